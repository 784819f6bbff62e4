"""The table of kernels, best first: what each takes, and where its functions are. `fastattn.dispatch` asks it."""

from typing import NamedTuple

from .backends import cpu
from .backends.triton import FEW_QUERIES, INTERPRETED, MOST_QUERIES
from .problem import FLOATS, MASK_KINDS


class Row(NamedTuple):
    """A kernel: its name "backend.algorithm", its functions ("module:function", imported on first use), its limits.

    entry      kernel(problem, q, k, v, terms) -> (out, lse or None), with `Terms` (`Edges` for layout "csr").
               Of a backward row: kernel(problem, q, k, v, terms, saved, dout, dlse, wanted) -> (dq, dk, dv, grads).
               saved is what `train` kept; wanted is (want_q, want_k, want_v, wants), where wants has a bool in the
               place of each term; grads has the gradient in the place of each wanted term, None in all others.
               Of a tangent row: kernel(problem, q, k, v, terms, tangents) -> (tout, tlse or None), where tangents is
               (tq, tk, tv, tterms): None in the place of what has no tangent.
               Of a row of second derivatives: kernel(problem, q, k, v, terms, tangents, dout, dlse, names) -> gradients
               of <dout, tout> + <dlse, tlse>, of which one cotangent may be None, by names: those of q, k, v and
               terms, "d.out", "d.lse".
               Of a row of statistics: kernel(problem, q, k, terms, lse or None, names) -> those, by name
    available  a function that returns None, or why the kernel cannot run on this machine; None: always
    declines   a function of a Problem that the row supports -> None, or why a later row is better for its lengths
    supports   Problem field or property -> plain container of accepted values; one that is missing accepts anything
    train      as `entry`, but -> (out, lse or None, saved), for a call whose gradient will be asked of `backward`;
               None: autograd goes through `entry` by itself
    backward   name of the row that computes the gradients and has to accept them too
    """

    name: str
    entry: str
    available: str | None
    supports: dict
    train: str | None = None
    backward: str | None = None
    declines: str | None = None

    @property
    def backend(self) -> str:
        return self.name.split(".")[0]


_FORWARD = {"direction": {"forward"}}
_BACKWARD = {"direction": {"backward"}}
_DENSE = {"layout": {"dense"}, "mask": set(MASK_KINDS), "bias": {"none", *FLOATS}}
_HEADS = {"head_dim": range(1, 513), "head_dim_v": range(1, 513)}
_CPU = {"device": {"cpu"}, "dtype": set(FLOATS), **_HEADS, **_DENSE}
_CPU_DECODE = {
    **_CPU, **_FORWARD, "rows_per_key_head": range(0, cpu.FEW_ROWS + 1), "mask": set(MASK_KINDS) - {"block"},
    "needs_grad": {False},
}  # fmt: skip
_CPU_CSR = {field: _CPU[field] for field in ("device", "dtype", "bias")} | {"layout": {"csr"}}
_CPU_VARLEN = {field: _CPU[field] for field in ("device", "dtype", *_HEADS)} | {"layout": {"varlen"}}
_CPU_CACHE = {**_CPU_VARLEN, "layout": {"cache"}, "transformed": {False}}
_TRITON = {
    "device": {"cuda", "cpu"} if INTERPRETED else {"cuda"},
    "dtype": {"float16", "bfloat16", "float32"},
    "seqlen_q": range(0, 2**30),
    "seqlen_k": range(0, 2**30),
    "head_dim": range(1, 257),
    "head_dim_v": range(1, 257),
    "relative": {False},
    "dropout_start": {False},  # they draw by places in their own call
    "rotary": {False},
    **_DENSE,
}
_TRITON_DECODE = {**_TRITON, **_FORWARD, "seqlen_q": range(0, MOST_QUERIES + 1), "needs_grad": {False}}


def _rows_of(backend: str, forward: str, backward: str, supports: dict) -> tuple[Row, Row]:
    """A forward row and the row of its gradients, of functions in fastattn.backends.<backend> of the same names."""
    module = f"fastattn.backends.{backend}"
    available, names = f"{module}:unavailable", (f"{backend}.{forward}", f"{backend}.{backward}")
    return (
        Row(
            names[0], f"{module}:{forward}", available, {**supports, **_FORWARD}, f"{module}:{forward}_for_backward",
            names[1],
        ),
        Row(names[1], f"{module}:{backward}", available, {**supports, **_BACKWARD}),
    )  # fmt: skip


