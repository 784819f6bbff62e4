"""`fastattn.parallel.attention` in graphs of torch.compile: no break, and the bits of the eager call."""

import pytest
import torch

from fastattn import BlockMask, Mask, parallel
from isas import needs_cpu
from processes import mesh_of, team_of

pytestmark = [needs_cpu, pytest.mark.usefixtures("one_thread")]
ROWS, HEADS = 52, 2


two = team_of(2)


def problem(name, rank):
    """(local q, k, v and learned tensors by name, options, schedule, dtype)."""
    generator = torch.Generator().manual_seed(0)
    shards = parallel.Shards.contiguous(ROWS, 2, 16) if name == "blocks" else parallel.Shards.zigzag(ROWS, 2)
    dtype = torch.bfloat16 if name == "bfloat16" else torch.float32
    q, k, v = [shards.take(torch.randn(2, HEADS, ROWS, 8, generator=generator), rank, 2).to(dtype) for _ in range(3)]
    leaves = {"q": q, "k": k, "v": v}
    options = {"shards": shards, "schedule": "all_to_all" if "heads" in name else "ring"}
    lengths = torch.tensor([ROWS - 9, ROWS])
    if name in ("causal", "bfloat16", "heads"):
        options |= {"causal": True, "return_lse": name == "causal", "shards": "zigzag"}
    if name == "heads and terms":
        leaves |= {"sinks": torch.randn(HEADS, generator=generator), "alibi_slopes": torch.ones(HEADS)}
        options |= {"dropout_p": 0.3, "seed": 11, "softcap": 3.0}
    if name == "dropout":
        options |= {"dropout_p": 0.3}
    if name == "intervals":
        rows = torch.arange(ROWS).view(1, 1, -1)
        options["mask"] = Mask.lengths(lengths) & Mask.intervals(k_start=shards.take((rows - 20).clamp(min=0), rank, 2))
        leaves["softmax_scale"] = torch.tensor(0.4)
    if name == "bias":
        leaves["bias"] = shards.take(torch.randn(1, 1, ROWS, ROWS, generator=generator), rank, 2)
    if name == "blocks":
        dense = torch.rand(1, 1, ROWS, ROWS, generator=generator) < 0.4
        options["mask"] = parallel.shard(BlockMask.from_dense(dense, block_size=16), mesh=mesh_of(2), shards=shards)
    return leaves, options


def train(attention, leaves, options):
    leaves = {name: x.detach().clone().requires_grad_() for name, x in leaves.items()}
    torch.manual_seed(3)
    found = attention(leaves, options)
    found = found if isinstance(found, tuple) else (found,)
    loss = sum(x.float().square().sum() for x in found)
    return [x.detach() for x in found] + list(torch.autograd.grad(loss, list(leaves.values())))


def _both(rank, name):
    mesh = mesh_of(2)

    def attention(leaves, options):
        q = leaves["q"] * 1.0  # something else in the graph
        return parallel.attention(**leaves | {"q": q}, **options, mesh=mesh)

    torch._dynamo.reset()
    leaves, options = problem(name, rank)
    compiled = torch.compile(attention, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        torch.manual_seed(3)
        plain = compiled(leaves, options)
    found = train(compiled, leaves, options)
    plain = plain[0] if isinstance(plain, tuple) else plain
    return found, train(attention, leaves, options), torch.equal(plain, found[0])


NAMES = ["causal", "heads and terms"]
MORE = ["bfloat16", "heads", "dropout", "intervals", "bias", "blocks"]


@pytest.mark.parametrize("name", NAMES + [pytest.param(name, marks=pytest.mark.slow) for name in MORE])
def test_as_eager(two, name):
    for found, expected, is_same_without_gradients in two.run(_both, name):
        assert is_same_without_gradients and len(found) == len(expected)
        assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))


def _uneven(rank):
    """Lengths that change, and that differ between the ranks, in one graph."""
    mesh = mesh_of(2)
    compiled = torch.compile(
        lambda q: parallel.attention(q, q, q, mesh=mesh, causal=True), backend="aot_eager", fullgraph=True, dynamic=True
    )
    found = []
    for rows in ((5, 9), (12, 0), (3, 30)):
        q = torch.randn(1, HEADS, rows[rank], 8, generator=torch.Generator().manual_seed(rank))
        found.append(torch.equal(compiled(q), parallel.attention(q, q, q, mesh=mesh, causal=True)))
    return found


def test_lengths_of_their_own(two):
    assert two.run(_uneven) == [[True] * 3] * 2


def _wrong(rank):
    q, mesh = torch.randn(1, HEADS + rank, 6, 8), mesh_of(2)
    try:
        torch.compile(lambda q: parallel.attention(q, q, q, mesh=mesh), backend="eager", fullgraph=True)(q)
    except parallel.ParallelError as error:
        return str(error)


def test_arguments_are_compared_when_the_graph_runs(two):
    assert all("num_heads" in text and "all ranks must agree" in text for text in two.run(_wrong))


@pytest.mark.slow
def test_inductor(two):
    assert all(error < 1e-5 for error in two.run(_inductor))


def _inductor(rank):
    (leaves, options), mesh = problem("heads and terms", rank), mesh_of(2)

    def attention(leaves, options):
        return parallel.attention(**leaves | {"q": leaves["q"] * 2.0}, **options, mesh=mesh)

    found = train(torch.compile(attention, fullgraph=True), leaves, options)
    expected = train(attention, leaves, options)
    return max((x - y).abs().max().item() for x, y in zip(found, expected, strict=True))
