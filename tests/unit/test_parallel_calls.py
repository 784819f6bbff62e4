"""`fastattn.parallel` around its attention: shards of tensors, decoding, training, what is imported, memory."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fastattn
from fastattn import Mask, parallel
from isas import needs_cpu
from processes import mesh_of, team_of

pytestmark = [needs_cpu, pytest.mark.usefixtures("one_thread")]


four = team_of(4)
one = team_of(1)
three = team_of(3)


def test_import_fastattn_does_not_import_it():
    code = "import sys, fastattn; assert not [x for x in sys.modules if x.startswith('fastattn.parallel')]"
    subprocess.run([sys.executable, "-c", code], check=True)


def _shard(rank, ranks, kind):
    mesh, dim = mesh_of(*ranks), "cp" if len(ranks) == 1 else ("outer", "inner")
    place = {"mesh": mesh, "dim": dim, "shards": kind}
    x = torch.arange(2 * 50 * 3).view(2, 50, 3)
    mine = parallel.shard(x, seq_dim=1, **place)
    mask = parallel.shard(Mask.documents(torch.arange(50)[None] // 7) & Mask.causal(), **place)
    return mine, parallel.unshard(mine, seq_dim=1, **place), mask.k_start


@pytest.mark.parametrize("kind", ["contiguous", "zigzag", parallel.Shards.of_lengths([20, 0, 5, 25])])
@pytest.mark.parametrize("ranks", [(4,), (2, 2)])
def test_shard_and_unshard(four, ranks, kind):
    shards = getattr(parallel.Shards, kind)(50, 4) if isinstance(kind, str) else kind
    whole = torch.arange(2 * 50 * 3).view(2, 50, 3)
    starts = (torch.arange(50) // 7 * 7).int().view(1, 1, 50)
    for rank, (mine, again, start) in enumerate(four.run(_shard, ranks, kind)):
        assert torch.equal(mine, shards.take(whole, rank, 1)) and torch.equal(again, whole)
        assert torch.equal(start, shards.take(starts, rank, 2))


def _cache(lengths, seqlen_q=3, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    shapes = (4, seqlen_q, 16), (2, sum(lengths), 16), (2, sum(lengths), 8)
    return [torch.randn(2, *shape, generator=generator).to(dtype) for shape in shapes]


OPTIONS = {
    "none": {},
    "causal": {"causal": True, "alibi_slopes": torch.tensor([0.5, 0.25, 0.1, 0.0]), "softcap": 4.0},
    "window": {"window_size": (9, 0), "sinks": torch.tensor([0.5, -1.0, 2.0, 0.0])},
    "lengths": {"mask": Mask.lengths(torch.tensor([5, 31])), "softmax_scale": torch.tensor(0.3)},
}


def _decode(rank, lengths, name, ranks):
    q, k, v = _cache(lengths)
    shards = parallel.Shards.of_lengths(lengths)
    dim = "cp" if len(ranks) == 1 else ("outer", "inner")
    before = parallel.sent_bytes()
    out, lse = parallel.decode(
        q,
        shards.take(k, rank, 2),
        shards.take(v, rank, 2),
        mesh=mesh_of(*ranks),
        dim=dim,
        return_lse=True,
        **OPTIONS[name],
    )
    return out, lse, parallel.sent_bytes() - before


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize(
    "lengths, ranks", [((10, 0, 7, 20), (4,)), ((10, 0, 7, 20), (2, 2)), ((4, 30, 3), (3,))], ids=str
)
def test_decode(request, lengths, ranks, name):
    team = request.getfixturevalue("three" if ranks == (3,) else "four")
    found = team.run(_decode, lengths, name, ranks)
    q, k, v = _cache(lengths)
    out, lse = fastattn.attention(q, k, v, return_lse=True, **OPTIONS[name])
    torch.testing.assert_close(found[0][:2], (out, lse))
    assert all(torch.equal(x, found[0][0]) and torch.equal(y, found[0][1]) for x, y, _ in found)
    numbers = out.numel() + 2 * lse.numel()
    assert max(sent for _, _, sent in found) <= 2 * numbers * 4  # whatever the length of the cache


def _many_steps(rank):
    """A cache that grows on the last rank, step by step."""
    q, k, v = _cache((12, 12, 12, 12), seqlen_q=1)
    worst = 0.0
    for extra in range(1, 6):
        keys = [x[:, :, 12 * rank : 12 * rank + (12 if rank < 3 else extra)] for x in (k, v)]
        out = parallel.decode(q, *keys, mesh=mesh_of(4), causal=True)
        expected = fastattn.attention(q, k[:, :, : 36 + extra], v[:, :, : 36 + extra], causal=True)
        worst = max(worst, (out - expected).abs().max().item())
    return worst


def test_decode_of_a_growing_cache(four):
    assert max(four.run(_many_steps)) < 1e-5


class Layer(torch.nn.Module):
    def __init__(self, dim=16, heads=2):
        super().__init__()
        self.heads, self.qkv, self.out = heads, torch.nn.Linear(dim, 3 * dim), torch.nn.Linear(dim, dim)

    def forward(self, x, attend):
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.out(attend(q, k, v).transpose(1, 2).flatten(2))


def _model():
    torch.manual_seed(1)
    return torch.nn.ModuleList([Layer(), Layer()])


def _loss(model, x, attend, checkpointed=False):
    for layer in model:
        if checkpointed:
            x = x + torch.utils.checkpoint.checkpoint(layer, x, attend, use_reentrant=False)
        else:
            x = x + layer(x, attend)
    return x.square().sum()


class _All(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x, attend, checkpointed):
        return _loss(self.model, x, attend, checkpointed)


def _train(rank, kind):
    """Gradients of the weights with batches along "outer" and the sequence along "inner"."""
    mesh = mesh_of(2, 2)
    data, model = torch.randn(4, 24, 16, generator=torch.Generator().manual_seed(0)), _model()
    batch = data[2 * (rank // 2) : 2 * (rank // 2) + 2]
    x = parallel.shard(batch, mesh=mesh, dim="inner", seq_dim=1, shards="zigzag")

    def attend(q, k, v):
        return parallel.attention(q, k, v, mesh=mesh, dim="inner", shards="zigzag", causal=True)

    if kind == "compile":
        attend = torch.compile(attend, backend="aot_eager", fullgraph=True)
    wrapped = _All(model)
    if kind == "ddp":
        wrapped = torch.nn.parallel.DistributedDataParallel(wrapped)  # over all four: a mean
    if kind == "fsdp":
        from torch.distributed.fsdp import fully_shard

        wrapped = fully_shard(wrapped, mesh=mesh["outer"])
    wrapped(x, attend, kind == "checkpoint").backward()
    grads = [p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad for p in model.parameters()]
    return torch.cat([g.flatten() for g in grads])


@pytest.mark.parametrize(
    "kind", ["plain", "ddp", "fsdp", "checkpoint", pytest.param("compile", marks=pytest.mark.slow)]
)
def test_training(four, kind):
    model = _model()
    data = torch.randn(4, 24, 16, generator=torch.Generator().manual_seed(0))
    _loss(model, data, lambda q, k, v: fastattn.attention(q, k, v, causal=True)).backward()
    expected = torch.cat([p.grad.flatten() for p in model.parameters()])
    found = four.run(_train, kind)
    if kind == "ddp":
        total = 4 * found[0]
    elif kind == "fsdp":  # a mean over "outer", of this rank's rows along "inner"
        total = 2 * (found[0] + found[1])
    else:
        total = sum(found)
    torch.testing.assert_close(total, expected, rtol=1e-4, atol=1e-4)


def _peak(rank, seqlen, schedule):
    """Bytes beyond the inputs at the peak of a forward and a backward pass, as torch's allocator is asked for them."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        largest = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            for x in out if isinstance(out, (tuple, list)) else (out,):
                if isinstance(x, torch.Tensor) and 0 not in x.stride():
                    self.largest = max(self.largest, x.untyped_storage().nbytes())
            return out

    shards = parallel.Shards.zigzag(seqlen, 4)
    rows = shards.lengths[rank]
    q, k, v = [torch.randn(1, 4, rows, 16, requires_grad=True) for _ in range(3)]
    with Largest() as seen:
        out = parallel.attention(q, k, v, mesh=mesh_of(4), schedule=schedule, shards="zigzag", causal=True)
        forward, seen.largest = seen.largest, 0
        out.sum().backward()
    assert seen.largest >= k.nbytes  # it is seen
    return max(forward, seen.largest), k.nbytes


