"""Models of transformers on fastattn and on torch's attention in turn: whole forwards, attention alone, overhead.

    python bench/models.py [--threads 2] [--budget 20]

The weights are random, the sizes those of all-MiniLM-L6-v2, DINOv2 ViT-S/14 and Whisper tiny. Outputs are compared
first. Exit status 1: a figure misses its target.
"""

import argparse
import copy
import sys
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
import transformers

import fastattn
from fastattn.cli.timing import Contender, in_turn
from fastattn.integrations import transformers as integration

WHOLE, ALONE, OVERHEAD, MASK = "whole forward, x sdpa", "attention alone, x sdpa", "tiny calls, x sdpa", "mask, MiB"


class Model(NamedTuple):
    """A model, how it is called, and its attention: [batch, num_heads, seqlen, head_dim], tokens bool or None."""

    model: torch.nn.Module
    inputs: dict
    shape: tuple[int, int, int, int]
    tokens: torch.Tensor | None
    targets: dict[str, float]  # at least


def minilm() -> Model:
    """32 texts of up to 256 tokens, padded."""
    config = transformers.BertConfig(
        hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536
    )
    tokens = torch.arange(256) < torch.linspace(64, 256, 32).long()[:, None]
    inputs = {"input_ids": torch.randint(1000, 30000, (32, 256)), "attention_mask": tokens.long()}
    return Model(transformers.BertModel(config), inputs, (32, 12, 256, 32), tokens, {ALONE: 1.3, WHOLE: 1.0})


def dinov2() -> Model:
    """518 x 518 pixels: 1369 patches and a class token."""
    config = transformers.Dinov2Config(
        hidden_size=384, num_hidden_layers=12, num_attention_heads=6, image_size=518, patch_size=14
    )
    model, inputs = transformers.Dinov2Model(config), {"pixel_values": torch.randn(1, 3, 518, 518)}
    return Model(model, inputs, (1, 6, 1370, 64), None, {ALONE: 1.25, WHOLE: 1.0})


def whisper() -> Model:
    """30 seconds of sound."""
    config = transformers.WhisperConfig(d_model=384, encoder_layers=4, encoder_attention_heads=6, encoder_ffn_dim=1536)
    model = transformers.models.whisper.modeling_whisper.WhisperEncoder(config)
    return Model(model, {"input_features": torch.randn(1, 80, 3000)}, (1, 6, 1500, 64), None, {ALONE: 1.25, WHOLE: 1.0})


def tiny() -> Model:
    """Twelve layers that have next to nothing to compute: the time is that of calls."""
    config = transformers.LlamaConfig(
        vocab_size=99, hidden_size=16, intermediate_size=16, num_hidden_layers=12, num_attention_heads=2
    )
    model, inputs = transformers.LlamaModel(config), {"input_ids": torch.randint(99, (1, 4)), "use_cache": False}
    return Model(model, inputs, (1, 2, 4, 8), None, {OVERHEAD: 1.0})


def forward(model: torch.nn.Module, inputs: dict, implementation: str) -> Callable:
    """A forward of a copy of the model on that implementation."""
    model = copy.deepcopy(model).eval()
    model.set_attn_implementation(implementation)
    return lambda: model(**inputs).last_hidden_state


def best_ratio(functions: dict[str, Callable], threads: int, budget: float) -> float:
    """Least time of "sdpa" over least time of "fastattn"."""
    times = in_turn({name: Contender(function, threads) for name, function in functions.items()}, budget)
    return min(times["sdpa"]) / min(times["fastattn"])


def figures(case: Model, threads: int, budget: float) -> dict[str, float]:
    """The figures that the model has targets for."""
    whole = {name: forward(case.model, case.inputs, name) for name in ("sdpa", "fastattn")}
    keep = torch.ones(case.shape[0], case.shape[2], dtype=torch.bool) if case.tokens is None else case.tokens
    expected, out = (function()[keep] if case.tokens is not None else function() for function in whole.values())
    torch.testing.assert_close(out, expected, rtol=1e-3, atol=1e-3)
    q, k, v = (torch.randn(case.shape) for _ in range(3))
    mask = None if case.tokens is None else fastattn.Mask.padding(keep)
    bool_mask = None if case.tokens is None else keep[:, None, None].expand(-1, 1, keep.shape[1], -1).contiguous()
    alone = {
        "sdpa": lambda: F.scaled_dot_product_attention(q, k, v, attn_mask=bool_mask),
        "fastattn": lambda: fastattn.attention(q, k, v, mask=mask),
    }
    functions = {WHOLE: whole, OVERHEAD: whole, ALONE: alone}
    return {what: best_ratio(functions[what], threads, budget) for what in case.targets}


def mask_mib(seqlen: int = 32768) -> float:
    """Memory of the mask of a padded batch of two."""
    tokens = torch.arange(seqlen) >= torch.tensor([[0], [5000]])
    mask = integration.make_mask(2, seqlen, seqlen, attention_mask=tokens).value
    return sum(bound.nbytes for bound in (mask.k_start, mask.k_end) if bound is not None) / 2**20


@torch.no_grad()
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--budget", type=float, default=20.0, help="seconds for each figure")
    options = parser.parse_args()
    integration.register()
    torch.set_num_threads(options.threads)
    missed = 0
    for make in (minilm, dinov2, whisper, tiny):
        torch.manual_seed(0)
        case = make()
        for what, found in figures(case, options.threads, options.budget).items():
            bound = case.targets[what]
            missed += found < bound
            print(f"{make.__name__}: {what} {found:.2f}, at least {bound}{' MISSED' * (found < bound)}", flush=True)
    size = mask_mib()
    print(f"padded batch of two at 32768 tokens: {MASK} {size:.6f}, at most 1")
    return int(missed > 0 or size > 1.0)


if __name__ == "__main__":
    sys.exit(main())
