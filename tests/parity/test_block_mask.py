"""BlockMask: every builder against a dense mask, the laws of its algebra, FlexAttention."""

import dataclasses
import itertools

import matplotlib.pyplot
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention import flex_attention as flex

from blocky_masks import SIZE, blocky_dense, of, random_dense
from fastattn import BlockMask, Mask, attention, explain, plans, record
from fastattn.masks import blocks as block_sets

LENGTHS = [(64, 64), (45, 77), (77, 45), (200, 200), (1, 130), (130, 1), (33, 257), (0, 5), (5, 0)]
lengths = pytest.mark.parametrize("seqlen_q, seqlen_k", LENGTHS, ids=lambda n: str(n))
BLOCK_SIZES = [16, 64, 128, 256, (32, 16), (16, 128), (48, 80)]
block_sizes = pytest.mark.parametrize("block_size", BLOCK_SIZES, ids=str)


def assert_same_tensors(a: BlockMask, b: BlockMask):
    assert (a.BLOCK_SIZE, a.seq_lengths) == (b.BLOCK_SIZE, b.seq_lengths)
    for (name, mine), other in zip(a.tensors().items(), b.tensors().values(), strict=True):
        assert torch.equal(mine, other), name


def check(mask: BlockMask, dense: torch.Tensor):
    """`mask` is `dense`, in its one form, and consistent with itself."""
    assert torch.equal(mask.to_dense(), dense)
    assert mask.shape == tuple(dense.shape)
    assert mask.visited_pairs == int(dense.sum())
    assert mask.density == pytest.approx(float(dense.sum()) / max(dense.numel(), 1))
    for row, columns in _blocks_of(dense, mask.BLOCK_SIZE).items():
        for kind, counts, indices in (
            ("partial", mask.kv_num_blocks, mask.kv_indices),
            ("full", mask.full_kv_num_blocks, mask.full_kv_indices),
        ):
            expected = [column for column, what in columns.items() if what == kind]
            assert int(counts[row]) == len(expected)
            assert indices[row][: len(expected)].tolist() == expected
    assert len(mask.bitmaps) == len(mask.bitmaps.unique(dim=0))


