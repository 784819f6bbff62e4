"""Each named pattern against a predicate on (query, key), in words that do not come from patterns.py."""

import pytest
import torch

from fastattn import BlockMask, Mask, patterns
from refusals import assert_refused

SIZES = [(100, None), (100, 150), (150, 100), (64, 64), (1, 90)]
sizes = pytest.mark.parametrize("seqlen_q, seqlen_k", SIZES, ids=str)
block_sizes = pytest.mark.parametrize("block_size", [16, 128, (32, 48)], ids=str)


def check(mask: BlockMask, sees):
    """sees(i, j) -> bool tensor of the whole mask (or a list of them, a head each); i, j index tensors."""
    i, j = torch.arange(mask.shape[2])[:, None], torch.arange(mask.shape[3])[None, :]
    expected = torch.as_tensor(sees(i, j)) if not isinstance(sees(i, j), list) else torch.stack(sees(i, j))
    expected = expected.expand(mask.shape[1], mask.shape[2], mask.shape[3])
    assert torch.equal(mask.to_dense()[0], expected)
    assert mask.equal(BlockMask.from_dense(expected[None], block_size=mask.BLOCK_SIZE))


def position(i, seqlen_q, seqlen_k):
    return i + (seqlen_q if seqlen_k is None else seqlen_k) - seqlen_q


@block_sizes
@sizes
def test_causal(seqlen_q, seqlen_k, block_size):
    mask = patterns.causal(seqlen_q, seqlen_k, block_size=block_size)
    check(mask, lambda i, j: j <= position(i, seqlen_q, seqlen_k))


@block_sizes
@sizes
@pytest.mark.parametrize("left, right", [(20, 0), (0, 7), (None, 3), (30, None)])
def test_sliding_window(seqlen_q, seqlen_k, block_size, left, right):
    mask = patterns.sliding_window(seqlen_q, seqlen_k, left=left, right=right, block_size=block_size)

    def sees(i, j):
        back = position(i, seqlen_q, seqlen_k) - j
        return (back <= (left if left is not None else 999)) & (-back <= (right if right is not None else 999))

    check(mask, sees)


@block_sizes
@sizes
@pytest.mark.parametrize("dilation", [1, 2, 7])
def test_dilated_window(seqlen_q, seqlen_k, block_size, dilation):
    mask = patterns.dilated_window(seqlen_q, seqlen_k, left=5, right=2, dilation=dilation, block_size=block_size)
    allowed = torch.tensor([step * dilation for step in range(-2, 6)])
    check(mask, lambda i, j: torch.isin(position(i, seqlen_q, seqlen_k) - j, allowed))


@block_sizes
@sizes
@pytest.mark.parametrize("stride", [1, 9, 32])
def test_strided(seqlen_q, seqlen_k, block_size, stride):
    mask = patterns.strided(seqlen_q, seqlen_k, stride=stride, block_size=block_size)

    def sees(i, j):
        back = position(i, seqlen_q, seqlen_k) - j
        return (back >= 0) & ((back < stride) | (back % stride == 0))

    check(mask, sees)


@sizes
def test_prefix_lm(seqlen_q, seqlen_k):
    lengths = [0, 33, 70]
    mask = patterns.prefix_lm(torch.tensor(lengths), seqlen_q, seqlen_k, block_size=32)
    for b, length in enumerate(lengths):
        one = BlockMask.from_dense(mask.to_dense()[b : b + 1], block_size=32)
        check(one, lambda i, j, length=length: (j < length) | (j <= position(i, seqlen_q, seqlen_k)))


def test_documents():
    ids_q, ids_k = torch.arange(100) // 30, torch.arange(120) // 41
    check(patterns.documents(ids_q[None], block_size=16), lambda i, j: ids_q[i] == ids_q[j])
    check(patterns.documents(ids_q[None], ids_k[None], block_size=16), lambda i, j: ids_q[i] == ids_k[j])


