"""`fastattn.parallel` where ranks die, are slow, or make different calls: every other rank says so and none hangs."""

import os
import time

import pytest
import torch

from fastattn import Mask, parallel
from processes import Raised, Team, mesh_of, team_of

SECONDS = 2.0


@pytest.fixture
def three(tmp_path):
    team = Team(3, tmp_path)
    team.run(_ready)
    yield team
    team.close()


two = team_of(2)


def _ready(rank):
    mesh_of(torch.distributed.get_world_size())
    return rank


def _states(heads=2, rows=8, dim=4, dtype=torch.float32):
    return [torch.randn(1, heads, rows, dim, dtype=dtype) for _ in range(3)]


def _attend(rank, **options):
    mesh = mesh_of(torch.distributed.get_world_size())
    q, k, v = _states()
    return parallel.attention(q, k, v, mesh=mesh, **options)


def _late(rank, who, where):
    """`who` comes too late: to the call, to a step of it, or to the backward pass."""
    mesh = mesh_of(torch.distributed.get_world_size())
    q, k, v = [x.requires_grad_() for x in _states()]
    if rank == who and where == "call":
        time.sleep(3 * SECONDS)
    if rank == who and where == "step":
        from fastattn.parallel import blocks

        forward = blocks.forward
        blocks.forward = lambda *args: (time.sleep(3 * SECONDS), forward(*args))[1]
    out = parallel.attention(q, k, v, mesh=mesh, timeout=SECONDS)
    if rank == who and where == "backward":
        time.sleep(3 * SECONDS)
    out.sum().backward()


@pytest.mark.parametrize("where", ["call", "step", "backward"])
def test_a_slow_rank(three, where):
    began = time.monotonic()
    three.start(_late, 1, where)
    found = three.results(ranks=(0, 2))
    assert time.monotonic() - began < 20 * SECONDS  # and never
    for rank, answer in zip((0, 2), found, strict=True):
        assert isinstance(answer, Raised) and answer.kind == "ParallelError", answer
        assert answer.text.startswith(f"rank {rank} waited for rank ") and "imed out" in answer.text
    assert any("waited for rank 1" in answer.text for answer in found)


def test_a_killed_rank(three):
    three.start(_attend, ranks=(0, 2))
    time.sleep(0.2)
    three.kill(1)
    for answer in three.results(ranks=(0, 2)):
        assert isinstance(answer, Raised) and answer.kind == "ParallelError", answer
        assert "waited for rank 1" in answer.text and ".cc" not in answer.text


def _halfway(rank, schedule):
    """Rank 1 is gone when the others begin the backward pass."""
    q, k, v = [x.requires_grad_() for x in _states(heads=3)]
    out = parallel.attention(q, k, v, mesh=mesh_of(3), schedule=schedule, timeout=SECONDS)
    if rank == 1:
        os._exit(1)
    out.sum().backward()


@pytest.mark.parametrize("schedule", ["ring", "all_gather", "all_to_all"])
def test_a_rank_that_dies_before_its_backward_pass(three, schedule):
    three.start(_halfway, schedule)
    for answer in three.results(ranks=(0, 2)):
        assert isinstance(answer, Raised) and answer.kind == "ParallelError", answer
        assert "waited for rank" in answer.text


def _raises(rank):
    """Rank 1 raises in the middle of a call."""
    from fastattn.parallel import blocks

    if rank == 1:
        blocks.forward = lambda *args: 1 // 0
    return _attend(rank, timeout=SECONDS)


def test_a_rank_that_raises(three):
    three.start(_raises)
    found = three.results()
    assert found[1].kind == "ZeroDivisionError"
    for answer in (found[0], found[2]):
        assert answer.kind == "ParallelError" and "failed said: rank 1 raised ZeroDivisionError" in answer.text


