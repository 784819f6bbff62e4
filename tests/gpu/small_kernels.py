"""Small kernels in PTX for tests of the executor."""

import torch

from emulator.programs import run

LOAD, STORE = "\tld.global.b32 %r3, [%rd11];\n", "\tst.global.b32 [%rd12], %r4;\n"


def kernel(body: str, parameters: int = 2, registers: int = 40) -> str:
    """A module: its parameters are pointers, of which %rd0 ... hold the values; %r0 is the thread, %r1 the program."""
    names = [f"k_param_{n}" for n in range(parameters)]
    loads = "\n".join(f"\tld.param.b64 %rd{n}, [{name}];" for n, name in enumerate(names))
    return "\n".join((
        ".extern .shared .align 16 .b8 global_smem[];", ".visible .entry k(",
        ",\n".join(f"\t.param .u64 .ptr .global .align 1 {name}" for name in names), ")", "{",
        f"\t.reg .pred %p<9>;\n\t.reg .b16 %rs<9>;\n\t.reg .b32 %r<{registers}>;\n\t.reg .b64 %rd<20>;",
        loads, "\tmov.u32 %r0, %tid.x;\n\tmov.u32 %r1, %ctaid.x;\n\tmul.wide.u32 %rd10, %r0, 4;",
        "\tadd.s64 %rd11, %rd0, %rd10;\n\tadd.s64 %rd12, %rd1, %rd10;\n\tshl.b32 %r2, %r0, 2;", body, "\tret;", "}",
    ))  # fmt: skip


def launch(body: str, x, y, programs: int = 1, warps: int = 1, shared: int = 1024) -> None:
    run(kernel(body), [x, y], (programs, 1, 1), warps, shared)


def integers(n: int) -> torch.Tensor:
    return torch.arange(n, dtype=torch.int32) * 3 + 1


def result_of(body: str, warps: int = 1, x=None, size: int | None = None) -> torch.Tensor:
    x = integers(32 * warps) if x is None else x
    y = torch.zeros(size or 32 * warps, dtype=torch.int32)
    launch(body, x, y, warps=warps)
    return y


def edited(body: str, old: str, new: str = "") -> str:
    assert old in body
    return body.replace(old, new)