@block_sizes
@sizes
def test_streaming(seqlen_q, seqlen_k, block_size):
    mask = patterns.streaming(seqlen_q, seqlen_k, num_sinks=4, window=20, block_size=block_size)

    def sees(i, j):
        back = position(i, seqlen_q, seqlen_k) - j
        return (back >= 0) & ((back < 20) | (j < 4))

    check(mask, sees)
    assert mask.equal(patterns.a_shape(seqlen_q, seqlen_k, num_sinks=4, window=20, block_size=block_size))


@block_sizes
@sizes
def test_vertical_slash(seqlen_q, seqlen_k, block_size):
    columns, distances = torch.tensor([3, 60]), torch.tensor([[0, 1, 50], [0, 17, 18]])
    mask = patterns.vertical_slash(seqlen_q, seqlen_k, columns=columns, distances=distances, block_size=block_size)

    def sees(i, j):
        back = position(i, seqlen_q, seqlen_k) - j
        vertical = (back >= 0) & ((j == 3) | (j == 60))
        return [vertical | (back == 0) | (back == a) | (back == b) for a, b in ((1, 50), (17, 18))]

    check(mask, sees)
    shared = patterns.vertical_slash(seqlen_q, seqlen_k, columns=columns, distances=distances[0], block_size=block_size)
    check(shared, lambda i, j: sees(i, j)[0])


@block_sizes
@pytest.mark.parametrize("tokens, chosen", [(3, [0, 1, 2]), (0, []), ([5, 77], [5, 77]), (torch.tensor([99]), [99])])
def test_global_tokens(tokens, chosen, block_size):
    chosen = torch.tensor(chosen, dtype=torch.int64)
    mask = patterns.global_tokens(100, tokens, block_size=block_size)
    check(mask, lambda i, j: torch.isin(i, chosen) | torch.isin(j, chosen))


@block_sizes
@pytest.mark.parametrize("dilation", [1, 3])
def test_longformer(dilation, block_size):
    mask = patterns.longformer(300, window=20, tokens=[0, 130], dilation=dilation, block_size=block_size)

    def sees(i, j):
        local = ((i - j).abs() <= 20 * dilation) & ((i - j) % dilation == 0)
        return local | (i == 0) | (j == 0) | (i == 130) | (j == 130)

    check(mask, sees)


def layout(mask: BlockMask) -> torch.Tensor:
    """bool [num_heads, blocks, blocks] of a mask that consists of whole blocks."""
    block = mask.BLOCK_SIZE[0]
    dense = mask.to_dense()[0]
    coarse = dense[:, ::block, ::block]
    blown_up = coarse.repeat_interleave(block, 1).repeat_interleave(block, 2)
    assert torch.equal(dense, blown_up[:, : dense.shape[1], : dense.shape[2]])
    return coarse


@pytest.mark.parametrize("seqlen", [16 * 20, 16 * 20 - 5])
def test_random_blocks(seqlen):
    mask = patterns.random_blocks(seqlen, num_blocks=3, num_heads=4, seed=5, block_size=16)
    drawn = layout(mask)
    assert drawn.shape == (4, 20, 20) and bool((drawn.sum(2) == 3).all())
    assert len(drawn.unique(dim=0)) == 4 and bool((drawn.sum(1) > 0).any(0).all())
    assert mask.equal(patterns.random_blocks(seqlen, num_blocks=3, num_heads=4, seed=5, block_size=16))
    assert not mask.equal(patterns.random_blocks(seqlen, num_blocks=3, num_heads=4, seed=6, block_size=16))


def test_random_blocks_causal():
    mask = patterns.random_blocks(160, num_blocks=4, num_heads=3, causal=True, block_size=16)
    dense = mask.to_dense()[0]
    assert not bool(dense.triu(1).any())
    blocks = dense[:, 15::16, ::16]  # the last query of a block sees whole blocks
    assert blocks.sum(2).tolist() == [[min(4, row + 1) for row in range(10)]] * 3


