"""Weights of all layers, heads and queries in a few MiB: the largest of each row, to 8 bits, deflated."""

import base64
import zlib
from collections.abc import Iterable
from typing import NamedTuple

import torch

from .weights import check_weights


class Packed(NamedTuple):
    """Weights for the page.

    shape   (layers, heads, rows, keys)
    kept    weights kept of a row, at most; those below 2^-18 or so are 0 and not kept
    error   largest difference of a kept weight from what it is stored as
    data    base64 of a zlib stream; inflated: for each row of each head of each layer how many weights it has (uint16,
            the low bytes of all, then the high bytes), for each weight the distance of its key from the one before
            (the same), and the rounded 255 * sqrt(weight) (uint8)
    """

    shape: tuple[int, int, int, int]
    kept: int
    error: float
    data: str


class _Layer(NamedTuple):
    """Of each row, the largest weights, falling: rounded 255 * sqrt(weight) and key."""

    codes: torch.Tensor  # uint8 [heads, rows, kept]
    keys: torch.Tensor  # int32 [heads, rows, kept]
    shape: tuple[int, int, int]
    error: float


def pack(layers: Iterable[torch.Tensor], limit: int) -> Packed:
    """The weights [heads, rows, keys] of each layer in at most `limit` characters, as many a row as fit.

    `layers` is read once, so that they may be computed one at a time. ValueError where a row of one weight is too much.
    """
    found, kept, count = [], None, len(layers) if hasattr(layers, "__len__") else 1
    for i, weights in enumerate(layers):
        weights = check_weights(f"weights[{i}]", weights, "heads rows keys")
        if found and weights.shape != found[0].shape:
            first, other = tuple(found[0].shape), tuple(weights.shape)
            raise ValueError(f"weights[{i}] has shape {other}, weights[0] {first}; layers must be alike")
        if weights.shape[-1] >= 2**16:
            raise ValueError(f"weights[{i}] has {weights.shape[-1]} keys; a page holds at most 65535")
        if kept is None:  # more than fit: a kept weight takes some 1.5 characters
            kept = min(weights.shape[-1], max(1, 2 * limit // (count * weights.shape[0] * weights.shape[1])))
        found.append(_largest(weights, kept))
    if not found:
        raise ValueError("weights has no layers: there is nothing to show")
    kept, _ = _fitted(found[:1], kept, limit / len(found))  # the first layer alone is the quick guess
    kept, data = _fitted(found, kept, limit)
    if len(data) > limit:
        raise ValueError(f"limit leaves {limit} characters for the weights; a single weight a row takes {len(data)}")
    return Packed((len(found), *found[0].shape), kept, max(layer.error for layer in found), data.decode())


def _fitted(layers: list[_Layer], kept: int, limit: float) -> tuple[int, bytes]:
    """Weights a row, about as many of `kept` as take at most `limit` characters, at least 1; and those characters."""
    while len(data := base64.b64encode(_deflated(layers, kept))) > limit and kept > 1:
        kept = min(kept - 1, max(1, int(kept * 0.98 * limit / len(data))))
    return kept, data


def _largest(weights: torch.Tensor, kept: int) -> _Layer:
    values, keys = weights.topk(kept, dim=-1)
    codes = values.sqrt().mul(255.0).round().clamp_max(255.0)
    error = ((codes / 255.0) ** 2 - values).abs().max().item()
    return _Layer(codes.to(torch.uint8), keys.to(torch.int32), tuple(weights.shape), error)


def _deflated(layers: list[_Layer], kept: int) -> bytes:
    """The stream of `Packed.data` with at most `kept` weights a row."""
    counts, gaps, codes = [], [], []
    for layer in layers:
        keys, order = layer.keys[..., :kept].sort(dim=-1)
        code = layer.codes[..., :kept].gather(-1, order)
        seen = code > 0
        # A key that is not kept leaves no gap of its own: the next one counts from the last that is.
        last = torch.where(seen, keys, -1).cummax(-1).values
        before = torch.nn.functional.pad(last[..., :-1], (1, 0), value=0).clamp_min(0)
        counts.append(seen.sum(-1).flatten())
        gaps.append((keys - before)[seen])
        codes.append(code[seen])
    streams = [_bytes(byte) for x in (counts, gaps) for byte in _low_and_high(torch.cat(x))]
    return zlib.compress(b"".join([*streams, _bytes(torch.cat(codes))]), 6)


def _low_and_high(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return (x & 255).to(torch.uint8), (x >> 8).to(torch.uint8)


def _bytes(x: torch.Tensor) -> bytes:
    return x.numpy().tobytes()
