"""`python -m fastattn look MODEL "a sentence"`: the page of token links of a transformers model on disk."""

import os
from pathlib import Path

import torch

from .. import viz
from ..seeing.capture import capture

MOST_TOKENS = 512


def add_arguments(parser) -> None:
    parser.add_argument("model", type=Path, help="folder of a transformers model with its tokenizer")
    parser.add_argument("sentence", help=f"text; its first {MOST_TOKENS} tokens are shown")
    parser.add_argument("--out", type=Path, default=Path("look.html"), help="the page (default: look.html)")


def run(options) -> int:
    page, what = page_of(options.model, options.sentence)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(page, encoding="utf-8")
    print(f"{options.out}: {what}")
    return 0


def page_of(folder: Path, sentence: str) -> tuple[str, str]:
    """(the page, what it shows). ValueError for a folder that is none, or an empty sentence."""
    if not folder.is_dir():
        raise ValueError(f"model={str(folder)!r} is no folder; it must hold a transformers model (save_pretrained)")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # everything is on disk
    try:
        from transformers import AutoModel, AutoTokenizer
    except ImportError as error:
        raise SystemExit(f"{error}. look loads models with transformers: pip install transformers") from error
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    model = AutoModel.from_pretrained(folder, local_files_only=True).eval()
    if model.config.is_encoder_decoder:
        model = model.get_encoder()
    most = min(MOST_TOKENS, tokenizer.model_max_length)
    ids = tokenizer(sentence, return_tensors="pt", truncation=True, max_length=most)["input_ids"]
    if not ids.shape[1]:
        raise ValueError(f"sentence={sentence!r} has no tokens")
    weights = [layer[0] for layer in attentions(model, {"input_ids": ids})]
    title = f"{folder.resolve().name}: {sentence if len(sentence) <= 60 else sentence[:59] + '…'}"
    page = viz.links(weights, names_of(tokenizer, ids[0].tolist()), title=title)
    return page, f"{ids.shape[1]} tokens, {len(weights)} layers, {weights[0].shape[0]} heads"


def attentions(model: torch.nn.Module, inputs: dict) -> list[torch.Tensor]:
    """Weights [batch, heads, rows, keys] of each layer of self-attention of a transformers model.

    They are captured while the model runs on fastattn. A model that computes attention itself gives its own.
    """
    from ..integrations import transformers as integration

    integration.register()
    try:
        model.set_attn_implementation("fastattn")
    except ValueError:
        return _own_attentions(model, inputs)
    with torch.no_grad(), capture(model) as seen:
        model(**inputs)
    return [call.weights for call in seen]


def _own_attentions(model: torch.nn.Module, inputs: dict) -> list[torch.Tensor]:
    model.set_attn_implementation("eager")
    with torch.no_grad():
        found = model(**inputs, output_attentions=True).attentions
    if not found or any(layer is None for layer in found):
        raise ValueError(f"{type(model).__name__} returns no attention weights")
    return list(found)


def names_of(tokenizer, ids: list[int]) -> list[str]:
    """What each token reads as; a space before a word belongs to its token."""
    names = []
    for number, token in zip(ids, tokenizer.convert_ids_to_tokens(ids), strict=True):
        is_marked = token.startswith("▁")  # sentencepiece's space, which decode drops
        names.append(" " + token[1:] if is_marked else tokenizer.decode([number]))
    return names
