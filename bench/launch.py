"""What a call of a Triton kernel costs before the driver gets it: Python on the CPU, with the C launcher left out.

Needs Triton and no GPU: `make bench-launch`. Tensors without memory, a device that launches nothing; outputs and
scratch memory are made once and not counted. CPU time, the best of several rounds.
"""

import argparse
import sys
import time
import timeit
from collections.abc import Callable
from pathlib import Path

sys.path += [str(Path(__file__).parents[1] / folder) for folder in ("tests/gpu", "tests/support", "")]

import pytest
import torch
from rich.console import Console
from rich.table import Table

import fastattn
from fake_device import FakeDriver
from fastattn import BlockMask, Mask, outputs, plans
from fastattn.kernels import decode, launch, prefill
from kernel_report import compiling_for, without_device

AIM = 8.0  # us
MODULES = {"prefill": prefill, "decode": decode, "block mask": prefill, "dense bias": prefill}


def prepare(kind: str, patch: pytest.MonkeyPatch) -> tuple[Callable, Callable, Callable]:
    """The same call by attention(), by the kernel's entry point, and by Triton's own launch; inside `compiling_for`."""
    module, seqlen_q, kwargs = MODULES[kind], 512, {"causal": True}
    if kind == "decode":
        seqlen_q, kwargs = 1, {}
    if kind == "block mask":
        kwargs = {"mask": without_device(BlockMask.from_mask(Mask.causal(), seqlen_q=512))}
    if kind == "dense bias":
        kwargs |= {"bias": torch.empty(8, 512, 512, dtype=torch.bfloat16, device="meta")}
    q, k, v = (torch.empty(1, 8, s, 64, dtype=torch.bfloat16, device="meta") for s in (seqlen_q, 512, 512))
    entries, launches, results, forward = [], [], outputs.empty_results, module.forward

    def note(seen, function):
        def noted(*args):
            seen.append(args)
            return function(*args)

        return noted

    def attention():
        return fastattn.attention(q, k, v, **kwargs, backend="triton")

    def plain():
        for run, arguments, options in prepared:
            run(*arguments, **options)

    with pytest.MonkeyPatch.context() as inner:
        inner.setattr(module, "forward", note(entries, forward))
        inner.setattr(launch, "_prepare", note(launches, launch._prepare))
        attention()
    (entry,) = entries
    made = results(entry[0], q, False)
    patch.setattr(outputs, "empty_results", lambda *args, **options: made)
    parts = decode.empty_parts(entry[0], q, 64)
    patch.setattr(decode, "empty_parts", lambda *args: parts)
    prepared = []
    for tensors, plan in launches:
        described = plan.describe(*tensors[1:3]) if plan.describe else ()
        arguments, options = (*tensors, *described, *plan.arguments), plan.constexprs | plan.options
        prepared.append((plan.kernel[plan.programs,], arguments, options))
    return attention, lambda: forward(*entry), plain


def microseconds(call: Callable, calls: int, rounds: int) -> float:
    call()
    return min(timeit.repeat(call, number=calls, repeat=rounds, timer=time.process_time)) / calls * 1e6


def main(argv: list[str] | None = None) -> dict[str, list[float]]:
    """Print the table; the figures of each row."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--calls", type=int, default=1000, help="of a round")
    parser.add_argument("--rounds", type=int, default=20)
    options = parser.parse_args(argv)
    table, figures = Table(title=f"us of Python a call, at most {AIM:g}"), {}
    for column in ("", "attention()", "from the entry point", "Triton's own launch"):
        table.add_column(column, justify="left" if not column else "right")
    for kind in MODULES:
        with pytest.MonkeyPatch.context() as patch, compiling_for(90):
            patch.setattr(FakeDriver, "launcher_cls", lambda self, src, metadata: lambda *args: None)
            # C++ would ask tensors without memory for it, and refuse
            patch.setattr(plans, "_cpu_signature", lambda *tensors: None)
            calls = prepare(kind, patch)
            figures[kind] = [microseconds(call, options.calls, options.rounds) for call in calls]
        table.add_row(kind, *(f"{figure:.1f}" for figure in figures[kind]))
    Console().print(table)
    return figures


if __name__ == "__main__":
    main()
