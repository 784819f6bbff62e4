"""`attention_stats()`: what the weights of a call amount to, without storing them."""

from collections.abc import Iterable
from typing import NamedTuple

import torch

from ..calls import current_backend, note
from ..checks import check_int, one_line
from ..masks.block_mask import BlockMask
from ..masks.intervals import Mask
from ..plans import Bound, derivative_of
from ..torch_internals import is_traced, outside_of_graphs
from ..transforms import dense
from ..transforms.blocks import BlockFunction
from ..transforms.slots import Call
from ..transforms.works import Higher, apply
from .choice import chosen_call

FUSED = ("key_mass", "entropy", "distance", "max")
STATISTICS = (*FUSED, "top_k")


class TopK(NamedTuple):
    """The largest weights of each row, descending, and the keys that they belong to (int64; -1 where a weight is 0),
    both [batch, heads, rows, top_k]."""

    weights: torch.Tensor
    keys: torch.Tensor


def attention_stats(
    q: torch.Tensor,
    k: torch.Tensor,
    lse: torch.Tensor | None = None,
    *,
    stats: Iterable[str] = FUSED,
    top_k: int = 8,
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
) -> dict[str, torch.Tensor | TopK]:
    """Statistics of the probabilities P of `attention`, by name, in O(n) memory.

    q, k           as in `attention`
    lse            as in `attention_weights`; it saves a pass over the keys
    stats          names of what is wanted:
                   "key_mass"  [batch, heads, seqlen_k]   sum of P over the rows: how much attention a key receives
                   "entropy"   [batch, heads, rows]       -sum P log P over the keys, in nats: 0 ... log(seqlen_k)
                   "distance"  [batch, heads, rows]       sum P |i + seqlen_k - seqlen_q - j|, in tokens: the mean
                                                          attention distance (arXiv 2010.11929) of a row i over keys j
                   "max"       [batch, heads, rows]       the largest P
                   "top_k"     a `TopK`                   the `top_k` largest P of each row, and their keys
    rows, heads    as in `attention_weights`
    mask ... rotary_interleaved  as in `attention`

    Returns {name: tensor}, float32 (float64 for float64 inputs). A sink takes its share and is no key: sums over keys
    leave it out. A row that sees no key is 0 everywhere.

    On CPUs all but "top_k" are one fused pass (`cpu.statistics`: see `last_call`), over all rows of the chosen heads;
    bits do not depend on the number of threads or on the batch. Chosen rows, "top_k" and what `cpu.statistics` refuses
    run in torch's own operators, in blocks of rows. Differentiable in q, k and the terms' tensors, to any order, in
    blocks of rows; under torch.compile a call breaks the graph.

    Raises TypeError or ValueError that names the argument, its value and the rule.
    """
    names = check_stats(stats)
    check_int("top_k", top_k, 1)
    options = {
        "mask": mask, "causal": causal, "window_size": window_size, "softmax_scale": softmax_scale,
        "softcap": softcap, "alibi_slopes": alibi_slopes, "bias": bias, "sinks": sinks, "rotary": rotary,
        "rotary_interleaved": rotary_interleaved,
    }  # fmt: skip
    return stats_of(*chosen_call(q, k, lse, options, rows, heads, top_k), names)


attention_stats = outside_of_graphs(
    attention_stats, "attention_stats looks at the values of its arguments: call it outside of torch.compile"
)


def check_stats(stats) -> tuple[str, ...]:
    """The names of statistics, each once; TypeError or ValueError."""
    if isinstance(stats, str) or not isinstance(stats, Iterable):
        raise TypeError(f"stats={one_line(stats)} must be a set of names, of {', '.join(STATISTICS)}")
    names = tuple(stats)
    for name in names:
        if name not in STATISTICS:
            raise ValueError(f"stats={one_line(names)}: {one_line(name)} must be one of {', '.join(STATISTICS)}")
    return tuple(name for name in STATISTICS if name in names)


def stats_of(call: Call, tensors: dict, names: tuple[str, ...]) -> dict:
    """The statistics `names` of a chosen call."""
    found = {}
    if fused := tuple(name for name in names if name in FUSED):
        found = apply(Statistics(call, tuple(tensors), fused), tensors)
    if "top_k" in names:
        outs = ("top_weights", "top_keys")
        top = apply(Higher(call, BlockFunction(dense.top_weights, tuple(tensors), outs)), tensors)
        found["top_k"] = TopK(top["top_weights"], top["top_keys"].detach().long())
    return found


class Statistics(Higher):
    """The statistics in FUSED, by the row of the table of kernels that takes the call."""

    def __init__(self, call: Call, slots: tuple[str, ...], outs: tuple[str, ...]):
        super().__init__(call, BlockFunction(dense.statistics, slots, outs))

    def run(self, tensors):
        if not self._is_whole:
            return super().run(tensors)
        choice, problem, _, _ = self._bound(self.call.problem_of(tensors))
        terms = self.call.terms(tensors)
        found = choice.forward(problem, tensors["q"], tensors["k"], terms, tensors.get("lse"), self.outs)
        return [found[name] for name in self.outs]

    def note(self):
        if self._is_whole:
            note(self._bound(self.call.problem))

    @property
    def _is_whole(self) -> bool:
        return self.call.runs == ((0, self.call.problem.seqlen_q),) and not is_traced()

    def _bound(self, problem) -> Bound:
        return derivative_of(problem, "statistics", current_backend(), False)
