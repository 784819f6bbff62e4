"""Which formulas the blocks of a layout have: tangents, and gradients of a weighted sum of tangents."""

from . import dense, edges
from .blocks import BlockFunction, derived
from .slots import Call

_TANGENTS = {"dense": dense.tangent, "csr": edges.tangent}


def tangent_function(call: Call, slots: tuple[str, ...], outs: tuple[str, ...]) -> BlockFunction:
    """Tangents "out", "lse" of the results, given tangents "t.q", ... of inputs."""
    return BlockFunction(_TANGENTS[call.layout], slots, outs)


def second_function(call: Call, slots: tuple[str, ...], outs: tuple[str, ...]) -> BlockFunction:
    """Gradients of <d.out, t.out> + <d.lse, t.lse> by inputs, "d.out" and "d.lse", given tangents of inputs."""
    if call.layout == "dense":
        return BlockFunction(dense.second, slots, outs)
    cotangents = tuple(slot for slot in slots if slot.startswith("d."))
    by_inputs = tuple(name for name in outs if not name.startswith("d."))
    pushed = tangent_function(call, tuple(slot for slot in slots if slot not in cotangents), ("out", "lse"))
    pulled = derived(pushed, cotangents, by_inputs)

    def run(call, block, tensors):
        found = {f"d.{name}": x for name, x in pushed.run(call, block, tensors).items()} if by_inputs != outs else {}
        return found | pulled.run(call, block, tensors)

    return BlockFunction(run, slots, outs)
