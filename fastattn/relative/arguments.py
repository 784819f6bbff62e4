"""Checks that the builders share."""

import torch

from ..checks import check_int, dtype_name, one_line
from ..scores import FLOATS


def compute_dtype(q: torch.Tensor) -> torch.dtype:
    """Of what is added to the scores."""
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def check_table(function: str, argument: str, x, *shapes: str) -> None:
    """TypeError or ValueError unless `x` is a float tensor with the rank of one of `shapes`, "[a, b]" as text."""
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"{function}: {argument} must be a torch.Tensor {' or '.join(shapes)}, got {type(x).__name__}")
    if dtype_name(x.dtype) not in FLOATS:
        raise TypeError(f"{function}: {argument} has dtype {x.dtype}; supported are {', '.join(FLOATS)}")
    if x.dim() not in [shape.count(",") + 1 for shape in shapes]:
        raise ValueError(f"{function}: {argument} has shape {tuple(x.shape)}; it must be {' or '.join(shapes)}")


def check_heads(function: str, argument: str, heads: int, q: torch.Tensor) -> None:
    """ValueError unless a table of so many heads fits q, or is shared by all heads."""
    if heads not in (1, q.shape[1]):
        raise ValueError(f"{function}: {argument} is of {heads} heads; q has num_heads={q.shape[1]} (1 is shared)")


def check_grid(function: str, argument: str, grid, dims: int | None = None) -> tuple[int, ...]:
    """Side lengths as a tuple; one int is a square (or `dims` equal sides). TypeError or ValueError."""
    grid = (grid,) * (dims or 2) if isinstance(grid, int) and not isinstance(grid, bool) else grid
    if not isinstance(grid, (tuple, list, torch.Size)) or not grid or (dims and len(grid) != dims):
        raise TypeError(f"{function}: {argument}={one_line(grid)} must be an int or a tuple of side lengths")
    return tuple(check_int(f"{function}: {argument}", side, 1) for side in grid)