_OF_DENSE, _OF_CSR = {"layout": {"dense"}}, {"layout": {"csr"}}
_REFERENCE = "fastattn.backends.reference"
_EACH, SEQUENCES = "fastattn.layouts.each", {"varlen", "cache"}
_TRITON_EACH = {field: _TRITON[field] for field in ("device", "dtype", *_HEADS)} | {"layout": SEQUENCES, **_FORWARD}
_TRITON_ALL = {  # in one call: distances and random numbers count from a sequence's own beginning
    **_TRITON_EACH, "layout": {"varlen"}, "alibi": {False}, "rotary": {False}, "dropout": {False},
    "transformed": {False},
}  # fmt: skip
_TRITON_CACHE = {**_TRITON_ALL, "layout": {"cache"}, "seqlen_q": range(0, FEW_QUERIES + 1)}
_DERIVATIVES, _OF_CPU = ("tangent", "second"), "fastattn.backends.cpu"
_TURNED = {"rotary": {False}}  # q and k are, where rotary embedding turns them
_CPU_OTHERS = {"tangent": _TURNED, "statistics": {}}
IN_BLOCKS = *_DERIVATIVES, "statistics"
"""What the reference computes in blocks of rows, without n x n memory."""

KERNELS = (
    Row("cpu.decode", "fastattn.backends.cpu:decode", "fastattn.backends.cpu:unavailable", _CPU_DECODE),
    *_rows_of("cpu", "prefill", "backward", _CPU),
    *(
        Row(f"cpu.{x}", f"{_OF_CPU}:{x}", f"{_OF_CPU}:unavailable", {**_CPU, "direction": {x}, **limits})
        for x, limits in _CPU_OTHERS.items()
    ),
    Row(
        "triton.decode",
        "fastattn.backends.triton:decode",
        "fastattn.backends.triton:unavailable",
        _TRITON_DECODE,
        declines="fastattn.backends.triton:declines",
    ),
    *_rows_of("triton", "prefill", "backward", _TRITON),
    *_rows_of("cpu", "csr", "csr_backward", _CPU_CSR),
    *_rows_of("cpu", "varlen", "varlen_backward", {**_CPU_VARLEN, "transformed": {False}}),
    Row("cpu.each", f"{_EACH}:cpu", "fastattn.backends.cpu:unavailable", {**_CPU_VARLEN, **_FORWARD}),
    Row("cpu.cache", "fastattn.backends.cpu:cache", "fastattn.backends.cpu:unavailable", {**_CPU_CACHE, **_FORWARD}),
    Row(
        "triton.varlen",
        "fastattn.backends.triton_sequences:varlen",
        "fastattn.backends.triton:unavailable",
        _TRITON_ALL,
        "fastattn.backends.triton_sequences:varlen_for_backward",
        "triton.varlen_backward",
    ),
    Row(
        "triton.varlen_backward",
        "fastattn.backends.triton_sequences:varlen_backward",
        "fastattn.backends.triton:unavailable",
        {**_TRITON_ALL, **_BACKWARD},
    ),
    Row(
        "triton.cache",
        "fastattn.backends.triton_sequences:cache",
        "fastattn.backends.triton:unavailable",
        _TRITON_CACHE,
    ),
    Row("triton.each", f"{_EACH}:triton", "fastattn.backends.triton:unavailable", _TRITON_EACH),
    Row("reference.each", f"{_EACH}:reference", None, {"layout": SEQUENCES, **_FORWARD}),
    Row("reference.csr", f"{_REFERENCE}:csr", None, {**_OF_CSR, **_FORWARD}),
    Row("reference.csr_backward", f"{_REFERENCE}:csr_backward", None, {**_OF_CSR, "direction": {"backward"}}),
    *(Row(f"reference.csr_{x}", f"{_REFERENCE}:csr_{x}", None, {**_OF_CSR, "direction": {x}}) for x in _DERIVATIVES),
    *(Row(f"reference.{x}", f"{_REFERENCE}:{x}", None, {**_OF_DENSE, **_TURNED, "direction": {x}}) for x in IN_BLOCKS),
    Row("reference.backward", f"{_REFERENCE}:backward", None, {**_OF_DENSE, "direction": {"backward"}}),
    Row("reference", f"{_REFERENCE}:forward", None, {**_OF_DENSE, **_FORWARD}),
)

BACKENDS = tuple(dict.fromkeys(row.backend for row in KERNELS))
