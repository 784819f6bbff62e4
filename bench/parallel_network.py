"""Two ranks of `fastattn.parallel` with a slow network between them: does sending hide behind work, and is the model
right?

`sudo python bench/parallel_network.py [options]`: two network namespaces of this machine, joined by a link of any rate
and delay (`slow_link.py`). The cost model is told what this machine does: the rate of blocks from two sizes of them, on
both ranks at once, and of each link its bytes a second and its latency. Then prints, for each case and link, the time
of a block, of a transfer, of both at once, of the whole call, and what the model says of it. Seconds are the fastest of
several runs. With --pretend blocks sleep instead of computing, for as long as their pairs would take at that rate: on a
machine that has other work, too, this still shows whether schedules and the model agree. Without root it says so.
"""

import argparse
import itertools
import os
import signal
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import slow_link

RANKS, PORT = 2, 29577
CASES = {  # name: shards, causal, fraction of the length
    "full": ("contiguous", False, 1.0),
    "full, half the length": ("contiguous", False, 0.5),
    "causal, zig-zag": ("zigzag", True, 1.0),
    "causal, contiguous": ("contiguous", True, 1.0),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seqlen", type=int, default=8192)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument(
        "--rates", type=float, nargs="*", default=[0.5, 1.0, 2.0], help="1: a transfer takes as long as a block"
    )
    parser.add_argument("--delays", type=float, nargs="*", default=[0.0, 0.1], help="in units of a block")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--pretend", type=float, help="GFLOP/s at which blocks sleep, and compute nothing")
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--link", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank is not None:
        rank_of(options)
        return
    server = None
    with tempfile.NamedTemporaryFile() as settings:
        link = Path(settings.name)
        try:
            files = slow_link.make()
            slow_link.set_link(link, float("inf"), 0.0)
            if (server := os.fork()) == 0:
                os.nice(-10)  # it sleeps, but for a packet now and then, which must not wait for the ranks
                slow_link.pass_on(files, link)
            children = [
                subprocess.Popen(
                    ["ip", "netns", "exec", slow_link.name_of(rank), sys.executable, *sys.argv]
                    + ["--rank", str(rank), "--link", str(link)],
                    env=os.environ | {"GLOO_SOCKET_IFNAME": slow_link.name_of(rank), "OMP_NUM_THREADS": "1"},
                )
                for rank in range(RANKS)
            ]
            status = max(child.wait() for child in children)
        except (OSError, subprocess.CalledProcessError) as error:
            sys.exit(f"no link: {error} {getattr(error, 'stderr', '') or ''}".strip())
        finally:
            if server:
                os.kill(server, signal.SIGKILL)
            slow_link.remove()
    sys.exit(status)


def pretend(flops: float) -> None:
    """From now on a block takes its time, and has no result."""
    import torch

    from fastattn.parallel import blocks, merge
    from fastattn.parallel.pairs import count_pairs

    def forward(whole, i, run, q, k, v):
        runs = torch.tensor([whole.q_runs[i]]), torch.tensor([whole.k_runs[run]])
        pairs = count_pairs(*runs, *whole.bounds).item() * q.shape[0] * q.shape[1]
        time.sleep(2 * pairs * (q.shape[3] + v.shape[3]) / flops)
        return merge.empty(q, v.shape[3], q.dtype)

    blocks.forward = forward


def rank_of(options) -> None:
    import torch
    import torch.distributed as dist

    from fastattn import parallel
    from fastattn.parallel.choice import setting_of
    from fastattn.parallel.costs import Sizes

    torch.set_num_threads(1)
    if options.pretend:
        pretend(options.pretend * 1e9)
    rank = options.rank
    store = f"tcp://{slow_link.address_of(0)}:{PORT}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=RANKS)
    mesh = dist.init_device_mesh("cpu", (RANKS, 1), mesh_dim_names=("cp", "alone"))
    sizes = Sizes(1, options.heads, options.heads, options.head_dim, options.head_dim, 4, 4)

    def states(rows: int):
        return [torch.randn(1, options.heads, rows, options.head_dim) for _ in range(3)]

    def fastest(functions: dict) -> dict[str, float]:
        """Seconds of each in the fastest of several turns, which all ranks begin together; of the slower rank."""
        best = dict.fromkeys(functions, float("inf"))
        for turn in range(options.repeat + 1):
            for name, function in functions.items():
                dist.barrier()
                start = time.perf_counter()
                function()
                taken = torch.tensor(time.perf_counter() - start)
                dist.all_reduce(taken, dist.ReduceOp.MAX)
                best[name] = min(best[name], taken.item()) if turn else best[name]
        return best

    def transfer(mine, theirs):
        group = mesh.get_group("cp")  # over the connection of the calls
        operations = [dist.P2POp(f, x, 1 - rank, group) for f, x in ((dist.irecv, theirs), (dist.isend, mine))]
        for work in dist.batch_isend_irecv(operations):
            work.wait()

    rows = options.seqlen // RANKS
    payload = rows * sizes.key_row
    mine, theirs = torch.zeros(payload // 4), torch.empty(payload // 4)
    functions = {
        "latency": lambda: transfer(mine[:1], theirs[:1]),
        "transfer": lambda: transfer(mine, theirs),
        "three transfers": lambda: [transfer(mine, theirs) for _ in range(3)],
    }
    for name, size in (("block", rows), ("small block", rows // 2)):
        functions[name] = partial(parallel.attention, *states(size), mesh=mesh, dim="alone", schedule="ring")
    block = fastest({"block": functions["block"]})["block"]
    for name, (shards, causal, share) in CASES.items():
        qkv = states(int(options.seqlen * share) // RANKS)
        functions[name] = partial(
            parallel.attention, *qkv, mesh=mesh, schedule="ring", shards=shards, causal=causal
        )  # fmt: skip
    columns = "{:<24}" + "{:>9}" * 8 + "{:>12}"
    if rank == 0:
        heads = ("case", "MiB/s", "delay", "block", "transfer", "both", "/longer", "call", "model", "model/call")
        print(columns.format(*heads))
    for rate, delay in itertools.product(options.rates, options.delays):
        if rank == 0:
            slow_link.set_link(options.link, rate * payload / block, delay * block)
        found = fastest(functions)
        of_pairs = (found["block"] - found["small block"]) / (rows**2 * 3 / 4)
        call = max(found["block"] - of_pairs * rows**2, 0.0)
        # Of a link that is busy: a single transfer may find a small window of TCP. Each waits for the one before.
        bytes_ = 2 * payload / max(found["three transfers"] - found["transfer"] - 2 * found["latency"], 1e-9)
        machine = parallel.Machine(sizes.pair_flops / of_pairs, bytes_, found["latency"], call)
        for name, (shards, causal, share) in CASES.items():
            seqlen, whole = int(options.seqlen * share), found[name]
            setting = setting_of((RANKS,), seqlen, seqlen, shards, causal, None, machine, sizes)
            modelled = setting.cost("ring").forward_seconds
            if rank == 0:
                overlap = [""] * 4
                if name == "full":  # a message that compares arguments, then two blocks, the first beside the transfer
                    both = whole - found["block"] - found["latency"]
                    longer = max(found["block"], found["transfer"])
                    overlap = [f"{x:.3f}" for x in (found["block"], found["transfer"], both, both / longer)]
                link = f"{bytes_ / 2**20:.1f}", f"{delay * block:.3f}"
                cells = name, *link, *overlap, f"{whole:.3f}", f"{modelled:.3f}", f"{modelled / whole:.2f}"
                print(columns.format(*cells), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
