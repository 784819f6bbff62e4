"""What `fastattn.transforms` computes, as one operator a layout: torch.func and double backward inside of graphs.

    work(kind, tensors, slots, outs, keeps, **options) -> a tensor for each of outs

kind   "Forward", "Backward", "Tangent" or "Second"; or what a function of blocks is made of, as text
slots  which of the tensors is which (`fastattn.transforms.slots`); keeps as in `slots.Call`

A graph holds the operator; its kernel binds the call and runs the `Work` that an eager call would run.
"""

import ast

import torch

from ..calls import note
from ..plans import Bound
from ..problem import Problem
from ..scores.rotary import before, taken_from, turn_back
from ..torch_internals import above_autograd, may_want_gradients
from ..transforms import works
from ..transforms.formulas import function_of
from ..transforms.slots import Call, base

_WORKS = {kind.__name__: kind for kind in (works.Backward, works.Tangent, works.Second)}
_BLOCKS = "blocks."
"""Before the number of a list of tensors among the slots, in the place of a BlockMask."""


class GraphCall(Call):
    """A call in a graph. Options that are tensors but no terms have slots, too: no dimension of theirs has samples."""

    def __init__(self, layout, q, k, v, options: dict, needs_grad: bool):
        dtype = str(q.dtype).removeprefix("torch.")
        (batch, num_heads, seqlen_q, head_dim), (num_heads_k, seqlen_k), head_dim_v = q.shape, k.shape[1:3], v.shape[3]
        problem = Problem(
            q.device.type, dtype, batch, seqlen_q, seqlen_k, num_heads, num_heads_k, head_dim, head_dim_v,
            layout=layout.kind, lse=bool(options.get("return_lse")), dropout=bool(options.get("dropout_p")),
        )  # fmt: skip
        self.tensors, self.options, self.operator = {"q": q, "k": k, "v": v}, {}, layout.work
        for name, x in options.items():
            if name in layout.lists and x is not None:
                self.tensors |= {f"{_BLOCKS}{place}": part for place, part in enumerate(x)}
            elif isinstance(x, torch.Tensor):
                self.tensors[name] = x
            elif x is not None:
                self.options[name] = x
        fields = {name: x for name, x in self.tensors.items() if name in layout.terms._fields}
        keeps = needs_grad and may_want_gradients([x for x in self.tensors.values() if x.is_floating_point()])
        super().__init__(problem, "", layout.terms(**{**layout.neutral, **fields}), keeps)
        self.inputs = tuple(self.tensors)

    def full_dims(self, slot: str) -> tuple[str, ...]:
        return super().full_dims(slot) if base(slot) in self.term_slots or base(slot) in _DENSE else ()

    def note(self, work) -> None:
        """Nothing runs yet."""

    def run(self, work, tensors: dict) -> list[torch.Tensor]:
        kind = type(work).__name__ if type(work).__name__ != "Higher" else repr(work.function.recipe)
        slots, values = list(tensors), list(tensors.values())
        return self.operator(kind, values, slots, list(work.outs), self.keeps, **self.options)


_DENSE = ("q", "k", "v", "out", "exact", "lse", "parts")


def attention(layout, q, k, v, options: dict) -> tuple[torch.Tensor, torch.Tensor]:
    """(out, lse) of a call inside of transforms, with all derivatives."""
    angles, options = taken_from(options)
    if angles is not None:
        q, k = before(q, k, angles[:2], angles[2])
    call = GraphCall(layout, q, k, v, options, True)
    found = works.apply(works.Forward(call), call.tensors)
    return found["out"], found.get("lse", q.new_empty(0))


def gradients(layout, qkv, options: dict, cotangents: dict, wanted: list[str]) -> dict:
    """Gradients of the inputs `wanted`, by name, for somebody who will differentiate them."""
    q, k, v = qkv
    angles, options = taken_from(options)
    first = k.shape[2] - q.shape[2]
    if angles is not None:
        q, k = before(q, k, angles[:2], angles[2])
    call = GraphCall(layout, q, k, v, options, False)
    found = works.apply(*works.backward(call, call.tensors, cotangents, wanted))
    return found if angles is None else turn_back(found, first, angles)


def kernel_of(layout):
    """What runs when the graph does."""

    def work(kind, tensors, slots, outs, keeps, **options):
        given = dict(zip(slots, tensors, strict=True))
        lists = [given.pop(slot) for slot in slots if slot.startswith(_BLOCKS)]
        if lists:
            options[layout.lists[0]] = lists
        for name in layout.tensors:
            if name in given:
                options[name] = given[name]
        q, k, v = (given[name] for name in "qkv")
        choice, problem, terms, backend = layout.bind(q, k, v, options, keeps)
        if kind == "Forward" or choice is None:
            note(Bound(choice, problem, terms, backend))
        call = Call(problem._replace(needs_grad=False), choice.row.backend, terms, keeps, asked=backend)
        given = {slot: x for slot, x in given.items() if base(slot) in (*_DENSE, *call.term_slots)}
        if kind == "Forward":
            todo = works.Forward(call)
        elif kind in _WORKS:
            todo = _WORKS[kind](call, tuple(given), tuple(outs))
            todo.note()
        else:
            todo = works.Higher(call, function_of(ast.literal_eval(kind), call))
        with above_autograd():
            found = dict(zip(todo.outs, todo.run(given), strict=True))
        return [found[out].detach().contiguous() for out in outs]

    return work


def fake_of(layout):
    """What comes out, without memory."""

    def fake(kind, tensors, slots, outs, keeps, **options):
        given = dict(zip(slots, tensors, strict=True))
        q, v = given["q"], given["v"]
        real = torch.float64 if q.dtype == torch.float64 else torch.float32
        shape = (*q.shape[:3], v.shape[3])
        shapes = {"out": (shape, q.dtype), "exact": (shape, real), "lse": (shape[:3], real)}
        shapes["parts"] = (*shape[:3], 2), real
        results = [(given[out].shape, given[out].dtype) if out in given else shapes[out] for out in outs]
        return [q.new_empty(shape, dtype=dtype) for shape, dtype in results]

    return fake
