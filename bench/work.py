"""What a row times, by value: a case, which of its passes, and the tensors that they take."""

from typing import NamedTuple

import torch

from cases import GRID, LONG, SHORT, WIDE, Case, inputs, visited_pairs
from sparsity import block_mask


class Work(NamedTuple):
    """Some passes of one attention call; a gradient is asked of every float tensor that goes in.

    passes     "forward" | "backward" (alone, of a graph made outside of the clock) | "forward+backward"
    pattern    a name in sparsity.PATTERNS: the mask is its BlockMask
    """

    case: Case
    passes: str = "forward"
    pattern: str | None = None

    @property
    def trains(self) -> bool:
        return self.passes != "forward"

    @property
    def suite(self) -> str:
        return suite_of(self.passes)

    @property
    def spec(self) -> dict:
        """Every fact as plain values: what a row records and targets.py selects by."""
        return self.case._asdict() | {"passes": self.passes, "pattern": self.pattern}

    @property
    def block_mask(self):
        """The BlockMask of the pattern; None without one."""
        return self.pattern and block_mask(self.pattern, self.case.seqlen_q, self.case.num_heads)

    @property
    def pairs(self) -> int:
        """Visited (query, key) pairs over batch and query heads."""
        if self.pattern is None:
            return visited_pairs(self.case)
        return self.block_mask.visited_pairs * self.case.batch * (self.case.num_heads // self.block_mask.shape[1])

    @property
    def flops_per_pair(self) -> int:
        """Of the matrix products, two in the forward pass and five in the backward, for each (query, key) pair."""
        head_dim, head_dim_v = self.case.head_dim, self.case.head_dim_v or self.case.head_dim
        forward, backward = 2 * (head_dim + head_dim_v), 2 * (3 * head_dim + 2 * head_dim_v)
        return {"forward": forward, "backward": backward, "forward+backward": forward + backward}[self.passes]

    @property
    def flops(self) -> int:
        return self.pairs * self.flops_per_pair

    def __str__(self) -> str:
        passes, pattern = f"{self.passes} " if self.trains else "", f"-{self.pattern}" if self.pattern else ""
        return f"{passes}{self.case}{pattern}"


def suite_of(passes: str) -> str:
    """What run.py's --suite selects by: "forward" is inference, "backward" is training."""
    return "forward" if passes == "forward" else "backward"


def tensors(work: Work, dtype: torch.dtype | None = None):
    """(q, k, v and the score tensors by name, other arguments of `fastattn.attention`, dout), in `dtype` if given.

    The named ones require gradients if the work trains; dout is None if it does not.
    """
    (q, k, v), kwargs = inputs(work.case)
    kwargs |= {"mask": work.block_mask} if work.pattern else {}
    leaves = {"q": q, "k": k, "v": v}
    names = ("bias", "alibi_slopes", "sinks", "softmax_scale")
    leaves |= {name: kwargs.pop(name) for name in names if isinstance(kwargs.get(name), torch.Tensor)}
    dout = None
    if work.trains:
        generator = torch.Generator().manual_seed(1)
        shape = (*q.shape[:3], v.shape[3])
        dout = torch.randn(shape, generator=generator, dtype=torch.float64).to(q.dtype).to(dtype)
    leaves = {name: x.to(dtype).requires_grad_(work.trains) for name, x in leaves.items()}
    return leaves, kwargs, dout


FORWARD = tuple(Work(case) for case in GRID)
"""What is timed beside the peers in inference."""


STEPS = (
    Case(num_heads=8, seqlen_q=512, head_dim=64, causal=True),
    Case(batch=8, num_heads=12, seqlen_q=128, head_dim=64),
    Case(batch=32, num_heads=12, seqlen_q=64, head_dim=32),
)
"""Steps of a training that are short, timed in 16 bits."""


def _training() -> tuple[Work, ...]:
    cases = [Case(batch=8, num_heads=12, seqlen_q=128, head_dim=32), *LONG, *WIDE]
    cases += [case._replace(causal=True) for case in cases]
    cases += [Case(num_heads=8, seqlen_q=512, head_dim=64, causal=True)]
    cases += [case._replace(dtype="bfloat16") for case in (*LONG, WIDE[0])]
    cases += [LONG[0]._replace(bias="per_head")]
    cases += SHORT
    steps = [LONG[1], LONG[1]._replace(dropout_p=0.1), *(case._replace(dtype="bfloat16") for case in STEPS)]
    return (*(Work(case, "backward") for case in cases), *(Work(case, "forward+backward") for case in steps))


TRAINING = _training()
"""What is timed beside the peers that can train on a CPU."""
