"""What every picture asks of its weights and labels."""

import math
from collections.abc import Sequence

import torch

from ..checks import check_tensors, one_line


def check_weights(name: str, weights: torch.Tensor, *shapes: str) -> torch.Tensor:
    """`weights` as float32 on the CPU, without a gradient. `shapes`: names of dimensions, as in "heads rows keys".

    TypeError unless a tensor of floats; ValueError unless it has one of the shapes, no size of 0, and probabilities.
    """
    check_tensors(**{name: weights})
    if not weights.is_floating_point():
        raise TypeError(f"{name} has dtype {weights.dtype}; attention weights are floats")
    if weights.dim() not in [len(shape.split()) for shape in shapes]:
        rule = " or ".join("[" + ", ".join(shape.split()) + "]" for shape in shapes)
        raise ValueError(f"{name} has shape {tuple(weights.shape)}; it must be {rule}")
    if 0 in weights.shape:
        raise ValueError(f"{name} has shape {tuple(weights.shape)}: there is nothing to show")
    weights = weights.detach().to("cpu", torch.float32)
    low, high = (x.item() for x in weights.aminmax())
    if not (low >= 0.0 and high <= 1.001):  # NaN is neither; half precision rounds 1 up
        raise ValueError(f"{name} has values from {low:g} to {high:g}; weights are probabilities, from 0 to 1")
    return weights


def check_labels(name: str, labels: Sequence[str] | None, count: int, of: str) -> list[str]:
    """`labels` as a list, numbers from 0 for None; ValueError unless there are `count`."""
    if labels is None:
        return [str(i) for i in range(count)]
    if isinstance(labels, str) or not all(isinstance(label, str) for label in labels):
        raise TypeError(f"{name}={one_line(labels)} must be a list of strings")
    if len(labels) != count:
        raise ValueError(f"{name} has {len(labels)} labels, but {of} has {count}; they must be as many")
    return list(labels)


def grid_of(count: int) -> tuple[int, int]:
    """Rows and columns of a grid of `count` panels: at least as wide as high, with few places empty."""
    root = math.sqrt(count)
    columns = min(range(math.ceil(root), math.ceil(1.7 * root) + 1), key=lambda n: -count % n)
    return math.ceil(count / columns), columns
