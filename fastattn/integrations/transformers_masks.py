"""transformers' masks as intervals: which of its mask functions are recognised, and the tensor that holds one."""

from typing import NamedTuple

import torch
from torch.utils._pytree import tree_map_only
from transformers import masking_utils

from ..masks.block_mask import BlockMask
from ..masks.intervals import Mask, Window


class IntervalMask(torch.Tensor):
    """A bool mask [batch, 1, seqlen_q, seqlen_k] that stores only the `Mask` or `BlockMask` it stands for.

    A tensor, because models slice masks, join them, test them with isinstance and move them. The first operation on
    it, in-place or not, forms the full tensor, which from then on is the value: nothing that a model does to its mask
    gets lost. value is the mask, or that tensor. Only `attention_forward` may take it to `fastattn.attention`.
    """

    value: Mask | BlockMask | torch.Tensor

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, mask: Mask | BlockMask, shape: tuple[int, ...], device: torch.device | str):
        self = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=torch.bool, device=device)
        self.value = mask
        return self

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        args, kwargs = tree_map_only(cls, cls._form, (args, kwargs or {}))
        return func(*args, **kwargs)

    def _form(self) -> torch.Tensor:
        if not isinstance(self.value, torch.Tensor):
            lengths = (*self.shape[2:], self.device) if isinstance(self.value, Mask) else ()
            self.value = self.value.to_dense(*lengths).expand(self.shape).contiguous()
        return self.value

    def __repr__(self) -> str:
        return f"IntervalMask({self.value!r}, shape={tuple(self.shape)})"


class Reach(NamedTuple):
    """The query at position p sees keys at p - left ... p + right, both inclusive; None is unbounded."""

    left: int | None
    right: int | None


def reach_of(mask_function) -> Reach | None:
    """The reach of one of transformers' own mask functions; None if it is not certain to be nothing but that."""
    rule = _RULES.get(code_of(mask_function))
    return None if rule is None else rule(**captured(mask_function))


def code_of(mask_function):
    """The code object, which only that one line of transformers has; None if there is none."""
    return getattr(mask_function, "__code__", None)


def captured(mask_function) -> dict:
    """The variables that the function closes over."""
    values = [cell.cell_contents for cell in mask_function.__closure__ or ()]
    return dict(zip(code_of(mask_function).co_freevars, values, strict=True))


def _causal_window(sliding_window) -> Reach | None:
    return Reach(sliding_window - 1, None) if type(sliding_window) is int and sliding_window > 0 else None


def _two_sided_window(sliding_window) -> Reach | None:
    return Reach(sliding_window, sliding_window) if type(sliding_window) is int and sliding_window > 0 else None


def _intersection(mask_functions) -> Reach | None:
    reaches = [reach_of(function) for function in mask_functions]
    if any(reach is None for reach in reaches):
        return None
    lefts = [reach.left for reach in reaches if reach.left is not None]
    rights = [reach.right for reach in reaches if reach.right is not None]
    return Reach(min(lefts, default=None), min(rights, default=None))


def _agrees(mask_function, reach: Reach, size: int = 9) -> bool:
    """Whether `mask_function` really has that reach, on a size x size grid."""
    zero, position = torch.zeros(1, 1, dtype=torch.int64, device="cpu"), torch.arange(size, device="cpu")
    visible = mask_function(zero, zero, position[:, None], position[None, :]).expand(size, size)
    distance = position[None, :] - position[:, None]
    left, right = (size if bound is None else bound for bound in reach)
    return torch.equal(visible, (distance >= -left) & (distance <= right))


def _recognised() -> dict:
    """Code object of transformers' own patterns -> function from the values that the pattern closes over to its reach.

    Each pattern is tried out first: if a release changes what it means, it is no longer recognised, and its masks
    become bool tensors.
    """
    causal, full = masking_utils.causal_mask_function, masking_utils.bidirectional_mask_function
    window, two_sided = masking_utils.sliding_window_overlay, masking_utils.sliding_window_bidirectional_overlay
    rules = {}
    for rule, examples in (
        (lambda: Reach(None, 0), {causal: Reach(None, 0)}),
        (lambda: Reach(None, None), {full: Reach(None, None)}),
        (_causal_window, {window(size): Reach(size - 1, None) for size in (1, 2, 5)}),
        (_two_sided_window, {two_sided(size): Reach(size, size) for size in (1, 2, 5)}),
        (_intersection, {masking_utils.and_masks(window(3), causal): Reach(2, 0)}),
    ):
        if all(_agrees(function, reach) for function, reach in examples.items()):
            rules |= {function.__code__: rule for function in examples}
    return rules


_RULES = _recognised()


class Padding(NamedTuple):
    """Each entry of the batch has one run of tokens, keys start ... end - 1."""

    start: list[int]
    end: list[int]


def padding_of(tokens: torch.Tensor) -> Padding | None:
    """The run of True in each row of a bool tensor [batch, keys]; None if a row has gaps."""
    batch, length = tokens.shape
    if not length or tokens.all():
        return Padding([0] * batch, [length] * batch)
    numbers = tokens.view(torch.uint8)
    found = torch.stack([numbers.argmax(1), numbers.flip(1).argmax(1), tokens.sum(1)]).tolist()
    ends = [start + count for start, _, count in zip(*found, strict=True)]
    if any(count and end != length - after for end, after, count in zip(ends, *found[1:], strict=True)):
        return None
    return Padding(found[0], ends)


def interval_mask(
    reach: Reach, padding: Padding | None, q_length: int, kv_length: int, shift: int, device, bounds: Mask | None = None
) -> Mask:
    """`reach`, `padding` and `bounds` as a `Mask` without bounds that bind nothing; query i stands at key i + shift."""
    lo = None if reach.left is None or shift - reach.left <= 1 - q_length else shift - reach.left
    hi = None if reach.right is None or shift + reach.right >= kv_length - 1 else shift + reach.right
    k_start = k_end = None
    if padding is not None:
        limit = kv_length if hi is None else q_length + hi
        if any(padding.start):
            k_start = torch.tensor(padding.start, dtype=torch.int32, device=device)[:, None, None]
        if min(padding.end, default=limit) < limit:
            k_end = torch.tensor(padding.end, dtype=torch.int32, device=device)[:, None, None]
    windows = ()
    if shift == kv_length - q_length:
        windows = (Window(None if lo is None else reach.left, None if hi is None else reach.right),)
    elif (lo is None or lo <= 0) and (hi is None or hi >= 0):
        windows = (Window(None if lo is None else -lo, hi, "top_left"),)
    else:
        row = torch.arange(q_length, device=device)[None, None]
        rows = Mask.intervals(None if lo is None else row + lo, None if hi is None else row + hi + 1)
        bounds = rows if bounds is None else bounds & rows
    mask = Mask(windows if lo is not None or hi is not None else (), k_start, k_end)
    return mask if bounds is None else mask & bounds


def is_plain(mask: Mask | BlockMask, is_causal: bool, q_length: int, kv_length: int) -> bool:
    """Whether `attention_forward` does the same without `mask`."""
    if isinstance(mask, BlockMask) or mask.k_start is not None or mask.k_end is not None:
        return False
    if is_causal and q_length > 1:
        return q_length == kv_length and mask.windows == (Window(None, 0),)
    return not mask.windows
