"""One wave with known registers, on which an instruction of AMD's runs alone."""

import numpy as np
import torch

from emulator.amd.machine import Machine, decode
from emulator.amd.opcodes import step_of
from emulator.amd.parsing import EXEC, VCC, instruction
from emulator.tensors import Tensors

SHARED = 8192
NOTHING = """\t.amdgcn_target "amd-unknown-{arch}"
\t.globl\tnothing
\ts_endpgm
\t\t.amdhsa_private_segment_fixed_size 64
\t\t.amdhsa_user_sgpr_kernarg_segment_ptr 1
\t\t.amdhsa_system_sgpr_workgroup_id_y 0
\t\t.amdhsa_user_sgpr_count 15
\t\t.amdhsa_wavefront_size32 {is_wave32}
"""
EDGES = (
    0.0, -0.0, 1.0, -1.0, 0.5, 3e38, -3e38, 1e-40, -1e-45, 2.0**-126, 2.0**100, 2.0**-100, np.inf, -np.inf, np.nan, 4e9,
)  # fmt: skip
BITS = (0, 1, 2, 3, 7, 8, 31, 32, 33, 255, 0x7FC00001, 0x7F800001, 0x80000000, 0x7FFFFFFF, 0xFFFFFFFF, 0x7C017E00)


def words(rng, count: int) -> np.ndarray:
    """32 bits each: floats, integers, pairs of halves, and what is special."""
    floats = (rng.standard_normal(count) * 2.0 ** rng.integers(-30, 30, count)).astype(np.float32).view(np.uint32)
    integers = (rng.integers(0, 1 << 32, count) >> rng.integers(0, 31, count)).astype(np.uint32)
    halves = rng.standard_normal((count, 2)).astype(np.float16).view(np.uint32)[:, 0]
    edges = rng.choice(np.array(EDGES, np.float32), count).view(np.uint32)
    special = rng.choice(np.array(BITS, np.uint32), count)
    return np.choose(rng.integers(0, 5, count), [floats, integers, halves, edges, special])


class Bench:
    """v1 to v9, v20 to v23, s2 to s7, s30, s31 and the mask s[40:41], VCC, SCC are random; lanes of EXEC, too.

    memory: a tensor of bytes; LDS has the same bytes from its address 0 on, scratch memory others.
    """

    def __init__(self, arch: str, seed: int, all_active: bool = False):
        self.rng, self.arch = np.random.default_rng(seed), arch
        self.lanes = 32 if arch == "gfx1100" else 64
        self.memory = torch.from_numpy(self.rng.integers(0, 256, SHARED, dtype=np.uint8))
        tensors = Tensors()
        self.address = tensors.add("memory", self.memory)
        code = decode(NOTHING.format(arch=arch, is_wave32=int(arch == "gfx1100")))._replace(unit=1)
        self.machine = Machine(code, tensors, self.address, np.arange(1), 1, SHARED)
        shared = self.machine.shared
        shared.data[:], shared.writers[:] = self.memory.numpy(), 0
        self.registers = self.machine.registers
        with np.errstate(over="ignore"):
            for number in (*range(1, 10), *range(20, 24)):
                self.write_vector(number, words(self.rng, self.lanes))
            for number in (*range(2, 8), 30, 31, 40, 41, VCC, VCC + 1):
                self.write_scalar(number, int(words(self.rng, 1)[0]))
        self.registers.scc = self.rng.random((1, 1)) < 0.5
        active = np.ones((1, self.lanes), bool) if all_active else self.rng.random((1, self.lanes)) < 0.7
        self.registers.write_mask(EXEC, active)
        self.active = active[0]

    def write_vector(self, number: int, values: np.ndarray) -> None:
        self.registers.write_vector(number, values.astype(np.uint32).reshape(1, -1))

    def write_scalar(self, number: int, value: int) -> None:
        self.registers.write_scalar(number, np.array([[value]], np.uint32))

    def vector(self, number: int) -> np.ndarray:
        return self.registers.vector(number)[0]

    def scalar(self, number: int, count: int = 1) -> int:
        return sum(int(self.registers.scalar(number + i)[0, 0]) << 32 * i for i in range(count))

    def bits_of_mask(self, number: int) -> int:
        return self.scalar(number, self.lanes // 32)

    def run(self, *texts: str) -> None:
        """Instructions, and a wait for what they load."""
        with np.errstate(all="ignore"):
            for text in (*texts, "s_waitcnt vmcnt(0) lgkmcnt(0)"):
                step_of(instruction(1, "\t" + text, ""), self.lanes)(self.machine)
