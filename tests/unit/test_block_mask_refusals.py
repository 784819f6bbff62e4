"""What BlockMask refuses, and with which words."""

import pytest
import torch
from torch.nn.attention import flex_attention as flex

from blocky_masks import blocky_dense, of
from fastattn import BlockMask, Mask
from fastattn.masks import blocks as block_sets
from refusals import assert_refused


def int32(*values):
    return torch.tensor(values, dtype=torch.int32)


def parts(**changes):
    """A mask of 3 x 3 blocks of 16, 40 x 40 tokens: two partial blocks in row 0, a full one in row 1, one each in 2."""
    inside = torch.zeros(16, 16, dtype=torch.bool)
    inside[:8, :8] = True
    given = {
        "kv_num_blocks": int32(2, 0, 1)[None, None],
        "kv_indices": torch.stack([int32(0, 1), int32(0, 0), int32(2, 0)])[None, None],
        "full_kv_num_blocks": int32(0, 1, 1)[None, None],
        "full_kv_indices": torch.stack([int32(0), int32(1), int32(0)])[None, None],
        "kv_bitmaps": torch.stack([int32(0, 1), int32(0, 0), int32(1, 0)])[None, None],
        "bitmaps": torch.stack([block_sets.pack(torch.eye(16) > 0), block_sets.pack(inside)]),
        "BLOCK_SIZE": (16, 16),
        "seq_lengths": (40, 40),
    }
    for name, change in changes.items():
        given[name] = change(given[name].clone()) if callable(change) else change
    return BlockMask(**given)


def put(*place_and_value):
    *place, value = place_and_value

    def change(tensor):
        tensor[tuple(place)] = value
        return tensor

    return change


def test_lists_that_are_right_are_taken():
    mask = parts()
    assert mask.visited_pairs == 16 + 64 + 256 + 64 + 8 * 16
    assert torch.equal(mask.to_dense()[0, 0, :16, :16], torch.eye(16) > 0)
    unread = parts(kv_indices=put(0, 0, 1, 1, -7), kv_bitmaps=put(0, 0, 2, 1, 99))
    assert unread.equal(mask)


MALFORMED = {
    "column out of range": (
        {"kv_indices": put(0, 0, 0, 1, 3)},
        r"kv_indices\[0, 0, 0, 1\] is 3; it must be in 0 ... 2",
    ),
    "negative column": ({"kv_indices": put(0, 0, 0, 0, -1)}, r"kv_indices\[0, 0, 0, 0\] is -1; it must be in 0 ... 2"),
    "duplicated": ({"kv_indices": put(0, 0, 0, 1, 0)}, r"kv_indices\[0, 0, 0, 1\] is 0; it must be greater than"),
    "unsorted": ({"kv_indices": put(0, 0, 0, int32(1, 0))}, r"kv_indices\[0, 0, 0, 1\] is 0; it must be greater.*once"),
    "full out of range": ({"full_kv_indices": put(0, 0, 1, 0, 9)}, r"full_kv_indices\[0, 0, 1, 0\] is 9"),
    "negative full": ({"full_kv_indices": put(0, 0, 1, 0, -2)}, r"full_kv_indices\[0, 0, 1, 0\] is -2"),
    "in both lists": ({"full_kv_indices": put(0, 0, 2, 0, 2)}, "row 2, column 2 is listed as partial and as full"),
    "count too large": ({"kv_num_blocks": put(0, 0, 1, 3)}, r"kv_num_blocks\[0, 0, 1\] is 3; it must be in 0 ... 2"),
    "negative count": ({"full_kv_num_blocks": put(0, 0, 0, -1)}, r"full_kv_num_blocks\[0, 0, 0\] is -1"),
    "bitmap out of range": (
        {"kv_bitmaps": put(0, 0, 0, 1, 2)},
        r"kv_bitmaps\[0, 0, 0, 1\] is 2; it must be in 0 ... 1",
    ),
    "negative bitmap": ({"kv_bitmaps": put(0, 0, 0, 0, -1)}, r"kv_bitmaps\[0, 0, 0, 0\] is -1"),
    "bit past the end": ({"kv_bitmaps": put(0, 0, 2, 0, 0)}, r"bitmaps\[0\] has a bit set past seqlen_q or seqlen_k"),
    "too few rows": ({"seq_lengths": (60, 40)}, r"kv_num_blocks has shape \(1, 1, 3\); .* it must be \(1, 1, 4\)"),
    "other block size": ({"BLOCK_SIZE": (16, 32)}, r"bitmaps has shape \(2, 16, 2\); .*must be \(2, 16, 4\)"),
    "odd block size": (
        {"BLOCK_SIZE": (16, 24)},
        r"block_size=\(16, 24\) must consist of multiples of 16 in 16 ... 256",
    ),
    "large block size": ({"BLOCK_SIZE": 512}, "block_size=512 must consist of multiples of 16"),
    "negative length": ({"seq_lengths": (-1, 40)}, "seqlen_q=-1 must be >= 0"),
    "rank": ({"kv_indices": lambda t: t[0]}, r"kv_indices has shape \(1, 3, 2\); it must have 4 dimensions"),
    "heads": ({"full_kv_num_blocks": lambda t: t.expand(1, 2, 3)}, r"full_kv_num_blocks has shape \(1, 2, 3\)"),
}
WRONG_TYPES = {
    "int64": ({"kv_indices": lambda t: t.long()}, "kv_indices has dtype torch.int64; it must be torch.int32"),
    "bool bitmaps": ({"bitmaps": lambda t: t.bool()}, "bitmaps has dtype torch.bool; it must be torch.uint8"),
    "no tensor": ({"kv_bitmaps": None}, "kv_bitmaps must be a torch.Tensor, got NoneType"),
    "block size": ({"BLOCK_SIZE": "16"}, "block_size='16' must be an int or a pair"),
    "float length": ({"seq_lengths": (40.0, 40)}, "seqlen_q=40.0 must be an int"),
}


