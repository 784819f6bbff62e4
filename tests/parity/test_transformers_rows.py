"""Masks of transformers as runs of keys a query: equal to its own bool tensors, and kilobytes."""

import itertools
import random

import pytest
import torch

from fastattn import BlockMask, Mask

transformers = pytest.importorskip("transformers")

from transformers import masking_utils as mu  # noqa: E402

from fastattn.integrations import transformers as integration  # noqa: E402
from fastattn.integrations.transformers_rows import compact_mask  # noqa: E402

BATCH, LENGTH = 2, 12
IMAGES = torch.tensor([[-1, 0, 0, 0, -1, -1, 1, 1, 2, 2, 2, -1], [0, 0, 0, 0, -1, -1, -1, -1, 3, 3, 3, 3]])
PREFIX = torch.where(torch.arange(LENGTH) < torch.tensor([[5], [0]]), 0, -1)
DOCUMENTS = torch.tensor([[0, 0, 0, 1, 1, 2, 2, 2, 2, 3, 4, 4], [0, 1, 1, 1, 1, 1, 1, 3, 3, 4, 4, 4]])
POSITIONS = torch.tensor([[0, 1, 2, 0, 1, 0, 1, 2, 3, 0, 0, 1], [7, 0, 1, 2, 3, 4, 5, 0, 1, 9, 10, 11]])
CAUSAL, WINDOW = mu.causal_mask_function, mu.sliding_window_overlay(3)


def chunks(size, *left_padding):
    return mu.chunked_causal_mask_function(size, torch.tensor(left_padding))


def packed(function):
    return mu.packed_sequence_compatibility_function(function, POSITIONS, DOCUMENTS)


ONE_RUN = {
    "chunks": chunks(4, 0, 0),
    "padded chunks": chunks(5, 0, 3),
    "documents": packed(CAUSAL),
    "documents, both sides": packed(mu.bidirectional_mask_function),
    "documents in windows": packed(mu.sliding_window_causal_mask_function(2)),
    "documents in chunks": packed(chunks(2, 0, 0)),
    "documents alone": mu.packed_sequence_mask_function(DOCUMENTS),
    "images": mu.or_masks(CAUSAL, mu.blockwise_overlay(IMAGES)),
    "images in windows": mu.and_masks(mu.or_masks(CAUSAL, mu.blockwise_overlay(IMAGES)), WINDOW),
    "images beside windows": mu.or_masks(mu.sliding_window_causal_mask_function(3), mu.blockwise_overlay(IMAGES)),
    "images alone": mu.blockwise_overlay(IMAGES),
    "prefix": mu.or_masks(CAUSAL, mu.blockwise_overlay(PREFIX)),
    "documents with a prefix": mu.or_masks(packed(CAUSAL), mu.blockwise_overlay(PREFIX)),
    "any": mu.or_masks(CAUSAL, WINDOW),
}
PADDINGS = {
    "none": None,
    "left": torch.arange(LENGTH) >= torch.tensor([[0], [3]]),
    "right": torch.arange(LENGTH) < torch.tensor([[7], [12]]),
    "short": torch.ones(BATCH, LENGTH - 4, dtype=torch.bool),
    "a row without tokens": torch.tensor([[True], [False]]).expand(BATCH, LENGTH),
}


@pytest.mark.parametrize("name", ONE_RUN)
def test_one_run_equals_sdpa_mask(name):
    whole = [(LENGTH, LENGTH, 0, 0)]
    sizes = [*whole, (4, LENGTH, 8, 0), (1, LENGTH, 11, 0), (4, 7, 8, 5), (5, LENGTH, 2, 0), (3, 5, 0, 2)]
    for (q_length, kv_length, q_offset, kv_offset), padding in itertools.product(sizes, PADDINGS.values()):
        arguments = {
            "batch_size": BATCH, "q_length": q_length, "kv_length": kv_length, "q_offset": q_offset,
            "kv_offset": kv_offset, "mask_function": ONE_RUN[name], "attention_mask": padding,
            "allow_is_causal_skip": False,
        }  # fmt: skip
        mask = integration.make_mask(**arguments)
        assert isinstance(mask, integration.IntervalMask) and isinstance(mask.value, Mask), arguments
        assert torch.equal(mask & True, mu.sdpa_mask(**arguments)), arguments