@pytest.mark.parametrize("schedule", ["ring", "all_to_all"])
def test_no_tensor_is_as_large_as_the_sequence(four, schedule):
    for seqlen in (512, 4096):
        for largest, own in four.run(_peak, seqlen, schedule):
            assert largest <= 3 * own, (largest, own)  # the whole sequence: 4 times


def _derivatives(rank):
    """What is said of derivatives that would need the other ranks once more."""
    q, k, v = [torch.randn(1, 2, 6, 8, requires_grad=True) for _ in range(3)]
    mesh, found = mesh_of(1), []
    out = parallel.attention(q, k, v, mesh=mesh)
    (dq,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
    for again in (
        lambda: dq.sum().backward(),
        lambda: torch.func.vmap(lambda q: parallel.attention(q[None], k, v, mesh=mesh))(q),
        lambda: torch.func.jvp(lambda q: parallel.attention(q, k, v, mesh=mesh), (q,), (q,)),
    ):
        try:
            again()
            found.append("nothing")
        except (RuntimeError, NotImplementedError) as error:
            found.append(str(error))
    with torch.inference_mode():
        found.append(parallel.attention(q, k, v, mesh=mesh).shape)
    return found


def _changed_mask(rank):
    q, k, v = [torch.randn(1, 2, 6, 8, requires_grad=True) for _ in range(3)]
    mask = torch.ones(1, 1, 6, 24, dtype=torch.bool)
    out = parallel.attention(q, k, v, mesh=mesh_of(4), mask=mask)
    mask[0, 0, 0, 0] = False
    try:
        out.sum().backward()
    except RuntimeError as error:
        return str(error)


def test_a_mask_that_was_changed(four):
    assert set(four.run(_changed_mask)) == {"mask was changed in place after the forward pass that needs it"}


def test_derivatives_that_are_refused(one):
    for again, of_batch, forward, shape in one.run(_derivatives):
        assert "once_differentiable" in again and shape == (1, 2, 6, 8)
        assert all("fastattn.parallel has no torch.func transforms" in text for text in (of_batch, forward))


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="makes network namespaces")
def test_benchmark_of_a_slow_network():
    bench = Path(fastattn.__file__).parents[1] / "bench" / "parallel_network.py"
    arguments = "--seqlen", "256", "--pretend", "1", "--repeat", "1", "--rates", "1", "--delays", "0", "0.1"
    environment = os.environ | {"PYTHONPATH": str(bench.parents[1])}
    found = subprocess.run([sys.executable, str(bench), *arguments], capture_output=True, text=True, env=environment)
    if "no link:" in found.stderr:
        pytest.skip(found.stderr)
    assert found.returncode == 0, found.stderr
    rows = [line for line in found.stdout.splitlines() if line.startswith(("full", "causal"))]
    assert len(rows) == 8 and all(float(row.split()[-1]) > 0.0 for row in rows)


@pytest.mark.slow
def test_benchmark():
    bench = Path(fastattn.__file__).parents[1] / "bench" / "parallel.py"
    arguments = [sys.executable, str(bench), "--ranks", "2", "--seqlen", "256", "--repeat", "1"]
    environment = os.environ | {"PYTHONPATH": str(bench.parents[1])}
    text = subprocess.run(arguments, check=True, capture_output=True, text=True, env=environment).stdout
    rings = [f"ring-flash-attention, {name} kernel" for name in ("torch's", "fastattn's")]
    rows = {name: text.split(f"\n{name} ")[-1].split("\n")[0].split() for name in ("ring", "all_to_all", *rings)}
    assert all(float(row[-1]) < 1e-4 for row in rows.values())
    assert float(rows["ring"][-2]) < float(rows[rings[0]][-2])  # MiB: an eighth of the ring is of no use
    assert "\ntorch's context_parallel " in text
