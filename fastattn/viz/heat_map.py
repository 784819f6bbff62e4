"""`heat_map()`: which tokens attend to which, a panel a head."""

from collections.abc import Sequence

import torch

from .figures import panels, plain
from .weights import check_labels, check_weights

MOST_LABELS = 40
"""With more tokens than these, the axes count instead of naming them."""


def heat_map(
    weights: torch.Tensor,
    rows: Sequence[str] | None = None,
    keys: Sequence[str] | None = None,
    *,
    titles: Sequence[str] | None = None,
):
    """A figure of the weights: a row a query, a column a key, a panel a head, one colour scale for all.

    weights  [heads, rows, keys] or [rows, keys], float, 0 ... 1
    rows     names of the queries; None counts them
    keys     names of the keys; None: those of the rows where there are as many of both, else it counts them
    titles   of the panels; None: "head 0", "head 1", ...

    Returns a `matplotlib.figure.Figure`. Raises TypeError or ValueError that names the argument, ImportError without
    matplotlib. Colours grow with the weight up to the largest one shown; up to 40 tokens are named on the axes.
    """
    weights = check_weights("weights", weights, "heads rows keys", "rows keys")
    single, weights = weights.dim() == 2, weights.reshape(-1, *weights.shape[-2:])
    heads, num_rows, num_keys = weights.shape
    if keys is None and num_rows == num_keys:
        keys = rows
    rows = check_labels("rows", rows, num_rows, "weights.shape[-2]")
    keys = check_labels("keys", keys, num_keys, "weights.shape[-1]")
    titles = [""] if single and titles is None else check_labels("titles", titles, heads, "weights.shape[0]")
    if heads > 1 and all(map(str.isdigit, titles)):
        titles = [f"head {title}" for title in titles]

    named = max(num_rows, num_keys) <= MOST_LABELS
    side = max(2.2, 0.17 * max(num_rows, num_keys)) if named else 3.2
    width, height = (side * min(1.0, max(0.4, n / max(num_rows, num_keys))) for n in (num_keys, num_rows))
    figure, axes = panels(heads, width + 1.0, height + 1.0)
    for panel, values, title in zip(axes, weights, titles, strict=True):
        image = panel.imshow(values.numpy(), vmin=0.0, vmax=weights.max().item(), cmap="magma_r", aspect="auto")
        panel.set_title(plain(title), fontsize=9)
        if named:
            panel.set_xticks(range(num_keys), [plain(key) for key in keys], rotation=90, fontsize=7)
            panel.set_yticks(range(num_rows), [plain(row) for row in rows], fontsize=7)
        panel.set(xlabel="key", ylabel="query")
        panel.label_outer()
    figure.colorbar(image, ax=axes, label="attention weight", shrink=0.8)
    return figure
