"""Shards, plans and costs of `fastattn.parallel`, without any process."""

import random
from types import SimpleNamespace

import pytest
import torch

import fastattn
from fastattn import BlockMask, Mask, parallel
from fastattn.parallel import arguments
from fastattn.parallel.agreement import hash_of
from fastattn.parallel.block_masks import cut, local_rows
from fastattn.parallel.choice import setting_of
from fastattn.parallel.costs import Sizes, listed, needs_of, work
from fastattn.parallel.pairs import count_pairs, sees
from fastattn.parallel.plan import PLANS, transfers
from fastattn.parallel.shards import check_shards


@pytest.mark.parametrize("seqlen, ranks, multiple", [(0, 3, 1), (7, 3, 1), (100, 4, 16), (5, 8, 1), (129, 2, 64)])
@pytest.mark.parametrize("kind", ["contiguous", "zigzag"])
def test_every_row_is_on_one_rank(kind, seqlen, ranks, multiple):
    shards = getattr(parallel.Shards, kind)(seqlen, ranks, multiple)
    assert check_shards(shards, "shards", shards.lengths) is shards
    assert shards.seqlen == seqlen and shards.ranks == ranks
    x = torch.arange(seqlen)
    pieces = [shards.take(x, rank, 0) for rank in range(ranks)]
    assert all(torch.equal(piece, shards.positions(rank)) for rank, piece in enumerate(pieces))
    assert torch.equal(shards.joined(pieces, 0), x)
    ends = {end for runs in shards.runs for run in runs for end in run} - {seqlen}
    assert all(end % multiple == 0 for end in ends)


def test_documents_are_whole_and_balanced():
    rng = random.Random(0)
    lengths = [rng.randint(1, 300) for _ in range(60)]
    shards = parallel.Shards.documents(lengths, 4)
    assert shards.seqlen == sum(lengths)
    ids = torch.arange(60).repeat_interleave(torch.tensor(lengths))
    held = [set(shards.take(ids, rank, 0).tolist()) for rank in range(4)]
    assert sorted(x for of_rank in held for x in of_rank) == list(range(60))
    sizes = [sum(lengths[x] ** 2 for x in of_rank) for of_rank in held]
    assert max(sizes) < 1.1 * sum(sizes) / 4


@pytest.mark.parametrize(
    "shards, lengths, text",
    [
        ("spiral", (2, 2), "shards='spiral' must be one of contiguous, zigzag"),
        ("zigzag", (3, 1), "the ranks would hold"),
        (parallel.Shards((((0, 2),), ((3, 4),))), (2, 1), "position 2 lies in no run"),
        (parallel.Shards((((0, 2),), ((1, 4),))), (2, 3), "position 1 lies in two runs"),
        (parallel.Shards((((2, 2),), ((0, 2),))), (0, 2), r"shards.runs\[0\]"),
        (parallel.Shards((((0, 2),), ((2, 4),))), (2, 3), "the ranks would hold"),
    ],
)
def test_wrong_shards(shards, lengths, text):
    with pytest.raises(ValueError, match=text):
        check_shards(shards, "shards", lengths)


def test_pairs_in_closed_form():
    rng = random.Random(0)
    for _ in range(200):
        q_start, k_start, rows, columns = (rng.randint(0, 12) for _ in range(4))
        queries, keys = (q_start, q_start + rows + 1), (k_start, k_start + columns + 1)
        lo, hi = rng.choice([-(1 << 40), rng.randint(-15, 15)]), rng.choice([1 << 40, rng.randint(-15, 15)])
        count = sum(lo <= j - i <= hi for i in range(*queries) for j in range(*keys))
        if lo <= hi:
            assert count_pairs(torch.tensor([queries]), torch.tensor([keys]), lo, hi).item() == count
            assert sees(queries, keys, lo, hi) == (count > 0)


@pytest.mark.parametrize("name", PLANS)
def test_plans_bring_every_run_and_every_gradient_where_it_belongs(name):
    rng = random.Random(0)
    for _ in range(400):
        ranks = rng.randint(1, 6)
        owners = tuple(rng.randrange(ranks) for _ in range(rng.randint(0, 9)))
        share = rng.random()
        needs = tuple(frozenset(run for run in range(len(owners)) if rng.random() < share) for _ in range(ranks))
        check_plan([PLANS[name](needs, owners, rank) for rank in range(ranks)], needs, owners)


def check_plan(slots, needs, owners):
    """Play all ranks at once: who has what, whose gradients are added up where."""
    ranks, sent, returned = range(len(needs)), 0, 0
    here, adding = [set() for _ in ranks], [{} for _ in ranks]
    computed, home = [set() for _ in ranks], [set() for _ in owners]
    for t in range(len(slots[0])):
        now = [of_rank[t] for of_rank in slots]
        for r in ranks:
            for p in ranks:
                assert [x for q, x in now[r].send if q == p] == [x for q, x in now[p].receive if q == r]
                assert [x for q, x in now[r].grads_out if q == p] == [x for q, x in now[p].grads_in if q == r]
            assert all(owners[x] == r or x in here[r] for _, x in now[r].send)
            sent += len(now[r].send)
        here, before, adding = [{x for _, x in slot.receive} for slot in now], adding, [{} for _ in ranks]
        for r in ranks:
            assert all(owners[x] == r or x in here[r] for x in now[r].compute)
            assert not computed[r] & set(now[r].compute)
            computed[r] |= set(now[r].compute)
            for x in now[r].compute:
                if owners[x] == r:
                    home[x].add(r)
                else:
                    adding[r][x] = {r}
        for r in ranks:
            for p, x in now[r].grads_in:
                total, part = home[x] if owners[x] == r else adding[r][x], before[p].pop(x)
                assert not total & part
                total |= part
                returned += 1
        assert not any(before)
    assert computed == [set(x) for x in needs]
    assert home == [{r for r in ranks if x in needs[r]} for x in range(len(owners))]
    assert sent == returned == sum(transfers(needs, owners))


