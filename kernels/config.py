"""Which tile sizes a kernel takes: `config` is a pure function of the problem, the device's facts and a table."""

import re
from typing import NamedTuple


class Device(NamedTuple):
    """What a choice of tiles depends on.

    arch       "sm_80", "sm_90", ..., "gfx942", ..., or "interpreter"
    smem       bytes of shared memory that one program may take
    num_sms    multiprocessors (compute units)
    name       as the driver calls it
    """

    arch: str
    smem: int
    num_sms: int
    name: str = ""


class Config(NamedTuple):
    """Tile sizes and compiler options of one kernel.

    reload      where registers do not hold the factors of the scores: load both in each step, few columns at a time
    kpack       how many loads of a factor of a product the threads of CDNA make one: 1 or 2
    specialize  warps of their own load, multiply and rescale in the forward loop without masks; never in a table
    """

    BLOCK_M: int
    BLOCK_N: int
    num_warps: int
    num_stages: int
    waves_per_eu: int = 0
    reload: bool = False
    kpack: int = 1
    specialize: bool = False

    def options(self, device: Device) -> dict:
        """Launch options of Triton."""
        options = {"num_warps": self.num_warps, "num_stages": self.num_stages, "enable_fp_fusion": True}
        if self.waves_per_eu and device.arch.startswith("gfx"):
            options["waves_per_eu"] = self.waves_per_eu
        if self.kpack != 1 and device.arch in WITH_KPACK:
            options["kpack"] = self.kpack
        return options


WITH_KPACK = ("gfx90a", "gfx942")
WITH_SPECIALIZED_WARPS = ("sm_100", "sm_103")
_AMD = ("gfx90a", "gfx942", "gfx950", "gfx11", "gfx12")
_OLDEST_ON_AMD = (3, 9)


def refusal(device: Device, version: str) -> str | None:
    """None if Triton of this version can compile these kernels for the device, else why not."""
    arch, of_triton = device.arch, tuple(int(x) for x in re.findall(r"\d+", version)[:2])  # "4.0rc1" is 4, 0
    if arch.startswith("sm_") and int(arch[3:]) < 80:
        return f"{device.name or arch} is {arch}, and Triton compiles for sm_80 and later (Ampere)"
    if arch.startswith("gfx") and not arch.startswith(_AMD):
        return f"{device.name or arch} is {arch}, and these kernels know {', '.join(_AMD)}"
    if arch.startswith("gfx") and of_triton < _OLDEST_ON_AMD:
        # its range analysis may delete a branch of nested loops
        return (
            f"Triton {version} may compile nested loops wrongly on AMD (triton-lang/triton issue 11313); these kernels "
            "take 3.9 and later there"
        )
    return None


KB = 1024
SMEM = {
    "sm_80": 163 * KB, "sm_86": 99 * KB, "sm_87": 163 * KB, "sm_89": 99 * KB, "sm_90": 227 * KB, "sm_100": 227 * KB,
    "sm_103": 227 * KB, "sm_110": 227 * KB, "sm_120": 99 * KB, "sm_121": 99 * KB,
    "gfx90a": 64 * KB, "gfx942": 64 * KB, "gfx950": 160 * KB,
}  # fmt: skip
"""Shared memory a program may take: 1 KB of the multiprocessor's goes to the system. Others: 48 KB."""


def split_head_dim(head_dim: int, dtype: str = "bfloat16") -> tuple[int, int]:
    """Widths of the one or two tiles of columns (powers of two, at least 16) that hold head_dim columns.

    64 -> (64, 0); 80 -> (64, 16); 96 -> (64, 32); 192 -> (128, 64); 250 -> (256, 0): a second tile where it saves work,
    and in float32 from 65 columns on, since a thread that multiplies without matrix units holds whole rows of a tile.
    """
    whole = max(16, 1 << (head_dim - 1).bit_length())
    half = whole // 2
    rest = max(16, 1 << (head_dim - half - 1).bit_length()) if head_dim > half else 0
    saves = half >= 16 and half + rest < whole
    return (half, rest) if saves or (dtype == "float32" and whole > 64) else (whole, 0)


