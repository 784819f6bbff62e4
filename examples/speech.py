"""Which vowel is spoken: frames that see a tenth of a second around them, beside frames that see the whole recording.

    python examples/speech.py --out out            needs: pip install "fastattn[demo]"

The sound is synthesised: vowels of 60 to 200 ms, each a voice of random pitch through three formants (the means that
Peterson and Barney measured in 1952, 5 % off from speaker to speaker), in noise as loud as the voice. Two small
transformers learn to name the vowel of each frame of 10 ms from recordings of 1 s, and are tested on recordings of
10 s. In one, with Whisper's sinusoidal positions, each frame attends to all; in its twin to the 10 before and after
(`window_size=(10, 10)`), which needs no positions, costs the same for each second however long it listens, and hears
more.
"""

from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from training import Sinusoids, Size, Transformer, arguments, figure_of, save, tell, train

import fastattn

PLAIN, OURS = "the whole recording", "a window"
# Formants in Hz, of the vowels of heed, hid, head, had, hod, hawed, hood, who'd.
VOWELS = {
    "i": (270, 2290, 3010), "ɪ": (390, 1990, 2550), "ɛ": (530, 1840, 2480), "æ": (660, 1720, 2410),
    "ɑ": (730, 1090, 2440), "ɔ": (570, 840, 2410), "ʊ": (440, 1020, 2240), "u": (300, 870, 2240),
}  # fmt: skip
RATE, HOP, BINS = 8000, 80, 40
WIDTH, HEADS, LAYERS, WINDOW = 32, 2, 2, 10
SIZE = Size(steps=200, quick_steps=10)


class Recordings(NamedTuple):
    """spectra: float32 [batch, frames, BINS], log power; vowels: int64 [batch, frames]."""

    spectra: torch.Tensor
    vowels: torch.Tensor


def record(batch: int, seconds: int, generator: torch.Generator) -> Recordings:
    frames = seconds * RATE // HOP
    vowels = torch.stack([random_vowels(frames, generator) for _ in range(batch)])
    speaker = 1.0 + 0.05 * torch.randn(batch, 1, 3, generator=generator)
    formants = torch.tensor([*VOWELS.values()], dtype=torch.float32)[vowels] * speaker  # [batch, frames, 3]
    pitch = 100.0 + 100.0 * torch.rand(batch, 1, generator=generator)
    harmonics = torch.arange(1, 31)
    heard = harmonics * pitch[:, :, None]  # Hz, [batch, 1, 30]
    # Resonances 80 Hz wide, over a voice that falls with the frequency.
    gains = (1.0 / (1.0 + ((heard[..., None] - formants[:, :, None]) / 80.0) ** 2)).sum(-1) / harmonics**0.5
    gains = gains.masked_fill(heard >= RATE / 2, 0.0).repeat_interleave(HOP, dim=1)
    time = torch.arange(frames * HOP) / RATE
    phases = 2.0 * torch.pi * torch.rand(batch, 1, len(harmonics), generator=generator)
    voice = (gains * torch.sin(2.0 * torch.pi * heard * time[None, :, None] + phases)).sum(-1)
    sound = voice / voice.std(1, keepdim=True) + torch.randn(voice.shape, generator=generator)
    power = torch.stft(sound, 4 * HOP, HOP, window=torch.hann_window(4 * HOP), return_complex=True).abs() ** 2
    power = power[:, : 4 * BINS, :frames].unflatten(1, (BINS, 4)).mean(2)
    return Recordings(power.mT.add(1e-3).log() - 2.0, vowels)


def random_vowels(frames: int, generator: torch.Generator) -> torch.Tensor:
    """Of each frame; each lasts 6 to 20 frames."""
    lengths = torch.randint(6, 21, (frames // 6 + 1,), generator=generator)
    return torch.randint(len(VOWELS), lengths.shape, generator=generator).repeat_interleave(lengths)[:frames]


def models() -> dict[str, Transformer]:
    made = {}
    for name in (PLAIN, OURS):
        torch.manual_seed(0)
        embed, attend = nn.Linear(BINS, WIDTH), fastattn.attention
        if name == PLAIN:
            embed = Sinusoids(embed, WIDTH)
        else:
            attend = partial(attend, window_size=(WINDOW, WINDOW))
        made[name] = Transformer(embed, WIDTH, HEADS, [attend] * LAYERS, len(VOWELS))
    return made


class Outcome(NamedTuple):
    """accuracy: of frames, by model and seconds of the recording."""

    losses: dict[str, list[float]]
    accuracy: dict[str, dict[int, float]]


def main(argv: list[str] | None = None) -> Outcome:
    options = arguments(__doc__, SIZE, argv)
    both = models()
    losses = train(
        both, lambda model, batch: F.cross_entropy(model(batch.spectra).mT, batch.vowels), partial(record, 16, 1),
        options.steps,
    )  # fmt: skip
    guesses, accuracy = {}, {name: {} for name in both}
    for seconds in (1, 10):
        tested = record(20 // seconds, seconds, torch.Generator().manual_seed(1))
        for name, model in both.items():
            with torch.no_grad():
                guesses[name] = model(tested.spectra).argmax(-1)
            accuracy[name][seconds] = (guesses[name] == tested.vowels).float().mean().item()
    pairs = {PLAIN: 1.0, OURS: (2 * WINDOW + 1) / 1000}
    tell(
        f"Vowels in noise, {options.steps} steps on recordings of 1 s; frames named rightly",
        {name: (f"{found[1]:.1%}", f"{found[10]:.1%}", f"{pairs[name]:.0%}") for name, found in accuracy.items()},
        ("of 1 s", "of 10 s", "pairs of frames seen in 10 s"),
    )

    figure, (panel,) = figure_of(losses, (2.2,))
    shown = slice(700, 900)
    panel.imshow(
        tested.spectra[0, shown].T.numpy(), origin="lower", aspect="auto", cmap="gray_r", extent=(7.0, 9.0, 0.0, 4.0)
    )
    named = {"spoken": tested.vowels, **guesses}
    for row, (name, vowels) in enumerate(named.items()):
        top = 5.6 - 0.5 * row
        panel.imshow(
            vowels[:1, shown].numpy(), aspect="auto", cmap="Set2", vmin=0, vmax=7, extent=(7.0, 9.0, top - 0.4, top)
        )
        panel.text(9.02, top - 0.2, name, va="center", fontsize=8)
    panel.set(xlabel="seconds of a recording of 10", ylabel="kHz", yticks=range(5), ylim=(0.0, 5.7), xlim=(7.0, 9.0))
    panel.set_title("spectrum, and above it the vowels: a colour each", fontsize=9)
    save(figure, options.out / "speech.png")
    return Outcome(losses, accuracy)


if __name__ == "__main__":
    main()
