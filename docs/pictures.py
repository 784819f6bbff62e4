"""The pictures of docs/self_attention.md: `python docs/pictures.py [out]` draws them into docs/pictures/.

Each shows the weights of one toy sequence under one variant, as `fastattn.attention_weights` gives them. With a folder,
in which examples/look.py has left its pictures, those are made small as well.
"""

import sys
from collections.abc import Callable
from pathlib import Path

import torch
from PIL import Image

import fastattn
from fastattn import Mask, patterns, viz

FOLDER = Path(__file__).with_name("pictures")
TOKENS = 48


def tokens(heads: int, seqlen: int, seed: int) -> torch.Tensor:
    return torch.randn(1, heads, seqlen, 16, generator=torch.Generator().manual_seed(seed))


def weights(
    *, heads: int = 1, heads_k: int | None = None, seqlen: int = TOKENS, seqlen_q: int | None = None, **options
):
    """[heads, seqlen_q, seqlen] of random q and k, small enough that the shape of a variant is seen."""
    q, k = tokens(heads, seqlen_q or seqlen, 0), tokens(heads_k or heads, seqlen, 1)
    return fastattn.attention_weights(0.7 * q, k, **options)[0]


def near(seqlen: int) -> torch.Tensor:
    """Lists of a graph, as a bool mask: each node sees itself and 4 others."""
    others = torch.randint(seqlen, (seqlen, 4), generator=torch.Generator().manual_seed(2))
    return torch.zeros(seqlen, seqlen).scatter(1, others, 1.0).bool() | torch.eye(seqlen).bool()


def learned_bias() -> torch.Tensor:
    """As a model might learn it: the token before counts, and what is 8 tokens back."""
    distance = torch.arange(TOKENS)[:, None] - torch.arange(TOKENS)
    return 3.0 * (distance == 1) + 2.0 * (distance == 8)


def dropped() -> torch.Tensor:
    found = weights(causal=True)
    kept = fastattn.dropout_mask(1, 1, TOKENS, TOKENS, dropout_p=0.3, seed=0)[0]
    return torch.where(kept, found, 0.0)


def selected() -> torch.Tensor:
    q, k = tokens(1, 256, 0) + 1.0, tokens(1, 256, 1)
    k[:, :, 64:96] += 1.0  # keys that all queries look for
    mask = fastattn.select_blocks(0.7 * q, k, top_k=4, causal=True, block_size=16)
    return fastattn.attention_weights(0.7 * q, k, mask=mask, causal=True)[0]


SLOPES, SCALES, SINKS = (0.5, 0.25, 0.125, 0.0625), (0.03, 0.25, 1.0, 4.0), (-10.0, 5.0)
DOCUMENTS = torch.repeat_interleave(torch.arange(3), torch.tensor([20, 10, 18]))[None]

VARIANTS: dict[str, Callable[[], torch.Tensor]] = {
    "self": weights,
    "multi_head": lambda: weights(heads=4),
    "grouped": lambda: weights(heads=4, heads_k=2),
    "cross": lambda: weights(seqlen_q=12),
    "temperature": lambda: weights(heads=4, softmax_scale=torch.tensor(SCALES)),
    "softcap": lambda: weights(softmax_scale=2.0, softcap=3.0),
    "sinks": lambda: weights(heads=2, sinks=torch.tensor(SINKS)),
    "causal": lambda: weights(causal=True),
    "window": lambda: weights(window_size=(6, 2)),
    "lengths": lambda: weights(mask=Mask.lengths(torch.tensor([30]))),
    "documents": lambda: weights(mask=Mask.documents(DOCUMENTS), causal=True),
    "prefix_lm": lambda: weights(mask=patterns.prefix_lm(torch.tensor([10]), TOKENS, block_size=16)),
    "alibi": lambda: weights(heads=4, causal=True, alibi_slopes=torch.tensor(SLOPES)),
    "bias": lambda: weights(bias=learned_bias()),
    "dropout": dropped,
    "dilated": lambda: weights(mask=patterns.dilated_window(TOKENS, left=4, right=4, dilation=3, block_size=16)),
    "strided": lambda: weights(mask=patterns.strided(TOKENS, stride=6, block_size=16)),
    "longformer": lambda: weights(mask=patterns.longformer(TOKENS, window=6, tokens=2, block_size=16)),
    "bigbird": lambda: weights(seqlen=256, mask=patterns.bigbird(256, block_size=16)),
    "streaming": lambda: weights(mask=patterns.streaming(TOKENS, num_sinks=2, window=8, block_size=16)),
    "neighborhood": lambda: weights(seqlen=64, mask=patterns.neighborhood((8, 8), kernel_size=3, block_size=16)),
    "selected": selected,
    "graph": lambda: weights(mask=near(TOKENS)),
}


TITLES = {
    "grouped": [f"head {head}, keys of {head // 2}" for head in range(4)],
    "temperature": [f"scale {scale:g}" for scale in SCALES],
    "sinks": [f"sink {sink:g}" for sink in SINKS],
    "alibi": [f"slope {slope:g}" for slope in SLOPES],
}


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    for name, weights_of in VARIANTS.items():
        shown = weights_of()
        titles = TITLES.get(name, [f"head {head}" for head in range(4)] if len(shown) > 1 else [""])
        viz.heat_map(shown, titles=titles).savefig(FOLDER / f"{name}.png", dpi=55)
    for path in Path(sys.argv[1]).glob("look_*.png") if sys.argv[1:] else ():
        for side in (1000, 800, 600, 500):
            picture = Image.open(path).convert("RGB")
            picture.thumbnail((side, side))
            picture.quantize(64).save(FOLDER / path.name, optimize=True)
            if (FOLDER / path.name).stat().st_size < 60_000:
                break


if __name__ == "__main__":
    main()
