"""How threads that part come together again: of the blocks that some of them wait for, the first in the text runs."""

import numpy as np

from .faults import Deadlock, Fault

MOST_BLOCKS = 10_000
"""That some programs of a launch may run, which takes seconds; those of the quick tests run at most 228."""


def run_blocks(machine, everyone: np.ndarray, choose, waits=lambda block, those: False) -> None:
    """Runs `machine.code` from its first block on. choose(those): bool, who runs the block that follows;
    `machine.leave(block, those)` says which of them go where. waits(block, those): whether others have to come to a
    block first; where all wait, one of them runs all the same, and says what is wrong."""
    waiting = {0: everyone}
    ran = 0
    with np.errstate(all="ignore"):
        while waiting:
            ready = (n for n, those in waiting.items() if not waits(machine.code.blocks[n], those))
            number = min(ready, default=min(waiting))
            those = waiting.pop(number)
            choose(those)
            block = machine.code.blocks[number]
            ran += 1
            if ran > MOST_BLOCKS:
                raise Deadlock(f"{MOST_BLOCKS} blocks of code have run, and no end\n  {block.last}")
            machine.code.visited.add(number)
            _run(machine, block)
            for target, chosen in machine.leave(block, those):
                if np.any(chosen):
                    waiting[target] = waiting[target] | chosen if target in waiting else chosen


def _run(machine, block) -> None:
    done = 0
    try:
        for step in block.steps:
            step(machine)
            done += 1
    except Fault as fault:
        raise type(fault)(f"{fault}\n  {block.instructions[done]}") from None