def _blocks_of(dense, block_size):
    """{(b, h, row): {column: "full" | "partial"}}, from the dense mask, block after block."""
    (batch, num_heads, seqlen_q, seqlen_k), (bq, bk) = dense.shape, block_size
    found = {}
    for b, h, row in itertools.product(range(batch), range(num_heads), range(-(-seqlen_q // bq))):
        found[b, h, row] = {}
        for column in range(-(-seqlen_k // bk)):
            block = dense[b, h, row * bq : (row + 1) * bq, column * bk : (column + 1) * bk]
            if block.any():
                found[b, h, row][column] = "full" if block.all() else "partial"
    return found


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


# --- FlexAttention ---------------------------------------------------------------------------------------------------


def flex_masks():
    table = torch.rand(2, 3, 3, 3, generator=torch.Generator().manual_seed(0)) < 0.6
    return {
        "causal": lambda b, h, i, j: i >= j,
        "window": flex.and_masks(lambda b, h, i, j: i >= j, lambda b, h, i, j: i - j <= 37),
        "per head": lambda b, h, i, j: (i - j).abs() <= 20 * (h + 1) + 30 * b,
        "table": lambda b, h, i, j: table[b, h, i // 128, j // 128] | (i == j),
        "noop": flex.noop_mask,
    }


@pytest.mark.parametrize("kind", flex_masks())
@pytest.mark.parametrize("seqlen_q, seqlen_k", [(256, 256), (300, 333)])
def test_flex_attention_lists_agree(kind, seqlen_q, seqlen_k):
    mask_mod = flex_masks()[kind]
    theirs = flex.create_block_mask(mask_mod, 2, 3, seqlen_q, seqlen_k, device="cpu")
    ours = BlockMask.from_mask_mod(mask_mod, batch=2, num_heads=3, seqlen_q=seqlen_q, seqlen_k=seqlen_k)
    dense = flex.create_mask(mask_mod, 2, 3, seqlen_q, seqlen_k, device="cpu")
    check(ours, dense)
    assert_same_tensors(BlockMask.from_flex(theirs), ours)
    back = ours.to_flex()
    assert_same_tensors(BlockMask.from_flex(back), ours)
    assert_same_tensors(BlockMask.from_flex(ours.to_flex(mask_mod)), ours)
    assert torch.equal(flex.create_mask(back.mask_mod, 2, 3, seqlen_q, seqlen_k, device="cpu"), dense)
    assert back.shape == theirs.shape
    if (seqlen_q, seqlen_k) == (256, 256):  # at an edge, torch calls a block partial that we call full
        for name in ("kv_num_blocks", "full_kv_num_blocks", "q_num_blocks", "full_q_num_blocks"):
            assert torch.equal(getattr(back, name), getattr(theirs, name)), name
            assert torch.equal(getattr(ours, name), getattr(theirs, name)), name
        for name in ("kv", "full_kv", "q", "full_q"):
            counts = getattr(theirs, f"{name}_num_blocks")
            listed = block_sets.listed(counts, getattr(theirs, f"{name}_indices"))
            mine = block_sets.listed(counts, getattr(ours, f"{name}_indices"))
            assert torch.equal(getattr(ours, f"{name}_indices")[mine], getattr(theirs, f"{name}_indices")[listed])


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_attention_computes_the_same(one_thread):
    q, k, v = torch.randn(3, 2, 3, 200, 16).unbind(0)
    ours = BlockMask.from_dense(blocky_dense(5, shape=(2, 3, 200, 200)) | torch.eye(200, dtype=torch.bool))
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=ours.to_dense())
    torch.testing.assert_close(flex.flex_attention(q, k, v, block_mask=ours.to_flex()), expected)


def test_flex_attention_without_full_blocks_and_with_one_batch():
    theirs = flex.BlockMask.from_kv_blocks(
        torch.tensor([[[1, 2]]], dtype=torch.int32),
        torch.tensor([[[[0, 1], [0, 1]]]], dtype=torch.int32),
        BLOCK_SIZE=64,
        mask_mod=lambda b, h, i, j: j <= i,
    )
    check(BlockMask.from_flex(theirs), Mask.causal().to_dense(128, 128))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_compiled_flex_attention_computes_the_same(one_thread):
    compiled = torch.compile(flex.flex_attention, dynamic=False)
    q, k, v = torch.randn(3, 2, 3, 200, 16).unbind(0)
    ours = BlockMask.from_dense(blocky_dense(5, shape=(2, 3, 200, 200)) | torch.eye(200, dtype=torch.bool))
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=ours.to_dense())
    torch.testing.assert_close(compiled(q, k, v, block_mask=ours.to_flex()), expected)


# --- attention -------------------------------------------------------------------------------------------------------


def states(batch=2, num_heads=6, num_heads_k=3, seqlen_q=50, seqlen_k=70, **options):
    generator = torch.Generator().manual_seed(0)
    shapes = (batch, num_heads, seqlen_q, 16), (batch, num_heads_k, seqlen_k, 16), (batch, num_heads_k, seqlen_k, 24)
    return [torch.randn(shape, generator=generator, **options) for shape in shapes]


def results_and_gradients(qkv, **kwargs):
    qkv = [x.clone().requires_grad_() for x in qkv]
    out, lse = attention(*qkv, return_lse=True, **kwargs)
    seen = lse != -torch.inf
    (out.sin().sum() + lse[seen].cos().sum()).backward()
    return out, lse, *(x.grad for x in qkv)


@pytest.mark.parametrize("shape", [(1, 1), (2, 1), (1, 6), (2, 6)])
@pytest.mark.parametrize("limits", [{}, {"causal": True}, {"window_size": (9, 3)}], ids=str)
def test_attention_takes_it_as_the_same_bool_tensor(shape, limits):
    """Every kernel that takes block masks, against the reference on the dense mask, in float64."""
    dense = blocky_dense(11, shape=(*shape, 50, 70))
    dense[:, :, 7] = False  # a row that sees nothing
    mask, qkv = BlockMask.from_dense(dense, block_size=SIZE), states(dtype=torch.float64)
    expected = results_and_gradients(qkv, mask=dense, backend="reference", **limits)
    for actual in (
        results_and_gradients(qkv, mask=mask, **limits),
        results_and_gradients(qkv, mask=mask.to_flex(), **limits),
    ):
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


def test_plans_depend_on_shapes_and_not_on_contents():
    plans.forget()
    qkv = states()
    for seed in range(3):
        attention(*qkv, mask=BlockMask.from_dense(blocky_dense(seed, shape=(2, 1, 50, 70)), block_size=16))
    assert plans.count() == 1
    attention(*qkv, mask=BlockMask.from_dense(blocky_dense(0, shape=(2, 1, 50, 70)), block_size=32))
    attention(*qkv, mask=BlockMask.from_dense(blocky_dense(0, shape=(1, 1, 50, 70)), block_size=16))
    assert plans.count() == 3


def test_flex_masks_are_converted_once(monkeypatch):
    theirs, calls = of(blocky_dense(0, shape=(1, 1, 50, 70))).to_flex(), []
    convert = BlockMask.from_flex
    monkeypatch.setattr(BlockMask, "from_flex", lambda mask: calls.append(mask) or convert(mask))
    for _ in range(3):
        attention(*states(), mask=theirs)
    assert len(calls) == 1


def test_explain_and_record():
    mask = of(blocky_dense(0, shape=(1, 6, 50, 70)))
    text = explain(*states(), mask=mask)
    assert text.splitlines()[0].endswith(" block") and text.count("runs") == 1
    with record() as calls:
        attention(*states(), mask=mask, causal=True)
    assert calls[0].problem.mask == "block"


@pytest.mark.parametrize(
    "shape, message",
    [
        ((1, 1, 50, 71), r"BlockMask of shape \(1, 1, 50, 71\); it must be .* here \(2, 6, 50, 70\)"),
        ((1, 1, 1, 70), r"BlockMask of shape \(1, 1, 1, 70\)"),
        ((1, 3, 50, 70), r"BlockMask of shape \(1, 3, 50, 70\)"),
        ((3, 1, 50, 70), r"BlockMask of shape \(3, 1, 50, 70\)"),
    ],
)
def test_attention_refuses_a_mask_of_other_shape(shape, message):
    with pytest.raises(ValueError, match=message):
        attention(*states(), mask=of(random_dense(*shape)))


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