def test_random_blocks_are_uniform():
    drawn = layout(patterns.random_blocks(16 * 10, num_blocks=4, num_heads=400, block_size=16)).double()
    assert drawn.mean().item() == pytest.approx(0.4)
    deviation = (0.4 * 0.6 / 400) ** 0.5
    assert float((drawn.mean(0) - 0.4).abs().max()) < 4.5 * deviation
    both = (drawn[:, 0, :, None] * drawn[:, 0, None, :]).mean(0)[~torch.eye(10, dtype=torch.bool)]
    pairs = 4 * 3 / 90
    assert float((both - pairs).abs().max()) < 4.5 * (pairs * (1 - pairs) / 400) ** 0.5


@pytest.mark.parametrize("global_blocks", [(0, -1), (0,), (), (3, 4)])
@pytest.mark.parametrize("window", [1, 3, 5])
def test_bigbird(global_blocks, window):
    mask, again = (
        patterns.bigbird(
            16 * 24 - 3, num_window_blocks=window, global_blocks=global_blocks, num_random_blocks=3, num_heads=3,
            block_size=16,
        )
        for _ in range(2)
    )  # fmt: skip
    seen = layout(mask)
    i, j = torch.arange(24)[:, None], torch.arange(24)
    chosen = torch.tensor([block % 24 for block in global_blocks], dtype=torch.int64)
    fixed = ((i - j).abs() <= window // 2) | torch.isin(i, chosen) | torch.isin(j, chosen)
    assert bool(seen[:, fixed].all())
    drawn = (seen & ~fixed).sum(2)
    assert torch.equal(drawn, (~fixed).sum(1).clamp(max=3).expand(3, 24))
    assert len(seen.unique(dim=0)) == 3
    assert mask.equal(again)


def test_bigbird_causal():
    mask = patterns.bigbird(16 * 12, num_random_blocks=2, num_heads=2, causal=True, block_size=16)
    dense = mask.to_dense()[0]
    assert not bool(dense.triu(1).any())
    i, j = torch.arange(12)[:, None], torch.arange(12)
    fixed = (i - j <= 1) | (j == 0) | (i == 11)
    seen = dense[:, 15::16, ::16]
    assert bool(seen[:, fixed & (j <= i)].all())
    assert (seen & ~fixed).sum(2).tolist() == [[min(2, max(row - 2, 0)) if row < 11 else 0 for row in range(12)]] * 2


def test_bigbird_with_nothing_left_to_draw():
    mask = patterns.bigbird(16 * 3, global_blocks=(0, 1, 2), num_random_blocks=5, block_size=16)
    assert mask.density == 1.0


@pytest.mark.parametrize("seqlen", [16 * 16, 16 * 14 - 3, 16 * 17, 16])
@pytest.mark.parametrize("causal, horizontal", [(False, False), (False, True), (True, False)])
@pytest.mark.parametrize("num_global, num_patterns", [(1, 1), (1, 4), (2, 2)])
def test_deepspeed_fixed(seqlen, causal, horizontal, num_global, num_patterns):
    heads = 5
    mask = patterns.deepspeed_fixed(
        seqlen, num_local_blocks=4, num_global_blocks=num_global, num_heads=heads, causal=causal,
        num_different_global_patterns=num_patterns, horizontal_global=horizontal, block_size=16,
    )  # fmt: skip
    count = -(-seqlen // 16)

    def sees(i, j):
        seen = []
        for head in range(heads if num_patterns > 1 else 1):
            first = 4 - (1 + head % num_patterns) * num_global
            chosen = [start + n for start in range(first, count - count % 4, 4) for n in range(num_global)]
            if count % 4:  # a short last window
                start = max(min(count - count % 4 + first, count - num_global), 0)
                chosen += [start + n for n in range(num_global)]
            chosen = torch.tensor(chosen)
            one = (i // 64 == j // 64) | torch.isin(j // 16, chosen)
            one = one | torch.isin(i // 16, chosen) if horizontal else one
            seen.append(one & (j <= i) if causal else one)
        return seen

    check(mask, sees)


@pytest.mark.parametrize("causal, horizontal", [(False, False), (False, True), (True, False)])
def test_deepspeed_variable(causal, horizontal):
    mask = patterns.deepspeed_variable(
        16 * 12, local_window_blocks=(1, 2, 4), global_blocks=(0, 5), causal=causal, horizontal_global=horizontal
    )
    window = torch.tensor([0, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3, 4])
    chosen = torch.tensor([0, 5])

    def sees(i, j):
        seen = (window[i // 16] == window[j // 16]) | torch.isin(j // 16, chosen)
        seen = seen | torch.isin(i // 16, chosen) if horizontal else seen
        return seen & (j <= i) if causal else seen

    check(mask, sees)
    drawn = patterns.deepspeed_variable(
        16 * 12, local_window_blocks=(1, 2, 4), global_blocks=(0, 5), causal=causal, horizontal_global=horizontal,
        num_random_blocks=2, num_heads=3, seed=1,
    )  # fmt: skip
    extra = patterns.random_blocks(16 * 12, num_blocks=2, num_heads=3, seed=1, causal=causal, block_size=16)
    assert drawn.equal(mask | extra) and drawn.shape[1] == 3


def neighbors(size, kernel_size, dilation, causal):
    """bool [size, size], token by token."""
    table = torch.zeros(size, size, dtype=torch.bool)
    for token in range(size):
        group = list(range(token % dilation, size, dilation))
        place = group.index(token)
        if causal:
            seen = group[max(place - kernel_size + 1, 0) : place + 1]
        else:
            start = min(max(place - kernel_size // 2, 0), len(group) - kernel_size)
            seen = group[start : start + kernel_size]
            assert len(seen) == kernel_size
        table[token, seen] = True
    return table


@block_sizes
@pytest.mark.parametrize(
    "shape, kernel_size, dilation, causal",
    [
        ((100,), 7, 1, False),
        ((100,), (12,), (3,), True),
        ((300,), 7, 40, False),
        ((12, 15), 5, 1, False),
        ((12, 15), (3, 7), (2, 2), False),
        ((9, 8), (9, 8), 1, False),
        ((12, 15), 4, (3, 1), (True, False)),
        ((4, 6, 9), 3, 1, False),
        ((6, 6, 5), (3, 2, 5), (2, 3, 1), (True, False, False)),
    ],
)
@pytest.mark.parametrize("prefix", [0, 5])
def test_neighborhood(shape, kernel_size, dilation, causal, prefix, block_size):
    mask = patterns.neighborhood(
        shape,
        kernel_size=kernel_size,
        dilation=dilation,
        causal=causal,
        num_prefix_tokens=prefix,
        block_size=block_size,
    )
    expected = torch.ones(1, 1, dtype=torch.bool)
    for axis, size in enumerate(shape):
        options = [x[axis] if isinstance(x, tuple) else x for x in (kernel_size, dilation, causal)]
        expected = torch.kron(expected.int(), neighbors(size, *options).int()).bool()
    expected = torch.nn.functional.pad(expected, (prefix, 0, prefix, 0), value=True)
    check(mask, lambda i, j: expected)


def test_composition():
    mask = (patterns.longformer(200, window=10, tokens=2, block_size=32) & Mask.causal()) | ~patterns.causal(
        200, block_size=32
    )
    check(mask, lambda i, j: (j > i) | (i - j <= 10) | (j < 2) | (i < 2))
    heads = BlockMask.cat([patterns.sliding_window(200, left=left, right=0) for left in (10, 70, 199)])
    check(heads, lambda i, j: [(j <= i) & (i - j <= left) for left in (10, 70, 199)])


@pytest.mark.parametrize(
    "mask",
    [
        lambda n: patterns.longformer(n, window=100, tokens=2),
        lambda n: patterns.dilated_window(n, left=100, right=0, dilation=4),
        lambda n: patterns.streaming(n, num_sinks=4, window=500),
        lambda n: patterns.strided(n, stride=64),
        lambda n: patterns.neighborhood((n // 64, 64), kernel_size=5),
    ],
)
def test_bitmaps_do_not_grow_with_the_length(mask):
    short, long = mask(4096), mask(16384)
    assert len(long.bitmaps) <= len(short.bitmaps) + 2
    assert long.visited_pairs > 3 * short.visited_pairs


def test_long_patterns_take_a_few_megabytes():
    n = 131072
    for mask in (
        patterns.dilated_window(n, left=256, right=0, dilation=4),
        patterns.bigbird(n, global_blocks=()),
        patterns.random_blocks(n, num_blocks=8, block_size=128),
        patterns.streaming(n, num_sinks=4, window=1024),
    ):
        blocks = int(mask.kv_num_blocks.sum() + mask.full_kv_num_blocks.sum())
        assert mask.nbytes - mask.bitmaps.nbytes < 4 * (8 * blocks + 2 * n // 64) and mask.nbytes < 2**20


REFUSALS = {
    "dilation": (
        lambda: patterns.dilated_window(9, left=1, right=1, dilation=0), ValueError, "dilation=0 must be >= 1"
    ),
    "left": (lambda: patterns.dilated_window(9, left=None, right=1, dilation=2), TypeError, "left=None must be an int"),
    "stride": (lambda: patterns.strided(9, stride=0), ValueError, "stride=0 must be >= 1"),
    "sinks": (lambda: patterns.streaming(9, num_sinks=-1, window=3), ValueError, "num_sinks=-1 must be >= 0"),
    "window": (lambda: patterns.streaming(9, num_sinks=1, window=0), ValueError, "window=0 must be >= 1"),
    "token": (lambda: patterns.global_tokens(9, [9]), ValueError, r"tokens\[0\] is 9; it must be in 0 ... 8"),
    "token dtype": (lambda: patterns.global_tokens(9, torch.ones(2)), TypeError, "tokens has dtype torch.float32"),
    "column": (
        lambda: patterns.vertical_slash(9, columns=torch.tensor([-1]), distances=torch.tensor([0])),
        ValueError,
        r"columns\[0\] is -1; it must be in 0 ... 8",
    ),
    "bigbird even": (lambda: patterns.bigbird(640, num_window_blocks=2), ValueError, "num_window_blocks=2 must be odd"),
    "bigbird global": (
        lambda: patterns.bigbird(640, global_blocks=(10,)), ValueError, "global_blocks has 10; it must be in -10 ... 9"
    ),
    "bigbird blocks": (lambda: patterns.bigbird(640, block_size=(64, 32)), TypeError, "consists of square blocks"),
    "fixed": (
        lambda: patterns.deepspeed_fixed(64, num_local_blocks=4, num_global_blocks=3),
        ValueError,
        "num_local_blocks=4 must be a multiple of num_global_blocks=3",
    ),
    "fixed patterns": (
        lambda: patterns.deepspeed_fixed(64, num_different_global_patterns=5),
        ValueError,
        "num_different_global_patterns=5 at most their quotient",
    ),
    "fixed horizontal": (
        lambda: patterns.deepspeed_fixed(64, causal=True, horizontal_global=True),
        ValueError,
        "horizontal_global=True needs causal=False",
    ),
    "variable": (lambda: patterns.deepspeed_variable(64, local_window_blocks=()), ValueError, "is empty"),
    "axes": (lambda: patterns.neighborhood((2, 2, 2, 2), kernel_size=1), ValueError, "must have 1, 2 or 3 axes"),
    "kernel": (
        lambda: patterns.neighborhood((9, 9), kernel_size=(3, 5), dilation=2),
        ValueError,
        "kernel_size=5 times dilation=2 exceeds 9 tokens",
    ),
    "per axis": (
        lambda: patterns.neighborhood((9, 9), kernel_size=(3, 3, 3)), ValueError, r"kernel_size=\(3, 3, 3\) must be one"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSALS)
def test_refusal(name):
    assert_refused(*REFUSALS[name])
