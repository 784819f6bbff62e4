"""`alignment()`: speech against its transcript."""

from collections.abc import Sequence

import torch

from ..checks import check_real, check_tensors
from .aligning import align
from .figures import new_figure, plain
from .weights import check_labels, check_weights


def alignment(
    weights: torch.Tensor, tokens: Sequence[str], seconds: float, *, waveform: torch.Tensor | None = None
):  # fmt: skip
    """A figure of cross-attention over time: a row a token, with the seconds that `align` gives each token.

    weights   [tokens, frames] or [heads, tokens, frames], float, 0 ... 1; heads are averaged
    tokens    their names
    seconds   that the frames last, all together
    waveform  [samples], float: the sound of those seconds, drawn above; None: none

    Returns a `matplotlib.figure.Figure`. Raises TypeError or ValueError that names the argument, ImportError without
    matplotlib.
    """
    weights = check_weights("weights", weights, "heads tokens frames", "tokens frames")
    borders = align(weights)
    weights = weights.reshape(-1, *weights.shape[-2:]).mean(0)
    count, frames = weights.shape
    tokens = check_labels("tokens", tokens, count, "weights.shape[-2]")
    if check_real("seconds", seconds) <= 0.0:
        raise ValueError(f"seconds={seconds} must be > 0")
    sound = None
    if waveform is not None:
        check_tensors(waveform=waveform)
        if waveform.dim() != 1 or not len(waveform) or not waveform.is_floating_point():
            raise ValueError(f"waveform is {waveform.dtype} {tuple(waveform.shape)}; it must be floats, [samples]")
        sound = waveform.detach().cpu().float()

    height = 1.2 + 0.2 * count
    figure = new_figure(9.0, height + (1.0 if sound is not None else 0.0))
    if sound is None:
        panel = figure.subplots()
    else:
        above, panel = figure.subplots(2, 1, sharex=True, height_ratios=(1.0, height))
        above.plot(torch.linspace(0.0, seconds, len(sound)).numpy(), sound.numpy(), linewidth=0.4, color="tab:gray")
        above.set_yticks([])
    # Rows over their own largest weight: a token that looks at many frames is seen as well.
    image = panel.imshow(
        (weights / weights.amax(1, keepdim=True).clamp_min(1e-30)).numpy(), aspect="auto", cmap="magma_r",
        extent=(0.0, seconds, count - 0.5, -0.5), interpolation="nearest",
    )  # fmt: skip
    times = (borders * (seconds / frames)).tolist()
    for token, (start, end) in enumerate(zip(times[:-1], times[1:], strict=True)):
        panel.plot([start, start, end, end], [token - 0.5, token, token, token + 0.5], color="tab:blue", linewidth=1.5)
    panel.set_yticks(range(count), [plain(token) for token in tokens], fontsize=8)
    panel.set(xlabel="seconds", xlim=(0.0, seconds), ylim=(count - 0.5, -0.5))
    figure.colorbar(image, ax=panel, label="weight / the token's largest", pad=0.01)
    return figure