CALLS = {
    "dtype": (lambda rank: {"dtype": torch.float64} if rank else {}, {}, "passes another dtype"),
    "head_dim": (lambda rank: {"dim": 4 + rank}, {}, "passes head_dim=5"),
    "heads": (lambda rank: {"heads": 2 + rank}, {}, "passes num_heads=3"),
    "causal": (lambda rank: {}, {"causal": lambda rank: rank == 1}, "passes another windows"),
    "softcap": (lambda rank: {}, {"softcap": lambda rank: 1.0 + rank}, "passes another softcap"),
    "mask": (lambda rank: {}, {"mask": lambda rank: [None, Mask.lengths(torch.tensor([3]))][rank]}, "another mask"),
    "dropout": (lambda rank: {}, {"dropout_p": lambda rank: 0.1 * rank}, "another dropout_p"),
    "seed": (lambda rank: {}, {"dropout_p": lambda rank: 0.5, "seed": lambda rank: 3 + rank}, "passes seed=4"),
    "schedule": (lambda rank: {}, {"schedule": lambda rank: ["ring", "all_gather"][rank]}, "another schedule"),
}


def _differently(rank, name):
    states, options, _ = CALLS[name]
    q, k, v = _states(**states(rank))
    return parallel.attention(q, k, v, mesh=mesh_of(2), **{key: of(rank) for key, of in options.items()})


@pytest.mark.parametrize("name", CALLS)
def test_other_arguments(two, name):
    two.start(_differently, name)
    first, second = two.results()
    assert first.kind == second.kind == "ParallelError"
    assert "rank 1" in first.text and CALLS[name][2] in first.text and "must agree" in second.text
    assert all(x.shape == (1, 2, 8, 4) for x in two.run(_attend))  # the ranks go on


def _refused(rank, name):
    q, k, v = _states()
    wrong = {
        "shapes": {"k": k[:, :, :, :2]},
        "dropout": {"dropout_p": 1.5},
        "mask": {"mask": torch.ones(1, 1, 7, 16, dtype=torch.bool)},
        "intervals": {"mask": Mask.intervals(k_end=torch.ones(1, 1, 5).int())},
        "schedule": {"schedule": "star"},
        "sinks": {"sinks": 3},
    }[name]
    if rank == 0 and name in ("mask", "intervals"):
        wrong = {"mask": torch.ones(1, 1, 8, 16, dtype=torch.bool)} if name == "mask" else {
            "mask": Mask.intervals(k_end=torch.ones(1, 1, 8).int())}  # fmt: skip
    arguments = {"q": q, "k": k, "v": v} | (wrong if rank or name in ("mask", "intervals") else {})
    return parallel.attention(**arguments, mesh=mesh_of(2))


@pytest.mark.parametrize(
    "name, kind, text",
    [
        ("shapes", "ValueError", "k has shape (1, 2, 8, 2)"),
        ("dropout", "ValueError", "dropout_p=1.5 must be in [0, 1)"),
        ("mask", "ValueError", "mask has shape (1, 1, 7, 16)"),
        ("intervals", "ValueError", "k_end of mask has shape (1, 1, 5)"),
        ("schedule", "ValueError", "schedule='star'"),
        ("sinks", "TypeError", "sinks must be a torch.Tensor"),
    ],
)
def test_wrong_arguments_of_one_rank(two, name, kind, text):
    two.start(_refused, name)
    first, second = two.results()
    assert second.kind == kind and text in second.text
    assert first.kind == "ParallelError" and first.text.startswith("rank 1 was called with wrong arguments: " + kind)


def _debug(rank, debug):
    q, k, v = _states()
    return parallel.attention(q, k, v, mesh=mesh_of(2), sinks=torch.full((2,), float(rank)), debug=debug)


def test_debug_compares_values(two):
    two.start(_debug, True)
    for answer in two.results():
        assert answer.kind == "ParallelError" and "values of sinks" in answer.text
    two.run(_debug, False)


def _local_errors(rank):
    q, k, v = _states()
    found = []
    for options in ({"mesh": None}, {"mesh": mesh_of(2), "dim": "dp"}, {"mesh": mesh_of(2), "is_causal": True}):
        try:
            parallel.attention(q, k, v, **options)
        except (TypeError, ValueError) as error:
            found.append(str(error))
    return found


def test_what_is_wrong_without_other_ranks(two):
    mesh, dim, name = two.run(_local_errors)[0]
    assert "mesh must be a torch.distributed DeviceMesh" in mesh
    assert "dim='dp' must be one or two different names of mesh dimensions, here ('cp',)" in dim
    assert "unexpected keyword argument 'is_causal'" in name