# Tables of a kernel, by kind of call:
#   plain     dense
#   masked    with bounds or a block mask
#   learned   softmax_scale is a tensor
#   heavy     a bias, a bool mask, ALiBi, softcap or dropout, which take registers
#   float32   multiplied without tensor cores
# "masked" and "learned" serve the architectures that they name; others take the next best. A row is (largest
# of head_dim and head_dim_v, config), ascending; the last one serves any. Chosen by compiling: tiles whose main loop
# does not spill, and of several those with the best static bound (docs/triton.md says what was tried).
_PREFILL = {
    "plain": {
        "sm_80": [
            (64, Config(128, 128, 8, 2)), (128, Config(128, 64, 8, 2)), (192, Config(128, 32, 8, 2)),
            (256, Config(32, 32, 4, 2)),
        ],
        "sm_86": [
            (64, Config(128, 64, 4, 2)), (128, Config(128, 64, 8, 2)), (192, Config(64, 32, 8, 2)),
            (256, Config(32, 32, 4, 2)),
        ],
        "sm_90": [(64, Config(128, 128, 8, 3)), (128, Config(128, 128, 8, 2)), (256, Config(128, 64, 8, 2))],
        "sm_100": [(64, Config(128, 128, 8, 2)), (128, Config(128, 64, 8, 3)), (256, Config(64, 64, 8, 2))],
        "sm_120": [(128, Config(128, 64, 8, 2)), (192, Config(32, 32, 4, 2)), (256, Config(64, 32, 8, 2))],
        "gfx90a": [(64, Config(128, 64, 4, 1, 2)), (128, Config(128, 64, 4, 1)), (256, Config(64, 32, 4, 1))],
        "gfx942": [(64, Config(128, 64, 4, 1, 2)), (128, Config(128, 64, 4, 2)), (256, Config(64, 32, 4, 1))],
        "gfx950": [(64, Config(128, 64, 4, 1, 2)), (128, Config(128, 64, 4, 1, 2)), (256, Config(64, 64, 4, 1))],
        "other": [(64, Config(64, 32, 4, 1)), (192, Config(32, 32, 8, 1)), (256, Config(16, 16, 8, 1))],
    },
    "masked": {
        "sm_80": [
            (64, Config(128, 128, 8, 2)), (128, Config(128, 64, 8, 2)), (192, Config(128, 32, 8, 2)),
            (256, Config(64, 64, 8, 2)),
        ],
        "sm_86": [
            (64, Config(128, 64, 8, 2)), (128, Config(128, 32, 8, 3)), (192, Config(32, 32, 4, 2)),
            (256, Config(64, 32, 8, 2)),
        ],
        "sm_90": [
            (64, Config(128, 128, 8, 3)), (96, Config(128, 64, 8, 2)), (128, Config(128, 128, 8, 2)),
            (256, Config(128, 64, 8, 2)),
        ],
        "sm_120": [
            (64, Config(128, 64, 8, 2)), (128, Config(128, 32, 8, 3)), (192, Config(32, 32, 4, 2)),
            (256, Config(64, 32, 8, 2)),
        ],
    },
    "learned": {
        "sm_86": [(128, Config(128, 64, 8, 2)), (256, Config(32, 32, 4, 2))],
    },
    "heavy": {
        "sm_80": [(128, Config(64, 32, 8, 2)), (256, Config(32, 32, 8, 1))],
        "sm_86": [(128, Config(64, 32, 8, 2)), (256, Config(32, 16, 4, 1))],
        "sm_90": [(128, Config(64, 32, 8, 2)), (256, Config(64, 16, 8, 1))],
        "sm_100": [(128, Config(64, 32, 8, 2)), (256, Config(32, 32, 4, 1))],
        "sm_120": [
            (64, Config(64, 32, 4, 2)), (128, Config(32, 32, 4, 2)), (192, Config(32, 16, 8, 1)),
            (256, Config(64, 16, 8, 1)),
        ],
        "gfx9": [(64, Config(64, 32, 4, 1)), (256, Config(32, 32, 4, 1))],
        "other": [
            (64, Config(64, 16, 4, 1)), (128, Config(32, 16, 8, 1)), (256, Config(32, 16, 8, 1, reload=True)),
        ],
    },
    "float32": {
        "sm_80": [(64, Config(32, 32, 8, 2)), (128, Config(16, 32, 8, 2)), (256, Config(16, 16, 8, 2))],
        "gfx9": [(64, Config(32, 32, 4, 1)), (256, Config(16, 16, 4, 1))],
        "other": [
            (64, Config(16, 32, 8, 1)), (128, Config(16, 16, 8, 1)), (256, Config(32, 16, 8, 1, reload=True)),
        ],
    },
}  # fmt: skip
_DECODE = {  # BLOCK_M: at most
    "plain": {
        "sm_80": [(128, Config(64, 64, 4, 3)), (256, Config(32, 32, 4, 3))],
        "sm_86": [(128, Config(64, 64, 4, 2)), (256, Config(32, 32, 4, 2))],
        "sm_120": [(64, Config(64, 64, 4, 3)), (128, Config(32, 64, 4, 2)), (256, Config(32, 32, 4, 2))],
        "other": [(128, Config(32, 32, 4, 1)), (256, Config(16, 16, 4, 1, reload=True))],
    },
    "heavy": {
        "sm_80": [(128, Config(32, 32, 4, 2)), (256, Config(16, 32, 4, 2))],
        "gfx9": [(128, Config(32, 32, 4, 1)), (256, Config(16, 16, 4, 1))],
        "other": [(128, Config(16, 16, 4, 1)), (256, Config(16, 16, 8, 1, reload=True))],
    },
    "float32": {
        "sm_80": [(256, Config(16, 16, 8, 1))],
        "gfx9": [(128, Config(16, 32, 4, 1)), (256, Config(16, 16, 4, 1))],
        "other": [(128, Config(16, 16, 8, 1)), (256, Config(16, 16, 8, 1, reload=True))],
    },
}
_KEY_VALUE = {
    "plain": {
        "sm_80": [(64, Config(64, 64, 4, 2)), (128, Config(32, 64, 4, 2)), (256, Config(32, 32, 8, 1))],
        "sm_86": [(64, Config(32, 64, 4, 2)), (128, Config(32, 32, 4, 2)), (256, Config(32, 32, 8, 1))],
        "sm_90": [(64, Config(64, 64, 4, 2)), (128, Config(64, 128, 8, 2)), (256, Config(32, 32, 8, 1))],
        "sm_100": [(64, Config(64, 64, 4, 2)), (128, Config(64, 128, 8, 3)), (256, Config(32, 32, 8, 1))],
        "sm_120": [(64, Config(32, 64, 4, 2)), (128, Config(32, 32, 4, 2)), (256, Config(32, 32, 8, 1))],
        "gfx90a": [(128, Config(32, 32, 4, 1)), (256, Config(16, 16, 4, 1))],
        "gfx942": [(128, Config(32, 32, 4, 1)), (256, Config(16, 16, 4, 1))],
        "gfx950": [(128, Config(32, 32, 4, 1)), (256, Config(16, 16, 4, 1))],
        "other": [
            (64, Config(16, 32, 4, 1)), (96, Config(16, 16, 4, 1, reload=True)),
            (256, Config(16, 16, 8, 1, reload=True)),
        ],
    },
    "masked": {
        "sm_80": [
            (64, Config(64, 32, 4, 2)), (96, Config(32, 32, 4, 2)), (128, Config(64, 32, 4, 2)),
            (256, Config(32, 32, 8, 1)),
        ],
        "sm_86": [(64, Config(64, 32, 4, 2)), (128, Config(32, 32, 4, 2)), (256, Config(32, 32, 8, 1))],
        "sm_90": [(64, Config(64, 64, 4, 2)), (128, Config(32, 128, 8, 2)), (256, Config(32, 32, 8, 1))],
        "sm_120": [
            (64, Config(32, 64, 4, 2)), (96, Config(16, 32, 4, 2)), (128, Config(32, 32, 4, 2)),
            (256, Config(32, 32, 8, 1)),
        ],
    },
    "learned": {
        "sm_86": [
            (64, Config(64, 32, 4, 2)), (96, Config(16, 32, 4, 2)), (128, Config(32, 32, 4, 2)),
            (256, Config(32, 32, 8, 1)),
        ],
        "sm_90": [(64, Config(64, 64, 4, 2)), (128, Config(32, 64, 4, 2)), (256, Config(32, 32, 8, 1))],
        "sm_100": [(128, Config(32, 64, 4, 2)), (256, Config(32, 32, 8, 1))],
        "sm_120": [
            (64, Config(64, 32, 4, 2)), (96, Config(16, 32, 4, 2)), (128, Config(32, 32, 4, 2)),
            (256, Config(32, 32, 8, 1)),
        ],
    },
    "heavy": {
        "sm_80": [
            (64, Config(32, 32, 4, 2)), (80, Config(16, 32, 4, 1)), (96, Config(32, 16, 4, 1)),
            (128, Config(32, 32, 4, 2)), (256, Config(16, 16, 4, 1)),
        ],
        "sm_90": [(64, Config(16, 64, 4, 1)), (128, Config(16, 64, 8, 2)), (256, Config(16, 16, 4, 1))],
        "gfx9": [(64, Config(32, 32, 4, 1)), (256, Config(16, 16, 4, 1))],
        "other": [
            (64, Config(16, 16, 4, 1)), (96, Config(16, 16, 4, 1, reload=True)),
            (256, Config(16, 16, 8, 1, reload=True)),
        ],
    },
    "float32": {
        "sm_80": [(64, Config(16, 32, 8, 1)), (256, Config(16, 16, 8, 1))],
        "sm_100": [(256, Config(16, 16, 8, 1))],
        "gfx9": [(64, Config(32, 32, 4, 1)), (256, Config(16, 16, 4, 1))],
        "other": [(128, Config(16, 16, 8, 1, reload=True)), (256, Config(16, 16, 16, 1, reload=True))],
    },
}  # fmt: skip
_QUERY = {
    "plain": {
        "sm_80": [
            (64, Config(64, 32, 4, 2)), (96, Config(32, 32, 4, 2)), (128, Config(64, 32, 4, 2)),
            (256, Config(32, 32, 8, 1)),
        ],
        "sm_90": [(128, Config(64, 64, 4, 2)), (256, Config(128, 32, 8, 1))],
        "sm_100": [(64, Config(64, 64, 4, 2)), (128, Config(128, 64, 8, 3)), (256, Config(32, 32, 8, 1))],
        "gfx90a": [(128, Config(32, 32, 4, 1)), (256, Config(16, 16, 4, 1))],
        "gfx942": [(128, Config(32, 32, 4, 1)), (256, Config(16, 16, 4, 1))],
        "gfx950": [(128, Config(32, 32, 4, 1)), (256, Config(16, 16, 4, 1))],
        "other": [(64, Config(32, 32, 4, 1)), (256, Config(16, 16, 8, 1, reload=True))],
    },
    "masked": {
        "sm_90": [(64, Config(64, 64, 4, 2)), (128, Config(64, 32, 4, 2)), (256, Config(128, 16, 8, 1))],
        "sm_120": [(64, Config(64, 32, 4, 2)), (128, Config(32, 32, 4, 2)), (256, Config(32, 32, 8, 1))],
    },
    "learned": {
        "sm_90": [(64, Config(64, 64, 4, 2)), (128, Config(64, 32, 4, 2)), (256, Config(128, 16, 8, 1))],
    },
    "heavy": {
        "sm_80": [
            (64, Config(32, 32, 4, 2)), (96, Config(32, 16, 4, 1)), (128, Config(32, 32, 4, 2)),
            (256, Config(16, 16, 4, 1)),
        ],
        "sm_90": [(128, Config(64, 16, 4, 1)), (256, Config(16, 16, 4, 1))],
        "gfx9": [(64, Config(32, 32, 4, 1)), (256, Config(16, 16, 4, 1))],
        "other": [
            (64, Config(16, 16, 4, 1)), (96, Config(16, 16, 4, 1, reload=True)),
            (256, Config(16, 16, 8, 1, reload=True)),
        ],
    },
    "float32": {
        "sm_80": [(128, Config(16, 16, 8, 1)), (256, Config(16, 16, 8, 2))],
        "gfx9": [(64, Config(32, 32, 4, 1)), (256, Config(16, 16, 4, 1))],
        "other": [(64, Config(16, 16, 8, 1)), (256, Config(16, 16, 8, 1, reload=True))],
    },
}  # fmt: skip
_BIAS = {
    "plain": {
        "sm_80": [(64, Config(32, 32, 4, 1)), (256, Config(16, 16, 4, 1))],
        "gfx9": [(64, Config(32, 32, 4, 1)), (256, Config(16, 16, 4, 1))],
        "other": [(64, Config(32, 32, 4, 1)), (256, Config(16, 16, 8, 1, reload=True))],
    },
    "float32": {
        "sm_80": [(128, Config(16, 16, 8, 1)), (256, Config(16, 16, 8, 1, reload=True))],
        "gfx9": [(64, Config(32, 32, 4, 1)), (256, Config(16, 16, 4, 1))],
        "other": [(128, Config(16, 16, 8, 1)), (256, Config(16, 16, 8, 1, reload=True))],
    },
}
_INTERPRETER = Config(64, 64, 1, 1)
_SAME_AS = {
    "sm_87": "sm_80", "sm_89": "sm_86", "sm_103": "sm_100", "sm_110": "sm_100", "sm_121": "sm_120",
}  # fmt: skip


