"""`attention_weights()`: the probabilities of chosen query rows."""

import torch

from ..masks.block_mask import BlockMask
from ..masks.intervals import Mask
from ..torch_internals import outside_of_graphs
from ..transforms.blocks import BlockFunction
from ..transforms.dense import weights as weights_of_block
from ..transforms.slots import Call
from ..transforms.works import Higher, apply
from .choice import chosen_call


def attention_weights(
    q: torch.Tensor,
    k: torch.Tensor,
    lse: torch.Tensor | None = None,
    *,
    rows=None,
    heads=None,
    mask: Mask | BlockMask | torch.Tensor | None = None,
    causal: bool = False,
    window_size: tuple[int | None, int | None] | None = None,
    softmax_scale: float | torch.Tensor | None = None,
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    rotary: tuple[torch.Tensor, torch.Tensor] | None = None,
    rotary_interleaved: bool = False,
) -> torch.Tensor:
    """The probabilities that `attention` multiplies the values by, of chosen query rows.

    q, k           as in `attention`
    lse            [batch, num_heads, seqlen_q], any float dtype: what `attention(..., return_lse=True)` returned.
                   Weights are exp(score - lse) then, so rows sum to 1 only as exactly as lse is rounded; where k is a
                   part of the keys, an lse of all keys gives this part's share. None: each row finds its own
    rows           query rows in any order, ints (negative: from the end) or an integer tensor; None: all
    heads          query heads, likewise
    mask ... rotary_interleaved  as in `attention`

    Returns [batch, len(heads), len(rows), seqlen_k] in lse's dtype of `attention`: float32, float64 for float64 inputs.
    Rows sum to 1, with sinks to less; a row that sees no key is 0, as is every masked key, whatever stands there.
    Dropout is no part of it: these are the probabilities before any is dropped.

    **All rows are an n x n tensor**: batch * heads * seqlen_q * seqlen_k numbers, and nothing else of that size. Chosen
    rows take O(rows * seqlen_k), and chosen heads a copy of their keys.

    Differentiable in q, k, softmax_scale, alibi_slopes, bias and sinks, to any order and under torch.func, in blocks of
    rows that are computed again; gradients are those of the whole softmax, and none goes to lse. Attention x gradient
    (arXiv 1902.10186) is `w * torch.autograd.grad(y, w)`; with y a function of w, integrated gradients over attention
    (arXiv 2004.11207) are its mean over `t * w`. Runs on any device, in torch's own operators; under torch.compile it
    breaks the graph.

    Raises TypeError or ValueError that names the argument, its value and the rule.
    """
    options = {
        "mask": mask, "causal": causal, "window_size": window_size, "softmax_scale": softmax_scale,
        "softcap": softcap, "alibi_slopes": alibi_slopes, "bias": bias, "sinks": sinks, "rotary": rotary,
        "rotary_interleaved": rotary_interleaved,
    }  # fmt: skip
    return weights_of(*chosen_call(q, k, lse, options, rows, heads))


def weights_of(call: Call, tensors: dict) -> torch.Tensor:
    """The weights of a chosen call."""
    return apply(Higher(call, BlockFunction(weights_of_block, tuple(tensors), ("weights",))), tensors)["weights"]


attention_weights = outside_of_graphs(
    attention_weights, "attention_weights looks at the values of its arguments: call it outside of torch.compile"
)
