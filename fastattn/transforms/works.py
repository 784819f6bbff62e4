"""What is computed in a transformed call, and how each of it is differentiated.

    Forward   out, lse                                            a kernel
    Backward  gradients of inputs, given cotangents "d."          a kernel
    Tangent   tangents of out, lse, given tangents "t."           the first row of direction "tangent"
    Second    gradients of <d.out, t.out> + <d.lse, t.lse>        the first row of direction "second"
    Higher    derivatives of Tangent and Second                   in blocks of rows

Derivatives read saved inputs and never saved results: a derivative of a derivative that took out or lse for constants
would be wrong without a sign of it. (What a kernel saved, "s.", goes back to that kernel alone.)
"""

import torch

from .. import dispatch
from ..calls import note
from ..dispatch import KernelError
from ..plans import Bound, after_failure, derivative_of
from ..scores.rotary import turn_back, turned_call
from ..torch_internals import into_old_vmap, is_in_old_vmap, is_traced, may_want_gradients, out_of_old_vmap
from .blocks import BlockFunction, derived, over_blocks, pushed
from .folding import fold
from .formulas import second_function, tangent_function
from .slots import Call, base


class Work:
    """A function of the tensors in `slots` with a result for each of `outs`; no tuple, as `Call`.

    An out that is the name of a slot is shaped as its tensor: it is a gradient. Tensors travel as dicts by slot.
    """

    kept: dict[str, str] = {}
    """Slot -> the out that the backward pass finds in it."""

    def __init__(self, call: Call, slots: tuple[str, ...], outs: tuple[str, ...]):
        self.call, self.slots, self.outs = call, slots, outs

    def note(self) -> None:
        """Tell `fastattn.calls` what will run."""

    def run(self, tensors: dict) -> list[torch.Tensor]:
        """The results, of plain tensors."""
        raise NotImplementedError

    def gradients(self, tensors: dict, cotangents: dict, wanted: list[str]) -> dict:
        """Gradients of the slots `wanted`, given cotangents by out; by slot, those that are 0 may be missing."""
        function = self._function()
        prefix = f"c{len(self.slots)}"
        given = {f"{prefix}.{out}": x for out, x in cotangents.items()}
        return apply(Higher(self.call, derived(function, tuple(given), tuple(wanted))), tensors | given)

    def tangents(self, tensors: dict, tangents: dict) -> dict:
        """Tangents by out, given tangents by slot; those that are 0 may be missing."""
        slots = {slot: f"t{len(self.slots)}.{slot}" for slot in tangents}
        given = {slots[slot]: x for slot, x in tangents.items()}
        return apply(Higher(self.call, pushed(self._function(), slots)), tensors | given)

    def _function(self) -> BlockFunction:
        raise NotImplementedError


class Transformed(torch.autograd.Function):
    """A `Work` as apply(work, *tensors of its slots), for all that torch.func and autograd may do with it."""

    generate_vmap_rule = False

    @staticmethod
    def forward(work, *tensors):
        found = work.call.run(work, dict(zip(work.slots, tensors, strict=True)))
        # Forward mode wants the tangent of a view to lie in memory as the view does: no result may be one.
        return tuple(x.clone() if x._is_view() else x for x in found)

    @staticmethod
    def setup_context(ctx, inputs, output):
        work, *tensors = inputs
        by_out = dict(zip(work.outs, output, strict=True))
        ctx.work = work
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*[x for out, x in by_out.items() if out in ("exact", "parts")])
        ctx.save_for_backward(*tensors, *[by_out[out] for out in work.kept.values()])
        ctx.save_for_forward(*tensors)

    @staticmethod
    def backward(ctx, *cotangents):
        work = ctx.work
        tensors = dict(zip((*work.slots, *work.kept), ctx.saved_tensors, strict=True))
        wanted = [slot for slot, want in zip(work.slots, ctx.needs_input_grad[1:], strict=True) if want]
        given = {out: x for out, x in zip(work.outs, cotangents, strict=True) if x is not None}
        grads = work.gradients(tensors, given, wanted) if given else {}
        return None, *[grads.get(slot) for slot in work.slots]

    @staticmethod
    def jvp(ctx, _, *tangents):
        work = ctx.work
        tensors = dict(zip(work.slots, ctx.saved_tensors, strict=True))
        given = {slot: x for slot, x in zip(work.slots, tangents, strict=True) if x is not None}
        found = work.tangents(tensors, given) if given else {}
        return tuple(found.get(out) for out in work.outs)

    @staticmethod
    def vmap(info, in_dims, work, *tensors):
        return fold(Transformed.apply, info.batch_size, in_dims[1:], work, tensors)


