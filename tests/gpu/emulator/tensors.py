"""Global memory: the tensors of a launch, each in addresses of its own."""

import numpy as np
import torch

from .faults import Misaligned, OutOfBounds, Race

DISTANCE = 1 << 42
"""Of the addresses of two tensors: an access beyond one meets nothing. AMD's have 48 bits."""


class Tensor:
    """The bytes from a tensor's first element to its last. owner: which program wrote each, counted from 1, or 0."""

    def __init__(self, name: str, x: torch.Tensor):
        extent = 1 + sum((n - 1) * step for n, step in zip(x.shape, x.stride(), strict=True)) if x.numel() else 0
        flat = x.detach().as_strided((extent,), (1,))
        self.name, self.bytes = name, flat.view(torch.uint8).numpy()
        self.offset = x.data_ptr() % 16
        self.owner = np.zeros(len(self.bytes), np.int32)
        self.is_written = False
        self.inside = None
        if extent > x.numel():  # gaps between strides, or elements that are there twice
            inside = torch.zeros(extent, dtype=torch.bool)
            inside.as_strided(x.shape, x.stride()).fill_(True)
            self.inside = None if inside.all() else inside.numpy().repeat(x.element_size())


class Tensors:
    """What pointers point to. Arrays `addresses` and `programs` are of the lanes that take part.

    alignment: an access of more bytes has to be at a multiple of this, one of fewer at a multiple of its own size.
    """

    def __init__(self, alignment: int = 16):
        self.tensors: list[Tensor] = []
        self.alignment = alignment

    def add(self, name: str, x: torch.Tensor) -> int:
        """Its address."""
        self.tensors.append(Tensor(name, x))
        return len(self.tensors) * DISTANCE + self.tensors[-1].offset

    def load(self, addresses: np.ndarray, size: int, programs: np.ndarray) -> np.ndarray:
        """[lanes, size] bytes."""
        found = np.empty((len(addresses), size), np.uint8)
        for tensor, lanes, places in self._places(addresses, size):
            if tensor.is_written:
                self._check_owner(tensor, places, programs[lanes])
            found[lanes] = tensor.bytes[places]
        return found

    def store(self, addresses: np.ndarray, data: np.ndarray, programs: np.ndarray) -> None:
        for tensor, lanes, places in self._places(addresses, data.shape[1]):
            self._check_owner(tensor, places, programs[lanes])
            tensor.bytes[places] = data[lanes]
            tensor.owner[places] = programs[lanes, None] + 1
            tensor.is_written = True
            if np.any(tensor.owner[places] != programs[lanes, None] + 1):
                raise Race(f"two programs write one place of {tensor.name}")
            if np.any(tensor.bytes[places] != data[lanes]):
                raise Race(f"two lanes write different values to one place of {tensor.name}")

    def _check_owner(self, tensor: Tensor, places: np.ndarray, programs: np.ndarray) -> None:
        owner = tensor.owner[places]
        if np.any((owner != 0) & (owner != programs[:, None] + 1)):
            raise Race(f"a program touches what another one of the same launch wrote to {tensor.name}")

    def _places(self, addresses: np.ndarray, size: int):
        """For each tensor that is met: (tensor, which of the lanes, [those lanes, size] places in its bytes)."""
        alignment = min(size, self.alignment)
        if np.any(addresses % np.uint64(alignment)):
            raise Misaligned(f"an access of {size} bytes at an address that is no multiple of {alignment}")
        # an access a little before a tensor belongs to it, so that the message names it
        numbers = ((addresses + np.uint64(DISTANCE // 2)) // np.uint64(DISTANCE)).astype(np.int64)
        for number in np.unique(numbers):
            lanes = np.flatnonzero(numbers == number)
            if not 1 <= number <= len(self.tensors):
                raise OutOfBounds(f"address {int(addresses[lanes[0]]):#x} belongs to no tensor")
            tensor = self.tensors[number - 1]
            first = addresses[lanes].astype(np.int64) - number * DISTANCE - tensor.offset
            outside = (first < 0) | (first + size > len(tensor.bytes))
            if np.any(outside):
                place = int(first[np.flatnonzero(outside)[0]])
                raise OutOfBounds(f"{size} bytes at {place} of {tensor.name}, which has {len(tensor.bytes)}")
            places = first[:, None] + np.arange(size)
            if tensor.inside is not None and not np.all(tensor.inside[places]):
                raise OutOfBounds(f"an access in a gap between the strides of {tensor.name}")
            yield tensor, lanes, places
