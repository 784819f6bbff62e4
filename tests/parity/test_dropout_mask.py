"""Which weights dropout keeps: Philox by the position of the weight, and no dependence on sizes or neighbours."""

import math

import pytest
import torch

import fastattn
from fastattn.scores import dropout

# Random123 (D. E. Shaw Research), tests/kat_vectors, "philox4x32 10": counter, key, output.
KNOWN_ANSWERS = (
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
)


@pytest.mark.parametrize("counter, key, expected", KNOWN_ANSWERS)
def test_philox_known_answers(counter, key, expected):
    low, high = (int(word, 16) for word in key.split())
    words = dropout.philox(tuple(torch.tensor(int(word, 16)) for word in counter.split()), low | high << 32)
    assert " ".join(f"{word.item():08x}" for word in words) == expected


def test_dropout_mask_is_keyed_by_position():
    """One evaluation for four neighbouring keys; counter (key // 4, query, head, batch)."""
    mask = fastattn.dropout_mask(2, 3, 5, 11, 0.5, seed=(7 << 32) + 3)
    for b, h, i, j in ((0, 0, 0, 0), (1, 2, 4, 10), (1, 0, 3, 7), (0, 2, 1, 5)):
        words = dropout.philox(tuple(torch.tensor(n) for n in (j // 4, i, h, b)), (7 << 32) + 3)
        assert mask[b, h, i, j] == (words[j % 4].item() >= 2**31)


def test_dropout_mask_does_not_depend_on_the_sizes():
    large = fastattn.dropout_mask(4, 3, 20, 30, 0.3, seed=1)
    assert torch.equal(large[:2, :2, :7, :13], fastattn.dropout_mask(2, 2, 7, 13, 0.3, seed=1))


@pytest.mark.parametrize("dropout_p", [0.1, 0.5, 0.9])
def test_dropout_mask_mean(dropout_p):
    mask = fastattn.dropout_mask(2, 4, 128, 256, dropout_p, seed=123)
    deviation = math.sqrt(dropout_p * (1 - dropout_p) / mask.numel())
    assert mask.double().mean().item() == pytest.approx(1 - dropout_p, abs=5 * deviation)
    for dims in ((1, 2, 3), (0, 2, 3), (0, 1, 3), (0, 1, 2)):  # no batch, head, query or key is special
        means = mask.double().mean(dims)
        bound = 6 * deviation * math.sqrt(len(means))
        assert (means - (1 - dropout_p)).abs().max() < bound


def test_dropout_mask_of_another_seed_is_independent():
    masks = [fastattn.dropout_mask(1, 2, 64, 64, 0.5, seed=seed) for seed in (0, 1, 1 << 32, 2**63 - 1)]
    for i, j in ((0, 1), (0, 2), (1, 2), (2, 3)):
        assert (masks[i] == masks[j]).double().mean().item() == pytest.approx(0.5, abs=0.03)


def test_dropout_of_a_row_ignores_its_neighbours():
    q, k, v = (torch.randn(3, 2, 6, 8) for _ in range(3))
    whole = fastattn.attention(q, k, v, dropout_p=0.5, seed=9)
    torch.testing.assert_close(whole[:1], fastattn.attention(q[:1], k[:1], v[:1], dropout_p=0.5, seed=9))


def test_dropout_keeps_the_mean():
    q, k, v = (torch.randn(1, 1, 4, 8, dtype=torch.float64) for _ in range(3))
    mean = sum(fastattn.attention(q, k, v, dropout_p=0.2, seed=seed) for seed in range(500)) / 500
    torch.testing.assert_close(mean, fastattn.attention(q, k, v), rtol=0.0, atol=0.1)


def test_seed_none_draws_from_torchs_generator():
    q = torch.randn(1, 1, 16, 8)
    torch.manual_seed(3)
    first, second = (fastattn.attention(q, q, q, dropout_p=0.5) for _ in range(2))
    torch.manual_seed(3)
    assert torch.equal(first, fastattn.attention(q, q, q, dropout_p=0.5)) and not torch.equal(first, second)