def test_seconds_of_the_model_by_hand():
    """Of two ranks: a message in which arguments are compared; a block beside the transfer; the other block."""
    sizes, rows = Sizes(1, 4, 2, 16, 8, 4, 4), 512
    for bytes_, shards in ((1e6, "contiguous"), (1e9, "contiguous"), (1e9, "zigzag")):
        machine = parallel.Machine(flops=1e9, bytes=bytes_, latency=1e-2, call=3e-3)
        blocks = (4, 2) if shards == "zigzag" else (1, 1)  # of rank 0, which holds two runs; rank 1's are neighbours
        first, second = (rows * rows * sizes.pair_flops / 1e9 + 3e-3 * n for n in blocks)
        transfer = rows * 2 * (16 + 8) * 4 / bytes_ + 1e-2
        found = setting_of((2,), 2 * rows, 2 * rows, shards, False, None, machine, sizes).cost("ring")
        assert found.forward_seconds == pytest.approx(1e-2 + max(first, transfer) + second)
    alone = setting_of((1,), rows, rows, "contiguous", False, None, machine, sizes).cost("ring")
    assert alone.forward_seconds == pytest.approx(rows * rows * sizes.pair_flops / 1e9 + 3e-3)


def test_zigzag_balances_and_a_window_sends_to_neighbours_alone():
    causal = -(1 << 40), 0
    for kind, imbalance in (("contiguous", 1.7), ("zigzag", 1.01)):
        shards = getattr(parallel.Shards, kind)(4096, 8)
        pairs = work(shards, shards, *causal).sum(1)
        assert (pairs.max() / pairs.mean() > 1.7) == (imbalance == 1.7) and pairs.sum() == 4096 * 4097 / 2
    shards = parallel.Shards.contiguous(4096, 8)
    needs, (_, owners) = needs_of(work(shards, shards, -100, 0)), listed(shards)
    assert transfers(needs, owners) == [1] * 7 + [0]


def test_explain_of_hundreds_of_ranks():
    text = parallel.explain(
        ranks=300, seqlen=10_000_000, num_heads=64, num_heads_k=8, head_dim=128, causal=True, shards="zigzag",
        dtype=torch.bfloat16,
    )  # fmt: skip
    assert "ring " in text and "refused: num_heads=64" in text and "runs" in text
    assert "two mesh dimensions" in text


def test_explain_chooses_and_refuses():
    options = {"seqlen": 4096, "num_heads": 8, "head_dim": 64}
    assert parallel.explain(ranks=4, **options, schedule="ring").count("runs") == 1
    with pytest.raises(ValueError, match="'all_to_all' is refused: num_heads=8"):
        parallel.explain(ranks=3, **options, schedule="all_to_all")
    with pytest.raises(ValueError, match="must be one of ring"):
        parallel.explain(ranks=3, **options, schedule="star")
    long = parallel.explain(ranks=4, **options, num_heads_k=8)
    assert "keys are not short" in long
    assert "runs" in parallel.explain(ranks=(2, 4), **options).splitlines()[-1]


def test_alibi_on_kernels_that_know_no_positions_is_refused(monkeypatch):
    q, k, v = torch.randn(3, 1, 2, 8, 4)
    options = {
        "mask": None, "causal": True, "window_size": None, "softmax_scale": None, "softcap": 0.0, "bias": None,
        "alibi_slopes": torch.ones(2), "sinks": None, "dropout_p": 0.0, "seed": None, "skip_negligible": None,
        "return_lse": False, "backend": None,
    }  # fmt: skip
    shards = parallel.Shards.contiguous(16, 2)
    call = arguments.Arguments(q, k, v, options, ())
    assert arguments.whole(call, shards, shards, 1)[0].terms.query_start == 0
    row = SimpleNamespace(row=SimpleNamespace(backend="triton"))
    monkeypatch.setattr(arguments.dispatch, "select", lambda *_: row)
    with pytest.raises(fastattn.UnsupportedError, match="alibi_slopes are not supported across ranks by Triton"):
        arguments.whole(call, shards, shards, 1)


def test_parts_of_a_block_mask():
    dense = torch.rand(1, 2, 200, 150) < 0.1
    mask = BlockMask.from_dense(dense, block_size=(32, 16))
    part = cut(mask, (64, 160), (48, 150))
    assert torch.equal(part.to_dense(), dense[:, :, 64:160, 48:150])
    assert cut(mask & Mask.intervals(k_end=torch.tensor([[[10]]])), (0, 32), (16, 32)) is None
    with pytest.raises(ValueError, match="query blocks of 32, and a shard ends at 60: .* multiple=32"):
        cut(mask, (60, 160), (48, 150))
    shards = parallel.Shards((((32, 64), (128, 200)), ((0, 32), (64, 128))))
    for rank in range(2):
        assert torch.equal(local_rows(mask, shards, rank).to_dense(), shards.take(dense, rank, 2))


def test_hashes_are_the_same_in_every_process():
    assert hash_of(("ring", 1.5, None)) == hash_of(("ring", 1.5, None)) != hash_of(("ring", 1.25, None))
