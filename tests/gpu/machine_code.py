"""What a compiled kernel consists of: registers, spills, its loops of matrix instructions, a static bound.

NVIDIA's disassembler is the one in Triton's wheel; AMD's assembly is text already. Nothing here is a measurement: a
bound says what the instructions of a loop allow at best, and serves to compare configurations and to see regressions.
"""

import re
import subprocess
from collections import Counter
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import triton

from fake_device import SHARED_MEMORY, Binary

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
FP32 = {"FFMA", "FMUL", "FADD", "FMNMX", "FMNMX3", "FSETP", "FSEL", "FFMA2", "FMUL2", "FADD2"}
_SASS = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)\s*([^;]*);")
_SASS_LABEL = re.compile(r"^(\.L_x_\d+):")
_AMD = re.compile(r"^\t([a-z]\w+)[ \t]*([^;]*)")
_AMD_LABEL = re.compile(r"^(\.LBB\w+):")


class Instruction(NamedTuple):
    opcode: str  # "HMMA.16816.F32.BF16", "v_mfma_f32_32x32x8_bf16", ...
    operands: str

    @property
    def kind(self) -> str:
        return self.opcode.split(".")[0]

    @property
    def is_matrix(self) -> bool:
        return bool(re.match(r"H(G)?MMA|UTC\w*MMA|v_(smfmac|mfma|s?wmma)_", self.opcode))

    @property
    def is_multiply_add(self) -> bool:
        return bool(re.match(r"FFMA|v_(pk_|dual_)?fma", self.opcode))

    @property
    def is_exp(self) -> bool:
        return self.opcode.startswith(("MUFU.EX2", "v_exp_f32"))

    @property
    def is_copy(self) -> bool:
        amd = self.kind.startswith(("buffer_load", "global_load")) and "lds" in self.kind + self.operands
        return amd or self.kind in ("LDGSTS", "UTMALDG")

    @property
    def is_spill(self) -> bool:
        return self.kind in ("LDL", "STL") or self.kind.startswith("scratch_")


class Loop(NamedTuple):
    """A loop around the products of a step: matrix instructions, or multiply-adds of a kernel that has no others."""

    instructions: tuple[Instruction, ...]
    products: int

    @property
    def matrix(self) -> int:
        return sum(instruction.is_matrix for instruction in self.instructions)

    @property
    def spills(self) -> int:
        return sum(instruction.is_spill for instruction in self.instructions)

    @property
    def copies(self) -> int:
        """Asynchronous loads into shared memory: cp.async, TMA, or AMD's."""
        return sum(instruction.is_copy for instruction in self.instructions)

    @property
    def kind(self) -> str:
        """The name of its products."""
        products = [i.kind for i in self.instructions if (i.is_matrix if self.matrix else i.is_multiply_add)]
        return Counter(products).most_common(1)[0][0]

    @property
    def others(self) -> float:
        """Instructions for each product."""
        return len(self.instructions) / self.products


class Code(NamedTuple):
    """spills: bytes a thread keeps in local memory; loops: the best first (fewest instructions beside the products)."""

    arch: int | str
    registers: int
    spills: int
    shared: int
    warps: int
    loops: tuple[Loop, ...]
    matrix: int  # in the whole kernel


def analyze(binary: Binary) -> Code:
    """The code of a compiled kernel."""
    metadata = binary.metadata
    arch = metadata["target"]["arch"]
    read = _read_amd if "amdgcn" in binary.files else _read_nvidia
    registers, spills, instructions, labels = read(binary)
    loops = sorted(_loops(instructions, labels), key=lambda loop: loop.others)
    matrix = sum(instruction.is_matrix for instruction in instructions)
    warps = metadata["num_warps"]
    return Code(arch, registers, spills, metadata["shared"], warps, tuple(loops), matrix)


def _read_nvidia(binary: Binary):
    cubin = binary.files["cubin"]
    usage = dict(re.findall(r"(\w+):(\d+)", _tool("cuobjdump", "-res-usage", cubin).split("Function")[1]))
    instructions, labels = _parse(_tool("nvdisasm", "-c", cubin), _SASS, _SASS_LABEL)
    return int(usage["REG"]), int(usage["STACK"]), instructions, labels


def _read_amd(binary: Binary):
    text = binary.text("amdgcn")
    instructions, labels = _parse(text, _AMD, _AMD_LABEL)
    registers, scratch = (int(re.search(rf"^; {name}: (\d+)", text, re.M)[1]) for name in ("NumVgprs", "ScratchSize"))
    return registers, scratch, instructions, labels


def used_between_products(binary: Binary) -> list[Instruction]:
    """Of sm_90: what uses a register of a product (HGMMA) between the fence before it and the last one of its group."""
    found, others, registers = [], None, set()
    for instruction in _read_nvidia(binary)[2]:
        if instruction.opcode == "WARPGROUP.ARRIVE":
            others, registers = [], set()
        elif instruction.kind == "HGMMA":
            registers |= _registers_of_product(instruction)
            if "gsb0" in instruction.operands:
                found += [other for other in others if registers & _registers_of(other.operands)]
                others = []
        elif others is not None:
            others.append(instruction)
    return found


