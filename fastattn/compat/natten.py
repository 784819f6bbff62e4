"""natten's functions na1d, na2d and na3d (0.21), argument by argument (behind backend by name), on any device, forward
and backward.

kernel_size, stride, dilation, is_causal
    one value, or one for each axis. Every token sees kernel_size tokens along each axis, `dilation` apart; windows are
    shifted at borders, not cut. `stride` tokens, one after the other, share the window of the middle one. Causal
    windows end at the token itself, begin where that of the last of `stride` tokens does, and are cut at the border
scale             factor of the scores, default head_dim ** -0.5
additional_keys, additional_values
                  [batch, tokens, heads_kv, head_dim], [batch, tokens, heads_kv, head_dim_v]: every query sees them too
rpb               of natten before 0.20: [heads, 2 * kernel_size - 1, ...], one axis for each of the tokens; its entry
                  at (key - query) / dilation + kernel_size - 1 is added to the scaled score. Differentiable. Not with
                  stride or is_causal, as there
return_lse        also return the log of the softmax denominator, [batch, ..., heads]
backend           one of fastattn's, None: the best; natten's own names are refused
q_tile_shape ... torch_compile
                  say how to compute, not what: every value gives the same result here

Memory is O(tokens), and of lists of blocks that a kind of call makes once and keeps for the latest 32 kinds; with rpb
O(heads * tokens * neighbours). Under torch.compile a call breaks no graph, but with rpb.
"""

import functools
import math

import torch

from ..api import attention
from ..checks import check_flag, check_tensors, one_line
from ..dispatch import BACKENDS, UnsupportedError
from ..layouts.csr import attention_csr
from ..masks.graphs import is_in_graph
from ..masks.neighborhoods import neighbors, per_axis, relative_lists
from ..merging import merge
from ..patterns import neighborhood

__all__ = ["na1d", "na2d", "na3d"]


def na1d(
    query, key, value, kernel_size, stride=1, dilation=1, is_causal=False, scale=None, additional_keys=None,
    additional_values=None, attention_kwargs=None, backend=None, *, rpb=None, return_lse=False, **how,
):  # fmt: skip
    """Neighborhood attention along a line (arXiv 2204.07143).

    query       [batch, length, heads, head_dim], any strides; float32, bfloat16, float16 or float64
    key, value  [batch, length, heads_kv, head_dim], [batch, length, heads_kv, head_dim_v]; heads is a multiple of
                heads_kv
    Others: see the module.

    Returns [batch, length, heads, head_dim_v] in query's dtype, with return_lse (out, lse [batch, length, heads]).

    Raises TypeError or ValueError that names the argument; `UnsupportedError` for attention_kwargs, for natten's
    backends, and for rpb with stride or is_causal.
    """
    return _attend(1, **locals())


def na2d(
    query, key, value, kernel_size, stride=1, dilation=1, is_causal=False, scale=None, additional_keys=None,
    additional_values=None, attention_kwargs=None, backend=None, *, rpb=None, return_lse=False, **how,
):  # fmt: skip
    """`na1d` for images: query [batch, height, width, heads, head_dim], key and value likewise (arXiv 2204.07143)."""
    return _attend(2, **locals())


def na3d(
    query, key, value, kernel_size, stride=1, dilation=1, is_causal=False, scale=None, additional_keys=None,
    additional_values=None, attention_kwargs=None, backend=None, *, rpb=None, return_lse=False, **how,
):  # fmt: skip
    """`na1d` for videos: query [batch, frames, height, width, heads, head_dim], key and value likewise
    (arXiv 2204.07143)."""
    return _attend(3, **locals())


_HOW = (
    "q_tile_shape", "kv_tile_shape", "backward_q_tile_shape", "backward_kv_tile_shape", "backward_kv_splits",
    "backward_use_pt_reduction", "run_persistent_kernel", "kernel_schedule", "torch_compile",
)  # fmt: skip


