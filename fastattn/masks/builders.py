"""What makes a BlockMask, by methods of its own, as operators of graphs."""

from collections.abc import Callable
from functools import wraps
from types import SimpleNamespace

import torch

from . import blocks, flex
from .block_mask import BlockMask, build
from .graphs import in_graphs, is_in_graph, of_lengths

_of_self: Callable = lambda given: (given["self"].seq_lengths, given["self"].BLOCK_SIZE)  # noqa: E731
_BUILDERS = {
    "from_mask": of_lengths,
    "from_bsr": of_lengths,
    "from_csr": of_lengths,
    "from_coo": of_lengths,
    "from_dense": lambda given: (given["mask"].shape[2:], given["block_size"]),
    "from_tokens": lambda given: ((given["queries"].shape[0], given["keys"].shape[0]), given["block_size"]),
    "cat": lambda given: (given["masks"][0].seq_lengths, given["masks"][0].BLOCK_SIZE),
}
_METHODS = {
    "__and__": _of_self,
    "__rand__": _of_self,
    "__or__": _of_self,
    "__invert__": _of_self,
    "reblock": lambda given: (given["self"].seq_lengths, given["block_size"]),
    "transpose": lambda given: (given["self"].seq_lengths[::-1], given["self"].BLOCK_SIZE[::-1]),
}


def trace_as_operators() -> None:
    """Let graphs hold what makes a BlockMask as operators."""
    for name, sizes in _BUILDERS.items():
        setattr(BlockMask, name, staticmethod(in_graphs(sizes)(getattr(BlockMask, name))))
    for name, sizes in _METHODS.items():
        setattr(BlockMask, name, in_graphs(sizes)(getattr(BlockMask, name)))
    BlockMask.from_mask_mod = staticmethod(_instead(BlockMask.from_mask_mod, _from_mask_mod))
    BlockMask.from_flex = staticmethod(_instead(BlockMask.from_flex, _from_flex))
    BlockMask.where = _instead(BlockMask.where, _where)
    BlockMask.__post_init__ = _instead(BlockMask.__post_init__, _post_init)


def _instead(function: Callable, in_graph: Callable) -> Callable:
    """`function`, in whose place graphs hold what `in_graph` consists of."""

    @wraps(function)
    def run(*args, **kwargs):
        return (in_graph if is_in_graph() else function)(*args, **kwargs)

    return run


# --- with functions among their arguments, of which an operator has none: they are evaluated for all pairs ------------


def _from_mask_mod(fn, *, batch=1, num_heads=1, seqlen_q, seqlen_k=None, block_size=128, device=None) -> BlockMask:
    seen = _evaluated(fn, (batch, num_heads, seqlen_q, seqlen_q if seqlen_k is None else seqlen_k), device)
    return BlockMask.from_dense(seen, block_size=block_size)


def _where(self, fn, *, by_distance: bool = False) -> BlockMask:
    return self & BlockMask.from_dense(_evaluated(fn, self.shape, self.device), block_size=self.BLOCK_SIZE)


def _from_flex(block_mask) -> BlockMask:
    shape = *block_mask.kv_num_blocks.shape[:2], *block_mask.seq_lengths
    return _of_lists(
        block_mask.kv_num_blocks, block_mask.kv_indices, block_mask.full_kv_num_blocks, block_mask.full_kv_indices,
        _evaluated(block_mask.mask_mod, shape, block_mask.kv_num_blocks.device), block_mask.BLOCK_SIZE,
    )  # fmt: skip


@in_graphs(lambda given: (given["seen"].shape[2:], given["block_size"]))
def _of_lists(kv_num_blocks, kv_indices, full_kv_num_blocks, full_kv_indices, seen, block_size) -> BlockMask:
    """The mask of FlexAttention's lists, where `seen` [batch, num_heads, seqlen_q, seqlen_k] stands for mask_mod."""
    lists = SimpleNamespace(
        kv_num_blocks=kv_num_blocks, kv_indices=kv_indices, full_kv_num_blocks=full_kv_num_blocks,
        full_kv_indices=full_kv_indices, mask_mod=lambda b, h, i, j: seen[b, h, i, j], BLOCK_SIZE=block_size,
        seq_lengths=tuple(seen.shape[2:]),
    )  # fmt: skip
    return build(*flex.blocks_of(lists))


def _evaluated(fn: Callable, shape: tuple[int, int, int, int], device) -> torch.Tensor:
    """The predicate for all pairs, bool tensor of `shape`."""
    places = [torch.arange(size, device=device) for size in shape]
    seen = fn(*[place.view([-1 if i == dim else 1 for i in range(4)]) for dim, place in enumerate(places)])
    return blocks.check_predicate(seen, shape)


# --- lists that somebody else has made --------------------------------------------------------------------------------


def _post_init(self) -> None:
    names = self.__match_args__
    checked = _checked(**{name: getattr(self, name) for name in names})
    for name in names:
        object.__setattr__(self, name, getattr(checked, name))


_checked = in_graphs(lambda given: (given["seq_lengths"], given["BLOCK_SIZE"]))(BlockMask)
