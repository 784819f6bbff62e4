"""A launch: a grid of programs of one kernel."""

from typing import NamedTuple

import numpy as np
import torch

from .machine import Machine, Values, decode
from .mbarriers import FIRST_DESCRIPTOR, Descriptor
from .registers import TYPES
from .tensors import Tensors

MOST_LANES = 8192
"""That run at once: what their registers take should stay in the cache."""


class Map(NamedTuple):
    """A tensor with the box of its tensor map, outer dimensions first, and its swizzle (`mbarriers.Descriptor`)."""

    x: torch.Tensor
    strides: tuple[int, ...]
    box: tuple[int, ...]
    swizzle: int


def run(text: str, values: list, grid: tuple[int, int, int], warps: int, shared: int) -> None:
    """Run the kernel of a PTX module; raises `faults.Fault`.

    values  of its parameters in order: tensors on the CPU, `Map`s, numbers; None and those left out are null pointers
    shared  bytes of each program
    """
    code, threads = decode(text), 32 * warps
    parameters = code.program.parameters
    values = _values(parameters, values + [None] * (len(parameters) - len(values)))
    programs, at_once = np.arange(np.prod(grid)), max(1, MOST_LANES // threads)
    for first in range(0, len(programs), at_once):
        Machine(code, values, grid, programs[first : first + at_once], threads, shared).run()


def _values(parameters, values) -> Values:
    tensors, bits, descriptors, addresses = Tensors(), {}, {}, {}
    for parameter, value in zip(parameters, values, strict=True):
        if isinstance(value, Map):
            place = FIRST_DESCRIPTOR * (1 + len(descriptors))
            base, x = tensors.add(parameter.name, value.x), value.x
            descriptors[place] = Descriptor(
                base, tuple(x.shape), value.strides, value.box, x.element_size(), value.swizzle
            )
            addresses[parameter.name] = np.array(place)
        else:
            if isinstance(value, torch.Tensor):
                value = tensors.add(parameter.name, value)
            bits[parameter.name] = np.array([value or 0]).astype(TYPES[parameter.type]).view(np.uint8)
    return Values(tensors, bits, descriptors, addresses)
