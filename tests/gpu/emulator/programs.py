"""A launch: a grid of programs of one kernel."""

import numpy as np
import torch

from .machine import Machine, decode
from .parsing import Parameter
from .registers import TYPES
from .tensors import Tensors

MOST_LANES = 8192
"""That run at once: what their registers take should stay in the cache."""


def run(text: str, values: list, grid: tuple[int, int, int], warps: int, shared: int) -> None:
    """Run the kernel of a PTX module; raises `faults.Fault`.

    values  of its parameters in order: tensors on the CPU, numbers; None is a null pointer, as are those left out
    shared  bytes of each program
    """
    code, tensors = decode(text), Tensors()
    parameters, threads = code.program.parameters, 32 * warps
    values = values + [None] * (len(parameters) - len(values))
    bits = {x.name: _bits(x, value, tensors) for x, value in zip(parameters, values, strict=True)}
    programs, at_once = np.arange(np.prod(grid)), max(1, MOST_LANES // threads)
    for first in range(0, len(programs), at_once):
        Machine(code, bits, tensors, grid, programs[first : first + at_once], threads, shared).run()


def _bits(parameter: Parameter, value, tensors: Tensors) -> np.ndarray:
    if isinstance(value, torch.Tensor):
        value = tensors.add(parameter.name, value)
    return np.array([0 if value is None else value]).astype(TYPES[parameter.type]).view(np.uint8)
