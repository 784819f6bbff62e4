"""Slots: the tensors of a transformed call by name, and what their dimensions mean.

A slot is the name of a tensor, "q" or "bias", with a prefix where it is something of that tensor: "t." its tangent,
"d." the cotangent of a result, "s." what the forward pass saved for the backward pass, "c1.", "c2.", ... cotangents of
derivatives. A tensor of a slot is cut, folded and summed as the tensor whose name it bears.
"""

import torch

from ..masks.block_mask import BlockMask
from ..terms import TERMS

_SHAPES = {
    "q": ("batch", "num_heads", "seqlen_q", "head_dim"),
    "k": ("batch", "num_heads_k", "seqlen_k", "head_dim"),
    "v": ("batch", "num_heads_k", "seqlen_k", "head_dim_v"),
    "out": ("batch", "num_heads", "seqlen_q", "head_dim_v"),
    "exact": ("batch", "num_heads", "seqlen_q", "head_dim_v"),
    "lse": ("batch", "num_heads", "seqlen_q"),
    "parts": ("batch", "num_heads", "seqlen_q", "two"),
    "weights": ("batch", "num_heads", "rows", "seqlen_k"),
    "key_mass": ("batch", "num_heads", "seqlen_k"),
    **dict.fromkeys(("entropy", "distance", "max"), ("batch", "num_heads", "rows")),
    **dict.fromkeys(("top_weights", "top_keys"), ("batch", "num_heads", "rows", "top_k")),
    **dict.fromkeys(("mix_scores", "mix_weights"), ("heads_out", "heads_in")),
    **dict.fromkeys(("keys_at", "values_at"), ("num_heads", "distances", "columns")),
}
_DENSE = {term.name: sorted(((), *term.shapes), key=len)[-1] for term in TERMS}
_CSR = {"indptr": ("starts",), "indices": ("edges",), "bias": ("batch", "num_heads", "edges")}
_NAMES = {"dense": {**_DENSE, **_SHAPES}, "csr": {**_CSR, **_SHAPES}}


def base(slot: str) -> str:
    """ "q" of "t.q"."""
    return slot.rpartition(".")[2]


class Call:
    """What a transformed call is beside its tensors. (Not a tuple, in which torch.func would look for tensors.)

    problem  that of one sample, as the caller of `attention` sees it
    backend  that of the kernel which takes it
    asked    the backend that its caller asked for by name, or None
    keeps    whether the forward pass keeps what the backward pass wants
    runs     the query rows that are looked at, as (start, end) of rows side by side; all, but for `fastattn.seeing`
    top_k    how many weights of a row are looked for
    mixes_heads  whether heads depend on each other, so that a block has all of them
    """

    def __init__(
        self, problem, backend: str, terms: tuple, keeps: bool, runs: tuple | None = None, top_k: int = 0,
        mixes_heads: bool = False, asked: str | None = None,
    ):  # fmt: skip
        self.problem, self.backend, self.keeps, self.layout = problem, backend, keeps, problem.layout
        self.asked = asked
        self.runs, self.top_k = ((0, problem.seqlen_q),) if runs is None else runs, top_k
        self.mixes_heads = mixes_heads
        self.term_slots = tuple(name for name in terms._fields if isinstance(getattr(terms, name), torch.Tensor))
        # Tensors belong to the graph, not to this object, which outlives a call.
        self.fixed = terms._replace(**dict.fromkeys(self.term_slots))
        self.inputs = ("q", "k", "v", *self.term_slots)
        self._block_masks: dict[int, BlockMask] = {}

    def run(self, work, tensors: dict) -> list[torch.Tensor]:
        """The results of a `Work` of this call."""
        return work.run(tensors)

    def note(self, work) -> None:
        """Tell `fastattn.calls` what will run."""
        work.note()

    def full_dims(self, slot: str) -> tuple[str, ...]:
        """What the dimensions of the tensor of a slot mean if it has all that it may have."""
        return _NAMES[self.layout][base(slot)]

    def dims(self, slot: str, x: torch.Tensor) -> tuple[str, ...]:
        """What the dimensions of the tensor of a slot mean."""
        full = self.full_dims(slot)
        return full[len(full) - x.dim() :]

    def problem_of(self, tensors: dict):
        """The problem of these tensors, in which samples may have been folded into the batch."""
        return self.problem.with_lengths((tensors["q"].shape[0], self.problem.seqlen_q, self.problem.seqlen_k))

    def sizes(self, slot: str, tensors: dict) -> list[int]:
        """The shape of the tensor of a slot that has all dimensions that it may have."""
        sizes = self.problem_of(tensors)._asdict()
        sizes |= {"rows": sum(end - start for start, end in self.runs), "top_k": self.top_k}
        return [sizes[dim] for dim in self.full_dims(slot)]

    def terms(self, tensors: dict) -> tuple:
        """The terms with their tensors."""
        given = {name: tensors[name] for name in self.term_slots}
        if "seed" in given:
            given["seed"] = int(given["seed"])
        if (block_mask := self.block_mask(tensors["q"].shape[0])) is not None:
            given["block_mask"] = block_mask
        return self.fixed._replace(**given) if given else self.fixed

    def of_terms(self, values: dict) -> tuple:
        """A value for each term, None where there is none, as a tuple of the terms' type."""
        return self.fixed._make([values.get(name) for name in self.fixed._fields])

    def block_mask(self, batch: int) -> BlockMask | None:
        """The block mask, repeated for the samples that have been folded into the batch."""
        mask = getattr(self.fixed, "block_mask", None)
        if mask is None or mask.shape[0] in (1, batch):
            return mask
        if batch not in self._block_masks:
            self._block_masks[batch] = BlockMask.cat([mask] * (batch // mask.shape[0]), dim=0)
        return self._block_masks[batch]
