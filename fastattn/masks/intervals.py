"""`Mask`: which keys each query sees, as loop bounds instead of an n x n tensor.

Every mask here is an interval of keys for each query: diagonal bounds (causal, window) intersected with per-row
bounds (padding, documents, prefix-LM). Kernels turn it into the range of key blocks that a query block visits;
`to_dense` is what the reference uses, so there is no second source of truth.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch.compiler import is_dynamo_compiling

from ..checks import one_line

UNBOUNDED = 1 << 40  # a diagonal offset beyond any sequence; fits every integer type the kernels use
NO_BOUNDS = (-UNBOUNDED, UNBOUNDED)
ALIGNMENTS = ("bottom_right", "top_left")


class Window(NamedTuple):
    """Query i sees keys i + offset - left ... i + offset + right, both inclusive; None is unbounded.

    offset is seqlen_k - seqlen_q for "bottom_right" (the last query lines up with the last key: flash-attn's rule,
    what decoding with a cache needs) and 0 for "top_left" (torch's rule for is_causal).
    """

    left: int | None
    right: int | None
    alignment: str = "bottom_right"


def check_window(window_size, argument: str = "window_size") -> tuple[int | None, int | None]:
    """`window_size` as a tuple (left, right) of ints >= 0 or None; raises TypeError or ValueError otherwise."""
    if not isinstance(window_size, (tuple, list)) or len(window_size) != 2:
        raise TypeError(
            f"{argument}={one_line(window_size)} must be a pair (left, right) of inclusive counts; "
            f"for the last n keys of each query write {argument}=(n - 1, 0)"
        )
    for side, value in zip(("left", "right"), window_size, strict=True):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
            raise TypeError(
                f"{argument}={one_line(window_size)}: {side} must be an int >= 0 or None, got {one_line(value)}"
            )
        if value is not None and value < 0:
            raise ValueError(
                f"{argument}={tuple(window_size)}: {side} must be >= 0; use None for unbounded (flash-attn's -1)"
            )
    return tuple(window_size)


def diagonal_bounds(windows: tuple[Window, ...], seqlen_q: int, seqlen_k: int) -> tuple[int, int]:
    """(lo, hi) such that all `windows` together allow exactly lo <= key - query <= hi; +-UNBOUNDED where open."""
    lo, hi = NO_BOUNDS
    for left, right, alignment in windows:
        offset = seqlen_k - seqlen_q if alignment == "bottom_right" else 0
        if left is not None and offset - left > lo:
            lo = offset - left
        if right is not None and offset + right < hi:
            hi = offset + right
    return lo, hi


@dataclass(frozen=True, eq=False)
class Mask:
    """An interval of keys for each query. Build it with the class methods and combine with `&`.

    windows   diagonal bounds, see `Window`
    k_start   int32, broadcastable to [batch, num_heads, seqlen_q]: first key that a query sees; None: 0
    k_end     int32, likewise: one past the last key; None: seqlen_k

    With seqlen_q=3, seqlen_k=5, `Mask.causal()` and `Mask.causal("top_left")` are

        bottom_right   1 1 1 0 0        top_left   1 0 0 0 0
                       1 1 1 1 0                   1 1 0 0 0
                       1 1 1 1 1                   1 1 1 0 0
    """

    windows: tuple[Window, ...] = ()
    k_start: torch.Tensor | None = None
    k_end: torch.Tensor | None = None

    def __post_init__(self):
        for name in ("k_start", "k_end"):
            object.__setattr__(self, name, _bounds(getattr(self, name), name))

    @classmethod
    def causal(cls, alignment: str = "bottom_right") -> "Mask":
        """Each query sees the keys up to its own position."""
        return cls.window(None, 0, alignment)

    @classmethod
    def window(cls, left: int | None, right: int | None, alignment: str = "bottom_right") -> "Mask":
        """Each query sees `left` keys before its own position and `right` after it, both inclusive."""
        left, right = check_window((left, right), "window")
        if not isinstance(alignment, str) or alignment not in ALIGNMENTS:
            raise ValueError(f"alignment={one_line(alignment)} must be one of {ALIGNMENTS}")
        return cls(windows=(Window(left, right, alignment),))

    @classmethod
    def intervals(cls, k_start: torch.Tensor | None = None, k_end: torch.Tensor | None = None) -> "Mask":
        """Query row [b, h, i] sees keys k_start[b, h, i] ... k_end[b, h, i] - 1.

        Integer tensors broadcastable to [batch, num_heads, seqlen_q] (three dimensions). Values may lie outside
        0 ... seqlen_k: they are clamped. An empty interval masks the row.
        """
        return cls(k_start=k_start, k_end=k_end)

    @classmethod
    def lengths(cls, seqlens_k: torch.Tensor) -> "Mask":
        """Right padding: sequence b has seqlens_k[b] keys (all of them, if that is more). int tensor [batch]."""
        _check_rank("seqlens_k", seqlens_k, "[batch]")
        return cls.intervals(k_end=seqlens_k[:, None, None])

    @classmethod
    def padding(cls, keep: torch.Tensor) -> "Mask":
        """Padding on either side from a bool (or integer 0/1) tensor [batch, seqlen_k], True = token.

        The tokens of each sequence must be contiguous (left padding, right padding or both); ValueError otherwise:
        pass keep[:, None, None, :] as a bool mask then.
        """
        _check_rank("keep", keep, "[batch, seqlen_k]")
        if keep.is_floating_point():  # most likely 0 = token, -inf = padding
            raise TypeError(f"keep has dtype {keep.dtype}; it must be bool or 0/1 (an additive mask goes to bias=)")
        keep = keep.bool()
        count = keep.sum(1, dtype=torch.int32)
        if keep.shape[1] == 0:
            return cls.intervals(k_end=count[:, None, None])
        start = keep.int().argmax(1).int()
        position = torch.arange(keep.shape[1], device=keep.device)
        interval = (position >= start[:, None]) & (position < (start + count)[:, None])
        if is_dynamo_compiling():  # no value is known yet: the graph asks when it runs
            torch._assert_async((interval == keep).all(), "a row of keep has gaps between its tokens (Mask.padding)")
        elif not torch.equal(interval, keep):
            row = int((interval != keep).any(1).nonzero()[0])
            raise ValueError(
                f"keep[{row}] has gaps between its tokens; only one run of True per sequence is an interval "
                "(pass mask=keep[:, None, None, :] for gaps)"
            )
        return cls.intervals(start[:, None, None], (start + count)[:, None, None])

    @classmethod
    def documents(cls, ids_q: torch.Tensor, ids_k: torch.Tensor | None = None) -> "Mask":
        """Packed documents: a query sees the keys with its own document id.

        ids_q int [batch, seqlen_q], ids_k int [batch, seqlen_k] (default: ids_q), each non-decreasing along a
        sequence, so that every document is one interval; ValueError otherwise.
        """
        ids_k = ids_q if ids_k is None else ids_k
        for name, ids in (("ids_q", ids_q), ("ids_k", ids_k)):
            _check_rank(name, ids, "[batch, seqlen]")
            if ids.dtype == torch.bool or ids.is_floating_point():
                raise TypeError(f"{name} has dtype {ids.dtype}; document ids must be integers")
            ascends = (ids[:, 1:] >= ids[:, :-1]).all()
            if is_dynamo_compiling():
                torch._assert_async(ascends, f"{name} must not decrease along a sequence (Mask.documents)")
            elif not ascends:
                raise ValueError(f"{name} must not decrease along a sequence: number the documents in order")
        if ids_q.shape[0] != ids_k.shape[0]:
            raise ValueError(
                f"ids_q has shape {tuple(ids_q.shape)} and ids_k {tuple(ids_k.shape)}; they must have the same batch"
            )
        ids_q, ids_k = ids_q.contiguous(), ids_k.contiguous()
        start = torch.searchsorted(ids_k, ids_q, right=False)
        end = torch.searchsorted(ids_k, ids_q, right=True)
        return cls.intervals(start[:, None, :], end[:, None, :])

    @classmethod
    def prefix_lm(cls, prefix_lengths: torch.Tensor, seqlen_q: int, seqlen_k: int | None = None) -> "Mask":
        """Every query sees the first prefix_lengths[b] keys, and the keys up to its own position (bottom-right).

        prefix_lengths int [batch].
        """
        seqlen_k = seqlen_q if seqlen_k is None else seqlen_k
        _check_rank("prefix_lengths", prefix_lengths, "[batch]")
        own = torch.arange(seqlen_q, device=prefix_lengths.device) + (seqlen_k - seqlen_q + 1)
        return cls.intervals(k_end=torch.maximum(own, prefix_lengths[:, None])[:, None, :])

    def __and__(self, other: "Mask") -> "Mask":
        """The keys that both masks allow."""
        if not isinstance(other, Mask):
            return NotImplemented
        return Mask(
            windows=_merge(self.windows + other.windows),
            k_start=_combine(torch.maximum, self.k_start, other.k_start),
            k_end=_combine(torch.minimum, self.k_end, other.k_end),
        )

    def __bool__(self) -> bool:
        raise TypeError("a Mask has no truth value: combine masks with & (`a and b` would drop a), test `is not None`")

    def to_dense(self, seqlen_q: int, seqlen_k: int, device: torch.device | str | None = None) -> torch.Tensor:
        """The mask as a bool tensor [batch|1, num_heads|1, seqlen_q, seqlen_k], True = attend. O(n^2) memory."""
        bounds = [bound for bound in (self.k_start, self.k_end) if bound is not None]
        device = bounds[0].device if bounds and device is None else device
        lo, hi = diagonal_bounds(self.windows, seqlen_q, seqlen_k)
        return dense(lo, hi, self.k_start, self.k_end, seqlen_q, seqlen_k, device)


def dense(
    lo: int, hi: int, k_start: torch.Tensor | None, k_end: torch.Tensor | None, seqlen_q: int, seqlen_k: int, device
) -> torch.Tensor:
    """Bool [batch|1, num_heads|1, seqlen_q, seqlen_k]: lo <= key - query <= hi and k_start <= key < k_end."""
    query = torch.arange(seqlen_q, device=device)[:, None]
    key = torch.arange(seqlen_k, device=device)[None, :]
    visible = ((key - query >= lo) & (key - query <= hi))[None, None]
    if k_start is not None:
        visible = visible & (key >= k_start.to(device)[..., None])
    if k_end is not None:
        visible = visible & (key < k_end.to(device)[..., None])
    return visible


def _merge(windows: tuple[Window, ...]) -> tuple[Window, ...]:
    merged = []
    for alignment in ALIGNMENTS:
        same = [window for window in windows if window.alignment == alignment]
        if same:
            lefts = [window.left for window in same if window.left is not None]
            rights = [window.right for window in same if window.right is not None]
            merged.append(Window(min(lefts, default=None), min(rights, default=None), alignment))
    return tuple(merged)


def _combine(pick, a: torch.Tensor | None, b: torch.Tensor | None) -> torch.Tensor | None:
    if a is None or b is None:
        return b if a is None else a
    try:
        return pick(a, b)
    except RuntimeError as error:
        shapes = f"{tuple(a.shape)} and {tuple(b.shape)}"
        raise ValueError(f"the two masks have key intervals of shape {shapes}; they must broadcast") from error


def _bounds(tensor: torch.Tensor | None, name: str) -> torch.Tensor | None:
    if tensor is None:
        return None
    _check_rank(name, tensor, "[batch|1, num_heads|1, seqlen_q|1]")
    if tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool:
        raise TypeError(f"{name} has dtype {tensor.dtype}; key indices must be integers")
    return tensor.long().clamp(min=0, max=torch.iinfo(torch.int32).max).int()


def _check_rank(name: str, tensor, expected: str) -> None:
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{name} must be a torch.Tensor {expected}, got {type(tensor).__name__}")
    if tensor.dim() != expected.count(",") + 1:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}; it must be {expected}")
