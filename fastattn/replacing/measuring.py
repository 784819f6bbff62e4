"""What one call costs: its time, and the most memory that its tensors take at once."""

import os
import time
from contextlib import contextmanager

import torch
from torch.autograd.profiler import profile

_ENOUGH_SECONDS, _MOST_REPEATS = 0.05, 20


def seconds_of(call) -> float:
    """The shortest of some runs of `call`, in seconds of wall time."""
    times = []
    while len(times) < 3 or (sum(times) < _ENOUGH_SECONDS and len(times) < _MOST_REPEATS):
        begin = time.perf_counter()
        call()
        times.append(time.perf_counter() - begin)
        if times[0] > 1.0:
            break
    return min(times)


def peak_of(call) -> int:
    """How many bytes of tensors `call` adds at its peak, results and buffers inside of torch's kernels included."""
    with _quiet(), profile(profile_memory=True) as profiled:
        call()
    # What torch allocates and frees, in order; the sum at each moment is what `call` holds then.
    steps = [(event.start_ns(), event.nbytes()) for event in profiled.kineto_results.events() if event.name() == _STEP]
    held = peak = 0
    for _, step in sorted(steps, key=lambda step: step[0]):
        held += step
        peak = max(peak, held)
    return peak


_STEP = "[memory]"


@contextmanager
def _quiet():
    """The profiler of torch 2.13 writes lines to stderr at its first use unless this is set."""
    before = os.environ.get("KINETO_LOG_LEVEL")
    os.environ["KINETO_LOG_LEVEL"] = before or "99"
    try:
        yield
    finally:
        if before is None:
            del os.environ["KINETO_LOG_LEVEL"]


def run_model(model: torch.nn.Module, inputs, call=None):
    """`call(model, inputs)`, or `model` called with a dict's items by name, a tuple's or list's by position, or one."""
    if call is not None:
        return call(model, inputs)
    if isinstance(inputs, dict):
        return model(**inputs)
    if isinstance(inputs, (tuple, list)):
        return model(*inputs)
    return model(inputs)


def tensors_in(tree, path: str = "") -> dict[str, torch.Tensor]:
    """The tensors of nested dicts, tuples and lists, by their paths."""
    if isinstance(tree, torch.Tensor):
        return {path: tree}
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, (tuple, list)) else ()
    found = {}
    for key, value in items:
        found |= tensors_in(value, f"{path}.{key}" if path else str(key))
    return found
