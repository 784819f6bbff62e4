"""Timing that the examples share."""

import time
from statistics import median


def time_in_turn(functions: dict, budget: float) -> dict[str, float]:
    """Median seconds of each function, called in turn (a, b, a, b, ...) for about `budget` seconds."""
    start = time.perf_counter()
    for function in functions.values():
        function()  # the first call is slower: threads start, memory is touched
    rounds = max(5, min(100, int(budget / (time.perf_counter() - start))))
    seconds = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            seconds[name].append(time.perf_counter() - start)
    return {name: median(values) for name, values in seconds.items()}
