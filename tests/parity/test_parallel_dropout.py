"""Dropout of `fastattn.parallel`: ranks drop the weights that one process drops, whatever schedule and shards."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import fastattn
from cases import Case
from fastattn import parallel
from isas import needs_cpu
from processes import mesh_of, team_of
from shard_problems import assert_as_in_one_place, sharded

pytestmark = [needs_cpu, pytest.mark.usefixtures("one_thread")]
SMALL = Case(batch=2, num_heads=4, num_heads_k=2, seqlen_q=90, head_dim=16, head_dim_v=8, dropout_p=0.3)
SEED, DROPOUT_P, ROWS, HEADS = (5 << 40) + 7, 0.4, 61, 4
SCHEDULES = [("ring", (4,)), ("all_gather", (4,)), ("all_to_all", (4,)), ("ring+all_to_all", (2, 2))]


two = team_of(2)
four = team_of(4)


def cut(kind, ranks):
    """Odd lengths; with "runs", of which no two neighbours are on one rank and a rank has none."""
    if kind != "runs":
        return getattr(parallel.Shards, kind)(ROWS, ranks)
    return parallel.Shards((((0, 3), (17, 30)), ((3, 17), (33, 61)), ((30, 33),), ())[:ranks])


def _kept(rank, kind, schedule, ranks, generator_seed):
    """(which weights the forward pass keeps, which the backward pass): with equal scores and v the identity, out is the
    weights, and the gradient of v for a cotangent of ones in one query is that query's row."""
    mesh, dim = mesh_of(*ranks), "cp" if len(ranks) == 1 else ("outer", "inner")
    shards = cut(kind, 4)
    q = torch.zeros(2, HEADS, shards.lengths[rank], 8)
    v = shards.take(torch.eye(ROWS).expand(2, HEADS, -1, -1), rank, 2).clone().requires_grad_()
    options = {"seed": SEED} if generator_seed is None else {}
    if generator_seed is not None:
        torch.manual_seed(generator_seed + rank)
    out = parallel.attention(
        q, q, v, mesh=mesh, dim=dim, schedule=schedule, shards=shards, dropout_p=DROPOUT_P, **options
    )
    own = shards.take(torch.eye(ROWS)[None, None], rank, 2).expand_as(out)  # query i in column i
    (dv,) = torch.autograd.grad(out, v, own)
    return out.detach() != 0, dv != 0


@pytest.mark.parametrize("kind", ["contiguous", "zigzag", "runs"])
@pytest.mark.parametrize("schedule, ranks", SCHEDULES)
def test_the_same_weights_are_dropped(four, schedule, ranks, kind):
    shards, found = cut(kind, 4), four.run(_kept, kind, schedule, ranks, None)
    expected = fastattn.dropout_mask(2, HEADS, ROWS, ROWS, DROPOUT_P, SEED)
    assert torch.equal(shards.joined([kept for kept, _ in found], 2), expected)
    assert torch.equal(shards.joined([kept for _, kept in found], 2), expected.transpose(2, 3))


def test_the_first_rank_draws_the_seed(four):
    found = four.run(_kept, "zigzag", "ring", (4,), 30)
    torch.manual_seed(30)
    seed = int(torch.randint(2**63 - 1, ()))
    expected = fastattn.dropout_mask(2, HEADS, ROWS, ROWS, DROPOUT_P, seed)
    assert torch.equal(cut("zigzag", 4).joined([kept for kept, _ in found], 2), expected)


def _checkpointed(rank, use_reentrant):
    """Gradients of a call whose seed is drawn, and of the same with its forward pass run twice."""
    q, k, v = [torch.randn(1, HEADS, 9 + rank, 8, generator=torch.Generator().manual_seed(n)) for n in range(3)]
    leaves = [x.requires_grad_() for x in (q, k, v)]

    def attend(q, k, v):
        return parallel.attention(q, k, v, mesh=mesh_of(4), dropout_p=DROPOUT_P, causal=True)

    found = []
    for call in (attend, lambda *args: checkpoint(attend, *args, use_reentrant=use_reentrant)):
        torch.manual_seed(8)
        call(*leaves).square().sum().backward()
        found.append([x.grad for x in leaves])
        for x in leaves:
            x.grad = None
    return all(torch.equal(x, y) for x, y in zip(*found, strict=True))


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpoints_drop_the_same_twice(four, use_reentrant):
    assert all(four.run(_checkpointed, use_reentrant))


TERMS = {
    "causal": {"causal": True, "sinks": True},
    "alibi": {"alibi": True, "softcap": 3.0, "causal": True},
    "documents": {"mask": "documents", "seqlen_k": 131},
    "bfloat16": {"dtype": "bfloat16", "causal": True},
    "float64": {"dtype": "float64", "window_size": (20, 3), "layout": "bshd"},
}


@pytest.mark.parametrize("name", TERMS)
@pytest.mark.parametrize("schedule", ["ring", "all_to_all"])
def test_results_and_gradients(two, schedule, name):
    assert_as_in_one_place(two, sharded(SMALL._replace(**TERMS[name]), (2,), "zigzag", schedule))


@pytest.mark.parametrize("bias", ["full", "query"])
def test_beside_a_bias(two, bias):
    assert_as_in_one_place(two, sharded(SMALL._replace(bias=bias, causal=True), (2,), "uneven", "all_gather"))


@pytest.mark.parametrize("kind", ["zigzag", "uneven"])
@pytest.mark.parametrize("schedule, ranks", SCHEDULES[:2] + SCHEDULES[3:])
def test_results_and_gradients_of_four_ranks(four, schedule, ranks, kind):
    assert_as_in_one_place(four, sharded(SMALL._replace(causal=True), ranks, kind, schedule))


def test_on_the_reference(two):
    assert_as_in_one_place(two, sharded(SMALL._replace(causal=True), (2,), "zigzag", "ring"), backend="reference")
