"""Which formulas the blocks of a layout have: tangents, and gradients of a weighted sum of tangents."""

from . import dense, edges
from .blocks import BlockFunction, derived, pushed
from .slots import Call

_TANGENTS = {"dense": dense.tangent, "csr": edges.tangent}


def tangent_function(call: Call, slots: tuple[str, ...], outs: tuple[str, ...]) -> BlockFunction:
    """Tangents "out", "lse" of the results, given tangents "t.q", ... of inputs."""
    return BlockFunction(_TANGENTS[call.layout], slots, outs, ("tangent", slots, outs))


def second_function(call: Call, slots: tuple[str, ...], outs: tuple[str, ...]) -> BlockFunction:
    """Gradients of <d.out, t.out> + <d.lse, t.lse> by inputs, "d.out" and "d.lse", given tangents of inputs."""
    recipe = "second", slots, outs
    if call.layout == "dense":
        return BlockFunction(dense.second, slots, outs, recipe)
    cotangents = tuple(slot for slot in slots if slot.startswith("d."))
    by_inputs = tuple(name for name in outs if not name.startswith("d."))
    tangents = tangent_function(call, tuple(slot for slot in slots if slot not in cotangents), ("out", "lse"))
    pulled = derived(tangents, cotangents, by_inputs)

    def run(call, block, tensors):
        found = {f"d.{name}": x for name, x in tangents.run(call, block, tensors).items()} if by_inputs != outs else {}
        return found | pulled.run(call, block, tensors)

    return BlockFunction(run, slots, outs, recipe)


_MADE_OF = {"derived": derived, "pushed": pushed}
_FIRST = {"tangent": tangent_function, "second": second_function}


def function_of(recipe: tuple, call: Call) -> BlockFunction:
    """The function of blocks that has this recipe."""
    kind, first, *rest = recipe
    return _FIRST[kind](call, first, *rest) if kind in _FIRST else _MADE_OF[kind](function_of(first, call), *rest)
