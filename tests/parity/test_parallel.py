"""`fastattn.parallel.attention` on 2 and 4 processes beside the same call in one place, with all gradients."""

import time

import pytest
import torch

import fastattn
from cases import Case, inputs
from fastattn import Mask, parallel
from fastattn.parallel.choice import setting_of
from fastattn.parallel.costs import Sizes, listed, needs_of, work
from fastattn.parallel.plan import transfers
from isas import needs_cpu
from processes import Team, mesh_of, team_of
from shard_problems import assert_as_in_one_place, attend, random_problem, sharded

pytestmark = [needs_cpu, pytest.mark.usefixtures("one_thread")]
SMALL = Case(batch=2, num_heads=4, num_heads_k=2, seqlen_q=90, head_dim=16, head_dim_v=8)
ONE = ("ring", "all_gather", "all_to_all")


two = team_of(2)
four = team_of(4)


@pytest.mark.parametrize("kind", ["contiguous", "zigzag", "uneven", "one"])
@pytest.mark.parametrize("schedule", ONE)
def test_shards_and_schedules(two, schedule, kind):
    assert_as_in_one_place(two, sharded(SMALL._replace(causal=True), (2,), kind, schedule))


@pytest.mark.parametrize("kind", ["contiguous", "zigzag", "uneven"])
@pytest.mark.parametrize("schedule", ["ring", "all_gather", "ring+all_to_all"])
def test_four_ranks(four, schedule, kind):
    ranks = (2, 2) if "all_to_all" in schedule else (4,)
    assert_as_in_one_place(four, sharded(SMALL._replace(causal=True, sinks=True), ranks, kind, schedule))


TERMS = {
    "window": {"window_size": (20, 3)},
    "softcap": {"softcap": 3.0},
    "alibi": {"alibi": True, "causal": True},
    "sinks": {"sinks": True},
    "scale": {"learned_scale": "per_head"},
    "lengths": {"mask": "lengths"},
    "documents": {"mask": "documents"},
    "prefix": {"mask": "prefix_lm"},
    "intervals": {"mask": "intervals", "sinks": True},
    "more keys": {"seqlen_k": 131, "causal": True, "alibi": True},
    "more queries": {"seqlen_k": 50, "causal": True},
    "top left": {"seqlen_k": 50, "mask": "top_left"},
    "bfloat16": {"dtype": "bfloat16", "causal": True},
    "float16": {"dtype": "float16", "window_size": (30, None)},
    "float64": {"dtype": "float64", "causal": True, "layout": "bshd"},
}


@pytest.mark.parametrize("name", TERMS)
@pytest.mark.parametrize("schedule", ["ring", "all_to_all"])
def test_masks_and_terms(two, schedule, name):
    assert_as_in_one_place(two, sharded(SMALL._replace(**TERMS[name]), (2,), "zigzag", schedule))


ROWS = {
    "tensor": {"mask": "tensor_per_head"},
    "key tensor": {"mask": "key_tensor"},
    "blocks": {"mask": "blocks", "seqlen_q": 260},
    "shared blocks": {"mask": "shared_blocks", "seqlen_q": 260, "causal": True, "bias": "key"},
    "bias": {"bias": "full", "causal": True},
    "query bias": {"bias": "query"},
}


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("schedule", ["ring", "all_gather"])
def test_masks_and_biases_of_rows(two, schedule, name):
    assert_as_in_one_place(two, sharded(SMALL._replace(**ROWS[name]), (2,), "zigzag", schedule))


@pytest.mark.parametrize("kind", ["zigzag", "uneven"])
@pytest.mark.parametrize("mask", ["blocks", "shared_blocks"])
def test_block_masks_of_all_rows(four, mask, kind):
    case = SMALL._replace(mask=mask, seqlen_q=330, seqlen_k=280, causal=True)
    assert_as_in_one_place(four, sharded(case, (2, 2), kind, "ring+all_to_all"))


@pytest.mark.parametrize("ranks", [(2,), (4,), (2, 2)], ids=str)
@pytest.mark.parametrize("part", range(2))
def test_random_problems(request, ranks, part):
    team = request.getfixturevalue("two" if ranks == (2,) else "four")
    for seed in range(6 * part, 6 * part + 6):
        assert_as_in_one_place(team, random_problem(seed, ranks))


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [(2,), (4,), (2, 2)], ids=str)
@pytest.mark.parametrize("part", range(7))
def test_many_random_problems(request, ranks, part):
    team = request.getfixturevalue("two" if ranks == (2,) else "four")
    for seed in range(100 + 10 * part, 110 + 10 * part):
        assert_as_in_one_place(team, random_problem(seed, ranks))


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [(8,), (4, 2)], ids=str)
def test_eight_ranks(tmp_path, ranks):
    team = Team(8, tmp_path)
    for seed in range(300, 320):
        assert_as_in_one_place(team, random_problem(seed, ranks))
    team.close()


@pytest.mark.parametrize("schedule", ["ring", "all_gather", None])
@pytest.mark.parametrize("rows, keys", [(3, 3), (2, 41), (41, 1)])
def test_fewer_rows_or_key_heads_than_ranks(four, rows, keys, schedule):
    case = SMALL._replace(num_heads_k=1, seqlen_q=rows, seqlen_k=keys, dropout_p=0.2, sinks=True, dtype="bfloat16")
    assert_as_in_one_place(four, sharded(case, (4,), "zigzag", schedule))


