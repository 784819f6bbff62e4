"""Defines the operators of a layout: what a traced call becomes, and what runs it later.

    attention(q, k, v, **options) -> (out, lse)      in graphs before autograd; made of the others, so it has gradients
    forward(q, k, v, **options) -> (out, lse)
    forward_plain(q, k, v, causal, scale) -> out     of dense calls without other options: a compiled graph hands over
                                                     every option of `forward`, which takes longer than a tiny call;
                                                     out has the same memory, but its usual dimensions
    forward_train(q, k, v, **options) -> (out, lse, out_exact, lse_parts)
    backward(dout, dlse, q, k, v, out, lse_parts, wanted, **options) -> (dq, dk, dv, gradients of the options)

The kernels of `forward` and the others are the eager path: plans, `use`, `record`, fallbacks and errors are those of
the moment when the graph runs. Tensors of shape [batch, num_heads, seqlen, head_dim] leave an operator as contiguous
[batch, seqlen, num_heads, head_dim], whatever the strides of the inputs: fakes and compilers see one layout. What was
not asked for has no elements, so that the number of results is fixed.
"""

import hashlib
from collections.abc import Callable
from contextlib import nullcontext
from functools import cache, partial
from typing import NamedTuple

import torch

from ..calls import note
from ..checks import refuse_subclasses
from ..dispatch import KernelError
from ..plans import Bound, after_failure, derivative_of
from ..torch_internals import above_autograd, is_transformed
from . import works

LIBRARY = torch.library.Library("fastattn", "DEF")
SCHEMAS: list[str] = []
"""Of all operators. torch keeps graphs on disk that know them by their names alone."""
_DEVICES = ("CPU", "CUDA")
_ops = torch.ops.fastattn
_exact_strides = getattr(torch.Tag, "needs_exact_strides", torch.Tag.needs_fixed_stride_order)


class Layout(NamedTuple):
    """What distinguishes the operators of dense calls from those of others.

    names     of attention, forward, forward_train, backward
    options   schema of what follows q, k, v, the usual ones first: a dispatcher hands over all by position, up to
              the last that is not its default, and each costs time
    tensors   the options that are tensors; learned: those of them that may have a gradient, in the order of results
    lists     the options that are lists of tensors
    bind      (q, k, v, options, needs_grad) -> Bound
    kind      of a Problem: its `layout`, for transforms inside of graphs
    plain     (q, k, v, options) -> (out, lse) instead of that
    terms     the type of its terms; neutral: fields of it that have no default
    into      functions of rows that also take the result, as their last argument
    short     (q, k, v, causal, scale) -> Bound, for `forward_plain`; None: there is none
    """

    names: tuple[str, str, str, str]
    options: str
    tensors: tuple[str, ...]
    learned: tuple[str, ...]
    lists: tuple[str, ...]
    bind: Callable
    terms: type
    kind: str = ""
    plain: Callable | None = None
    into: tuple[Callable, ...] = ()
    short: Callable | None = None
    neutral: dict = {}

    def named(self, values: tuple, options: dict) -> dict:
        """The options by name, of which `values` came by position."""
        options.update(zip(self.option_names, values, strict=False))
        return options

    @property
    def work(self):
        """The operator of what transforms ask of a call (`works`)."""
        return getattr(_ops, f"{self.kind}_work").default

    @property
    def option_names(self) -> list[str]:
        """In the order of the schema."""
        return _names_of(self.options)


@cache
def _names_of(schema: str) -> list[str]:
    return [option.split("=")[0].split()[-1] for option in schema.split(", ")]


_SHORT = "(Tensor q, Tensor k, Tensor v, bool causal, float? scale) -> Tensor"


