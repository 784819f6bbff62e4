"""The rows of the C++ extension: tensors to its arguments; no policy. Signatures: `fastattn.kernel_table.Row`."""

from pathlib import Path

import torch

from ..layouts.edges import Edges
from ..layouts.lists import check_entries
from ..layouts.sequences import Sequences
from ..outputs import compute_dtype, empty_out, empty_results, lse_parts
from ..terms import TERMS, Terms

try:
    from .. import _C
except ImportError as error:  # a wheel built without a compiler, or for another platform
    _C, _import_error = None, error

FEW_ROWS = getattr(_C, "few_rows", 12)
"""The most query rows a key head that `decode` takes; more fill the lanes of `prefill`."""

_MULTIPLY_PAIRS = {"cpu.prefill", "cpu.backward", "cpu.varlen", "cpu.varlen_backward", "cpu.cache"}
_NO_GRADIENTS = Terms._make([None] * len(Terms._fields))
_empty_like, _get_num_threads = torch.empty_like, torch.get_num_threads


def unavailable() -> str | None:
    """None if the compiled kernels can run here, else why not."""
    if _C is None:
        build_error = Path(__file__).parents[1] / "_build_error.txt"  # setup.py writes it
        why = build_error.read_text().strip() if build_error.exists() else _import_error
        return f"the compiled CPU kernels are missing ({why}); reinstall with a C++ compiler to build them"
    return None


def signature(*tensors) -> None:
    """(key, (batch, seqlen_q, seqlen_k)) of plain CPU tensors q, k, v and others that a call adds: the key holds their
    dtypes, and their shapes but for the lengths. None where a tensor is another thing, or q, k, v do not fit."""
    return None


def shapes(*tensors) -> None:
    """dtypes and sizes of plain CPU tensors, ints and Nones as a key; None where a tensor is another thing."""
    return None


if _C is not None:
    # C++ reads the fields of these tuples by name: it learns their places here, and refuses a name it does not know.
    _C.bind_fields("Terms", Terms._fields)
    _C.bind_fields("Edges", Edges._fields)
    _C.bind_fields("Sequences", Sequences._fields)
    signature, shapes = _C.signature, _C.shapes  # noqa: F811  (straight, without a Python frame)


def isa() -> str:
    """The instruction set that the kernels run on: avx512, avx2, neon or scalar (FASTATTN_CPU_ISA narrows it)."""
    return _C.isa()


def unusable() -> str | None:
    """None if a call runs on them, else why not: they are missing, or FASTATTN_CPU_ISA asks for what this CPU or this
    build lacks, which every call raises."""
    if missing := unavailable():
        return missing
    try:
        isa()
    except (ValueError, RuntimeError) as error:
        return str(error)
    return None


def isa_of(kernel: str, problem) -> str:
    """That of one call: named "<isa>_bf16" where its products are of pairs of bfloat16, and weights rounded to it."""
    return (_multiplies_pairs(kernel, problem) and _C.pair_isa()) or isa()


def forgoes_pairs(kernel: str, problem) -> bool:
    """Whether a call on bfloat16 has its products in float32 although this CPU multiplies pairs of bfloat16."""
    return problem.dtype == "bfloat16" and bool(_C.pair_isa()) and not _multiplies_pairs(kernel, problem)


def _multiplies_pairs(kernel: str, problem) -> bool:
    """As `multiplies_pairs` in csrc/drive/driver.h."""
    return kernel in _MULTIPLY_PAIRS and problem.dtype == "bfloat16" and not problem.rotary


def openmp() -> str | None:
    """The file of the OpenMP runtime that calls run on, which is torch's; None: there is none, all is serial."""
    return (_C.openmp() or None) if _C is not None else None


def release_scratch() -> int:
    """Free the memory that the calling thread and its OpenMP threads keep for their next call; how many bytes it was.

    A thread keeps what its largest call so far took, if that is at most 32 MiB: hundreds of KiB for a forward pass,
    whatever the lengths; a backward pass takes O(seqlen * head_dim). It is freed when the thread ends.
    """
    return _C.release_scratch() if _C is not None else 0


