"""Times of calls in turn, and whether their ratios reach targets: what the smaller benchmarks share."""

import argparse

from fastattn.cli.timing import Contender, in_turn


def options_of(description: str, seqlen: int, budget: float) -> argparse.Namespace:
    """seqlen, threads and budget of the command line; the first two arguments are their defaults."""
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("--seqlen", type=int, default=seqlen)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--budget", type=float, default=budget, help="seconds for each row")
    return parser.parse_args()


def compare(calls: dict, targets: dict, options: argparse.Namespace) -> int:
    """How many targets {what: (of, to, at most)} the best times of `calls` miss; prints each."""
    times = in_turn({name: Contender(run, options.threads) for name, run in calls.items()}, options.budget)
    best = {name: min(seconds) for name, seconds in times.items()}
    print("  " + ", ".join(f"{name} {1e3 * seconds:.0f} ms" for name, seconds in best.items()))
    return sum(judge(what, best[of] / best[to], bound) for what, (of, to, bound) in targets.items())


def judge(what: str, figure: float, bound: float) -> bool:
    """Whether a figure misses its target; prints both."""
    print(f"  {what:<46}{figure:6.2f}  (at most {bound}{'' if figure <= bound else ': missed'})")
    return figure > bound
