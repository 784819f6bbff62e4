"""`links()`: one HTML page on which a token shows what it attends to."""

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch

from ..checks import check_int
from .packing import pack
from .weights import check_labels

PAGE = Path(__file__).with_name("page.html")


def links(
    weights: torch.Tensor | Iterable[torch.Tensor],
    rows: Sequence[str],
    keys: Sequence[str] | None = None,
    *,
    title: str = "What attends to what",
    limit: int = 8 * 2**20,
) -> str:
    """The text of a page that shows the weights of every layer and head, one token at a time.

    weights  [layers, heads, rows, keys], or an iterable of [heads, rows, keys], one a layer; float, 0 ... 1
    rows     names of the queries; as they stand, so a name may carry the space before its word
    keys     names of the keys, where they are other tokens than the rows (cross-attention, chosen rows); None: the rows
    title    of the page
    limit    size of the page in bytes, at most

    The page is one file. It needs no network and asks for none (its own policy forbids it), and any browser since
    2023 opens it. Hover or focus a token to see what it attends to, or what attends to it; click to hold it. One layer
    and head, several or all may be chosen: their mean is shown. Weights are stored to 8 bits, and only the largest of
    each row if the page would be larger than `limit`; the page says how many, and how exactly.

    Returns a str, to be written with encoding="utf-8". Raises TypeError or ValueError that names the argument.
    """
    if isinstance(weights, torch.Tensor) and weights.dim() != 4:
        raise ValueError(f"weights has shape {tuple(weights.shape)}; it must be [layers, heads, rows, keys]")
    if not isinstance(title, str):
        raise TypeError(f"title={title!r} must be a string")
    rows, keys = list(rows), None if keys is None else list(keys)
    page = PAGE.read_text(encoding="utf-8")
    described = {"title": title, "rows": rows, "keys": keys}
    room = check_int("limit", limit, 1) - len(_filled(page, described, "").encode()) - 100  # the numbers of `described`
    packed = pack(weights, room)
    _, _, num_rows, num_keys = packed.shape
    check_labels("rows", rows, num_rows, "weights.shape[-2]")
    check_labels("keys (None: the rows)", rows if keys is None else keys, num_keys, "weights.shape[-1]")
    described |= {"shape": packed.shape, "kept": packed.kept, "error": round(packed.error, 4)}
    return _filled(page, described, packed.data)


def _filled(page: str, described: dict, data: str) -> str:
    # In a script element only "<" could end it; JSON may write it as an escape.
    about = json.dumps(described, ensure_ascii=False).replace("<", "\\u003c")
    start, middle, end = re.split("{{about}}|{{weights}}", page)
    return f"{start}{about}{middle}{data}{end}"
