"""select_blocks against its estimates written out pair by pair, and coverage against the softmax itself."""

import math

import pytest
import torch

import fastattn
from fastattn import Mask, coverage, patterns, select_blocks
from refusals import assert_refused

METHODS = ("mean_pool", "antidiagonal", "vertical_slash")
SIZES = [(128, 128), (128, 192), (192, 128), (100, 135), (5, 90), (90, 5)]
sizes = pytest.mark.parametrize("seqlen_q, seqlen_k", SIZES, ids=str)
methods = pytest.mark.parametrize("method", METHODS)


def states(seqlen_q=128, seqlen_k=None, batch=2, num_heads=4, num_heads_k=2, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    shapes = (batch, num_heads, seqlen_q, 8), (batch, num_heads_k, seqlen_k or seqlen_q, 8)
    return [torch.randn(shape, generator=generator).to(dtype) * 1.5 for shape in shapes]


def visited(mask, seqlen_q, seqlen_k, block_size):
    """bool [batch, num_heads, rows, columns]."""
    block_q, block_k = (block_size, block_size) if isinstance(block_size, int) else block_size
    dense = torch.nn.functional.pad(mask.to_dense(), (0, -seqlen_k % block_k, 0, -seqlen_q % block_q))
    return dense.unflatten(3, (-1, block_k)).unflatten(2, (-1, block_q)).any(5).any(3)


# --- estimates, in float64 and loops ---------------------------------------------------------------------------------


def causal_mask(seqlen_q, seqlen_k, causal):
    return Mask.causal().to_dense(seqlen_q, seqlen_k)[0, 0] if causal else torch.ones(seqlen_q, seqlen_k) > 0


def mean_pool(q, k, causal, block_q, block_k):
    sees = causal_mask(len(q), len(k), causal)
    rows = []
    for queries, seen in zip(q.split(block_q), sees.split(block_q), strict=True):
        score = torch.stack([(queries.mean(0) @ keys.mean(0)) / math.sqrt(8) for keys in k.split(block_k)])
        size = torch.tensor([len(keys) for keys in k.split(block_k)])
        some = torch.stack([part.any() for part in seen.split(block_k, 1)])
        weight = torch.where(some, size * score.exp(), 0.0)
        rows.append(weight / weight.sum().clamp(min=1e-300))
    return torch.stack(rows)


def antidiagonal(q, k, causal, block_q, block_k):
    def filled(x, block):
        return torch.cat([x, x[-1:].expand(-len(x) % block, -1)])

    real_keys, offset = len(k), len(k) - len(q)
    q, k = filled(q, block_q), filled(k, block_k)
    weight = torch.zeros(len(q) // 16, len(k) // 16, dtype=torch.float64)
    for i in range(len(q) // 16):
        for j in range(-(-real_keys // 16)):
            if causal and 16 * j > 16 * i + 15 + offset:
                continue
            mean = sum(q[16 * i + t] @ k[16 * j + 15 - t] for t in range(16)) / 16 / math.sqrt(8)
            weight[i, j] = mean.exp() * min(real_keys - 16 * j, 16)
    share = weight / weight.sum(1, keepdim=True).clamp(min=1e-300)
    return share.unflatten(1, (-1, block_k // 16)).sum(2).unflatten(0, (-1, block_q // 16))[:, ::2].mean(1)


def vertical_slash(q, k, causal, block_q, block_k):
    count, seqlen_q, seqlen_k = min(64, len(q)), len(q), len(k)
    scores = (q[-count:] @ k.T / math.sqrt(8)).masked_fill(~causal_mask(count, seqlen_k, True), -math.inf)
    p = torch.softmax(scores, 1).nan_to_num() / count
    distance = (torch.arange(count) + seqlen_k - count)[:, None] - torch.arange(seqlen_k)
    column = p.sum(0)
    diagonal = torch.stack([p[distance == d].sum() for d in range(seqlen_k)])
    at = diagonal[distance.clamp(min=0)]
    upright = p * column / (column + at).clamp(min=1e-300)
    column = upright.sum(0)
    diagonal = torch.stack([(p - upright)[distance == d].sum() for d in range(seqlen_k)])
    share = torch.zeros(-(-seqlen_q // block_q), -(-seqlen_k // block_k), dtype=torch.float64)
    position = torch.arange(len(share) * block_q) + seqlen_k - seqlen_q
    for row in range(len(share)):
        for block in range(share.shape[1]):
            keys = torch.arange(block * block_k, (block + 1) * block_k)
            back = position[row * block_q : (row + 1) * block_q, None] - keys
            seen = torch.where((back >= 0) & (back < seqlen_k), diagonal[back.clamp(0, seqlen_k - 1)], 0.0)
            if block * block_k < min((row + 1) * block_q, seqlen_q) + seqlen_k - seqlen_q:
                share[row, block] = column[keys[keys < seqlen_k]].sum() + seen.sum() / block_q
    return share / share.sum(1, keepdim=True).clamp(min=1e-300)


@pytest.mark.parametrize(
    "method, causal",
    [(method, causal) for method in METHODS for causal in (False, True)][:-2] + [("vertical_slash", True)],
)
@sizes
@pytest.mark.parametrize("block_size", [16, 32, (32, 64), (48, 16)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_blocks_with_the_largest_estimates(method, seqlen_q, seqlen_k, causal, block_size, dtype):
    q, k = states(seqlen_q, seqlen_k, dtype=dtype)
    block_q, block_k = (block_size, block_size) if isinstance(block_size, int) else block_size
    options = {"method": method, "causal": causal, "block_size": block_size}
    few = visited(select_blocks(q, k, top_k=2, **options), seqlen_q, seqlen_k, block_size)
    most = visited(select_blocks(q, k, coverage=0.8, **options), seqlen_q, seqlen_k, block_size)
    offset = seqlen_k - seqlen_q
    for b in range(2):
        for h in range(4):
            share = globals()[method](q[b, h].double(), k[b, h // 2].double(), causal, block_q, block_k)
            for row, shares in enumerate(share):
                last = min((row + 1) * block_q, seqlen_q) - 1 + offset
                reachable = [c for c in range(len(shares)) if not causal or c * block_k <= last]
                own = [max(row * block_q + offset, 0) // block_k] if causal and reachable else []
                order = own + sorted(set(reachable) - set(own), key=lambda c, shares=shares: -float(shares[c]))
                assert few[b, h, row].nonzero()[:, 0].tolist() == sorted(order[:2])
                needed, total = 0, 0.0
                while needed < len(order) and total < 0.8 - 1e-6:
                    total += float(shares[order[needed]])
                    needed += 1
                assert most[b, h, row].nonzero()[:, 0].tolist() == sorted(order[:needed])


@methods
@sizes
def test_causal_selection_is_causal_and_leaves_no_query_alone(method, seqlen_q, seqlen_k):
    mask = select_blocks(
        *states(seqlen_q, seqlen_k), method=method, top_k=1, causal=True, block_size=(16, 32)
    ).to_dense()
    causal = Mask.causal().to_dense(seqlen_q, seqlen_k)
    assert not bool((mask & ~causal).any())
    assert torch.equal(mask.any(3), causal.any(3).expand(2, 4, seqlen_q))


@methods
def test_what_was_planted_is_found(method):
    """Every query block has keys that point its way; key block 1 draws everybody."""
    generator = torch.Generator().manual_seed(3)
    directions = torch.linalg.qr(torch.randn(64, 64, generator=generator)).Q
    block = torch.arange(1024) // 64
    q = (6.0 * directions[block] + 6.0 * directions[40])[None, None]
    k = (4.0 * directions[block] + 9.0 * directions[40] * (block == 1)[:, None])[None, None]
    noise = torch.randn(1, 1, 1024, 64, generator=generator)
    mask = select_blocks(q + noise, k + noise.flip(2), method=method, top_k=2, causal=True, block_size=64)
    found = visited(mask, 1024, 1024, 64)[0, 0]
    expected = torch.eye(16, dtype=torch.bool)
    expected[1:, 1] = True
    assert bool((found | ~expected).all())
    kept = coverage(q + noise, k + noise.flip(2), mask, causal=True)
    assert float(kept.mean()) > 0.95
    least = select_blocks(-q, k, method=method, top_k=2, causal=True, block_size=64)
    assert float(coverage(q + noise, k + noise.flip(2), least, causal=True).mean()) < float(kept.mean())


@methods
def test_more_coverage_is_more_blocks(method):
    q, k = states(256)
    masks = [
        select_blocks(q, k, method=method, coverage=share, causal=True, block_size=16)
        for share in (0.01, 0.5, 0.9, 1.0)
    ]
    for small, large in zip(masks, masks[1:], strict=False):
        assert (small & large).equal(small) and small.visited_pairs < large.visited_pairs
    everything = patterns.causal(256, block_size=16)
    assert masks[-1].density > 0.99 * everything.density
    assert select_blocks(q, k, method=method, top_k=99, causal=True, block_size=16).equal(everything)


@methods
def test_deterministic_and_without_gradient(method):
    q, k = (x.requires_grad_() for x in states(200))
    first, second = (select_blocks(q, k, method=method, top_k=3, causal=True, block_size=32) for _ in range(2))
    for a, b in zip(first.tensors().values(), second.tensors().values(), strict=True):
        assert torch.equal(a, b) and not a.requires_grad


def test_softmax_scale_matters_for_coverage():
    q, k = states(256)
    sharp, flat = (
        select_blocks(q, k, coverage=0.9, softmax_scale=scale, block_size=16).visited_pairs for scale in (30.0, 0.01)
    )
    assert sharp < flat / 2


@methods
def test_rows_are_worked_on_in_parts(method, monkeypatch):
    q, k = states(500)
    options = {"method": method, "coverage": 0.7, "causal": True, "block_size": 32}
    whole = select_blocks(q, k, **options)
    monkeypatch.setattr("fastattn.selection._CELLS", 1)
    assert select_blocks(q, k, **options).equal(whole)


@methods
@pytest.mark.parametrize("shape", [(0, 4, 64, 64), (2, 0, 64, 64), (2, 4, 0, 64), (2, 4, 64, 0)])
def test_nothing_to_select(method, shape):
    batch, num_heads, seqlen_q, seqlen_k = shape
    q, k = torch.randn(batch, num_heads, seqlen_q, 8), torch.randn(batch, max(num_heads, 1), seqlen_k, 8)
    mask = select_blocks(q, k, method=method, top_k=1, causal=True)
    assert mask.shape == shape and mask.visited_pairs == 0


# --- coverage --------------------------------------------------------------------------------------------------------


def softmax_mass(q, k, visible, **changes):
    """The share that `visible` keeps, from the softmax itself, in float64."""
    scores = q.double() @ k.double().repeat_interleave(q.shape[1] // k.shape[1], 1).transpose(2, 3)
    scores = scores * changes.get("softmax_scale", q.shape[3] ** -0.5)
    if "softcap" in changes:
        scores = changes["softcap"] * torch.tanh(scores / changes["softcap"])
    everything = changes.get("everything", torch.ones_like(scores, dtype=torch.bool))
    weight = scores.exp() * everything
    sink = changes["sinks"].double().exp()[:, None] if "sinks" in changes else 0.0
    return ((weight * visible).sum(3) + sink) / (weight.sum(3) + sink)


MASKS = {
    "block": patterns.sliding_window(60, 80, left=7, right=2, block_size=16),
    "per head": fastattn.BlockMask.cat([patterns.strided(60, 80, stride=n, block_size=16) for n in (2, 3, 5, 9)]),
    "interval": Mask.window(9, None),
    "tensor": torch.rand(2, 4, 60, 80, generator=torch.Generator().manual_seed(5)) < 0.3,
}


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize(
    "options", [{}, {"softmax_scale": 0.7}, {"softcap": 2.0}, {"sinks": torch.arange(4.0)}], ids=str
)
def test_coverage_is_the_share_of_the_softmax(name, options):
    mask = MASKS[name]
    dense = mask if isinstance(mask, torch.Tensor) else mask.to_dense(*((60, 80) if name == "interval" else ()))
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 2e-5), (torch.bfloat16, 2e-5)):
        q, k = states(60, 80, dtype=dtype)
        kept = coverage(q, k, mask, **options)
        assert kept.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        torch.testing.assert_close(kept.double(), softmax_mass(q, k, dense, **options), rtol=tolerance, atol=1e-9)


def test_coverage_of_a_causal_call_and_within_a_padding_mask():
    q, k = states(60, 80, dtype=torch.float64)
    causal = Mask.causal().to_dense(60, 80)
    mask = MASKS["block"]
    kept = coverage(q, k, mask, causal=True)
    torch.testing.assert_close(kept, softmax_mass(q, k, mask.to_dense(), everything=causal))
    padding = Mask.lengths(torch.tensor([50, 80]))
    kept = coverage(q, k, mask, within=padding)
    expected = softmax_mass(q, k, mask.to_dense(), everything=padding.to_dense(60, 80).expand(2, 4, 60, 80))
    torch.testing.assert_close(kept, expected)


def test_coverage_at_the_ends():
    q, k = states(60, 80)
    assert torch.equal(coverage(q, k, Mask()), torch.ones(2, 4, 60))
    torch.testing.assert_close(coverage(q, k, patterns.causal(60, 80), causal=True), torch.ones(2, 4, 60))
    nothing = torch.zeros(60, 80, dtype=torch.bool)
    assert torch.equal(coverage(q, k, nothing), torch.zeros(2, 4, 60))
    q, k = states(80, 60)  # the first 20 queries see nothing anyway
    kept = coverage(q, k, torch.zeros(80, 60, dtype=torch.bool), causal=True)
    assert kept[..., :20].eq(1.0).all() and kept[..., 20:].eq(0.0).all()
    many = coverage(*states(300), patterns.causal(300), causal=True)
    assert float(many.max()) <= 1.0


REFUSALS = {
    "method": (dict(method="magic", top_k=1), ValueError, "method='magic' must be one of mean_pool, antidiagonal"),
    "neither": (dict(), ValueError, "top_k=None, coverage=None: give one of the two"),
    "both": (dict(top_k=1, coverage=0.5), ValueError, "top_k=1, coverage=0.5: give one of the two"),
    "top_k": (dict(top_k=0), ValueError, "top_k=0 must be >= 1"),
    "top_k type": (dict(top_k=1.5), TypeError, "top_k=1.5 must be an int"),
    "coverage": (dict(coverage=1.5), ValueError, r"coverage=1.5 must be a number in \(0, 1\]"),
    "coverage zero": (dict(coverage=0.0), ValueError, r"coverage=0.0 must be a number in \(0, 1\]"),
    "not causal": (dict(method="vertical_slash", top_k=1), ValueError, "'vertical_slash' needs causal=True"),
    "block size": (dict(top_k=1, block_size=8), ValueError, "block_size=8 must consist of multiples of 16"),
    "ints": (dict(q=torch.ones(1, 1, 4, 8).int(), top_k=1), TypeError, "q must be a float tensor"),
    "rank": (dict(k=torch.ones(4, 8), top_k=1), TypeError, "k must be a float tensor"),
    "heads": (dict(k=torch.ones(2, 3, 128, 8), top_k=1), ValueError, "num_heads a multiple of num_heads_k"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_refusal(name):
    changes, error, message = REFUSALS[name]
    q, k = states()
    assert_refused(lambda: select_blocks(**({"q": q, "k": k} | changes)), error, message)
