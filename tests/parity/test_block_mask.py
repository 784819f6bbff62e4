"""BlockMask: every builder against a dense mask, the laws of its algebra, its size."""

import dataclasses
import itertools

import matplotlib.pyplot
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from blocky_masks import SIZE, assert_same_tensors, blocky_dense, check, of, random_dense
from fastattn import BlockMask, Mask
from fastattn.masks import blocks as block_sets

LENGTHS = [(64, 64), (45, 77), (77, 45), (200, 200), (1, 130), (130, 1), (33, 257), (0, 5), (5, 0)]
lengths = pytest.mark.parametrize("seqlen_q, seqlen_k", LENGTHS, ids=lambda n: str(n))
BLOCK_SIZES = [16, 64, 128, 256, (32, 16), (16, 128), (48, 80)]
block_sizes = pytest.mark.parametrize("block_size", BLOCK_SIZES, ids=str)


# --- builders --------------------------------------------------------------------------------------------------------


@block_sizes
@lengths
def test_from_dense(seqlen_q, seqlen_k, block_size):
    for share in (0.0, 0.02, 0.5, 1.0):
        dense = random_dense(2, 3, seqlen_q, seqlen_k, share=share)
        check(BlockMask.from_dense(dense, block_size=block_size), dense)


@block_sizes
@pytest.mark.parametrize("seed", range(3))
def test_from_dense_with_full_blocks(seed, block_size):
    dense = blocky_dense(seed)
    mask = BlockMask.from_dense(dense, block_size=block_size)
    check(mask, dense)