def test_one_rank(tmp_path):
    team = Team(1, tmp_path)
    for seed in range(4):
        assert_as_in_one_place(team, random_problem(seed, (1,)))
    team.close()


def _documents(rank, lengths, in_documents):
    """(bytes sent, blocks computed) of both passes over whole documents, or the same rows without a mask of them."""
    shards = parallel.Shards.documents(lengths, 4)
    ids = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))[None]
    mask = parallel.shard(Mask.documents(ids), mesh=mesh_of(4), shards=shards)
    leaves = [torch.randn(1, 2, shards.lengths[rank], 8, requires_grad=True) for _ in range(3)]
    before = parallel.sent_bytes()
    with fastattn.record() as calls:
        out = parallel.attention(
            *leaves, mesh=mesh_of(4), schedule="ring", shards=shards, mask=mask if in_documents else None
        )
        out.sum().backward()
    return parallel.sent_bytes() - before, len(calls), len(shards.runs[rank])


def test_what_nobody_sees_is_neither_computed_nor_sent(four):
    lengths = [40, 7, 30, 22, 9, 14, 25, 31]
    found = four.run(_documents, lengths, True)
    assert [sent for sent, _, _ in found] == [0] * 4
    assert [calls for _, calls, _ in found] == [2 * runs for _, _, runs in found]
    assert all(sent > 0 for sent, _, _ in four.run(_documents, lengths, False))


@pytest.mark.parametrize("schedule", ["ring", "all_gather"])
def test_bits_do_not_depend_on_timing(four, schedule):
    problem = sharded(SMALL._replace(causal=True, alibi=True, dtype="bfloat16"), (4,), "zigzag", schedule)
    first, again = (four.run(attend, problem, {}) for _ in range(2))
    delayed = four.run(_late, problem)
    for x, y, z in zip(first, again, delayed, strict=True):
        assert all(torch.equal(x[name], y[name]) and torch.equal(x[name], z[name]) for name in x)


def _late(rank, problem):
    """As `attend`, by ranks that are late in another order than they are counted."""
    time.sleep(0.05 * (rank * 3 % 4))
    return attend(rank, problem, {})


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_backends(two, backend):
    problem = sharded(SMALL._replace(causal=True, sinks=True, softcap=3.0), (2,), "zigzag", "ring")
    assert_as_in_one_place(two, problem, backend=backend)


@pytest.mark.parametrize("kind, window", [("zigzag", None), ("contiguous", (30, 0)), ("uneven", None)])
@pytest.mark.parametrize("schedule", ["ring", "all_gather", "ring+all_to_all"])
def test_bytes_are_the_least_and_the_models(four, schedule, kind, window):
    ranks = (2, 2) if "all_to_all" in schedule else (4,)
    case = SMALL._replace(seqlen_q=256, causal=True, window_size=window, dtype="bfloat16")
    problem = sharded(case, ranks, kind, schedule, seed=3)
    forward, both = (sum(x) for x in zip(*four.run(_sent, problem), strict=True))
    text, found = four.run(_modelled, problem)[0]
    assert forward == pytest.approx(sum(found.forward_bytes), rel=0.02), text
    assert both - forward == pytest.approx(sum(found.backward_bytes), rel=0.02), text
    if ranks == (4,):
        bounds = (-(window[0]) if window else -(1 << 40), 0)
        runs, owners = listed(problem.shards_k)
        counts = transfers(needs_of(work(problem.shards, problem.shards_k, *bounds)), owners)
        rows = sum(count * (stop - start) for count, (start, stop) in zip(counts, runs, strict=True))
        assert forward == rows * 2 * 2 * (16 + 8) * 2 and both == 2 * forward + rows * 2 * 2 * (16 + 8) * 4


def _sent(rank, problem):
    """(bytes that the forward pass sends, bytes of both passes)."""
    before = parallel.sent_bytes()
    with torch.no_grad():
        _call(rank, problem)
    middle = parallel.sent_bytes()
    out, leaves = _call(rank, problem)
    out.float().square().sum().backward()
    return middle - before, parallel.sent_bytes() - middle


def _call(rank, problem):
    qkv, kwargs = inputs(problem.case)
    cuts = problem.shards, problem.shards_k, problem.shards_k
    leaves = [y.take(x, rank, 2).requires_grad_() for x, y in zip(qkv, cuts, strict=True)]
    mesh = mesh_of(*problem.ranks)
    out = parallel.attention(
        *leaves, **kwargs, mesh=mesh, dim=problem.dim, schedule=problem.schedule, shards=problem.shards,
        shards_k=problem.shards_k,
    )  # fmt: skip
    return out, leaves


def _modelled(rank, problem):
    case = problem.case
    sizes = Sizes(case.batch, case.num_heads, case.num_heads_k, case.head_dim, case.head_dim_v, 2, 4)
    setting = setting_of(
        problem.ranks,
        case.seqlen_q,
        case.seqlen_q,
        problem.shards,
        case.causal,
        case.window_size,
        parallel.Machine(),
        sizes,
    )
    return str(problem), setting.cost(problem.schedule)
