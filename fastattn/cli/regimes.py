"""The attention calls that `bench` times, with their FLOPs, their bytes, torch's counterpart and their check."""

from collections.abc import Callable
from functools import cached_property
from typing import NamedTuple

import torch
from torch.nn import functional

from ..api import attention
from ..masks import Mask
from ..patterns import sliding_window

CEILING = {"float64": 1e-10, "float32": 1e-4, "float16": 1e-2, "bfloat16": 6e-2}
"""No result that is off by more than this is timed."""

CHECKED_ROWS = 128


class Regime(NamedTuple):
    """One call, by value: sizes as in `Problem`.

    window   (left, right) as attention's window_size; (None, 0) is causal
    blocks   the window is a BlockMask
    mask     a bool tensor takes part, which masks nothing ("tensor"), or such intervals ("interval"); or "none"
    """

    name: str
    batch: int
    num_heads: int
    num_heads_k: int
    seqlen_q: int
    seqlen_k: int
    head_dim: int
    head_dim_v: int
    dtype: str = "float32"
    window: tuple[int | None, int | None] = (None, None)
    blocks: bool = False
    training: bool = False
    mask: str = "none"
    bias: bool = False
    alibi: bool = False
    softcap: bool = False
    sinks: bool = False
    dropout: bool = False

    def __str__(self) -> str:
        return f"{self.name} {self.dtype}"


_CAUSAL, _WINDOW = (None, 0), (255, 0)
_SHAPES = (
    Regime("prefill", 1, 8, 8, 1024, 1024, 64, 64),
    Regime("causal", 1, 8, 8, 2048, 2048, 64, 64, window=_CAUSAL),
    Regime("grouped causal", 1, 8, 2, 1024, 1024, 128, 128, window=_CAUSAL),
    Regime("window", 1, 8, 8, 4096, 4096, 64, 64, window=_WINDOW),
    Regime("sparse", 1, 8, 8, 4096, 4096, 64, 64, window=_WINDOW, blocks=True),
    Regime("decode", 4, 32, 8, 1, 4096, 128, 128),
    Regime("training", 1, 8, 8, 1024, 1024, 64, 64, window=_CAUSAL, training=True),
)
REGIMES = tuple(shape._replace(dtype=dtype) for shape in _SHAPES for dtype in ("float32", "bfloat16"))


