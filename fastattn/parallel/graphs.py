"""`attention` across ranks in graphs of torch.compile: one operator, and one for its gradients.

    fastattn::parallel(q, k, v, bias, alibi_slopes, sinks, softmax_scale, seed, arguments, tensors, sizes, floats,
                       groups) -> (out, lse, exact, top, log_sum)

    seed       the one that this rank has drawn, or None
    arguments  all others, as text (`fastattn.masks.graphs`), whose tensors, integers and floats are places in lists
    groups     names of process groups, as functional collectives take them

Inside they are the eager calls: arguments are compared when the graph runs, and what is sent depends on the rows that
other ranks hold then. So no graph can hold the collectives themselves.
"""

import ast

import torch

from ..masks.graphs import put_together, taken_apart
from ..operators.library import LIBRARY
from ..scores.dropout import P
from ..torch_internals import above_autograd, group_of
from .costs import Machine
from .merge import Partial
from .peers import Peers
from .running import attend as attend_now
from .shards import Shards

LEARNED = ("bias", "alibi_slopes", "sinks", "softmax_scale")
_ops = torch.ops.fastattn


def attend(groups: list[str], timeout: float | None, qkv, options: dict, others: dict) -> tuple:
    """(out, lse) of a call in a graph."""
    learned = [options[name] if isinstance(options[name], torch.Tensor) else None for name in LEARNED]
    options = options | {name: None for name, x in zip(LEARNED, learned, strict=True) if x is not None}
    seed = None
    if P.check(options["dropout_p"]) > 0.0 and options["seed"] is None:
        seed = torch.randint(2**63 - 1, (), device="cpu")
    tensors, sizes, floats = [], [], []
    arguments = taken_apart([options, others, timeout], tensors, sizes, floats)
    out, lse, *_ = _ops.parallel(*qkv, *learned, seed, arguments, tensors, sizes, floats, groups)
    return out, lse


def _attend(groups, qkv, learned, seed, call: tuple, known: list[Partial]) -> tuple:
    arguments, *lists = call
    options, others, timeout = put_together(ast.literal_eval(arguments), *map(iter, lists))
    options |= {name: x for name, x in zip(LEARNED, learned, strict=True) if x is not None}
    for name in ("shards", "shards_k"):
        if isinstance(others[name], tuple):
            others[name] = Shards(*others[name])
    others["machine"] = Machine(*others["machine"])
    peers = tuple(Peers(group_of(name), timeout) for name in groups)
    return attend_now(peers, qkv, options, others, None if seed is None else int(seed), known)


def _forward(q, k, v, bias, alibi_slopes, sinks, softmax_scale, seed, arguments, tensors, sizes, floats, groups):
    known: list[Partial] = []
    with torch.no_grad():
        learned = bias, alibi_slopes, sinks, softmax_scale
        out, _ = _attend(groups, (q, k, v), learned, seed, (arguments, tensors, sizes, floats), known)
    exact, top, log_sum = found = known[0]
    exact = exact.new_empty(0) if exact.dtype == out.dtype else exact
    return tuple(x.contiguous() for x in (out, found.lse, exact, top, log_sum))


def _backward(dout, dlse, out, exact, top, log_sum, wanted, q, k, v, *rest):
    learned, seed, call, groups = rest[: len(LEARNED)], rest[len(LEARNED)], rest[len(LEARNED) + 1 : -1], rest[-1]
    inputs = [q, k, v, *learned]
    found = Partial(exact if exact.numel() else out, top, log_sum)
    with above_autograd(), torch.enable_grad():
        leaves = [x if x is None else x.detach().requires_grad_(want) for x, want in zip(inputs, wanted, strict=True)]
        results = _attend(groups, leaves[:3], leaves[3:], seed, call, [found])
        pairs = [(y, dy) for y, dy in zip(results, (dout, dlse), strict=True) if dy is not None]
        asked = [x for x, want in zip(leaves, wanted, strict=True) if want]
        grads = iter(torch.autograd.grad([y for y, _ in pairs], asked, [dy for _, dy in pairs]))
    return tuple(next(grads).contiguous() if want else q.new_empty(0) for want in wanted)


# --- what is traced --------------------------------------------------------------------------------------------------


def _fake_forward(q, k, v, *rest):
    out = q.new_empty(*q.shape[:3], v.shape[3])
    real = torch.float64 if q.dtype == torch.float64 else torch.float32
    exact = q.new_empty((0,) if real == q.dtype else out.shape, dtype=real)
    lse, top, log_sum = (q.new_empty(q.shape[:3], dtype=real) for _ in range(3))
    return out, lse, exact, top, log_sum


def _fake_backward(dout, dlse, out, exact, top, log_sum, wanted, *inputs):
    return tuple(x.new_empty(x.shape) if want else out.new_empty(0) for x, want in zip(inputs, wanted, strict=False))


def _keep(ctx, inputs, output):
    *tensors, seed, arguments, lists, sizes, floats, groups = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[0], *output[2:], seed, *tensors, *lists)
    ctx.call = len(tensors), arguments, sizes, floats, groups


def _gradients(ctx, dout, dlse, *_):
    out, exact, top, log_sum, seed, *rest = ctx.saved_tensors
    count, arguments, sizes, floats, groups = ctx.call
    inputs, lists = rest[:count], rest[count:]
    found, wanted = [None] * count, list(ctx.needs_input_grad[:count])
    if dout is not None or dlse is not None:
        grads = _ops.parallel_backward(
            dout, dlse, out, exact, top, log_sum, wanted, *inputs, seed, arguments, lists, sizes, floats, groups
        )
        found = [x if want else None for x, want in zip(grads, wanted, strict=True)]
    # torch takes every list that is empty for one of tensors.
    none = [None if numbers else [] for numbers in (sizes, floats)]
    return *found, None, None, [None] * len(lists), *none, None


_INPUTS = (
    "Tensor q, Tensor k, Tensor v, Tensor? bias, Tensor? alibi_slopes, Tensor? sinks, Tensor? softmax_scale, "
    "Tensor? seed, str arguments, Tensor[] tensors, SymInt[] sizes, float[] floats, str[] groups"
)
_SAVED = "Tensor out, Tensor exact, Tensor top, Tensor log_sum"
_TAGS = torch.Tag.pt2_compliant_tag, getattr(torch.Tag, "needs_exact_strides", torch.Tag.needs_fixed_stride_order)
for _name, _schema, _kernel, _fake in (
    ("parallel", f"({_INPUTS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)", _forward, _fake_forward),
    (
        "parallel_backward",
        f"(Tensor? dout, Tensor? dlse, {_SAVED}, bool[] wanted, {_INPUTS}) -> ({', '.join(['Tensor'] * 7)})",
        _backward,
        _fake_backward,
    ),
):
    LIBRARY.define(_name + _schema, tags=_TAGS)
    for _device in ("CPU", "CUDA"):
        LIBRARY.impl(_name, _kernel, _device)
    torch.library.register_fake(f"fastattn::{_name}", _fake, lib=LIBRARY)
torch.library.register_autograd("fastattn::parallel", _gradients, setup_context=_keep, lib=LIBRARY)