def random_function(draw: random.Random, depth: int):
    if depth == 0:
        return draw.choice(
            [CAUSAL, WINDOW, mu.bidirectional_mask_function, mu.sliding_window_bidirectional_overlay(2),
             mu.chunked_overlay(3, torch.tensor([1, 0])), mu.blockwise_overlay(IMAGES), mu.blockwise_overlay(PREFIX),
             mu.packed_sequence_mask_function(DOCUMENTS), packed(CAUSAL)]
        )  # fmt: skip
    parts = [random_function(draw, draw.randrange(depth)) for _ in range(draw.choice((1, 2, 3)))]
    return draw.choice((mu.and_masks, mu.or_masks))(*parts)


def test_combinations_equal_sdpa_mask():
    """Each pattern shows a query itself, or nothing: so one run is all that any combination has."""
    draw = random.Random(0)
    for _ in range(200):
        function, padding = random_function(draw, 3), draw.choice([*PADDINGS.values()])
        mask, _ = compact_mask(function, padding, BATCH, LENGTH, LENGTH, 0, 0, "cpu")
        expected = mu.sdpa_mask(BATCH, LENGTH, LENGTH, mask_function=function, attention_mask=padding,
                                allow_is_causal_skip=False)  # fmt: skip
        assert torch.equal(mask.to_dense(LENGTH, LENGTH, "cpu").expand(expected.shape), expected)


def test_what_is_not_certain_is_not_recognised():
    again, apart = torch.tensor([[0, 1, 0]]), torch.tensor([[0, 0, -1, 0]])
    jumps, of_one = torch.tensor([[0, 2, 3, 4]]), torch.zeros(1, 4, dtype=torch.int64)
    for function, length in (
        (mu.packed_sequence_mask_function(again), 3),  # a document in two parts
        (mu.packed_sequence_mask_function(apart), 4),  # negative numbers are documents too
        (mu.blockwise_overlay(apart), 4),
        (mu.blockwise_overlay(apart), 5),  # a query without a number
        (mu.packed_sequence_compatibility_function(CAUSAL, jumps, of_one), 4),
        (mu.remap_positions_for_packed_sequence(CAUSAL, torch.arange(4)[None]), 4),
        (mu.and_masks(CAUSAL, lambda b, h, q, k: k != 2), 4),
    ):
        assert compact_mask(function, None, 1, length, length, 0, 0, "cpu") == (None, False)


def test_gaps_in_a_large_mask_become_blocks():
    length, tokens = 2100, torch.ones(1, 2100, dtype=torch.bool)
    tokens[:, 300:340] = tokens[:, 1000:1999] = False
    mask = integration.make_mask(1, length, length, attention_mask=tokens)
    assert isinstance(mask.value, BlockMask) and mask.value.nbytes < 2**20
    expected = mu.sdpa_mask(1, length, length, attention_mask=tokens)
    assert torch.equal(mask.value.to_dense(), expected)
    q, k, v = torch.randn(3, 1, 2, length, 8, generator=torch.Generator().manual_seed(0))
    out, out_of_tensor = (integration.attention_forward(torch.nn.Module(), q, k, v, m)[0] for m in (mask, expected))
    torch.testing.assert_close(out, out_of_tensor, atol=1e-5, rtol=1e-5)
    tokens[:, ::3] = False  # many gaps
    assert compact_mask(CAUSAL, tokens, 1, length, length, 0, 0, "cpu") == (None, False)


def test_masks_of_32k_tokens_take_kilobytes():
    """Where a bool tensor takes a gigabyte for each entry of the batch."""
    length, batch = 32768, 2
    place = torch.arange(length)
    tokens = place >= torch.tensor([[0], [5000]])
    positions = (place % 3000).expand(batch, -1)
    documents = mu.find_packed_sequence_indices(positions)
    images = torch.where(place % 4000 < 500, place // 4000, -1).expand(batch, -1)
    for function, padding in (
        (CAUSAL, tokens),
        (mu.bidirectional_mask_function, tokens),
        (mu.sliding_window_causal_mask_function(1024), tokens),
        (chunks(8192, 0, 5000), tokens),
        (mu.packed_sequence_compatibility_function(CAUSAL, positions, documents), None),
        (mu.or_masks(CAUSAL, mu.blockwise_overlay(images)), tokens),
    ):
        mask = integration.make_mask(batch, length, length, mask_function=function, attention_mask=padding).value
        assert sum(bound.nbytes for bound in (mask.k_start, mask.k_end) if bound is not None) <= 2**19
