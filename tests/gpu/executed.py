"""Calls whose launches are executed (tests/gpu/emulator/) and compared with float64, and edits of what is executed."""

import re
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from accuracy import assert_accuracy, assert_gradients
from cases import Case, inputs
from emulator.device import executing
from emulator.machine import decode
from emulator.opcodes import STEPS
from fastattn import attention, last_call
from machine_code import used_between_products
from ptx_formulas import APPROXIMATE, FORMULAS

CHECKED = FORMULAS.keys() | APPROXIMATE.keys()

# Several rounds of each loop: tiles of sm_80 are up to 128 x 128.
CAUSAL = Case(num_heads=2, num_heads_k=1, seqlen_q=390, head_dim=64, dtype="bfloat16", causal=True)
# Enough tiles of keys for odd phases of the boxes' barriers too, in a ring of three boxes.
RING = Case(num_heads=1, seqlen_q=300, seqlen_k=1100, head_dim=64, dtype="bfloat16", causal=True)
WINDOW = Case(num_heads=2, seqlen_q=530, seqlen_k=557, head_dim=40, dtype="float16", window_size=(400, 3))
FLOAT32 = Case(num_heads=2, num_heads_k=1, seqlen_q=70, seqlen_k=130, head_dim=16)
BLOCKS = Case(num_heads=2, seqlen_q=150, seqlen_k=170, head_dim=32, dtype="bfloat16", mask="shared_blocks")
EVERYTHING = Case(
    num_heads=2, num_heads_k=1, seqlen_q=100, seqlen_k=150, head_dim=64, dtype="bfloat16", softcap=5.0, alibi=True,
    sinks=True, bias="per_head", mask="tensor_per_head", causal=True,
)  # fmt: skip
DECODE = Case(num_heads=4, num_heads_k=2, seqlen_q=1, seqlen_k=1500, head_dim=64, dtype="bfloat16")
DECODE_BLOCKS = DECODE._replace(num_heads=2, num_heads_k=1, seqlen_q=3, seqlen_k=1100, mask="shared_blocks")


# Each dtype with each of two bounds, the last tiles not full: alone, over block masks, decoding, decoding over them.
_ODD = [
    Case(num_heads=2, num_heads_k=1, seqlen_q=77, seqlen_k=151, head_dim=64, dtype=dtype, **bounds)
    for dtype in ("bfloat16", "float16", "float32")
    for bounds in ({"causal": True}, {"window_size": (100, 3)})
]
_DECODING = [case._replace(num_heads=4, num_heads_k=2, seqlen_q=n, seqlen_k=1501) for case in _ODD for n in (1, 3)]
ODD_BACKWARD = [*_ODD, *(case._replace(mask="blocks") for case in _ODD)]
ODD_FORWARD = [*ODD_BACKWARD, *_DECODING, *(case._replace(mask="blocks", seqlen_k=501) for case in _DECODING)]


def forward(case: Case, edit=lambda name, text: text, arch: int = 80, **options) -> list:
    """A call that is executed and compared with the reference in float64: its launches."""
    (q, k, v), kwargs = inputs(case)
    kwargs |= options
    with executing(arch, edit) as launches:
        actual = attention(q, k, v, **kwargs, return_lse=True, backend="triton")
        assert last_call().kernel.startswith("triton.")
    assert_accuracy(actual, q, k, v, **kwargs)
    return launches


def assert_all_products_ran(launches) -> None:
    """No matrix instruction is left out; the kernels of float32 have none."""
    for launch in launches:
        code = decode(launch.binary.text("ptx"))
        left_out = [
            str(instruction)
            for number, block in enumerate(code.blocks)
            for instruction in block.instructions
            if instruction.opcode.startswith(("mma", "wgmma.mma")) and number not in code.visited
        ]
        assert left_out == []


def assert_products_have_their_registers_alone(launches) -> None:
    """Between a wgmma.fence and the product, in machine code: the executor does not look at copies there."""
    for launch in launches:
        assert used_between_products(launch.binary) == []


def assert_all_opcodes_are_checked(launches) -> None:
    """In test_emulator.py by formulas, or there and in test_wgmma.py in kernels of their own, as those of `STEPS` and
    comparisons of halves are."""
    apart = {*STEPS, "bra", "ret"} - {"mov", "setp"}
    for launch in launches:
        opcodes = {i.opcode for i in decode(launch.binary.text("ptx")).program.instructions}
        opcodes = {opcode for opcode in opcodes if not re.match(r"setp.*16x2", opcode)}
        assert {opcode for opcode in opcodes if opcode.split(".")[0] not in apart} - CHECKED == set()


def backward(case: Case, edit, arch: int | str, monkeypatch) -> None:
    """Gradients that are executed and compared with those of the reference."""
    with executing(arch, edit):
        assert_gradients(case, monkeypatch)


def edited(pattern: str, replacement: str, which: int | None = None, kernel: str = "forward_kernel"):
    """An edit of a kernel: all places of the pattern, or one of them."""

    def edit(name: str, text: str) -> str:
        found = list(re.finditer(pattern, text))
        if name != kernel:
            return text
        # Not an assertion, which a test of a mistake may take for the error that it waits for.
        if not found or which is not None and not -len(found) <= which < len(found):
            pytest.fail(f"{name} has {len(found)} of {pattern!r}, not number {which}")
        before = text
        for match in reversed(found if which is None else [found[which]]):
            text = text[: match.start()] + match.expand(replacement) + text[match.end() :]
        if text == before:
            pytest.fail(f"{name} stays as it is with {replacement!r} for {pattern!r}")
        return text

    return edit


@contextmanager
def caught(error: type[BaseException]) -> Iterator[None]:
    """Inside, exactly this error is raised, no subclass; an AssertionError is that of a comparison with float64."""
    of_comparison = r"error .*, allowed|^is(nan|posinf|neginf)\b"
    with pytest.raises(error, match=of_comparison if error is AssertionError else None) as found:
        yield
    assert found.type is error
