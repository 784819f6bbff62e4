"""Talking heads: heads mix their scores before the softmax, and their weights after it."""

import torch

from .. import api
from ..checks import check_tensors, dtype_name, one_line
from ..masks.block_mask import BlockMask
from ..masks.intervals import Mask
from ..problem import FLOATS
from ..torch_internals import outside_of_graphs
from ..transforms import dense
from ..transforms.blocks import BlockFunction
from ..transforms.slots import Call
from ..transforms.works import Higher, apply


def talking_heads_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mix_scores: torch.Tensor | None,
    mix_weights: torch.Tensor | None,
    *,
    mask: Mask | BlockMask | torch.Tensor | None = None,
    causal: bool = False,
    window_size: tuple[int | None, int | None] | None = None,
    softmax_scale: float | torch.Tensor | None = None,
) -> torch.Tensor:
    """out_h = sum_g W_hg softmax(sum_f L_gf s_f, masked) v_h, with s_f the scaled scores of head f.

    q, k, v       as in `fastattn.attention`
    mix_scores    L [num_heads, num_heads], any float dtype: row g says what head g's logits are made of; None: identity
    mix_weights   W [num_heads, num_heads]: row h says what head h's weights are made of; None: identity
    mask ... softmax_scale
                  as in `fastattn.attention`; a mask is the same for all heads

    Returns [batch, num_heads, seqlen_q, head_dim_v] in q's dtype. A query that sees no key gives 0. In torch's own
    operators, in blocks of query rows of all heads at once: O(rows * num_heads * seqlen_k) memory, with fewer rows for
    more heads and keys (8 to 128), on any device. Differentiable in q, k, v, both matrices and a tensor softmax_scale,
    to any order and under torch.func; under torch.compile a call breaks the graph. bias, softcap, ALiBi, sinks and
    dropout are not among its arguments: papers differ on which side of the mixing they belong.

    Raises TypeError or ValueError that names the argument, its value and the rule. Source: arXiv 2003.02436.
    """
    if _heads_of(mask) not in (None, 1):
        raise ValueError(f"mask={one_line(mask)} differs from head to head; heads that mix share one mask")
    options = {"mask": mask, "causal": causal, "window_size": window_size, "softmax_scale": softmax_scale}
    bound = api.bind(q, k, v, backend="reference", **options)
    call = Call(bound.problem, "reference", bound.terms, False, mixes_heads=True)
    tensors = {"q": q, "k": k, "v": v, **{name: getattr(bound.terms, name) for name in call.term_slots}}
    for name, x in (("mix_scores", mix_scores), ("mix_weights", mix_weights)):
        if x is not None:
            tensors[name] = _checked(name, x, bound.problem.num_heads)
    return apply(Higher(call, BlockFunction(_mixed, tuple(tensors), ("out",))), tensors)["out"]


talking_heads_attention = outside_of_graphs(
    talking_heads_attention, "talking_heads_attention looks at the values of its arguments: call it outside of a graph"
)


def _mixed(call, block, x: dict) -> dict:
    x, s, visible = dense.scores(call, block, x)
    s, sighted = dense.hidden(block, _product(x.get("mix_scores"), s), visible)
    p = torch.softmax(s, -1)
    p = _product(x.get("mix_weights"), p if sighted is None else p * sighted)
    return {"out": dense.weighted(call, block, x, p)}


def _product(matrix: torch.Tensor | None, s: torch.Tensor) -> torch.Tensor:
    """Heads of s [b, H, rows, keys] mixed by a matrix [H, H]."""
    return s if matrix is None else torch.einsum("gf,bfij->bgij", matrix, s)


def _heads_of(mask) -> int | None:
    """For how many heads a mask has entries of their own, or 1; None where it is no tensor of heads."""
    if isinstance(mask, Mask):
        bounds = [x.shape[-2] for x in (mask.k_start, mask.k_end) if x is not None and x.dim() > 1]
        return max(bounds, default=1)
    if isinstance(mask, torch.Tensor):
        return mask.shape[-3] if mask.dim() > 2 else 1
    return mask.shape[1] if hasattr(mask, "shape") else None


def _checked(name: str, x, num_heads: int) -> torch.Tensor:
    check_tensors(**{name: x})
    if tuple(x.shape) != (num_heads, num_heads) or dtype_name(x.dtype) not in FLOATS:
        raise ValueError(
            f"{name} has shape {tuple(x.shape)} and dtype {x.dtype}; it must be float [num_heads, num_heads], here "
            f"({num_heads}, {num_heads})"
        )
    return x