def _attend(
    axes: int, *, query, key, value, kernel_size, stride, dilation, is_causal, scale, additional_keys,
    additional_values, attention_kwargs, backend, rpb, return_lse, how,
):  # fmt: skip
    for name in how:
        if name not in _HOW:
            raise TypeError(f"na{axes}d() got an unexpected keyword argument {name!r}")
    shape = _checked_shape(axes, query, key, value)
    if attention_kwargs:
        raise UnsupportedError(f"attention_kwargs={one_line(attention_kwargs)} is not supported: leave it out")
    if backend is not None and backend not in BACKENDS:
        raise UnsupportedError(
            f"backend={one_line(backend)} is not here: leave it out, or name one of fastattn's ({', '.join(BACKENDS)})"
        )
    return_lse = check_flag("return_lse", return_lse)
    stride, dilation = (1 if x is None else x for x in (stride, dilation))
    kinds = {"kernel_size": kernel_size, "dilation": dilation, "is_causal": is_causal or False, "stride": stride}
    sizes, steps, causal, strides = (per_axis(name, x, axes) for name, x in kinds.items())
    causal = tuple(check_flag("is_causal", x) for x in causal)
    more = _checked_more(query, key, value, additional_keys, additional_values)
    options = {"softmax_scale": scale, "backend": backend, "return_lse": return_lse or more is not None}
    q, k, v = (_heads_first(x, axes) for x in (query, key, value))
    if rpb is not None:
        found = _with_table(q, k, v, rpb, shape, sizes, steps, causal, strides, options)
    else:
        mask = (_mask_of if is_in_graph() else _kept_mask)(shape, sizes, steps, causal, strides)
        found = attention(q, k, v, mask=mask.to(q.device), **options)
    if more is not None:
        k, v = (x.transpose(1, 2) for x in more)
        found = merge(*zip(found, attention(q, k, v, **options), strict=True))
    if return_lse:
        return tuple(x.transpose(1, 2).unflatten(1, shape) for x in found)
    out = found if more is None else found[0]
    return out.transpose(1, 2).unflatten(1, shape)


def _heads_first(x: torch.Tensor, axes: int) -> torch.Tensor:
    """[batch, heads, tokens, dim] of [batch, *axes, heads, dim]."""
    return x.flatten(1, axes).transpose(1, 2)


def _mask_of(shape, sizes, steps, causal, strides):
    return neighborhood(shape, kernel_size=sizes, dilation=steps, causal=causal, stride=strides)


_kept_mask = functools.lru_cache(maxsize=32)(_mask_of)


@functools.lru_cache(maxsize=32)
def _lists(shape, sizes, steps) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(indptr, indices, places in the table) of the edges of neighbourhoods."""
    axes = [neighbors(*axis, False) for axis in zip(shape, sizes, steps, strict=True)]
    keys, table = relative_lists(shape, axes, sizes, steps)
    indptr = torch.arange(len(keys) + 1) * keys.shape[1]
    return indptr, keys.flatten(), table.flatten()


def _with_table(q, k, v, rpb, shape, sizes, steps, causal, strides, options):
    """Attention along the edges of neighbourhoods, each with its entry of the table."""
    check_tensors(rpb=rpb)
    expected = (q.shape[1], *(2 * size - 1 for size in sizes))
    if tuple(rpb.shape) != expected:
        raise ValueError(f"rpb has shape {tuple(rpb.shape)}; it must be [heads, 2 * kernel_size - 1, ...], {expected}")
    if any(causal) or any(step != 1 for step in strides):
        raise UnsupportedError(
            f"rpb with is_causal={causal}, stride={strides} is not supported (natten: neither): leave one of them out"
        )
    indptr, indices, places = (x.to(q.device) for x in _lists(shape, sizes, steps))
    return attention_csr(q, k, v, indptr, indices, edge_bias=rpb.flatten(1)[:, places], **options)


def _checked_shape(axes: int, query, key, value) -> tuple[int, ...]:
    """The tokens along each axis; TypeError or ValueError in natten's layout."""
    tensors = {"query": query, "key": key, "value": value}
    check_tensors(**tensors)
    names = ("length",), ("height", "width"), ("frames", "height", "width")
    layout = f"[batch, {', '.join(names[axes - 1])}, heads, head_dim]"
    for name, x in tensors.items():
        if x.dim() != axes + 3:
            raise ValueError(f"{name} has shape {tuple(x.shape)}; it must be {layout}")
        if x.shape[: axes + 1] != query.shape[: axes + 1]:
            raise ValueError(
                f"{name} has shape {tuple(x.shape)}, query {tuple(query.shape)}; batch and axes must agree in {layout}"
            )
    if key.shape[-2] != value.shape[-2] or not key.shape[-2] or query.shape[-2] % key.shape[-2]:
        raise ValueError(
            f"query, key, value have {query.shape[-2]}, {key.shape[-2]}, {value.shape[-2]} heads; the last two must "
            "agree and divide the first"
        )
    if math.prod(query.shape[1:-2]) == 0:
        raise ValueError(f"query has shape {tuple(query.shape)}; each axis must have a token")
    return tuple(query.shape[1:-2])


def _checked_more(query, key, value, additional_keys, additional_values):
    """The additional keys and values, or None; TypeError or ValueError."""
    if additional_keys is None and additional_values is None:
        return None
    more = {"additional_keys": additional_keys, "additional_values": additional_values}
    check_tensors(**more)
    for (name, x), like in zip(more.items(), (key, value), strict=True):
        expected = query.shape[0], additional_keys.shape[1] if additional_keys.dim() > 1 else 0, *like.shape[-2:]
        if tuple(x.shape) != expected:
            raise ValueError(
                f"{name} has shape {tuple(x.shape)}; it must be [batch, tokens, heads_kv, head_dim], here {expected}"
            )
    return additional_keys, additional_values
