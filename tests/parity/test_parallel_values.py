"""`fastattn.parallel.attention` at the edge: NaN behind masks, -inf, huge numbers, sizes of 0."""

import pytest
import torch

import fastattn
from fastattn import Mask, parallel
from isas import needs_cpu
from processes import mesh_of, team_of

pytestmark = [needs_cpu, pytest.mark.usefixtures("one_thread")]
INF, NAN = float("inf"), float("nan")
ROWS = 48


four = team_of(4)


def problem(name):
    """(q, k, v, options), the same in every process."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = [torch.randn(2, 4, ROWS, 16, generator=generator) for _ in range(3)]
    sinks = torch.randn(4, generator=generator)
    bias = torch.zeros(2, 1, ROWS, ROWS)
    if name == "NaN behind a mask":
        k[:, :, 40:], v[:, :, 40:] = NAN, NAN
        return q, k, v, {"mask": Mask.lengths(torch.tensor([40, 33]))}
    if name == "NaN ahead":
        v[:, :, 30] = NAN
        return q, k, v, {"causal": True}
    if name == "rows that see nothing":
        return q, k, v, {"mask": Mask.intervals(k_start=torch.full((1, 1, 1), ROWS - 1)), "causal": True}
    if name == "bias of -inf":
        bias[..., 10:], bias[:, :, 5] = -INF, -INF
        return q, k, v, {"bias": bias}
    if name == "bias of finfo.min":
        bias[..., 20:], bias[:, :, 7] = torch.finfo(torch.float32).min, torch.finfo(torch.float32).min
        return q, k, v, {"bias": bias}
    if name == "huge scores":
        return 1e4 * q, 1e4 * k, v, {}
    if name == "no batch":
        return q[:0], k[:0], v[:0], {"causal": True}
    if name == "no keys":
        return q, k[:, :, :0], v[:, :, :0], {"sinks": sinks}
    if name == "no queries":
        return q[:, :, :0], k, v, {}
    return q[:, :, :0], k[:, :, :0], v[:, :, :0], {}


NAMES = ["NaN behind a mask", "NaN ahead", "rows that see nothing", "bias of -inf", "bias of finfo.min", "huge scores"]
NAMES += ["no batch", "no keys", "no queries", "nothing"]


def cuts(q, k, kind):
    make = getattr(parallel.Shards, kind)
    return make(q.shape[2], 4), make(k.shape[2], 4)


def train(attention, qkv, options):
    leaves = [x.detach().clone().requires_grad_() for x in qkv]
    out, lse = attention(*leaves, **options, return_lse=True)
    return out.detach(), lse.detach(), *torch.autograd.grad(out.sum(), leaves)


def _parallel(rank, name, kind, schedule, ranks):
    q, k, v, options = problem(name)
    rows, keys = cuts(q, k, kind)
    if "bias" in options:
        options["bias"] = rows.take(options["bias"], rank, 2)
    options |= {"mesh": mesh_of(*ranks), "dim": "cp" if len(ranks) == 1 else ("outer", "inner"), "schedule": schedule}
    options |= {"shards": rows, "shards_k": keys}
    qkv = rows.take(q, rank, 2), keys.take(k, rank, 2), keys.take(v, rank, 2)
    return train(parallel.attention, qkv, options)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("schedule, ranks", [("ring", (4,)), ("all_gather", (4,)), ("ring+all_to_all", (2, 2))])
def test_as_in_one_place(four, schedule, ranks, name):
    q, k, v, options = problem(name)
    if "bias" in options and len(ranks) == 2:
        four.start(_parallel, name, "zigzag", schedule, ranks)
        assert all("is refused: bias: a rank would get the rows" in answer.text for answer in four.results())
        return
    expected = train(fastattn.attention, (q, k, v), options)
    for kind in ("contiguous", "zigzag"):
        rows, keys = cuts(q, k, kind)
        found = four.run(_parallel, name, kind, schedule, ranks)
        for pieces, shards, whole in zip(
            zip(*found, strict=True), (rows, rows, rows, keys, keys), expected, strict=True
        ):
            torch.testing.assert_close(shards.joined(pieces, 2), whole, equal_nan=True, rtol=1e-4, atol=1e-5)
