"""Figures of matplotlib, which is imported when one is drawn, and not through pyplot: nothing global changes."""

from .weights import grid_of


def new_figure(width: float, height: float):
    """An empty figure of so many inches; ImportError that says what to install."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(f"{error}. Pictures are drawn by matplotlib: pip install matplotlib") from error
    return Figure(figsize=(width, height), layout="constrained")


def panels(count: int, width: float, height: float):
    """A figure of `count` panels of so many inches, and its axes, in order."""
    rows, columns = grid_of(count)
    figure = new_figure(width * columns, height * rows)
    axes = figure.subplots(rows, columns, squeeze=False).flatten().tolist()
    for unused in axes[count:]:
        unused.remove()
    return figure, axes[:count]


def plain(text: str) -> str:
    """`text` as matplotlib shows it: a dollar sign does not start a formula, ends of lines are seen."""
    return text.replace("$", r"\$").replace("\n", "⏎")
