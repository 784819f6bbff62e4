"""Products of warpgroups (wgmma): under way from their instruction on, and computed when somebody waits for them.

PTX ISA, "Asynchronous Warpgroup Level Matrix Instructions". A warpgroup is four warps; each has sixteen of its 64 rows.
"""

from itertools import groupby
from typing import NamedTuple

import numpy as np

from .faults import NotWaited, Unfenced, Unknown
from .parsing import Register
from .registers import Registers
from .shared import Shared

LANES = 128
PIECE = 16
"""Bytes that stay together, whatever the layout."""
_WIDTHS = (16, 128, 64, 32)
"""Bytes of a row of each layout's pattern, by the descriptor's mode."""
_KNOWN_BITS = 0xC000_3FFF_3FFF_3FFF


class Layout(NamedTuple):
    """What the descriptors of one factor say, alike for all warpgroups but for where it begins.

    start    bytes, of each warpgroup
    leading, stride    bytes from one pattern to the next
    """

    start: np.ndarray
    leading: int
    stride: int
    width: int

    @classmethod
    def of(cls, descriptors: np.ndarray) -> "Layout":
        """uint64, of each warpgroup"""
        if np.any(descriptors & ~np.uint64(_KNOWN_BITS)):
            raise Unknown(f"matrix descriptor {int(descriptors[0]):#x}")
        start, leading, stride = (PIECE * (descriptors >> np.uint64(n) & np.uint64(0x3FFF)) for n in (0, 16, 32))
        mode = descriptors >> np.uint64(62)
        for x in (leading, stride, mode):
            if np.any(x != x[0]):
                raise Unknown("warpgroups with different layouts")
        return cls(start.astype(np.int64), int(leading[0]), int(stride[0]), _WIDTHS[int(mode[0])])

    def places(self, rows: int, is_transposed: bool) -> np.ndarray:
        """[warpgroups, rows, 2] addresses of pieces; transposed: [warpgroups, 16, rows / 8], rows lie in pieces."""
        pieces = self.width // PIECE
        if is_transposed:
            k, row = np.arange(16)[:, None], np.arange(rows // 8)
            far, near = (self.leading, self.stride) if pieces > 1 else (self.stride, self.leading)
            offsets = row % pieces * PIECE + row // pieces * far + k % 8 * self.width + k // 8 * near
        else:
            row, k = np.arange(rows)[:, None], np.arange(2)
            offsets = row % 8 * self.width + row // 8 * self.stride + k * (PIECE if pieces > 1 else self.leading)
        addresses = self.start[:, None, None] + offsets
        return addresses ^ (addresses >> 3 & self.width - PIECE)


class Product(NamedTuple):
    """Of one instruction; arrays are over the warpgroups that take part.

    commits    how many groups of products each had committed before
    adds       whether it adds to what the registers `result` hold
    factor     the registers of its left factor, if it lies there
    values     [warpgroups, 64, N] the product: what it reads does not change until somebody waits
    units      of shared memory that it reads
    """

    groups: np.ndarray
    commits: np.ndarray
    adds: np.ndarray
    result: tuple[Register, ...]
    factor: tuple[Register, ...]
    values: np.ndarray
    units: np.ndarray

    def where(self, chosen: np.ndarray) -> "Product":
        return Product(*(x if isinstance(x, tuple) else x[chosen] for x in self))


def sums(registers: np.ndarray) -> np.ndarray:
    """[N / 2, warpgroups, 128] -> [warpgroups, 64, N]: registers are column group, half of the rows, neighbour."""
    x = registers.reshape(-1, 2, 2, registers.shape[1], 4, 8, 4)
    return x.transpose(3, 4, 1, 5, 0, 6, 2).reshape(registers.shape[1], 64, -1)


def registers_of_sums(x: np.ndarray) -> np.ndarray:
    """The inverse of `sums`."""
    return x.reshape(len(x), 4, 2, 8, -1, 4, 2).transpose(4, 2, 6, 0, 1, 3, 5).reshape(-1, len(x), LANES)


class Warpgroups:
    """Of several programs. `groups` are numbers of warpgroups over all of them."""

    def __init__(self, shared: Shared, registers: Registers):
        self.shared, self.registers = shared, registers
        self.commits = np.zeros(registers.lanes // LANES, np.int32)
        self.fences = np.zeros_like(self.commits)
        self.products: list[Product] = []

    def fence(self, groups: np.ndarray) -> None:
        self.registers.now += 1
        self.fences[groups] = self.registers.now

    def start(self, groups: np.ndarray, adds: np.ndarray, *others) -> None:
        """others: the remaining fields of `Product`"""
        product = Product(groups, self.commits[groups], adds, *others)
        self._check_registers(product)
        self.products.append(product)
        self._hold(product)

    def _check_registers(self, product: Product) -> None:
        used = {*product.result, *product.factor}
        if max(self.registers.touched[register.number] for register in used) >= self.fences[product.groups].min():
            raise Unfenced("a product whose registers were used since the last wgmma.fence")
        for other in self.products:
            if other.result != product.result and (used & {*other.result} or {*product.result} & {*other.factor}):
                raise NotWaited("a product whose registers another one under way uses")

    def _hold(self, product: Product) -> None:
        self.shared.hold(product.units)
        lanes = np.zeros(len(self.commits), bool)
        lanes[product.groups] = True
        lanes = lanes.repeat(LANES)
        for register in (*product.result, *product.factor):
            self.registers.busy[register.number] = lanes | self.registers.busy.get(register.number, False)

    def commit(self, groups: np.ndarray) -> None:
        self.commits[groups] += 1

    def wait(self, groups: np.ndarray, pending: int) -> None:
        """All products of these warpgroups but for those of the latest `pending` commits."""
        finished = np.zeros_like(self.commits)
        finished[groups] = self.commits[groups] - pending
        done, left = [], []
        for product in self.products:
            chosen = product.commits < finished[product.groups]
            done += [product.where(chosen)] if chosen.any() else []
            left += [product.where(~chosen)] if not chosen.all() else []
        self.products = left
        self.registers.busy.clear()
        for product in done:
            self.shared.release(product.groups * LANES, product.units)
        for product in left:
            self._hold(product)
        for (result, _), chain in groupby(done, lambda product: (product.result, product.groups.tobytes())):
            self._finish(result, list(chain))

    def _finish(self, result: tuple[Register, ...], chain: list[Product]) -> None:
        """Of products that add up in the same registers."""
        groups, x = chain[0].groups, np.float32(0.0)
        if chain[0].adds.any():
            before = np.stack([self.registers.values[register.number] for register in result]).view(np.float32)
            x = sums(before.reshape(len(result), -1, LANES)[:, groups])
        for product in chain:
            x = np.where(product.adds[:, None, None], x + product.values, product.values)
        lanes = (groups[:, None] * LANES + np.arange(LANES)).ravel()
        for register, values in zip(result, registers_of_sums(x), strict=True):
            self.registers.deliver(register, lanes, values.ravel().view(np.uint32))

    def check_end(self) -> None:
        if self.products:
            raise NotWaited("the kernel ends before a product that nobody waited for")
