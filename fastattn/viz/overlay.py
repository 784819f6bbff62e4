"""`overlay()`: where in an image a query looks."""

from collections.abc import Sequence

import torch

from ..checks import check_int, check_tensors
from .figures import panels, plain
from .weights import check_labels, check_weights


def overlay(
    image: torch.Tensor,
    weights: torch.Tensor,
    grid: tuple[int, int],
    *,
    num_prefix_tokens: int = 0,
    query: int | None = None,
    titles: Sequence[str] | None = None,
):
    """A figure of an image with the weights of one query over it, a panel a head, and the image alone first.

    image              [height, width, 3], float from 0 to 1 or uint8
    weights            [heads, keys] or [keys], float, 0 ... 1: one row of each head, as a vision transformer's
    grid               (rows, columns) of the patches; keys = num_prefix_tokens + rows * columns, row by row
    num_prefix_tokens  keys before the patches (class token, registers), which have no place in the image
    query              the patch whose row it is, 0 ... rows * columns - 1, is marked; None: no patch (a class token)
    titles             of the heads' panels; None: "head 0", ... with the share that falls on patches

    Each panel has its own colour scale, up to its largest weight. Returns a `matplotlib.figure.Figure`. Raises
    TypeError or ValueError that names the argument, ImportError without matplotlib.
    """
    weights = check_weights("weights", weights, "heads keys", "keys")
    weights = weights.reshape(-1, weights.shape[-1])
    check_tensors(image=image)
    if image.dim() != 3 or image.shape[2] != 3 or 0 in image.shape:
        raise ValueError(f"image has shape {tuple(image.shape)}; it must be [height, width, 3]")
    if image.is_floating_point() and not (image.min() >= 0.0 and image.max() <= 1.0):
        raise ValueError(f"image has values from {image.min():g} to {image.max():g}; floats must be from 0 to 1")
    if not image.is_floating_point() and image.dtype != torch.uint8:
        raise TypeError(f"image has dtype {image.dtype}; it must be uint8, or floats from 0 to 1")
    rows, columns = (check_int(f"grid[{i}]", size, 1) for i, size in enumerate(grid))
    patches, found = rows * columns, weights.shape[1]
    if check_int("num_prefix_tokens", num_prefix_tokens) + patches != found:
        raise ValueError(
            f"weights have {found} keys; with grid={(rows, columns)} and num_prefix_tokens={num_prefix_tokens} they "
            f"must have {num_prefix_tokens + patches}"
        )
    if query is not None and check_int("query", query) >= patches:
        raise ValueError(f"query={query} must be a patch, below {patches}")
    maps = weights[:, num_prefix_tokens:].reshape(-1, rows, columns)
    if titles is None:
        titles = [f"head {head}: {share:.0%} on patches" for head, share in enumerate(maps.sum((1, 2)).tolist())]
    titles = check_labels("titles", titles, len(maps), "weights.shape[0]")

    height, width = image.shape[:2]
    figure, (first, *others) = panels(1 + len(maps), 2.6, 2.6 * height / width + 0.3)
    shown = image.detach().cpu()
    first.imshow(shown.float().numpy() if shown.is_floating_point() else shown.numpy())
    first.set_title("image", fontsize=9)
    grey = shown.float().mean(-1).numpy()
    for panel, values, title in zip(others, maps, titles, strict=True):
        panel.imshow(grey, cmap="gray", extent=(0, width, height, 0))
        panel.imshow(
            values.numpy(), cmap="inferno", alpha=0.65, extent=(0, width, height, 0), interpolation="bilinear", vmin=0.0
        )
        panel.set_title(plain(title), fontsize=9)
    if query is not None:
        for panel in (first, *others):
            x, y = (query % columns + 0.5) * width / columns, (query // columns + 0.5) * height / rows
            panel.plot([x], [y], marker="s", markersize=7, markerfacecolor="none", markeredgecolor="cyan")
    for panel in (first, *others):
        panel.set_axis_off()
    return figure