def skipped_pairs() -> int:
    """How many (query, key) pairs the calls of this process have skipped, all weights of their tiles being 0."""
    return _C.skipped_pairs() if _C is not None else 0


def runs() -> dict[str, int]:
    """How often each C++ kernel has run in this process, by its function's name in `_C`: what `last_call` must agree
    with."""
    return _C.runs() if _C is not None else {}


def prefill(problem, q, k, v, terms, out=None):
    """Forward pass, into `out` where there is one."""
    out = empty_out(problem, q) if out is None else out
    lse = q.new_empty(out.shape[:3], dtype=compute_dtype(problem)) if problem.lse else None
    _C.forward(q, k, v, out, lse, None, None, terms, _get_num_threads())
    return out, lse


def decode(problem, q, k, v, terms, out=None):
    """Forward pass of few query rows a key head, into `out` where there is one."""
    out = empty_out(problem, q) if out is None else out
    lse = q.new_empty(out.shape[:3], dtype=compute_dtype(problem)) if problem.lse else None
    _C.decode(q, k, v, out, lse, None, None, terms, _get_num_threads())
    return out, lse


def prefill_for_backward(problem, q, k, v, terms, out=None):
    """(out, lse or None, (out in the compute dtype, lse_parts))."""
    out, lse, out_exact, lse_parts = empty_results(problem, q, True, out)
    _C.forward(q, k, v, out, lse, lse_parts, out_exact, terms, _get_num_threads())
    return out, lse, (out if out_exact is None else out_exact, lse_parts)


def backward(problem, q, k, v, terms, saved, dout, dlse, wanted):
    """Gradients of a dense call."""
    dq, dk, dv = _empty_gradients(q, k, v, wanted)
    if True not in wanted[3]:
        _C.backward(q, k, v, *saved, terms, dout, dlse, dq, dk, dv, _NO_GRADIENTS, _get_num_threads())
        return dq, dk, dv, _NO_GRADIENTS
    sums = [
        x.new_zeros(x.shape, dtype=_sum_dtype(problem, term, x)) if want else None
        for term, x, want in zip(TERMS, terms, wanted[3], strict=True)
    ]
    _C.backward(q, k, v, *saved, terms, dout, dlse, dq, dk, dv, Terms._make(sums), _get_num_threads())
    return dq, dk, dv, [y if y is None else y.to(x.dtype) for x, y in zip(terms, sums, strict=True)]


def tangent(problem, q, k, v, terms, tangents):
    """(tangent of out, that of lse or None) of a dense call."""
    tout = empty_out(problem, q)
    tlse = q.new_empty(tout.shape[:3], dtype=compute_dtype(problem)) if problem.lse else None
    _C.tangent(q, k, v, terms, *tangents, tout, tlse, _get_num_threads())
    return tout, tlse


def statistics(problem, q, k, terms, lse, names):
    """Statistics of the weights of a dense call by their names; without lse after a forward pass that finds it."""
    parts = None if lse is None else lse_parts(lse, compute_dtype(problem), "cpu")
    if parts is None:
        _, _, (_, parts) = prefill_for_backward(problem._replace(head_dim_v=1, lse=False), q, k, k[..., :1], terms)
    rows, dtype = (problem.batch, problem.num_heads, problem.seqlen_q), compute_dtype(problem)
    shapes = {"key_mass": (*rows[:2], problem.seqlen_k), "entropy": rows, "distance": rows, "max": rows}
    found = {name: q.new_empty(shapes[name], dtype=dtype) for name in names}
    _C.statistics(q, k, parts, terms, *[found.get(name) for name in shapes], _get_num_threads())
    return found


def thresholds(scores: torch.Tensor, rule: int, top_k: int) -> torch.Tensor:
    """What scores [rows, keys], contiguous float32 or float64, must reach: a number a row. rule: of `_C.thresholds`."""
    found = scores.new_empty(len(scores))
    _C.thresholds(scores, found, rule, top_k, _get_num_threads())
    return found