def prefill(problem, device: Device) -> Config:
    """Tiles of the forward pass."""
    return _fit(_look_up(_PREFILL, problem, device), problem, device)


def decode(problem, device: Device) -> Config:
    """Tiles of the forward pass of few queries; the rows are those of all heads that share keys."""
    config = _look_up(_DECODE, problem, device)
    rows = problem.group_size * problem.seqlen_q
    block_m = next((size for size in (16, 32, 64) if size >= rows), 64)
    return _fit(config._replace(BLOCK_M=min(block_m, config.BLOCK_M)), problem, device)


def key_value(problem, device: Device) -> Config:
    """Tiles of the gradients of k and v: BLOCK_N keys stay, blocks of BLOCK_M queries pass."""
    return _fit(_look_up(_KEY_VALUE, problem, device), problem, device)


def query(problem, device: Device) -> Config:
    """Tiles of the gradient of q: BLOCK_M queries stay, blocks of BLOCK_N keys pass."""
    return _fit(_look_up(_QUERY, problem, device), problem, device)


def bias(problem, device: Device) -> Config:
    """Tiles of the gradient of a bias."""
    return _fit(_look_up(_BIAS, problem, device), problem, device)


def within(config: Config, block_size: tuple[int, int]) -> Config:
    """`config` with tiles that divide blocks of that size: powers of two."""
    block_m, block_n = (
        min(own, size & -size) for own, size in zip((config.BLOCK_M, config.BLOCK_N), block_size, strict=True)
    )
    return config._replace(BLOCK_M=block_m, BLOCK_N=block_n)


