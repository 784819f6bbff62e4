"""Rotary positions: pairs of columns of q and k are turned by an angle that grows with the position."""

import math

import torch
from torch import nn

from ..checks import one_line
from ..layouts.rotary import turned

SCALINGS = (None, "linear", "ntk", "yarn")


class Rotary(nn.Module):
    """Rotary position encoding (Su et al., arXiv 2104.09864), whole or partial, for contexts longer than in training.

    head_dim     of q and k
    base         of the wavelengths, 10000 in the paper
    fraction     share of the columns that are turned, the first ones (GPT-NeoX: 0.25)
    interleaved  False: column i goes with column i + width / 2 (Llama); True: 2i goes with 2i + 1 (the paper, GPT-J)
    scaling      how a context `factor` times longer than `trained_seqlen` is reached:
                 "linear" divides positions by factor (Chen et al., 2306.15595); "ntk" raises the base so that the
                 longest wavelength grows by factor; "yarn" divides long wavelengths alone and sharpens the scores
                 (Peng et al., 2309.00071)
    factor, trained_seqlen, beta_fast, beta_slow   of the scaling; the betas are YaRN's, in turns over trained_seqlen

    Called with q [batch, num_heads, seqlen, head_dim], k likewise and, optionally, positions (int or float,
    broadcastable to [batch, seqlen]; default 0 ... seqlen - 1): returns (q, k) turned, in their dtypes.
    `tables(positions)` gives the (cos, sin) [..., seqlen, width / 2] that `apply_rotary` takes. Angles are float32.
    """

    def __init__(
        self, head_dim: int, base: float = 10000.0, *, fraction: float = 1.0, interleaved: bool = False,
        scaling: str | None = None, factor: float = 1.0, trained_seqlen: int | None = None, beta_fast: float = 32.0,
        beta_slow: float = 1.0,
    ):  # fmt: skip
        super().__init__()
        if scaling not in SCALINGS:
            raise ValueError(f"scaling={one_line(scaling)} must be one of {SCALINGS}")
        width = int(head_dim * fraction)
        if width < 2 or width % 2 or width > head_dim:
            raise ValueError(
                f"fraction={fraction} of head_dim={head_dim} is {width} columns; it must be an even number"
            )
        if scaling == "yarn" and trained_seqlen is None:
            raise ValueError('scaling="yarn" needs trained_seqlen=, the context length of the training')
        self.head_dim, self.width, self.interleaved, self.sharpening = head_dim, width, interleaved, 1.0
        if scaling == "ntk":
            base *= factor ** (width / (width - 2)) if width > 2 else factor
        rates = base ** (-torch.arange(0, width, 2, dtype=torch.float32) / width)
        if scaling == "linear":
            rates = rates / factor
        elif scaling == "yarn":
            turns = torch.tensor([beta_fast, beta_slow])
            low, high = width * torch.log(trained_seqlen / (turns * 2 * math.pi)) / (2 * math.log(base))
            low, high = low.floor().clamp(min=0), high.ceil().clamp(max=width - 1)
            ramp = (torch.arange(width // 2) - low) / (high - low).clamp(min=1e-3)
            kept = 1.0 - ramp.clamp(0, 1)  # of which wavelengths turn often enough to stay
            rates = rates * kept + rates / factor * (1.0 - kept)
            self.sharpening = 0.1 * math.log(factor) + 1.0 if factor > 1.0 else 1.0
        self.register_buffer("rates", rates, persistent=False)

    def tables(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(cos, sin) [..., seqlen, width / 2], float32, of positions [..., seqlen]."""
        angles = positions.to(torch.float32)[..., None] * self.rates.to(positions.device)
        return angles.cos() * self.sharpening, angles.sin() * self.sharpening

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, positions: torch.Tensor | None = None,
        positions_k: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
        """positions_k: those of the keys, where they are not the queries'."""
        if positions is None:
            positions = torch.arange(q.shape[-2], device=q.device)
        if positions_k is None:
            positions_k = positions if k.shape[-2] == q.shape[-2] else torch.arange(k.shape[-2], device=k.device)
        both = (
            apply_rotary(x, *(table[..., None, :, :] for table in self.tables(at)), self.interleaved)
            for x, at in ((q, positions), (k, positions_k))
        )
        return tuple(both)

    def extra_repr(self) -> str:
        return f"head_dim={self.head_dim}, width={self.width}, interleaved={self.interleaved}"


def apply_rotary(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool = False) -> torch.Tensor:
    """x [..., seqlen, head_dim] with its first 2 * cos.shape[-1] columns turned, in x's dtype.

    cos, sin     [..., seqlen, width / 2], broadcastable to x's rows; products are in float32, float64 for float64
    interleaved  as in `Rotary`
    """
    half = cos.shape[-1]
    if cos.shape != sin.shape or 2 * half > x.shape[-1]:
        raise ValueError(
            f"cos={one_line(cos)}, sin={one_line(sin)} must be [..., seqlen, width / 2], width <= {x.shape[-1]}"
        )
    return turned(x, cos, sin, interleaved)
