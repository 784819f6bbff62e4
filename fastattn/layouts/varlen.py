"""`attention_varlen()`: sequences of different lengths in one call, without padding, with gradients."""

import torch

from .. import dispatch
from ..calls import current_backend, in_graph
from ..checks import check_flag, check_one_device, check_tensors
from ..differentiable import run
from ..masks.intervals import check_window
from ..operators import varlen as operator
from ..scores import dropout, scale
from ..scores import softcap as softcap_scores
from ..scores.dropout import check_seed
from ..torch_internals import is_memoryless, num_dispatch_modes
from .sequence_arguments import bind_packed, check_longest, check_tables


def attention_varlen(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor | None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    *,
    causal: bool = False,
    window_size: tuple[int | None, int | None] | None = None,
    softmax_scale: float | torch.Tensor | None = None,
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    rotary: tuple[torch.Tensor, torch.Tensor] | None = None,
    rotary_interleaved: bool = False,
    dropout_p: float = 0.0,
    seed: int | None = None,
    block_table: torch.Tensor | None = None,
    seqused_k: torch.Tensor | None = None,
    seqused_q: torch.Tensor | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Attention of many sequences, each by itself, whose rows lie one after the other: no padding, stored or computed.

    q             [total_q, num_heads, head_dim], any strides; float32, bfloat16, float16 or float64
    k, v          [total_k, num_heads_k, head_dim], [total_k, num_heads_k, head_dim_v], same dtype
    cu_seqlens_q  [sequences + 1], int32 or int64, on q's device: from 0 up to total_q; the queries of sequence i are
                  rows cu_seqlens_q[i] ... cu_seqlens_q[i + 1] - 1. A sequence may be empty
    cu_seqlens_k  the same for keys and values
    max_seqlen_q, max_seqlen_k  the longest sequence, which callers of other packages pass; no kernel needs it
    block_table   [sequences, entries], int32 or int64: k and v are pages [num_pages, page_size, num_heads_k, dim] then,
                  and key j of sequence i lies in page block_table[i, j // page_size]; cu_seqlens_k gives the lengths
                  alone (or seqused_k does, and cu_seqlens_k is None). No gradients
    seqused_q, seqused_k  [sequences]: a sequence uses its first so many queries or keys; None: all. A row that is not
                  used gives out = 0, lse = -inf and a gradient of 0
    alibi_slopes  [num_heads] or [sequences, num_heads]
    rotary        (cos, sin), float [positions, rotary_dim / 2], without gradients: q and k of a sequence turn by the
                  positions in it, as in `attention`; it may not have more queries than keys
    dropout_p, seed  sequence i drops what `attention` drops with the seed (seed + i) % 2^63

    causal, window_size, softmax_scale, softcap, sinks, rotary_interleaved, return_lse and backend are those of
    `fastattn.attention`, with the lengths of each sequence: causal is aligned bottom-right in each.

    Returns out [total_q, num_heads, head_dim_v] in q's dtype, or (out, lse) with lse [num_heads, total_q], natural log,
    float32 (float64 for float64 inputs). Bit for bit what `attention` gives for each sequence alone, and so are the
    gradients of q, k, v; those of alibi_slopes, sinks and softmax_scale are summed over the sequences.

    Memory is O(total) beyond inputs and outputs. Lists are read once by the kernel: the caller needs no `.item()`.

    Raises TypeError or ValueError that names the argument, its value and the rule, also for each entry of a list,
    before anything is computed; `UnsupportedError` if the named backend refuses. Method: FlashAttention-2, arXiv
    2307.08691.
    """
    check_tensors(q=q, k=k, v=v)
    check_longest("max_seqlen_q", max_seqlen_q)
    check_longest("max_seqlen_k", max_seqlen_k)
    for name, x, dim in (
        ("q", q, 3),
        ("k", k, 3 if block_table is None else 4),
        ("v", v, 3 if block_table is None else 4),
    ):
        if x.dim() != dim:
            shape = "[total, heads, dim]" if dim == 3 else "[num_pages, page_size, heads, dim]"
            raise ValueError(f"{name} has shape {tuple(x.shape)}; it must be {shape}")
    q = q.transpose(0, 1)[None]
    if block_table is None:
        k, v = k.transpose(0, 1)[None], v.transpose(0, 1)[None]
    else:
        k, v = k.transpose(1, 2), v.transpose(1, 2)
    places = {
        "cu_seqlens_q": cu_seqlens_q, "cu_seqlens_k": cu_seqlens_k, "seqused_q": seqused_q, "seqused_k": seqused_k,
        "block_table": block_table,
    }  # fmt: skip
    options = {
        "causal": causal, "window_size": window_size, "softmax_scale": softmax_scale, "softcap": softcap,
        "alibi_slopes": alibi_slopes, "sinks": sinks, "rotary": rotary, "rotary_interleaved": rotary_interleaved,
        "dropout_p": dropout_p, "seed": seed, "return_lse": return_lse, "backend": backend,
    }  # fmt: skip
    if torch.compiler.is_dynamo_compiling() or num_dispatch_modes() or is_memoryless(q):
        out, lse = _traced(q, k, v, places, **options)
    else:
        if backend is None:
            options["backend"] = current_backend()
        out, lse = _run(bind_packed(q, k, v, places, **options), q, k, v)
    out = out[0].transpose(0, 1)
    return (out, lse[0]) if return_lse else out


def _traced(
    q, k, v, places, *, causal, window_size, softmax_scale, softcap, alibi_slopes, sinks, rotary, rotary_interleaved,
    dropout_p, seed, return_lse, backend,
):  # fmt: skip
    """`attention_varlen` as an operator, as in `fastattn.api`."""
    check_one_device(q, k, v)
    check_seed(seed)
    learned, number = {"alibi_slopes": alibi_slopes, "sinks": sinks}, softmax_scale
    if isinstance(softmax_scale, torch.Tensor):
        learned["softmax_scale"], number = softmax_scale, None
    if rotary is not None:
        learned |= check_tables(rotary, q.shape[3])
    options = {name: x for name, x in (places | learned).items() if x is not None}
    check_tensors(**options)
    if window_size is not None:
        options["window"] = [-1 if side is None else side for side in check_window(window_size)]
    if dropout_p > 0.0:  # a tensor: each run of the graph draws another one, and the backward pass gets the same
        draw = torch.randint(2**63 - 1, (), device="cpu") if seed is None else torch.full((), seed, dtype=torch.int64)
        options["seed"] = draw
    if backend is None and in_graph:
        backend = in_graph[-1]
    return operator.attention_varlen(
        q, k, v, **options, causal=check_flag("causal", causal), scale=scale.TERM.check(number),
        rotary_interleaved=check_flag("rotary_interleaved", rotary_interleaved),
        softcap=softcap_scores.TERM.check(softcap), dropout_p=dropout.P.check(dropout_p),
        return_lse=check_flag("return_lse", return_lse), backend=dispatch.check_backend(backend, "backend"),
    )  # fmt: skip


def _run(bound, q, k, v):
    if bound.problem.dropout and bound.terms.seed is None:
        bound = bound._replace(terms=bound.terms._replace(seed=int(torch.randint(2**63 - 1, ()))))
    return run(bound, q, k, v)