def _registers_of_product(instruction: Instruction) -> set[int]:
    """Those of the sums, and of the left factor if it lies there."""
    columns = int(re.search(r"x(\d+)x", instruction.opcode)[1])
    sums, left, *_ = (re.match(r"R(\d+)", operand.strip()) for operand in instruction.operands.split(","))
    first = int(sums[1])
    return {*range(first, first + columns // 2), *(range(int(left[1]), int(left[1]) + 4) if left else ())}


def _registers_of(operands: str) -> set[int]:
    return {int(number) for number in re.findall(r"\bR(\d+)", operands)}


@lru_cache(maxsize=256)
def _tool(name: str, option: str, path: Path) -> str:
    return subprocess.run([TOOLS / name, option, path], capture_output=True, text=True, check=True).stdout


def _parse(text: str, pattern: re.Pattern, label: re.Pattern) -> tuple[list[Instruction], dict[str, int]]:
    instructions, labels = [], {}
    for line in text.splitlines():
        if match := label.match(line):
            labels[match[1]] = len(instructions)
        elif match := pattern.match(line):
            instructions.append(Instruction(match[1], match[2].strip()))
    return instructions, labels


MANY = 64
"""Multiply-adds in a loop that make it one of products, where no matrix instructions do."""


def _loops(instructions: list[Instruction], labels: dict[str, int]) -> list[Loop]:
    """Innermost backward branches around products, and around exponentials if there are any: a step may hold a loop
    over columns. Not the way back from code that lies after the end."""
    has_exp = any(instruction.is_exp for instruction in instructions)
    has_matrix = any(instruction.is_matrix for instruction in instructions)
    spans = {}
    for end, instruction in enumerate(instructions):
        target = re.search(r"\.L(_x_|BB)\w+", instruction.operands) if "BRA" in instruction.opcode.upper() else None
        start = labels.get(target[0], end + 1) if target else end + 1
        body = instructions[start : end + 1]
        products = sum(other.is_matrix if has_matrix else other.is_multiply_add for other in body)
        leaves = any(other.kind in ("EXIT", "s_endpgm") for other in body)
        is_step = not has_exp or any(other.is_exp for other in body)
        if not leaves and is_step and products >= (1 if has_matrix else MANY):
            spans[start, end] = products
    return [
        Loop(tuple(instructions[a : b + 1]), products)
        for (a, b), products in spans.items()
        if not any((c, d) != (a, b) and a <= c and d <= b for c, d in spans)
    ]


# --- a static bound --------------------------------------------------------------------------------------------------


class Multiprocessor(NamedTuple):
    """Throughput of one multiprocessor in a clock; from NVIDIA's architecture papers, nothing here measured.

    tensor   dense 16-bit FLOP (for GeForce parts with float32 sums: half of it)
    fp32     float32 lanes;  mufu: lanes of exp2 and the like
    shared   bytes that blocks share;  warps: resident at most
    """

    tensor: int
    fp32: int
    mufu: int
    shared: int
    warps: int


MULTIPROCESSORS = {
    80: Multiprocessor(2048, 64, 16, 164 * 1024, 64),
    86: Multiprocessor(1024, 128, 16, 100 * 1024, 48),
    89: Multiprocessor(1024, 128, 16, 100 * 1024, 48),
    90: Multiprocessor(4096, 128, 16, 228 * 1024, 64),
    120: Multiprocessor(1024, 128, 16, 100 * 1024, 48),
}
QUARTERS, LANES, REGISTERS = 4, 32, 65536


def cycles(code: Code, loop: Loop) -> dict[str, float] | None:
    """Clocks that one pass of `loop` keeps each unit of a quarter multiprocessor busy, for all warps of a block.

    None where the instructions do not tell: tcgen05 (sm_100) carries no shape.
    """
    machine = MULTIPROCESSORS.get(code.arch)
    if machine is None or any(instruction.kind.startswith("UTC") for instruction in loop.instructions):
        return None
    busy = dict.fromkeys(("tensor", "mufu", "fp32", "issue"), 0.0)
    for instruction in loop.instructions:
        busy["issue"] += 1.0
        if instruction.is_matrix:
            # an HGMMA is of four warps, one on each quarter; an HMMA of one
            quarters = QUARTERS if instruction.kind == "HGMMA" else 1
            busy["tensor"] += _flops(instruction) / (machine.tensor / QUARTERS) / quarters
        elif instruction.kind == "MUFU":
            busy["mufu"] += LANES * QUARTERS / machine.mufu
        elif instruction.kind in FP32:
            busy["fp32"] += LANES * QUARTERS / machine.fp32
    return {unit: clocks * code.warps / QUARTERS for unit, clocks in busy.items()}


def _flops(instruction: Instruction) -> int:
    if instruction.kind == "HGMMA":
        m, n, k = map(int, re.search(r"(\d+)x(\d+)x(\d+)", instruction.opcode).groups())
    else:  # HMMA.16816: 16 x 8 x 16
        m, n, k = 16, 8, int(re.search(r"HMMA\.168(\d+)", instruction.opcode)[1])
    return 2 * m * n * k


def tensor_bound(code: Code) -> float | None:
    """Share of the tensor cores' peak that the best loop allows if its products and the rest do not overlap."""
    busy = cycles(code, code.loops[0]) if code.loops and code.matrix else None
    return busy and busy["tensor"] / (busy["tensor"] + max(busy["mufu"], busy["fp32"], busy["issue"]))


def blocks_per_multiprocessor(code: Code) -> int | None:
    """How many programs fit at once by registers, shared memory (1 KiB each is the system's) and warps."""
    machine = MULTIPROCESSORS.get(code.arch)
    if machine is None:
        return None
    registers = -(-code.registers * LANES // 256) * 256 * code.warps
    return min(REGISTERS // registers, machine.shared // (code.shared + 1024), machine.warps // code.warps)


def pipeline_depth(binary: Binary) -> int:
    """Tiles of one operand that are in shared memory at once: one in use, the others on their way. 0: no pipeline."""
    buffers = re.findall(r"local_alloc : \(\) -> !ttg\.memdesc<(\d+)x\d+x\d+x\w+,", binary.text("ttgir"))
    return max(map(int, buffers), default=0)


def shared_limit(code: Code) -> int:
    return SHARED_MEMORY[code.arch]
