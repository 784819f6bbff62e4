"""Two ranks of `fastattn.parallel` with a network of limited bandwidth between them: does sending hide behind work?

`sudo python bench/parallel_network.py [options]`: two network namespaces of this machine, joined by a pair of virtual
devices that tc shapes. Prints the time of one block, of one transfer, of the step in which both happen at once, and
what the cost model says of the whole call with these rates. Without root, or without tc, it says so.
"""

import argparse
import os
import subprocess
import sys
import time

RANKS, PORT = 2, 29577


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seqlen", type=int, default=8192)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument(
        "--rate", type=float, help="of the link in Mbit/s; default: a transfer takes as long as a block"
    )
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank is not None:
        rank_of(options)
        return
    made = []
    try:
        for command in commands():
            shaped = subprocess.run(command.split(), capture_output=True, text=True)
            if shaped.returncode:
                sys.exit(f"{command}: {shaped.stderr.strip()}")
            made.append(command)
        children = [
            subprocess.Popen(
                ["ip", "netns", "exec", f"fastattn{rank}", sys.executable, *sys.argv, "--rank", str(rank)],
                env=os.environ | {"GLOO_SOCKET_IFNAME": f"fastattn{rank}", "OMP_NUM_THREADS": "1"},
            )
            for rank in range(RANKS)
        ]
        sys.exit(max(child.wait() for child in children))
    finally:
        for rank in range(RANKS):
            if f"ip netns add fastattn{rank}" in made:
                subprocess.run(["ip", "netns", "del", f"fastattn{rank}"])


def commands() -> list[str]:
    """What makes two namespaces and the link between them, at full speed."""
    found = [f"ip netns add fastattn{rank}" for rank in range(RANKS)]
    found += ["ip link add fastattn0 netns fastattn0 type veth peer name fastattn1 netns fastattn1"]
    for rank in range(RANKS):
        found += [f"ip -n fastattn{rank} addr add 10.77.0.{rank + 1}/24 dev fastattn{rank}"]
        found += [f"ip -n fastattn{rank} link set {device} up" for device in ("lo", f"fastattn{rank}")]
    return found


def shape(rank: int, megabits: float) -> None:
    """Limit what this rank sends."""
    limit = f"tbf rate {int(megabits * 1000)}kbit burst 128kb latency 400ms"
    subprocess.run(f"tc qdisc replace dev fastattn{rank} root {limit}".split(), check=True)


def rank_of(options) -> None:
    import torch
    import torch.distributed as dist

    import fastattn
    from fastattn import parallel
    from fastattn.parallel.choice import setting_of
    from fastattn.parallel.costs import Sizes

    torch.set_num_threads(1)
    rank = options.rank
    dist.init_process_group("gloo", init_method=f"tcp://10.77.0.1:{PORT}", rank=rank, world_size=RANKS)
    mesh = dist.init_device_mesh("cpu", (RANKS,), mesh_dim_names=("cp",))
    rows = options.seqlen // RANKS
    q, k, v = [torch.randn(1, options.heads, rows, options.head_dim) for _ in range(3)]
    mine, theirs = torch.cat([k.flatten(), v.flatten()]), torch.empty(2 * k.numel())

    def transfer(mine, theirs):
        operations = [dist.P2POp(dist.isend, mine, 1 - rank), dist.P2POp(dist.irecv, theirs, 1 - rank)]
        for work in dist.batch_isend_irecv(operations):
            work.wait()

    def slowest(function) -> float:
        """Of the ranks; each the median of several runs that begin together."""
        seconds = []
        for _ in range(options.repeat):
            dist.barrier()
            start = time.perf_counter()
            function()
            seconds.append(time.perf_counter() - start)
        found = torch.tensor(sorted(seconds)[len(seconds) // 2])
        dist.all_reduce(found, dist.ReduceOp.MAX)
        return found.item()

    def ring():
        return parallel.attention(q, k, v, mesh=mesh, schedule="ring")

    ring()
    block = slowest(lambda: fastattn.attention(q, k, v))
    shape(rank, options.rate or 8 * mine.nbytes / block / 1e6)
    transfer(mine, theirs)
    sending, latency = slowest(lambda: transfer(mine, theirs)), slowest(lambda: transfer(mine[:1], theirs[:1]))
    whole = slowest(ring)
    if rank == 0:
        sizes = Sizes(1, options.heads, options.heads, options.head_dim, options.head_dim, 4, 4)
        pairs = rows * rows
        machine = parallel.Machine(sizes.pair_flops * pairs / block, mine.nbytes / (sending - latency), latency)
        setting = setting_of((RANKS,), options.seqlen, options.seqlen, "contiguous", False, None, machine, sizes)
        modelled = setting.cost("ring").forward_seconds
        both, link = whole - block, 8 * mine.nbytes / sending / 1e6
        print(f"one block                    {block:8.3f} s")
        print(f"one transfer                 {sending:8.3f} s   {link:.0f} Mbit/s")
        print(f"both at once                 {both:8.3f} s   {both / max(block, sending):.2f} x the longer one")
        print(f"the whole call               {whole:8.3f} s")
        print(f"the model with these rates   {modelled:8.3f} s   {modelled / whole:.2f} x")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
