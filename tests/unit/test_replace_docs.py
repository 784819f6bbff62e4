"""docs/replace.md runs, and what docs/migrate.md says of other packages gives their results."""

import re
from pathlib import Path

import pytest
import torch

import fastattn
import formula
from fastattn import Mask, patterns

DOCS = Path(__file__).parents[2] / "docs"
GENERATOR = torch.Generator().manual_seed(0)
Q, K, V = (torch.randn(2, 4, seqlen, 16, generator=GENERATOR) for seqlen in (20, 30, 30))
KEEP, BIAS = torch.rand(20, 30, generator=GENERATOR) > 0.3, torch.randn(4, 20, 30, generator=GENERATOR)
torch_attention = torch.nn.functional.scaled_dot_product_attention


def test_the_python_of_replace_md_runs_from_top_to_bottom():
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / "replace.md").read_text(), re.S)
    assert len(blocks) == 4
    exec(compile("\n".join(blocks), "replace.md", "exec"), {})


def close(x, y):
    torch.testing.assert_close(x.double(), y.double(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "theirs, ours",
    [
        ({"attn_mask": KEEP}, {"mask": KEEP}),
        ({"attn_mask": BIAS}, {"bias": BIAS}),
        ({"is_causal": True}, {"mask": Mask.causal("top_left")}),
        ({"scale": 0.1}, {"softmax_scale": 0.1}),
    ],
)
def test_rows_of_torch(theirs, ours):
    close(fastattn.attention(Q, K, V, **ours), torch_attention(Q, K, V, **theirs))


def test_rows_of_multihead_attention():
    padding = torch.arange(30) >= torch.tensor([30, 12])[:, None]
    ours = fastattn.attention(Q, K, V, mask=Mask.padding(~padding))
    close(ours, torch_attention(Q, K, V, attn_mask=~padding[:, None, None]))
    weights = fastattn.attention_weights(Q, K, mask=Mask.padding(~padding))
    close(weights @ V, ours)


def test_rows_of_xformers():
    close(fastattn.attention(Q, K, V, causal=True), formula.attention(Q, K, V, causal="bottom_right"))
    close(fastattn.attention(Q, K, V, window_size=(3, 2)), formula.attention(Q, K, V, window=(3, 2)))
    document = torch.repeat_interleave(torch.arange(3), torch.tensor([5, 20, 5]))
    own = document[:, None] == document
    close(fastattn.attention(K, K, V, mask=Mask.documents(document[None])), formula.attention(K, K, V, keep=own))


@pytest.mark.filterwarnings("ignore::UserWarning")  # once in a process, that it is not compiled
def test_rows_of_flex_attention():
    flex = pytest.importorskip("torch.nn.attention.flex_attention")

    def sees(b, h, query, key):
        return query + 10 >= key

    block_mask = flex.create_block_mask(sees, None, None, 20, 30, device="cpu")
    theirs = flex.flex_attention(Q, K, V, block_mask=block_mask, scale=0.2)
    close(fastattn.attention(Q, K, V, mask=block_mask, softmax_scale=0.2), theirs)
    close(fastattn.attention(Q, K, V, causal=True, softmax_scale=0.2), theirs)
    slopes = torch.tensor([0.5, 0.25, 0.125, 0.0])
    theirs = flex.flex_attention(Q, K, V, lambda score, b, h, i, j: score - slopes[h] * (i + 10 - j).abs())
    close(fastattn.attention(Q, K, V, alibi_slopes=slopes), theirs)
    theirs = flex.flex_attention(Q, K, V, lambda score, b, h, i, j: 2.0 * torch.tanh(score / 2.0))
    close(fastattn.attention(Q, K, V, softcap=2.0), theirs)


def test_rows_of_natten():
    x = torch.randn(1, 2, 20, 16, generator=GENERATOR)
    for shape, kernel_size in (((20,), 5), ((4, 5), (3, 3))):
        strides = torch.tensor([1]) if len(shape) == 1 else torch.tensor([shape[1], 1])
        places = torch.arange(20)[:, None] // strides % torch.tensor(shape)  # [tokens, axes]
        sizes, kernels = torch.tensor(shape), torch.tensor([kernel_size]).flatten()
        first = (places - kernels // 2).clamp(min=0).minimum(sizes - kernels)
        inside = places[None] - first[:, None]
        keep = ((inside >= 0) & (inside < kernels)).all(-1)
        mask = patterns.neighborhood(shape, kernel_size=kernel_size)
        close(fastattn.attention(x, x, x, mask=mask), formula.attention(x, x, x, keep=keep))


def test_both_pages_name_what_exists():
    places = fastattn, Mask, fastattn.BlockMask, fastattn.compat, patterns
    for page in ("replace.md", "migrate.md"):
        text = (DOCS / page).read_text()
        for name in set(re.findall(r"(?<!\w)(?:fastattn|Mask|BlockMask)\.(\w+)\(", text)):
            assert any(hasattr(place, name) for place in places), name