def some_masks(seqlen_q, seqlen_k):
    ids = torch.arange(max(seqlen_q, seqlen_k)) // 19
    bounds = torch.randint(-5, seqlen_k + 5, (2, 3, seqlen_q), generator=torch.Generator().manual_seed(1))
    return {
        "empty": Mask(),
        "causal": Mask.causal(),
        "top_left": Mask.causal("top_left"),
        "window": Mask.window(20, 3),
        "left": Mask.window(30, None),
        "lengths": Mask.lengths(torch.tensor([0, 3, seqlen_k, seqlen_k + 9])),
        "documents": Mask.documents(ids[None, :seqlen_q], ids[None, :seqlen_k]),
        "causal documents": Mask.documents(ids[None, :seqlen_q], ids[None, :seqlen_k]) & Mask.causal(),
        "prefix_lm": Mask.prefix_lm(torch.tensor([0, 7]), seqlen_q, seqlen_k),
        "intervals": Mask.intervals(bounds, bounds.flip(2)),
        "row by row": Mask.intervals(bounds[:1, :1] // 2, bounds[:1, :1]) & Mask.window(40, 40),
    }


@block_sizes
@lengths
def test_from_mask(seqlen_q, seqlen_k, block_size):
    for mask in some_masks(seqlen_q, seqlen_k).values():
        dense = mask.to_dense(seqlen_q, seqlen_k)
        built = BlockMask.from_mask(mask, seqlen_q=seqlen_q, seqlen_k=seqlen_k, block_size=block_size)
        assert_same_tensors(built, BlockMask.from_dense(dense, block_size=block_size))


def test_from_mask_checks_the_length():
    mask = Mask.documents(torch.zeros(1, 7, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"key intervals of shape \(1, 1, 7\), but seqlen_q=8"):
        BlockMask.from_mask(mask, seqlen_q=8)


@pytest.mark.parametrize("batch, num_heads", [(1, 1), (2, 3), (1, 3), (0, 2)])
def test_from_mask_mod(batch, num_heads):
    slopes = torch.tensor([3, 7, 11])

    def sees(b, h, i, j):
        return (i - j < slopes[h] * (b + 1)) & (j <= i)

    i, j = torch.arange(77)[:, None], torch.arange(50)
    entries = [(b, h) for b in range(batch) for h in range(num_heads)]
    dense = [sees(torch.tensor(b), torch.tensor(h), i, j) for b, h in entries] or [torch.zeros(0, 77, 50) > 0]
    mask = BlockMask.from_mask_mod(sees, batch=batch, num_heads=num_heads, seqlen_q=77, seqlen_k=50, block_size=32)
    check(mask, torch.stack(dense).view(batch, num_heads, 77, 50))


def test_from_mask_mod_asks_inside_the_lengths_and_a_few_blocks_at_a_time():
    asked = []

    def sees(b, h, i, j):
        asked.append((int(i.max()), int(j.max()), i.numel() * j.numel() // len(i)))
        return i >= j

    BlockMask.from_mask_mod(sees, seqlen_q=3000, seqlen_k=2900, block_size=256)
    assert max(i for i, _, _ in asked) == 2999 and max(j for _, j, _ in asked) == 2899
    assert len(asked) > 1 and max(pairs for _, _, pairs in asked) <= 1 << 22  # of 8.7 million


@pytest.mark.parametrize(
    "returned, error, message",
    [
        (lambda i, j: (i - j).float(), TypeError, "returned torch.float32; it must return a bool tensor"),
        (lambda i, j: True, TypeError, "returned bool; it must"),
        (lambda i, j: torch.ones(2, 5, 7, dtype=torch.bool), ValueError, r"shape \(2, 5, 7\); it must broadcast"),
    ],
)
def test_from_mask_mod_refuses_what_is_not_a_predicate(returned, error, message):
    with pytest.raises(error, match=message):
        BlockMask.from_mask_mod(lambda b, h, i, j: returned(i, j), seqlen_q=40, block_size=16)


@block_sizes
@lengths
def test_from_tokens(seqlen_q, seqlen_k, block_size):
    for seed, share in enumerate((0.0, 0.1, 0.9, 1.0)):
        queries, keys = random_dense(seqlen_q, seed=seed, share=share), random_dense(seqlen_k, seed=seed + 9)
        dense = (queries[:, None] & keys)[None, None]
        built = BlockMask.from_tokens(queries, keys, block_size=block_size)
        assert_same_tensors(built, BlockMask.from_dense(dense, block_size=block_size))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize(
    "seqlen_q, seqlen_k, block_size", [(70, 130, (32, 16)), (64, 64, 64), (0, 20, 16), (20, 0, 16)]
)
def test_compressed_and_coordinate_lists(seqlen_q, seqlen_k, block_size, dtype):
    sizes = (block_size, block_size) if isinstance(block_size, int) else block_size
    rows, columns = -(-seqlen_q // sizes[0]), -(-seqlen_k // sizes[1])
    options = {"seqlen_q": seqlen_q, "seqlen_k": seqlen_k, "block_size": block_size}
    for kind, pattern in (("blocks", random_dense(rows, columns)), ("tokens", random_dense(seqlen_q, seqlen_k))):
        indptr = torch.cat([torch.zeros(1, dtype=torch.int64), pattern.sum(1).cumsum(0)]).to(dtype)
        row, column = (x.to(dtype) for x in pattern.nonzero(as_tuple=True))
        shuffled = torch.randperm(len(row), generator=torch.Generator().manual_seed(0))
        of_blocks = kind == "blocks"
        compressed = (BlockMask.from_bsr if of_blocks else BlockMask.from_csr)(indptr, column, **options)
        coordinates = BlockMask.from_coo(row[shuffled], column[shuffled], **options, of_blocks=of_blocks)
        dense = pattern
        if of_blocks:
            dense = pattern.repeat_interleave(sizes[0], 0).repeat_interleave(sizes[1], 1)[:seqlen_q, :seqlen_k]
        check(compressed, dense[None, None])
        assert_same_tensors(coordinates, compressed)


@pytest.mark.parametrize("dim", [0, 1])
def test_cat(dim):
    parts = [blocky_dense(seed, shape=(2, 3, 40, 70)) for seed in range(3)]
    parts[1] = parts[1][:1] if dim == 0 else parts[1][:, :1]
    masks = [BlockMask.from_dense(part, block_size=32) for part in parts]
    check(BlockMask.cat(masks, dim), torch.cat(parts, dim))
    shared = BlockMask.from_mask(Mask.causal(), seqlen_q=40, seqlen_k=70, block_size=32)
    expected = torch.cat([parts[0], shared.to_dense().expand(*((1, 3) if dim == 0 else (2, 1)), 40, 70)], dim)
    check(BlockMask.cat([masks[0], shared], dim), expected)


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("new", BLOCK_SIZES, ids=str)
@block_sizes
def test_reblock(block_size, new, seed):
    dense = blocky_dense(seed)
    mask = BlockMask.from_dense(dense, block_size=block_size).reblock(new)
    assert_same_tensors(mask, BlockMask.from_dense(dense, block_size=new))


def test_where_is_an_intersection():
    mask = BlockMask.from_mask(Mask.window(40, 10), seqlen_q=130, seqlen_k=150, block_size=(32, 16))
    i, j = torch.arange(130)[:, None], torch.arange(150)
    asked = []

    def even(b, h, i, j):
        asked.append(len(i))
        return (i - j) % 2 == 0

    expected = mask.to_dense() & ((i - j) % 2 == 0)
    check(mask.where(even), expected)
    once_a_block = sum(asked)
    asked.clear()
    check(mask.where(even, by_distance=True), expected)
    assert sum(asked) < once_a_block / 2


# --- algebra ---------------------------------------------------------------------------------------------------------


@st.composite
def dense_masks(draw):
    shape = draw(st.sampled_from([1, 2])), draw(st.sampled_from([1, 3]))
    kind = draw(st.sampled_from(["blocky", "random", "causal", "none", "all"]))
    seed = draw(st.integers(0, 1000))
    if kind == "blocky":
        return blocky_dense(seed, shape=(*shape, 50, 70))
    if kind == "causal":
        return Mask.causal().to_dense(50, 70).expand(*shape, 50, 70)
    return random_dense(*shape, 50, 70, seed=seed, share={"random": 0.5, "none": 0.0, "all": 1.0}[kind])


laws = settings(max_examples=30, deadline=None, derandomize=True)


@laws
@given(dense_masks(), dense_masks())
def test_and_or_not_are_those_of_sets(a, b):
    assert torch.equal((of(a) & of(b)).to_dense(), a & b)
    assert torch.equal((of(a) | of(b)).to_dense(), a | b)
    assert_same_tensors(~of(a), of(~a))
    assert_same_tensors(of(a) & of(b), of(a & b))
    assert_same_tensors(of(a) | of(b), of(a | b))


@laws
@given(dense_masks(), dense_masks(), dense_masks())
def test_laws(a, b, c):
    a, b, c = of(a), of(b), of(c)
    assert (a & b).equal(b & a) and (a | b).equal(b | a)
    assert ((a & b) & c).equal(a & (b & c)) and ((a | b) | c).equal(a | (b | c))
    assert (a & (b | c)).equal((a & b) | (a & c)) and (a | (b & c)).equal((a | b) & (a | c))
    assert (~(a & b)).equal(~a | ~b) and (~(a | b)).equal(~a & ~b)
    assert (~~a).equal(a) and (a & a).equal(a) and (a | a).equal(a) and (a | (a & b)).equal(a | (a & b & b))
    assert (a & ~a).visited_pairs == 0 and (a | ~a).density == 1.0 and (a | ~a).kv_indices.numel() == 0


@laws
@given(dense_masks(), dense_masks())
def test_transpose(a, b):
    a, b = of(a), of(b)
    turned = BlockMask.from_dense(a.to_dense().transpose(2, 3), block_size=SIZE[::-1])
    assert_same_tensors(a.transpose(), turned)
    assert a.transpose() is a.transpose() and a.transpose().transpose() is a
    assert (a & b).transpose().equal(a.transpose() & b.transpose())
    assert a.transpose().visited_pairs == a.visited_pairs
    for name in ("num_blocks", "indices"):
        for prefix in ("", "full_"):
            assert torch.equal(getattr(a, f"{prefix}q_{name}"), getattr(turned, f"{prefix}kv_{name}"))


@laws
@given(dense_masks(), dense_masks())
def test_equal_is_equality_of_what_is_seen(a, b):
    assert of(a).equal(of(a.clone())) and of(a).equal(of(b)) == bool((a == b).all())


def test_and_with_an_interval_mask():
    lengths = Mask.lengths(torch.tensor([3, 50]))
    for dense in (blocky_dense(3, shape=(2, 3, 50, 70)), blocky_dense(4, shape=(1, 1, 50, 70))):
        for mask in (Mask.causal(), Mask.window(9, None), lengths, lengths & Mask.causal("top_left"), Mask()):
            expected = of(dense & mask.to_dense(50, 70))
            assert_same_tensors(of(dense) & mask, expected)
            assert_same_tensors(mask & of(dense), expected)


def test_immutable_values_with_identity():
    mask = of(blocky_dense(0))
    with pytest.raises(dataclasses.FrozenInstanceError):
        mask.bitmaps = mask.bitmaps
    assert mask != of(blocky_dense(0)) and len({mask, of(blocky_dense(0))}) == 2
    assert mask.to("cpu") is mask and mask.device == torch.device("cpu")
    assert mask.nbytes == sum(tensor.numel() * tensor.element_size() for tensor in mask.tensors().values())


# --- size ------------------------------------------------------------------------------------------------------------


def numbers(mask):
    return sum(tensor.numel() for tensor in mask.tensors().values())


@pytest.mark.parametrize("block_size", [64, 128])
def test_a_million_tokens_take_a_few_megabytes(block_size):
    seqlen = 1_000_000
    mask = BlockMask.from_mask(Mask.causal() & Mask.window(511, 0), seqlen_q=seqlen, block_size=block_size)
    blocks = int(mask.kv_num_blocks.sum() + mask.full_kv_num_blocks.sum())
    rows = -(-seqlen // block_size)
    assert numbers(mask) - mask.bitmaps.numel() <= 3 * blocks + 2 * rows
    # two edges of the band; the first rows have no left edge, the last block is cut
    assert len(mask.bitmaps) <= 4
    assert mask.visited_pairs == sum(range(1, 512)) + (seqlen - 511) * 512
    assert numbers(mask.transpose()) - mask.bitmaps.numel() <= 3 * blocks + 2 * rows
    assert mask.nbytes < 2 * 2**20


def test_a_causal_mask_has_one_bitmap():
    for seqlen in (128, 1280, 12800):
        mask = BlockMask.from_mask(Mask.causal(), seqlen_q=seqlen)
        assert len(mask.bitmaps) == 1 and int(mask.kv_num_blocks.sum()) == seqlen // 128


def test_packed_documents_take_little():
    seqlen = 131072
    ids = torch.arange(seqlen)[None] // 1500
    mask = BlockMask.from_mask(Mask.causal() & Mask.window(4095, 0) & Mask.documents(ids), seqlen_q=seqlen)
    assert mask.nbytes < 16 * 2**20
    count = torch.bincount(ids[0])
    assert mask.visited_pairs == int((count * (count + 1) // 2).sum())


def test_equal_hashes_do_not_make_equal_rows(monkeypatch):
    """With a hash that is always 0 at first, `unique_rows` still tells rows apart."""
    original, seeds = torch.randint, []

    def weak(*args, generator=None, **kwargs):
        seeds.append(generator.initial_seed())
        factors = original(*args, generator=generator, **kwargs)
        return factors - factors - 1 if generator.initial_seed() == 0 else factors  # ... | 1 is -1 for all

    monkeypatch.setattr(torch, "randint", weak)
    codes = torch.tensor([[1, 2], [2, 1], [1, 2], [3, 0], [0, 0]])
    first, inverse = block_sets.unique_rows(codes)
    assert first.tolist() == [0, 1, 3, 4] and inverse.tolist() == [0, 1, 0, 2, 3] and seeds == [0, 1]


@laws
@given(st.integers(1, 4), st.integers(0, 1000))
def test_bits(words, seed):
    bits = random_dense(3, 5, 8 * words, seed=seed)
    packed = block_sets.pack(bits)
    for byte, bit in itertools.product(range(words), range(8)):
        assert torch.equal((packed[..., byte] >> bit) & 1 == 1, bits[..., 8 * byte + bit])
    assert torch.equal(block_sets.unpack(packed), bits)
    assert torch.equal(block_sets.popcount(packed), bits.flatten(1).sum(1))


# --- pictures and text -----------------------------------------------------------------------------------------------


def test_repr():
    mask = BlockMask.from_mask(Mask.causal(), seqlen_q=256)
    text = "BlockMask(1x1x256x256, blocks of 128x128: 1 full, 2 partial with 1 bitmaps, density 50.2 %)"
    assert repr(mask) == text


def test_plot():
    matplotlib.use("Agg")
    dense = blocky_dense(7, shape=(1, 2, 200, 330))
    mask = BlockMask.from_dense(dense, block_size=(16, 32))
    (image,) = mask.plot(head=1).images
    assert torch.equal(torch.from_numpy(image.get_array().data.copy()), dense[0, 1].float())
    for pixels in (13, 5):
        (image,) = mask.plot(head=1, pixels=pixels).images
        shares = torch.from_numpy(image.get_array().data.copy())
        height, width = shares.shape
        assert (height, width) == (min(pixels, 13), min(pixels, 11))
        rows = torch.arange(200) // 16 * height // 13
        columns = torch.arange(330) // 32 * width // 11
        for i, j in ((0, 0), (height - 1, width - 1), (height // 2, width // 3)):
            expected = dense[0, 1][rows == i][:, columns == j].float().mean()
            assert shares[i, j] == pytest.approx(float(expected))
    _, ax = matplotlib.pyplot.subplots()
    assert mask.plot(ax) is ax and ax.get_xlabel() == "key" and "density" in ax.get_title()
    matplotlib.pyplot.close("all")
    with pytest.raises(ValueError, match=r"head=2 must be in 0 \.\.\. 1"):
        mask.plot(head=2)