def can_specialize(config: Config, problem, device: Device) -> bool:
    """Whether `config` is worth measuring with warps of their own for loads, products and softmax: where tensor memory
    holds the sums of products, and tensor descriptors load tiles ahead, in a loop without masks."""
    if device.arch not in WITH_SPECIALIZED_WARPS or problem.dtype == "float32":
        return False
    has_loop = problem.mask != "tensor" and problem.bias == "none"
    in_one_tile = not any(split_head_dim(d, problem.dtype)[1] for d in (problem.head_dim, problem.head_dim_v))
    return has_loop and in_one_tile and config.BLOCK_N >= 64 and config.num_stages in (2, 3)


def _kinds(problem) -> tuple[str, ...]:
    """Which of a kernel's tables serve the problem, best first."""
    if problem.dtype == "float32":
        return ("float32",)
    if problem.bias != "none" or problem.mask == "tensor" or problem.alibi or problem.softcap or problem.dropout:
        return "heavy", "plain"
    kinds = ("plain",) if problem.mask == "none" else ("masked", "plain")
    return ("learned", *kinds) if problem.learned_scale else kinds


def _look_up(tables, problem, device: Device) -> Config:
    if device.arch == "interpreter":
        return _INTERPRETER
    arch = _SAME_AS.get(device.arch, device.arch)
    found = [tables[kind] for kind in _kinds(problem) if kind in tables]
    table = next(table for table in found if arch in table or "other" in table)
    family = "sm_80" if arch.startswith("sm_") else arch[:4]
    rows = table.get(arch) or table.get(family) or table["other"]
    widest = max(problem.head_dim, problem.head_dim_v)
    return next((config for head_dim, config in rows if widest <= head_dim), rows[-1][1])


def shared_memory(config: Config, problem) -> int:
    """Bytes that the tiles of k and v take in all stages, and q's beside them: an estimate."""
    size = 4 if problem.dtype == "float32" else 2
    width_qk, width_v = (sum(split_head_dim(d, problem.dtype)) for d in (problem.head_dim, problem.head_dim_v))
    passing = config.BLOCK_N * (width_qk + width_v) * max(1, config.num_stages)
    return size * (config.BLOCK_M * width_qk + passing)


def _fit(config: Config, problem, device: Device) -> Config:
    """Fewer stages, then smaller key blocks, until the tiles that are loaded fit the device."""
    while shared_memory(config, problem) > device.smem and config.num_stages > 1:
        config = config._replace(num_stages=config.num_stages - 1)
    while shared_memory(config, problem) > device.smem and config.BLOCK_N > 16:
        config = config._replace(BLOCK_N=config.BLOCK_N // 2)
    return config
