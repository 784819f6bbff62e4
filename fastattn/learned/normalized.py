"""`attention()` with another normalizer than the softmax, or over the largest scores alone."""

import torch

from .. import api
from ..checks import check_int, one_line
from ..masks.block_mask import BlockMask
from ..masks.intervals import Mask
from ..scores.relative import RelativeBias
from ..torch_internals import outside_of_graphs
from ..transforms import dense
from ..transforms.blocks import BlockFunction
from ..transforms.slots import Call
from ..transforms.works import Higher, apply
from .normalizers import NORMALIZERS, SHIFTED, among_largest


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    normalizer: str = "softmax",
    top_k: int | None = None,
    mask: Mask | BlockMask | torch.Tensor | None = None,
    causal: bool = False,
    window_size: tuple[int | None, int | None] | None = None,
    softmax_scale: float | torch.Tensor | None = None,
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    bias: torch.Tensor | RelativeBias | None = None,
    dropout_p: float = 0.0,
    seed: int | None = None,
) -> torch.Tensor:
    """normalize(scale * q k^T + bias, masked) v, where `normalize` need not be the softmax.

    q, k, v     as in `fastattn.attention`
    normalizer  what turns the scores s of a row into weights p:
                "softmax"   exp(s_j) / sum exp(s)
                "softmax1"  exp(s_j) / (1 + sum exp(s)): a row may look at nothing (Miller, "Attention is off by one")
                "sigmoid"   1 / (1 + exp(-s_j)), each key for itself (arXiv 2409.04431, which adds bias=-log(seqlen_k)
                            to the scores; here you do)
                "sparsemax" max(s_j - tau, 0) that sum to 1: many are 0 (Martins and Astudillo, arXiv 1602.02068)
                "entmax15"  max(s_j / 2 - tau, 0)^2 that sum to 1 (entmax with alpha = 1.5: Peters, Niculae and
                            Martins, arXiv 1905.05702)
    top_k       only the top_k largest visible scores of a row take part (Gupta et al., arXiv 2106.06899); those that
                equal the last of them do, too. None: all
    mask ... seed
                as in `fastattn.attention`; a bias of -inf masks. Of `fastattn.relative`, biases that follow from
                positions alone

    Returns out [batch, num_heads, seqlen_q, head_dim_v] in q's dtype. A query that sees no key gives 0. NaN or Inf in a
    masked key or value never reaches the result.

    "softmax" and "softmax1" without top_k are calls of `fastattn.attention`, fused. The others run in torch's own
    operators, in blocks of query rows: exact, on any device, O(seqlen) memory (a block of at most 128 rows times all
    keys that a causal mask or window leaves them; a `BlockMask` hides keys and skips none), and differentiable in q, k,
    v, softmax_scale, alibi_slopes and bias, to any order and under torch.func, with blocks computed again. Scores and
    sums are float32, for float64 inputs float64. Gradients of "sparsemax", "entmax15" and top_k are those at which keys
    have a weight now. Under torch.compile they break the graph. There are no sinks and no lse: what a softmax has.

    Raises TypeError or ValueError that names the argument, its value and the rule.
    """
    if normalizer not in NORMALIZERS:
        raise ValueError(f"normalizer={one_line(normalizer)} must be one of {', '.join(NORMALIZERS)}")
    if top_k is not None:
        check_int("top_k", top_k, 1)
    options = {
        "mask": mask, "causal": causal, "window_size": window_size, "softmax_scale": softmax_scale,
        "softcap": softcap, "alibi_slopes": alibi_slopes, "bias": bias, "dropout_p": dropout_p, "seed": seed,
    }  # fmt: skip
    if top_k is None and normalizer in ("softmax", "softmax1"):
        has_heads = normalizer == "softmax1" and isinstance(q, torch.Tensor) and q.dim() == 4
        return api.attention(q, k, v, sinks=q.new_zeros(q.shape[1]) if has_heads else None, **options)
    normalize = NORMALIZERS[normalizer]

    def weigh(s):
        return normalize(s if top_k is None else among_largest(s, top_k, normalizer in SHIFTED))

    return by_rows(q, k, v, weigh, options)


def by_rows(q, k, v, weigh, options: dict) -> torch.Tensor:
    """Attention with the weights weigh(scores), -inf where hidden, in blocks of query rows; options: of
    `fastattn.attention`."""
    bound = api.bind(q, k, v, backend="reference", **options)
    problem, terms = bound.problem, bound.terms
    if problem.dropout and terms.seed is None:
        drawn = torch.randint(2**63 - 1, ())
        terms = terms._replace(seed=drawn if problem.transformed else int(drawn))
    call = Call(problem, "reference", terms, False)

    def run(call, block, x):
        x, s, visible = dense.scores(call, block, x)
        s, sighted = dense.hidden(block, s, visible)
        p = weigh(s) if s.shape[-1] else s
        return {"out": dense.weighted(call, block, x, p if sighted is None else p * sighted)}

    tensors = {"q": q, "k": k, "v": v, **{name: getattr(terms, name) for name in call.term_slots}}
    return apply(Higher(call, BlockFunction(run, tuple(tensors), ("out",))), tensors)["out"]


by_rows = outside_of_graphs(by_rows, "learned attention in blocks of rows looks at values: call it outside of a graph")
