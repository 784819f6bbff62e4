"""Timing that the examples share."""

import time
from collections.abc import Callable
from statistics import median


def time_in_turn(
    functions: dict, budget: float, *, at_least: int = 5, done: Callable = lambda: None
) -> dict[str, float]:
    """Median seconds of each function, called in turn (a, b, a, b, ...) for about `budget` seconds.

    at_least   rounds, however long they take
    done       called after each round, the first one, which is not counted, among them
    """
    start = time.perf_counter()
    for function in functions.values():
        function()  # the first call is slower: threads start, memory is touched
    rounds = max(at_least, min(100, int(budget / (time.perf_counter() - start))))
    done()
    seconds = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            seconds[name].append(time.perf_counter() - start)
        done()
    return {name: median(values) for name, values in seconds.items()}
