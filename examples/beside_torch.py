"""What the examples of pretrained models share: one task with torch's attention and with fastattn's, in turn."""

import os
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # everything comes from installed packages

import torch
from in_turn import time_in_turn

import fastattn
from fastattn.integrations import transformers as fastattn_transformers

SDPA, OURS = "sdpa", "fastattn"


class Comparison(NamedTuple):
    """One task of a model, with torch's attention and with fastattn's.

    audit    what `fastattn.audit` says of the model before anything is replaced
    results  what the task gave, by implementation
    kernels  how many calls ran on each of fastattn's kernels, and with which kind of mask
    seconds  median of a run, by implementation
    """

    audit: object
    results: dict[str, object]
    kernels: Counter
    seconds: dict[str, float]

    @property
    def ratio(self) -> float:
        """torch's time over fastattn's."""
        return self.seconds[SDPA] / self.seconds[OURS]


def compare(model: torch.nn.Module, task: Callable, budget: float, audited: Callable | None = None) -> Comparison:
    """`task()`, which runs `model`, with both implementations in turn, for about `budget` seconds.

    audited   a shorter task for the audit, which measures each length of a cache anew
    """
    fastattn_transformers.register()

    @torch.no_grad()
    def run(implementation: str):
        model.set_attn_implementation(implementation)
        return task()

    results = {SDPA: run(SDPA)}
    with torch.no_grad():
        audit = fastattn.audit(model, {}, call=lambda model, inputs: (audited or task)())
    with fastattn.record() as calls:
        results[OURS] = run(OURS)
    kernels = Counter((call.kernel, call.problem.mask) for call in calls)
    seconds = time_in_turn({x: partial(run, x) for x in (SDPA, OURS)}, budget, at_least=3)
    return Comparison(audit, results, kernels, seconds)


def print_comparison(what: str, found: str, comparison: Comparison) -> None:
    """The task, what the audit said before, what ran, how long it took."""
    print(f"{what}\n  {found}")
    for line in str(comparison.audit).splitlines():  # the sums; the table has a row for each kind of call
        if line.startswith(("attention:", "most memory")):
            print(f"  audit before: {line}")
    ran = ", ".join(f"{count} on {kernel}, mask {mask}" for (kernel, mask), count in comparison.kernels.items())
    print(f"  attention calls: {ran}")
    times = ", ".join(f"{name} {1e3 * seconds:.1f} ms" for name, seconds in comparison.seconds.items())
    print(f"  {times}: {comparison.ratio:.2f} times as fast, {torch.get_num_threads()} threads")