class Call:
    """A regime with its tensors; `count` is how often a trace holds it."""

    def __init__(self, regime: Regime, count: int = 1):
        self.regime, self.count, r = regime, count, regime
        generator = torch.Generator().manual_seed(0)

        def normal(heads, seqlen, dim):
            x = torch.randn(r.batch, heads, seqlen, dim, generator=generator).to(getattr(torch, r.dtype))
            return x.requires_grad_(r.training)

        self.q = normal(r.num_heads, r.seqlen_q, r.head_dim)
        self.k, self.v = (normal(r.num_heads_k, r.seqlen_k, dim) for dim in (r.head_dim, r.head_dim_v))
        self.dout = normal(r.num_heads, r.seqlen_q, r.head_dim_v).detach()

    def __str__(self) -> str:
        return str(self.regime)

    @property
    def spec(self) -> dict:
        """The regime as plain values: what `compare` joins by."""
        return self.regime._asdict() | {"window": list(self.regime.window)}

    @cached_property
    def seen(self) -> torch.Tensor:
        """bool [seqlen_q, seqlen_k]: what the window leaves."""
        r = self.regime
        distance = torch.arange(r.seqlen_k) - torch.arange(r.seqlen_q)[:, None] - (r.seqlen_k - r.seqlen_q)
        left, right = (r.seqlen_q + r.seqlen_k if side is None else side for side in r.window)
        return (distance >= -left) & (distance <= right)

    @property
    def flops(self) -> int:
        """Of the matrix products over the pairs that are seen: two forward, five more backward."""
        r = self.regime
        forward, backward = r.head_dim + r.head_dim_v, 3 * r.head_dim + 2 * r.head_dim_v
        return 2 * int(self.seen.sum()) * r.batch * r.num_heads * (forward + backward * r.training)

    @property
    def bytes(self) -> int:
        """Of inputs and outputs, once for each pass: what must be moved if all else stays in caches."""
        q, k, v, out = (x.numel() * x.element_size() for x in (self.q, self.k, self.v, self.dout))
        return q + k + v + out + (2 * (q + k + v) + 2 * out) * self.regime.training

    @cached_property
    def options(self) -> dict:
        """Arguments of `attention` beside q, k, v."""
        r, options = self.regime, {}
        if r.blocks:
            options["mask"] = sliding_window(r.seqlen_q, r.seqlen_k, left=r.window[0], right=r.window[1])
        elif r.window != (None, None):
            options |= {"causal": True} if r.window == _CAUSAL else {"window_size": r.window}
        if r.mask == "tensor":
            options["mask"] = torch.ones(1, 1, r.seqlen_q, r.seqlen_k, dtype=torch.bool)
        if r.mask == "interval":
            options["mask"] = Mask.lengths(torch.full((r.batch,), r.seqlen_k))
        if r.bias:
            options["bias"] = torch.zeros(1, 1, r.seqlen_q, r.seqlen_k, dtype=self.q.dtype)
        options |= {"alibi_slopes": torch.full((r.num_heads,), 0.1)} if r.alibi else {}
        options |= {"sinks": torch.zeros(r.num_heads)} if r.sinks else {}
        return options | ({"softcap": 30.0} if r.softcap else {})

    def ours(self) -> torch.Tensor:
        """out of `fastattn.attention`."""
        return attention(self.q, self.k, self.v, **self.options, dropout_p=0.1 * self.regime.dropout, seed=0)

    @property
    def torchs(self) -> Callable | None:
        """The same of torch's SDPA, where it has arguments for it."""
        r = self.regime
        if r.alibi or r.softcap or r.sinks or r.dropout:
            return None
        square_causal = r.window == _CAUSAL and r.seqlen_q == r.seqlen_k and not r.bias
        free = square_causal or r.window == (None, None)
        mask = self.options.get("bias") if free else self.seen
        if r.bias and not free:
            mask = torch.zeros(self.seen.shape, dtype=self.q.dtype).masked_fill(~self.seen, -torch.inf)
        grouped = {"enable_gqa": True} if r.num_heads != r.num_heads_k else {}  # torch 2.4 has none
        return lambda: functional.scaled_dot_product_attention(
            self.q, self.k, self.v, attn_mask=mask, is_causal=square_causal, **grouped
        )

    def timed(self, forward: Callable) -> Callable:
        """What is timed of `ours` or `torchs`: the call, with its backward pass where it trains."""
        if not self.regime.training:
            return forward
        return lambda: torch.autograd.grad(forward(), (self.q, self.k, self.v), self.dout)

    def error(self, forward: Callable) -> float:
        """Largest difference from float64, of the last rows of the first group, or of all its rows with gradients."""
        r, group = self.regime, self.regime.num_heads // self.regime.num_heads_k
        if r.dropout:
            return 0.0  # depends on the seed alone; tests compare it
        rows = slice(None) if r.training else slice(-CHECKED_ROWS, None)
        q, k, v = (x.detach()[:1, :heads].double() for x, heads in ((self.q, group), (self.k, 1), (self.v, 1)))
        q, k, v = (x.requires_grad_(r.training) for x in (q[:, :, rows], k, v))
        options = {name: x[:group] for name, x in self.options.items() if name in ("alibi_slopes", "sinks")}
        options |= {"softcap": 30.0} if r.softcap else {}
        mask = self.seen[rows][None, None]
        exact = attention(q, k, v, mask=mask, backend="reference", **options)
        results, expected = [forward()[:1, :group, rows]], [exact]
        if r.training:
            dq, dk, dv = self.timed(forward)()
            results += [dq[:1, :group], dk[:1, :1], dv[:1, :1]]
            expected += torch.autograd.grad(exact, (q, k, v), self.dout[:1, :group].double())
        pairs = zip(results, expected, strict=True)
        return max((float((a.double() - b).detach().abs().max()) for a, b in pairs if b.numel()), default=0.0)