def define(layout: Layout) -> Callable:
    """Register the operators of `layout`; returns the first of them."""
    attention, forward, forward_train, backward = layout.names
    inputs = f"Tensor q, Tensor k, Tensor v, {layout.options}"
    gradients = ", ".join(["Tensor"] * (3 + len(layout.learned)))
    _register(forward, f"({inputs}) -> (Tensor, Tensor)", _forward(layout), partial(_fake_forward, layout))
    if layout.short:
        _register("forward_plain", _SHORT, _forward_plain(layout), _fake_plain)
        LIBRARY.impl("forward_plain", torch.library.fallthrough_kernel, "Autograd")  # nobody asks it for gradients
    results = "(Tensor, Tensor, Tensor, Tensor)"
    _register(forward_train, f"({inputs}) -> {results}", _train(layout), partial(_fake_train, layout))
    _register(
        backward,
        f"(Tensor? dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse_parts, bool[] wanted, "
        f"{layout.options}) -> ({gradients})",
        _backward(layout),
        partial(_fake_backward, layout),
    )
    if not layout.plain:
        _define_work(layout)
    inputs = inputs.replace("float? scale", "Scalar? scale")  # a float would be made a constant at once
    _define(f"{attention}({inputs}) -> (Tensor, Tensor)", torch.Tag.pt2_compliant_tag)
    # The second is what meets an operator first inside of torch.func: what it calls goes through the transforms, too.
    for key in ("CompositeImplicitAutograd", "FuncTorchDynamicLayerFrontMode"):
        LIBRARY.impl(attention, _composite(layout), key)
    return getattr(_ops, attention).default


def _define_work(layout: Layout) -> None:
    rest = [option for option in layout.options.split(", ") if not option.startswith("Tensor")]
    _register(
        f"{layout.kind}_work",
        f"(str kind, Tensor[] tensors, str[] slots, str[] outs, bool keeps, *, {', '.join(rest)}) -> Tensor[]",
        works.kernel_of(layout),
        works.fake_of(layout),
    )


def _define(schema: str, *tags: torch.Tag) -> None:
    LIBRARY.define(schema, tags=tags)
    SCHEMAS.append(schema)


def fingerprint() -> str:
    """Of the schemas: another one where a graph that was compiled before cannot run."""
    return "fastattn-" + hashlib.sha256("\n".join(sorted(SCHEMAS)).encode()).hexdigest()[:16]


def _register(name: str, schema: str, kernel: Callable, fake: Callable) -> None:
    _define(name + schema, torch.Tag.pt2_compliant_tag, _exact_strides)
    for device in _DEVICES:
        LIBRARY.impl(name, kernel, device)
    torch.library.register_fake(f"fastattn::{name}", fake, lib=LIBRARY)


# --- what runs -------------------------------------------------------------------------------------------------------


def _forward(layout: Layout) -> Callable:
    def forward(q, k, v, *values, **options):
        out, lse = _run(layout, q, k, v, layout.bind(q, k, v, layout.named(values, options), False))
        return out.transpose(1, 2), q.new_empty(0, dtype=_real(q)) if lse is None else lse

    return forward


def _forward_plain(layout: Layout) -> Callable:
    def forward_plain(q, k, v, causal, scale):
        return _run(layout, q, k, v, layout.short(q, k, v, causal, scale))[0]

    return forward_plain


def _run(layout: Layout, q, k, v, bound: Bound) -> tuple:
    """(out, lse or None), out in the memory order of the operators; on the next kernel where one cannot be prepared."""
    note(bound, q, k)
    choice, problem, terms, _ = bound
    if choice.forward in layout.into:
        out = _empty_out(q, v)
        return out, choice.forward(problem, q, k, v, terms, out)[1]
    try:
        out, lse = choice.forward(problem, q, k, v, terms)
    except KernelError as error:
        return _run(layout, q, k, v, after_failure(bound, error))
    return _rows_first(out).transpose(1, 2), lse


def _train(layout: Layout) -> Callable:
    def forward_train(q, k, v, *values, **options):
        options = layout.named(values, options)
        out, lse, saved = _run_to_train(layout, q, k, v, layout.bind(q, k, v, options, True))
        lse = lse if options.get("return_lse") else None
        exact = q.new_empty(0, dtype=_real(q)) if q.dtype == _real(q) else saved[0].to(_real(q)).contiguous()
        lse = q.new_empty(0, dtype=_real(q)) if lse is None else lse
        return _rows_first(out), lse, exact, saved[1]

    return forward_train


def _run_to_train(layout: Layout, q, k, v, bound: Bound) -> tuple:
    """(out, lse or None, (out in the compute dtype, lse_parts)), likewise."""
    note(bound, q, k)
    choice, problem, terms, _ = bound
    if choice.train is None:  # the reference, whose backward row computes everything again
        out, lse = choice.forward(problem._replace(lse=True), q, k, v, terms)
        return out, lse, (out.to(_real(q)), torch.stack([lse, torch.zeros_like(lse)], -1))  # of the right shape
    out = (_empty_out(q, v),) if choice.train in layout.into else ()
    try:
        return choice.train(problem, q, k, v, terms, *out)
    except KernelError as error:
        return _run_to_train(layout, q, k, v, after_failure(bound, error))