def _empty_gradients(q, k, v, wanted) -> tuple[torch.Tensor | None, ...]:
    want_q, want_k, want_v, *_ = wanted  # no loop: tiny calls notice it
    return _empty_like(q) if want_q else None, _empty_like(k) if want_k else None, _empty_like(v) if want_v else None


def _sum_dtype(problem, term, x: torch.Tensor) -> torch.dtype:
    """The dtype in which C++ adds up the gradient of a term: float64, unless there are as many sums as scores."""
    is_dense = term.broadcast and x.dim() > 1 and x.shape[-1] != 1 and x.shape[-2] != 1
    return compute_dtype(problem) if is_dense else torch.float64


def csr(problem, q, k, v, edges):
    """Forward pass along edges."""
    return csr_for_backward(problem, q, k, v, edges, False)[:2]


def csr_for_backward(problem, q, k, v, edges, for_backward: bool = True):
    """As `prefill_for_backward`, along edges."""
    out, lse, out_exact, lse_parts = empty_results(problem, q, for_backward)
    _run_csr(_C.csr_forward, problem, edges, q, k, v, out, lse, lse_parts, out_exact, edges)
    return out, lse, (out if out_exact is None else out_exact, lse_parts)


def csr_backward(problem, q, k, v, edges, saved, dout, dlse, wanted):
    """Gradients of a call along edges."""
    dq, dk, dv = _empty_gradients(q, k, v, wanted)
    dbias = edges.bias.new_zeros(edges.bias.shape, dtype=compute_dtype(problem)) if wanted[3].bias else None
    grads = Edges(None, None, dbias, None)
    _run_csr(_C.csr_backward, problem, edges, q, k, v, *saved, edges, dout, dlse, dq, dk, dv, grads)
    return dq, dk, dv, grads if dbias is None else grads._replace(bias=dbias.to(edges.bias.dtype))


def varlen(problem, q, k, v, terms):
    """Forward pass of packed sequences."""
    return varlen_for_backward(problem, q, k, v, terms, False)[:2]


def varlen_for_backward(problem, q, k, v, terms, for_backward: bool = True):
    """As `prefill_for_backward`, of packed sequences."""
    out, lse, out_exact, lse_parts = empty_results(problem, q, for_backward)
    if terms.seqused_q is not None:
        out.zero_()
        if lse is not None:
            lse.fill_(-torch.inf)
    _C.sequences_forward(q, k, v, out, lse, lse_parts, out_exact, terms, _get_num_threads())
    return out, lse, (out if out_exact is None else out_exact, lse_parts)


def varlen_backward(problem, q, k, v, terms, saved, dout, dlse, wanted):
    """Gradients of packed sequences."""
    grads = _empty_gradients(q, k, v, wanted)
    for x, used in zip(grads, (terms.seqused_q, terms.seqused_k, terms.seqused_k), strict=True):
        if x is not None and used is not None:
            x.zero_()
    wants = wanted[3]
    sums = [x.new_zeros(x.shape, dtype=torch.float64) if want else None for x, want in zip(terms, wants, strict=True)]
    _C.sequences_backward(q, k, v, *saved, terms, dout, dlse, *grads, Sequences._make(sums), _get_num_threads())
    return *grads, [y if y is None else y.to(x.dtype) for x, y in zip(terms, sums, strict=True)]


def cache(problem, q, k, v, terms):
    """Forward pass over caches, to which it appends first."""
    out = empty_out(problem, q)
    lse = q.new_empty(out.shape[:3], dtype=compute_dtype(problem)) if problem.lse else None
    _C.sequences_forward(q, k, v, out, lse, None, None, terms, _get_num_threads())
    return out, lse


def _run_csr(function, problem, edges, *arguments) -> None:
    """Call C++, which refuses wrong entries in the lists before it computes; which one is wrong is found here."""
    try:
        function(*arguments, _get_num_threads())
    except ValueError:
        check_entries(edges.indptr, edges.indices, problem.seqlen_k)
        raise
