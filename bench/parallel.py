"""Attention of one sequence over processes of this machine beside one process: `python bench/parallel.py [options]`.

Each rank has one thread. Prints times of forward and backward, the bytes that were sent beside those of the cost model,
and the largest difference from one process; for each schedule, and on the same shards for ring-flash-attention's
algorithm and torch's context_parallel (`ring_peers.py`). What does not run says why.
"""

import argparse
import tempfile
import time
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import fastattn
from fastattn import parallel
from ring_peers import OwnBlocks, Ring, TorchBlocks, train_context_parallel, train_ring


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--seqlen", type=int, default=16384)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--schedule", nargs="*", default=["ring", "all_gather", "all_to_all"])
    parser.add_argument("--shards", default="zigzag", choices=["contiguous", "zigzag"])
    parser.add_argument("--repeat", type=int, default=3)
    options = parser.parse_args()
    print(
        parallel.explain(
            ranks=options.ranks, seqlen=options.seqlen, num_heads=options.heads, head_dim=options.head_dim, causal=True,
            shards=options.shards,
        )
    )  # fmt: skip
    torch.set_num_threads(1)
    alone, expected = best_of(options.repeat, lambda: train(states(options), fastattn.attention, {}))
    print(f"\n{'':<40}{'seconds':>10}{'ratio':>8}{'sent MiB':>10}{'difference':>12}\n{'one process':<40}{alone:>10.3f}")
    with tempfile.TemporaryDirectory() as folder:
        expected_file = Path(folder, "expected")
        torch.save(expected, expected_file)
        mp.spawn(rank_of, (options, folder, alone, str(expected_file)), options.ranks)


def rank_of(rank: int, options, folder: str, alone: float, expected_file: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=options.ranks)
    mesh = dist.init_device_mesh("cpu", (options.ranks,), mesh_dim_names=("cp",))
    place = {"mesh": mesh, "shards": options.shards}
    local = [parallel.shard(x, **place) for x in states(options)]
    expected = [parallel.shard(x, **place) for x in torch.load(expected_file)]
    for name, run in contenders(options, mesh, local, place):
        before = sent_bytes()
        try:
            run()  # once, so that nothing is compiled or connected within the measurement
            seconds, found = best_of(options.repeat, run, dist.barrier)
        except NotImplementedError as error:
            if rank == 0:
                print(f"{name:<40}refused: {error}")
            continue
        sent = torch.tensor([(sent_bytes() - before) / (options.repeat + 1), 0.0])
        sent[1] = max((x - y).abs().max().item() for x, y in zip(found, expected, strict=True))
        dist.all_reduce(sent, dist.ReduceOp.MAX)
        slowest = torch.tensor(seconds)
        dist.all_reduce(slowest, dist.ReduceOp.MAX)
        if rank == 0:
            ratio = alone / slowest.item()
            print(f"{name:<40}{slowest.item():>10.3f}{ratio:>7.2f}x{sent[0] / 2**20:>10.1f}{sent[1]:>12.2g}")
    dist.destroy_process_group()


def contenders(options, mesh, local, place: dict):
    """(name, function that returns out and gradients) of each row."""
    for schedule in options.schedule:
        yield schedule, partial(train, local, parallel.attention, place | {"schedule": schedule})
    is_zigzag = options.shards == "zigzag"
    if options.seqlen % (2 * options.ranks) == 0:
        for name, blocks in (("torch's", TorchBlocks), ("fastattn's", OwnBlocks)):
            yield f"ring-flash-attention, {name} kernel", partial(train_ring, blocks, is_zigzag, mesh, local)
    if is_zigzag:
        yield "torch's context_parallel", partial(train_context_parallel, mesh, states(options))


def sent_bytes() -> int:
    """What this process has sent, by whomever it was."""
    return parallel.sent_bytes() + Ring.sent


def states(options) -> list[torch.Tensor]:
    """q, k, v of the whole sequence, the same in every process."""
    generator = torch.Generator().manual_seed(0)
    shape = 1, options.heads, options.seqlen, options.head_dim
    return [torch.randn(shape, generator=generator) for _ in range(3)]


def train(qkv, attention, place: dict) -> list[torch.Tensor]:
    """out and the gradients of q, k, v, with out as its own cotangent."""
    leaves = [x.detach().requires_grad_() for x in qkv]
    out = attention(*leaves, causal=True, **place)
    return [out.detach(), *torch.autograd.grad(out, leaves, out.detach())]


def best_of(repeat: int, function, before=lambda: None) -> tuple[float, list[torch.Tensor]]:
    """(seconds of the fastest run, its result)."""
    best = float("inf")
    for _ in range(repeat):
        before()
        start = time.perf_counter()
        found = function()
        best = min(best, time.perf_counter() - start)
    return best, found


if __name__ == "__main__":
    main()