def _backward(layout: Layout) -> Callable:
    places = [layout.terms._fields.index(name) for name in layout.learned]

    def backward(dout, dlse, q, k, v, out, lse_parts, wanted, *values, **options):
        options = layout.named(values, options)
        choice, problem, terms, backend = bound = layout.bind(q, k, v, options, True)
        if choice is not None:
            bound = derivative_of(problem, "backward", choice.row.backend, dlse is not None)
        if dout is None:
            dout = q.new_zeros(()).expand(out.shape)
        wants = [False] * len(terms)
        for place, want in zip(places, wanted[3:], strict=True):
            wants[place] = want
        wanted = *wanted[:3], layout.terms._make(wants)
        call = q, k, v, terms, (out, lse_parts), dout, dlse, wanted
        *grads, of_terms = _run_backward(bound, backend, call)
        grads = [q.new_empty(0) if x is None else _rows_first(x) for x in grads]
        found = [of_terms[place] if wants[place] else None for place in places]
        return (*grads, *[q.new_empty(0) if x is None else x.contiguous() for x in found])

    return backward


def _run_backward(bound: Bound, backend: str | None, call: tuple) -> tuple:
    """(dq, dk, dv, gradients of terms), likewise."""
    note(bound)
    with above_autograd() if bound.choice.row.backend == "reference" else nullcontext():
        try:
            return bound.choice.forward(bound.problem, *call)
        except KernelError as error:
            failure = error
    return _run_backward(after_failure(bound._replace(backend=backend), failure), backend, call)


def _empty_out(q, v) -> torch.Tensor:
    """A result [batch, num_heads, seqlen_q, head_dim_v] in the memory order of the operators, for functions that take
    one: no copy is needed then."""
    batch, num_heads, seqlen_q, _ = q.shape
    head_dim_v = v.shape[3]
    strides = seqlen_q * num_heads * head_dim_v, head_dim_v, num_heads * head_dim_v, 1
    return q.new_empty_strided((batch, num_heads, seqlen_q, head_dim_v), strides)


def _rows_first(x: torch.Tensor) -> torch.Tensor:
    return x.transpose(1, 2).contiguous()


# --- what is traced --------------------------------------------------------------------------------------------------


def _composite(layout: Layout) -> Callable:
    forward, names = getattr(_ops, layout.names[1]).default, (*layout.tensors, *layout.lists)

    def attention(q, k, v, *values, **options):
        options = layout.named(values, options)
        refuse_subclasses(q, k, v)
        # Compilers make constants of numbers, but not of tensors.
        if "number" in layout.tensors and isinstance(options.get("scale"), torch.SymFloat):
            options["number"] = torch.ones((), dtype=torch.float64) * options.pop("scale")
        if is_transformed():
            return (layout.plain or partial(works.attention, layout))(q, k, v, options)
        learned = [q, k, v, *[x for name in layout.learned if (x := options.get(name)) is not None]]
        if torch.is_grad_enabled() and any([x.requires_grad for x in learned]):
            tensors, counts = [], {}
            for name in names:
                if (value := options.pop(name, None)) is not None:
                    counts[name] = len(value) if name in layout.lists else None
                    tensors += value if name in layout.lists else [value]
            out, lse, *_ = Traced.apply(layout, options, counts, q, k, v, *tensors)
        elif layout.short and all([name in ("causal", "scale") or _is_default(name, x) for name, x in options.items()]):
            out = _ops.forward_plain.default(q, k, v, options.get("causal", False), options.get("scale"))
            return out, q.new_empty(0, dtype=_real(q))
        else:
            out, lse = forward(q, k, v, **options)
        return out.transpose(1, 2), lse

    return attention


def _is_default(name: str, value) -> bool:
    return value is None or (name in ("softcap", "dropout_p", "return_lse") and not value)


