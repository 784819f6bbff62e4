"""Tables of biases of windows of tokens on a grid: Swin's, with any number of dimensions, and BEiT's."""

import math

import torch

from ..scores.relative import RelativeBias
from .arguments import check_grid, check_heads, check_table, compute_dtype


class WindowTable(RelativeBias):
    """A number of a table, for each head, for each pair of tokens of one window."""

    def __init__(self, name: str, table: torch.Tensor, window: tuple[int, ...], extra: int):
        self.name, self.table, self.window, self.extra = name, table, window, extra

    def terms(self, q, k):
        check_heads(self.name, "table", self.table.shape[1], q)
        tokens = math.prod(self.window) + (1 if self.extra else 0)
        if not q.shape[2] == k.shape[2] == tokens:
            raise ValueError(
                f"{self.name}: seqlen_q={q.shape[2]} and seqlen_k={k.shape[2]} must be {tokens}, the tokens of a "
                f"window of {' x '.join(map(str, self.window))}{' and the class token' if self.extra else ''}"
            )
        # Only the window is squared here: all windows, in the batch, share it.
        return {"bias": self.table.t()[:, self.index()].to(compute_dtype(q))}

    def index(self) -> torch.Tensor:
        """[tokens, tokens]: the row of the table for each query and key."""
        grid = torch.stack(torch.meshgrid(*[torch.arange(side) for side in self.window], indexing="ij")).flatten(1)
        sides = torch.tensor(self.window)[:, None, None]
        offsets = grid[:, :, None] - grid[:, None, :] + sides - 1
        index = torch.zeros_like(offsets[0])
        for side, offset in zip(self.window, offsets, strict=True):
            index = index * (2 * side - 1) + offset
        if self.extra:
            index = torch.nn.functional.pad(index, (1, 0, 1, 0))
            last = len(self.table)
            index[0, :], index[:, 0], index[0, 0] = last - 3, last - 2, last - 1
        return index.to(self.table.device)


def swin(table: torch.Tensor, window: int | tuple[int, ...]) -> RelativeBias:
    """Swin's bias of the offset between two tokens of a window on a grid (arXiv 2103.14030).

    table    float [(2 h - 1) * (2 w - 1), num_heads], Swin's `relative_position_bias_table`; what Swin v2's network of
             the offsets returns (arXiv 2111.09883, after 16 * sigmoid) is one, too
    window   (h, w), or one int for both; three and more sides are boxes, as in Video Swin (arXiv 2106.13230)

    Queries and keys are the h * w tokens of a window, row by row, windows lie in the batch. The bias is
    [num_heads, h * w, h * w], once for all windows: squared in the window, linear in the image. Raises TypeError or
    ValueError that names the argument.
    """
    return _window("swin", table, window, 0)


def beit(table: torch.Tensor, window: int | tuple[int, ...]) -> RelativeBias:
    """BEiT's bias: that of `swin` over the whole image, and three numbers a head for the class token, which is the
    first (arXiv 2106.08254).

    table    float [(2 h - 1) * (2 w - 1) + 3, num_heads]; its last rows are for class token to patch, patch to class
             token, and class token to itself
    window   (h, w) patches, or one int for both

    The bias is [num_heads, n, n] with n = 1 + h * w, once for the batch. Raises TypeError or ValueError that names the
    argument.
    """
    return _window("beit", table, window, 3)


def _window(name: str, table, window, extra: int) -> WindowTable:
    check_table(name, "table", table, "[offsets, num_heads]")
    window = check_grid(name, "window", window)
    rows = math.prod([2 * side - 1 for side in window]) + extra
    if len(table) != rows:
        text = " * ".join(f"(2 * {side} - 1)" for side in window) + (f" + {extra}" if extra else "")
        raise ValueError(f"{name}: table has {len(table)} rows; with window={window} it must have {text} = {rows}")
    return WindowTable(name, table, window, extra)
