"""Packed sequences, pages, int8 caches and the Python time of a step, in turn with what they are compared to.

    python bench/varlen.py [--threads 1] [--budget 10]

Times are of the wall clock, the least of many rounds in turn. Exit status 1: a ratio misses its target. Rates of packed
sequences are per visited pair, beside dense causal calls of their mean length.
"""

import argparse
import sys

import torch

import fastattn
from fastattn.cli.timing import Contender, in_turn
from fastattn.layouts.quantization import quantized

LENGTHS = torch.randint(16, 1025, (64,), generator=torch.Generator().manual_seed(0)).tolist()
HEADS, DIM = 8, 64


def packed_and_dense() -> dict:
    """Calls by name, and how many pairs of a head each visits."""
    mean, total = sum(LENGTHS) // len(LENGTHS), sum(LENGTHS)
    bounds = torch.tensor([0, *LENGTHS]).cumsum(0).int()
    packed = [torch.randn(total, HEADS, DIM).requires_grad_() for _ in range(3)]
    dense = [torch.randn(16, HEADS, mean, DIM).requires_grad_() for _ in range(3)]
    out = fastattn.attention_varlen(*packed, bounds, bounds, causal=True)
    dense_out = fastattn.attention(*dense, causal=True)
    cotangents = torch.randn_like(out), torch.randn_like(dense_out)
    plain = [x.detach() for x in packed], [x.detach() for x in dense]
    pairs = sum(n * (n + 1) // 2 for n in LENGTHS), 16 * mean * (mean + 1) // 2
    return {
        "varlen": (lambda: fastattn.attention_varlen(*plain[0], bounds, bounds, causal=True), pairs[0]),
        "dense": (lambda: fastattn.attention(*plain[1], causal=True), pairs[1]),
        "varlen backward": (lambda: torch.autograd.grad(out, packed, cotangents[0], retain_graph=True), pairs[0]),
        "dense backward": (lambda: torch.autograd.grad(dense_out, dense, cotangents[1], retain_graph=True), pairs[1]),
    }


def in_pages(x: torch.Tensor, page_size: int, table: torch.Tensor) -> torch.Tensor:
    """x [batch, heads, rows, dim] in the pages of `table`."""
    pages = x.new_empty(table.numel(), x.shape[1], page_size, x.shape[3])
    pages[table.flatten().long()] = x.unflatten(2, (-1, page_size)).transpose(1, 2).flatten(0, 1)
    return pages


def pages_and_contiguous(batch=8, heads=32, heads_k=8, seqlen=2048, dim=128) -> dict:
    """Steps over one cache, contiguous and in random pages; together they are more than caches of a CPU hold."""
    q = torch.randn(batch, heads, 1, dim).bfloat16()
    caches = [torch.randn(batch, heads_k, seqlen, dim).bfloat16() for _ in range(2)]
    calls = {"contiguous": lambda: fastattn.attention_with_kvcache(q, *caches, cache_seqlens=seqlen)}
    for page_size in (16, 256):
        table = torch.randperm(batch * seqlen // page_size).view(batch, -1).int()
        pages = [in_pages(x, page_size, table) for x in caches]

        def step(pages=pages, table=table):
            return fastattn.attention_with_kvcache(q, *pages, cache_seqlens=seqlen, block_table=table)

        calls[f"pages of {page_size}"] = step
    return calls


def int8_and_bfloat16(heads_k: int, heads=32, seqlen=4096, dim=128) -> dict:
    """Steps over caches of four entries, which take turns."""
    caches = [torch.randn(4, heads_k, seqlen, dim) for _ in range(2)]
    q, turn = torch.randn(1, heads, 1, dim).bfloat16(), [torch.tensor([i]) for i in range(4)]
    narrow, wide = [quantized(x) for x in caches], [x.bfloat16() for x in caches]
    scales = {"k_scale": narrow[0][1], "v_scale": narrow[1][1]}

    def step(caches, **options):
        turn.append(turn.pop(0))
        return fastattn.attention_with_kvcache(q, *caches, cache_seqlens=seqlen, cache_batch_idx=turn[0], **options)

    return {"bfloat16": lambda: step(wide), "int8": lambda: step([x for x, _ in narrow], **scales)}


def tiny_step() -> dict:
    """A step so small that Python is most of it."""
    q, k, v = (torch.randn(1, 1, 1, 8) for _ in range(3))
    caches, seqlens = [torch.randn(1, 1, 64, 8) for _ in range(2)], torch.tensor([15])
    return {"step": lambda: fastattn.attention_with_kvcache(q, *caches, k, v, cache_seqlens=seqlens)}


def speculative_steps(heads=32, heads_k=8, seqlen=8192, dim=128) -> dict:
    """Steps of 1 ... 128 queries over caches of two entries, which take turns."""
    caches, turn = [torch.randn(2, heads_k, seqlen, dim).bfloat16() for _ in range(2)], [0]

    def step(q):
        turn[0] ^= 1
        return fastattn.attention(q, *[x[turn[0]][None] for x in caches], causal=True)

    queries = {n: torch.randn(1, heads, n, dim).bfloat16() for n in (1, 4, 8, 16, 32, 64, 128)}
    return {str(n): (lambda q=q: step(q)) for n, q in queries.items()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--budget", type=float, default=10.0, help="seconds for each group")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    missed = 0

    def best(calls: dict) -> dict:
        times = in_turn({name: Contender(run, options.threads) for name, run in calls.items()}, options.budget)
        return {name: min(seconds) for name, seconds in times.items()}

    def report(name: str, value: float, bound: float, at_most: bool = False) -> None:
        nonlocal missed
        is_missed = value > bound if at_most else value < bound
        missed += is_missed
        side = "at most" if at_most else "at least"
        print(f"  {name:<60}{value:7.2f}  ({side} {bound}{': missed' if is_missed else ''})")

    print(f"{options.threads} thread(s)")
    calls = packed_and_dense()
    seconds = {
        name: time / calls[name][1] for name, time in best({name: run for name, (run, _) in calls.items()}).items()
    }
    report("64 sequences of 16...1024, causal, D=64: of the dense rate", seconds["dense"] / seconds["varlen"], 0.88)
    report("the same, backward", seconds["dense backward"] / seconds["varlen backward"], 0.85)
    with torch.no_grad():
        seconds = best(pages_and_contiguous())
        for page_size in (16, 256):
            ratio = seconds["contiguous"] / seconds[f"pages of {page_size}"]
            report(f"8 x 32/8 x 2048 x 128 bfloat16, pages of {page_size}: of contiguous", ratio, 0.9)
        for heads_k in (32, 8):
            seconds = best(int8_and_bfloat16(heads_k))
            report(f"32/{heads_k} x 4096 x 128, int8: x bfloat16", seconds["bfloat16"] / seconds["int8"], 1.6)
        report("a step of nothing, us", 1e6 * best(tiny_step())["step"], 8.0, at_most=True)
        seconds = best(speculative_steps())
        report("32/8 x 8192 x 128, 4 queries: x the time of 1", seconds["4"] / seconds["1"], 1.3, at_most=True)
        each = [seconds[name] / int(name) for name in seconds]
        rise = max(later / sooner for sooner, later in zip(each, each[1:], strict=False))
        report("the same, 1 ... 128 queries: largest rise of time a query", rise, 1.0, at_most=True)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