def apply(work: Work, tensors: dict) -> dict:
    """The results of `work` by out, with all their derivatives."""
    work.call.note(work)
    inputs = [tensors[slot] for slot in work.slots]
    if any(map(is_in_old_vmap, inputs)):
        return dict(zip(work.outs, _in_old_vmap(work, inputs), strict=True))
    return dict(zip(work.outs, Transformed.apply(work, *inputs), strict=True))


def _in_old_vmap(work: Work, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    in_dims = [0 if is_in_old_vmap(x) else None for x in inputs]
    inputs = [x if dim is None else out_of_old_vmap(x) for x, dim in zip(inputs, in_dims, strict=True)]
    results, _ = fold(Transformed.apply, len(inputs[in_dims.index(0)]), in_dims, work, inputs)
    return [into_old_vmap(x) for x in results]


def attention(backend: str, asked: str | None, problem, q, k, v, terms) -> tuple:
    """(out, lse or None) by the kernel of `backend` that takes `problem`, with all derivatives under all transforms.

    asked: the backend that the caller asked for, or None. KernelError if the kernel cannot be prepared.
    """
    tensors = {"q": q, "k": k, "v": v, **terms._asdict()}
    backend = "reference" if is_traced() else backend
    keeps = backend != "reference" and may_want_gradients([x for x in tensors.values() if isinstance(x, torch.Tensor)])
    found = apply(Forward(Call(problem, backend, terms, keeps, asked=asked)), tensors)
    return found["out"], found.get("lse")


def gradients_again(backend: str, problem, qkv, terms, saved, dout, dlse, wanted, asked: str | None = None) -> list:
    """Gradients of q, k, v and each term (None where not wanted) of a call that ran untransformed, for somebody who
    will differentiate them. asked: the backend that the caller asked for, or None."""
    q, k, v = qkv
    problem, q, k, terms, angles = turned_call(problem, q, k, terms)
    call = Call(problem, backend, terms, True, asked=asked)
    tensors = {"q": q, "k": k, "v": v, **terms._asdict()}
    tensors |= {slot: x.detach() for slot, x in zip(("s.out", "s.parts"), saved, strict=True)}
    names = "q", "k", "v", *terms._fields
    outs = [name for name, want in zip(names, wanted, strict=True) if want]
    cotangents = {out: x for out, x in (("out", dout), ("lse", dlse)) if x is not None}
    found = apply(*backward(call, tensors, cotangents, outs))
    if angles is not None:
        found = turn_back(found, terms.query_start, angles)
    return [found.get(name) for name in names]


class Forward(Work):
    """out, lse and what a kernel saves for its backward pass: `exact` is out before it is rounded to 16 bits."""

    def __init__(self, call: Call):
        outs = ("out", "lse") if call.problem.lse else ("out",)
        if call.keeps:
            exact = "exact" if call.problem.dtype in ("float16", "bfloat16") else "out"
            self.kept = {"s.out": exact, "s.parts": "parts"}
            outs = tuple(dict.fromkeys((*outs, exact, "parts")))
        super().__init__(call, call.inputs, outs)

    def run(self, tensors):
        out, lse, saved = run_forward(self.call, tensors, self.call.keeps)
        if self.kept:
            exact, parts = saved
            saved = exact.to(parts.dtype), parts  # no result may be another one
        found = {"out": out, "lse": lse, **{self.kept[slot]: x for slot, x in zip(self.kept, saved, strict=True)}}
        return [found[out] for out in self.outs]

    def gradients(self, tensors, cotangents, wanted):
        saved = {slot: tensors[slot].detach() for slot in self.kept}
        return apply(*backward(self.call, tensors | saved, cotangents, wanted))

    def tangents(self, tensors, tangents):
        return apply(*tangent(self.call, tensors, tangents))


class Derivative(Work):
    """What a row of the table of kernels computes; direction: of the row, has_lse: whether lse takes part."""

    direction: str

    @property
    def has_lse(self) -> bool:
        return "d.lse" in self.slots

    def bound(self, problem) -> Bound:
        return derivative_of(problem, self.direction, _backend(self.call), self.has_lse)

    def note(self):
        note(self.bound(self.call.problem))

    def on_row(self, problem, run):
        """run(row's choice, problem) on the first row that takes it, on the next one where one cannot be prepared."""
        bound = self.bound(problem)
        while True:
            try:
                return run(bound.choice, bound.problem)
            except KernelError as error:
                bound = after_failure(bound._replace(backend=self.call.asked), error)
                note(bound)


class Backward(Derivative):
    """Gradients of some inputs by the kernel that belongs to the one that ran."""

    direction = "backward"

    def run(self, tensors):
        call = self.call
        dout, dlse = tensors.get("d.out"), tensors.get("d.lse")
        if dout is None:
            dout = dlse.new_zeros((), dtype=tensors["q"].dtype).expand(*dlse.shape, tensors["v"].shape[3])
        wanted = (
            *[name in self.outs for name in "qkv"],
            call.of_terms({name: name in self.outs for name in call.fixed._fields}),
        )

        def gradients(choice, problem) -> tuple:
            saved = [tensors[slot] for slot in ("s.out", "s.parts") if slot in tensors]
            if not saved and choice.row.backend != "reference":
                _, _, saved = run_forward(call, tensors, True)
            return choice.forward(problem, *qkv(tensors), call.terms(tensors), saved, dout, dlse, wanted)

        *grads, of_terms = self.on_row(call.problem_of(tensors), gradients)
        found = dict(zip(("q", "k", "v", *call.fixed._fields), (*grads, *of_terms), strict=True))
        return [found[name] for name in self.outs]

    def gradients(self, tensors, cotangents, wanted):
        wanted = [slot for slot in wanted if not slot.startswith("s.")]
        return apply(*second(self.call, tensors, cotangents, wanted))

    def tangents(self, tensors, tangents):
        # The matrix of second derivatives is symmetric: its product with a tangent is that with a cotangent.
        of_inputs = {slot: x for slot, x in tangents.items() if slot in self.call.inputs}
        of_cotangents = {base(slot): x for slot, x in tangents.items() if slot.startswith("d.")}
        found = apply(*second(self.call, tensors, of_inputs, self.outs)) if of_inputs else {}
        return _sum(found, apply(*backward(self.call, tensors, of_cotangents, self.outs)) if of_cotangents else {})


class Tangent(Derivative):
    """Tangents of out and lse."""

    direction = "tangent"

    @property
    def has_lse(self) -> bool:
        return "lse" in self.outs

    def run(self, tensors):
        call = self.call
        choice, problem, _, _ = self.bound(call.problem_of(tensors))
        out, lse = choice.forward(problem, *qkv(tensors), call.terms(tensors), tangents_of(call, tensors))
        return [out, lse][: len(self.outs)]

    def gradients(self, tensors, cotangents, wanted):
        of_inputs = [slot for slot in wanted if slot in self.call.inputs]
        of_tangents = [base(slot) for slot in wanted if slot not in self.call.inputs]
        given = tensors | {f"d.{out}": x for out, x in cotangents.items()}
        tangents = {base(slot): tensors[slot] for slot in self.slots if slot.startswith("t.")}
        found = apply(*second(self.call, given, tangents, of_inputs)) if of_inputs else {}
        if of_tangents:
            pulled = apply(*backward(self.call, tensors, cotangents, of_tangents))
            found |= {f"t.{name}": x for name, x in pulled.items()}
        return found

    def tangents(self, tensors, tangents):
        of_inputs = {slot: x for slot, x in tangents.items() if slot in self.call.inputs}
        of_tangents = {base(slot): x for slot, x in tangents.items() if slot not in self.call.inputs}
        found = apply(*tangent(self.call, tensors, of_tangents)) if of_tangents else {}
        return _sum(found, super().tangents(tensors, of_inputs) if of_inputs else {})

    def _function(self):
        return tangent_function(self.call, self.slots, self.outs)


class Second(Derivative):
    """Gradients of <d.out, t.out> + <d.lse, t.lse> by inputs and by "d.out" and "d.lse"."""

    direction = "second"

    def run(self, tensors):
        call = self.call
        choice, problem, _, _ = self.bound(call.problem_of(tensors))
        cotangents = tensors.get("d.out"), tensors.get("d.lse")
        terms, tangents = call.terms(tensors), tangents_of(call, tensors)
        found = choice.forward(problem, *qkv(tensors), terms, tangents, *cotangents, self.outs)
        return [found[name] for name in self.outs]

    def _function(self):
        return second_function(self.call, self.slots, self.outs)


class Higher(Work):
    """A function of blocks."""

    def __init__(self, call: Call, function: BlockFunction):
        super().__init__(call, function.slots, function.outs)
        self.function = function

    def run(self, tensors):
        return over_blocks(self.function, self.call, tensors)

    def _function(self):
        return self.function


def backward(call: Call, tensors: dict, cotangents: dict, wanted) -> tuple[Work, dict]:
    """The work and its tensors; cotangents by out ("d.out" among the tensors otherwise)."""
    given = {f"d.{out}": cotangents[out] for out in ("out", "lse") if out in cotangents}
    saved = tuple(slot for slot in ("s.out", "s.parts") if slot in tensors)
    return Backward(call, (*call.inputs, *saved, *given), tuple(wanted)), tensors | given


def tangent(call: Call, tensors: dict, tangents: dict) -> tuple[Work, dict]:
    """The work and its tensors; tangents by input."""
    given = {f"t.{name}": x for name, x in tangents.items()}
    outs = ("out", "lse") if call.problem.lse else ("out",)
    return Tangent(call, (*call.inputs, *given), outs), tensors | given


def second(call: Call, tensors: dict, tangents: dict, wanted) -> tuple[Work, dict]:
    """The work and its tensors, "d.out" and "d.lse" among them; tangents by input."""
    given = {f"t.{name}": x for name, x in tangents.items()}
    cotangents = tuple(slot for slot in ("d.out", "d.lse") if slot in tensors)
    return Second(call, (*call.inputs, *cotangents, *given), tuple(wanted)), tensors | given


def qkv(tensors: dict) -> tuple:
    """q, k, v."""
    return tensors["q"], tensors["k"], tensors["v"]


def tangents_of(call: Call, tensors: dict) -> tuple:
    """(tq, tk, tv, tterms), None where there is no tangent."""
    given = {base(slot): x for slot, x in tensors.items() if slot.startswith("t.")}
    return *[given.get(name) for name in "qkv"], call.of_terms(given)


def _backend(call: Call) -> str:
    """The backend whose kernels run; the reference consists of torch's operators, which a trace holds."""
    return "reference" if is_traced() else call.backend


def run_forward(call: Call, tensors: dict, keeps: bool) -> tuple:
    """(out, lse or None, what the backward kernel wants) of plain tensors."""
    problem = call.problem_of(tensors)._replace(transformed=False, needs_grad=keeps)
    choice = dispatch.select(problem, _backend(call))
    arguments = problem, *qkv(tensors), call.terms(tensors)
    return choice.train(*arguments) if keeps else (*choice.forward(*arguments), ())


def _sum(a: dict, b: dict) -> dict:
    return {name: a[name] + b[name] if name in a and name in b else a.get(name, b.get(name)) for name in a | b}