class Traced(torch.autograd.Function):
    """`forward_train` with its gradients. counts: name of each option that is a tensor, or a list with so many."""

    @staticmethod
    def forward(layout, options, counts, q, k, v, *tensors):
        return getattr(_ops, layout.names[2]).default(q, k, v, **options, **_named(counts, tensors))

    @staticmethod
    def setup_context(ctx, inputs, results):
        ctx.layout, ctx.options, ctx.counts, *tensors = inputs
        out, _, exact, parts = results
        ctx.mark_non_differentiable(exact, parts)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(out if out.dtype == parts.dtype else exact, parts, *tensors)

    @staticmethod
    def backward(ctx, dout, dlse, *_):
        if dout is None and dlse is None:
            return (None,) * len(ctx.needs_input_grad)
        out, parts, q, k, v, *tensors = ctx.saved_tensors
        learned, owners = ctx.layout.learned, _owners(ctx.counts)
        needs = dict(zip(owners, ctx.needs_input_grad[6:], strict=True))
        wanted = [*ctx.needs_input_grad[3:6], *[needs.get(name, False) for name in learned]]
        if torch.is_grad_enabled():  # somebody will differentiate these gradients
            if ctx.layout.plain:
                raise NotImplementedError(
                    f"fastattn: a gradient of {ctx.layout.names[0]} in a graph cannot be differentiated again; call it "
                    "outside of torch.compile and torch.export for create_graph=True"
                )
            outs = [name for name, want in zip(("q", "k", "v", *learned), wanted, strict=True) if want]
            cotangents = {"out": None if dout is None else dout.transpose(1, 2), "lse": dlse}
            cotangents = {out: x for out, x in cotangents.items() if x is not None}
            options = ctx.options | _named(ctx.counts, tensors)
            of_names = works.gradients(ctx.layout, (q, k, v), options, cotangents, outs)
            return None, None, None, *[of_names.get(name) for name in ("q", "k", "v", *owners)]
        found = getattr(_ops, ctx.layout.names[3]).default(
            None if dout is None else dout.transpose(1, 2), dlse if ctx.options.get("return_lse") else None,
            q, k, v, out.transpose(1, 2) if out.dtype == q.dtype else out, parts, wanted,
            **ctx.options, **_named(ctx.counts, tensors),
        )  # fmt: skip
        found = [x if want else None for x, want in zip(found, wanted, strict=True)]
        of_terms = dict(zip(learned, found[3:], strict=True))
        grads = [None if x is None else x.transpose(1, 2) for x in found[:3]]
        return None, None, None, *grads, *[of_terms.get(owner) for owner in owners]


def _owners(counts: dict) -> list[str]:
    """For each tensor, the option that it belongs to."""
    return [name for name, count in counts.items() for _ in range(1 if count is None else count)]


def _named(counts: dict, tensors) -> dict:
    """The options that these tensors are."""
    rest = iter(tensors)
    return {name: next(rest) if count is None else [next(rest) for _ in range(count)] for name, count in counts.items()}


# --- what comes out, without memory ----------------------------------------------------------------------------------


def _fake_forward(layout: Layout, q, k, v, *values, **options):
    options = layout.named(values, options)
    batch, num_heads, seqlen_q, head_dim_v = _sizes_of_out(q, k, v)
    rows = q.new_empty((batch, seqlen_q, num_heads, head_dim_v))
    return rows, q.new_empty(q.shape[:3] if options.get("return_lse") else (0,), dtype=_real(q))


def _fake_plain(q, k, v, causal, scale):
    _sizes_of_out(q, k, v)
    return _empty_out(q, v)


def _fake_train(layout: Layout, q, k, v, *values, **options):
    shape = _sizes_of_out(q, k, v)
    exact = q.new_empty((0,) if _real(q) == q.dtype else shape, dtype=_real(q))
    return *_fake_forward(layout, q, k, v, *values, **options), exact, q.new_empty((*shape[:3], 2), dtype=_real(q))


def _fake_backward(layout: Layout, dout, dlse, q, k, v, out, lse_parts, wanted, *values, **options):
    options = layout.named(values, options)
    shapes = [(batch, seqlen, num_heads, dim) for batch, num_heads, seqlen, dim in (q.shape, k.shape, v.shape)]
    sources = [q, k, v, *[options.get(name) for name in layout.learned]]
    shapes += [None if x is None else x.shape for x in sources[3:]]
    return tuple(
        x.new_empty(shape) if want else q.new_empty(0) for x, shape, want in zip(sources, shapes, wanted, strict=True)
    )


def _sizes_of_out(q, k, v) -> tuple:
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dim() != 4:
            raise ValueError(f"{name} has shape {tuple(x.shape)}; it must be [batch, num_heads, seqlen, head_dim]")
    return *q.shape[:3], v.shape[3]


def _real(q: torch.Tensor) -> torch.dtype:
    return torch.float64 if q.dtype == torch.float64 else torch.float32