@pytest.mark.parametrize("name", [*MALFORMED, *WRONG_TYPES])
def test_malformed_lists(name):
    changes, message = {**MALFORMED, **WRONG_TYPES}[name]
    with pytest.raises(ValueError if name in MALFORMED else TypeError, match=message) as caught:
        parts(**changes)
    assert "\n" not in str(caught.value)


BSR = {"seqlen_q": 40, "seqlen_k": 40, "block_size": 16}
CAUSAL = BlockMask.from_mask(Mask.causal(), seqlen_q=40, block_size=16)


def bsr(indptr, indices, **options):
    return BlockMask.from_bsr(torch.tensor(indptr), torch.tensor(indices), **{**BSR, **options})


def coo(queries, keys, **options):
    return BlockMask.from_coo(torch.tensor(queries), torch.tensor(keys), **{**BSR, **options})


REFUSALS = {
    "bsr column": (lambda: bsr([0, 1, 1, 1], [3]), ValueError, r"indices\[0\] is 3; it must be in 0 ... 2"),
    "bsr negative": (lambda: bsr([0, 1, 1, 1], [-1]), ValueError, r"indices\[0\] is -1"),
    "bsr unsorted": (lambda: bsr([0, 2, 2, 2], [1, 0]), ValueError, r"indices\[1\] is 0; it must be greater"),
    "bsr twice": (lambda: bsr([0, 0, 2, 2], [1, 1]), ValueError, r"indices\[1\] is 1; it must be greater.*once"),
    "bsr rows": (lambda: bsr([0, 1, 1], [0]), ValueError, "indptr has 3 entries; for 3 rows it must have 4"),
    "bsr start": (lambda: bsr([1, 1, 1, 1], [0]), ValueError, "indptr runs from 1 to 1; it must run from 0 to .*1"),
    "bsr end": (lambda: bsr([0, 1, 1, 1], [0, 1]), ValueError, "indptr runs from 0 to 1; it must run from 0 to .*2"),
    "bsr decreasing": (lambda: bsr([0, 2, 1, 2], [0, 1]), ValueError, r"indptr\[1\] is 1; it must not be less"),
    "bsr past the end": (lambda: bsr([0, 9, 1, 1], [0]), ValueError, r"indptr\[1\] is 9; it must be in 0 ... 1"),
    "bsr dtype": (
        lambda: bsr([0.0, 1.0, 1.0, 1.0], [0]),
        TypeError,
        "indptr has dtype torch.float32; it must be int32",
    ),
    "bsr rank": (lambda: bsr([[0, 1, 1, 1]], [0]), ValueError, r"indptr has shape \(1, 4\); it must have 1 dimension"),
    "bsr list": (lambda: BlockMask.from_bsr([0], [0], **BSR), TypeError, "indices must be an integer tensor, got list"),
    "bsr block size": (lambda: bsr([0, 1], [0], block_size=40), ValueError, "block_size=40 must consist of multiples"),
    "csr column": (
        lambda: BlockMask.from_csr(torch.tensor([0, 1]), torch.tensor([40]), seqlen_q=1, seqlen_k=40),
        ValueError,
        r"indices\[0\] is 40; it must be in 0 ... 39",
    ),
    "coo key": (lambda: coo([1], [40]), ValueError, r"keys\[0\] is 40; it must be in 0 ... 39"),
    "coo negative": (lambda: coo([-1], [4]), ValueError, r"queries\[0\] is -1; it must be in 0 ... 39"),
    "coo block": (lambda: coo([0], [3], of_blocks=True), ValueError, r"keys\[0\] is 3; it must be in 0 ... 2"),
    "coo twice": (lambda: coo([1, 2, 1], [3, 3, 3]), ValueError, "the pair 1, 3 is listed twice"),
    "coo lengths": (lambda: coo([1, 2], [3]), ValueError, "queries has 2 entries and keys 1; they must be as many"),
    "mask": (
        lambda: BlockMask.from_mask(torch.ones(2, 2) > 0, seqlen_q=2),
        TypeError,
        "mask must be a Mask, got Tensor",
    ),
    "dense rank": (lambda: BlockMask.from_dense(torch.ones(2, 2) > 0), TypeError, r"got torch.bool \(2, 2\)"),
    "dense dtype": (lambda: BlockMask.from_dense(torch.ones(1, 1, 2, 2)), TypeError, "got torch.float32"),
    "tokens": (lambda: BlockMask.from_tokens(torch.ones(3), torch.ones(3) > 0), TypeError, "queries must be a bool"),
    "batch": (lambda: BlockMask.from_mask_mod(lambda *x: x, batch=-1, seqlen_q=3), ValueError, "batch=-1 must be >= 0"),
    "float length": (lambda: BlockMask.from_mask(Mask(), seqlen_q=3.0), TypeError, "seqlen_q=3.0 must be an int"),
    "lengths differ": (
        lambda: CAUSAL & BlockMask.from_mask(Mask(), seqlen_q=41, block_size=16),
        ValueError,
        r"seq_lengths \(40, 40\) and \(41, 41\); build both with the same",
    ),
    "sizes differ": (
        lambda: CAUSAL | BlockMask.from_mask(Mask(), seqlen_q=40),
        ValueError,
        r"BLOCK_SIZE \(16, 16\) and \(128, 128\)",
    ),
    "heads differ": (
        lambda: of(blocky_dense(0, (1, 2, 50, 70))) & of(blocky_dense(0, (1, 3, 50, 70))),
        ValueError,
        r"\(batch, num_heads\) \(1, 2\) and \(1, 3\); they must be equal or 1",
    ),
    "equal to what": (lambda: CAUSAL.equal(None), TypeError, "a BlockMask is needed, got NoneType"),
    "and tensor": (lambda: CAUSAL & torch.ones(2), TypeError, "unsupported operand"),
    "or mask": (lambda: CAUSAL | Mask.causal(), TypeError, "unsupported operand"),
    "python and": (lambda: CAUSAL and CAUSAL, TypeError, "combine masks with & and |"),
    "cat nothing": (lambda: BlockMask.cat([]), ValueError, "masks is empty"),
    "cat dim": (lambda: BlockMask.cat([CAUSAL], 2), ValueError, r"dim=2 must be 0 \(batch\) or 1"),
    "cat batches": (
        lambda: BlockMask.cat([of(blocky_dense(0, (n, 1, 50, 70))) for n in (2, 3)]),
        ValueError,
        r"the masks have batch \[2, 3\]; they must be equal or 1",
    ),
    "flex sizes": (
        lambda: BlockMask.from_flex(flex.create_block_mask(flex.noop_mask, 1, 1, 64, 64, device="cpu", BLOCK_SIZE=8)),
        ValueError,
        r"block_size=\(8, 8\) must consist of multiples of 16",
    ),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_refusal(name):
    assert_refused(*REFUSALS[name])


def test_nothing_is_read_from_a_malformed_flex_mask():
    theirs = flex.create_block_mask(lambda b, h, i, j: i >= j, 1, 1, 256, 256, device="cpu")
    theirs.kv_indices[0, 0, 0, 0] = 7
    with pytest.raises(ValueError, match=r"kv_indices\[0, 0, 0, 0\] is 7; it must be in 0 ... 1"):
        BlockMask.from_flex(theirs)
