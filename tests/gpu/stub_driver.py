"""Triton's own launcher for NVIDIA, its driver.c, on a libcuda.so.1 without a device (stub_driver.c).

What Triton does between a call in Python and the driver is unchanged: its C makes bytes and tensor maps of arguments,
and the stub records what arrives, by the sizes that the compiled kernel gives. Tensors are on the CPU.
"""

import ctypes
import shutil
import struct
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import torch
import triton
from triton import knobs
from triton.tools.tensor_descriptor import TensorDescriptor

import fake_device
from fake_device import SHARED_MEMORY, FakeDriver
from kernel_report import compiling_for

SOURCE = Path(__file__).with_name("stub_driver.c")
INCLUDE = Path(triton.__file__).parent / "backends" / "nvidia" / "include"


class _Launch(ctypes.Structure):
    """Launch in stub_driver.c."""

    _fields_ = [
        ("name", ctypes.c_char * 256), ("grid", ctypes.c_uint32 * 3), ("block", ctypes.c_uint32 * 3),
        ("shared", ctypes.c_uint32), ("count", ctypes.c_uint32), ("stream", ctypes.c_uint64),
        ("offset", ctypes.c_uint32 * 256), ("size", ctypes.c_uint32 * 256), ("bytes", ctypes.c_ubyte * 4096),
    ]  # fmt: skip


class Recorded(NamedTuple):
    """A launch as it came to the driver: the bytes of each parameter that the cubin has."""

    name: str
    grid: tuple[int, int, int]
    threads: int
    shared: int
    stream: int
    parameters: list[bytes]


class TensorMap(NamedTuple):
    """TensorMap in stub_driver.c: what cuTensorMapEncodeTiled was given, innermost dimension first."""

    address: int
    type: int
    swizzle: int
    dims: tuple[int, ...]
    strides: tuple[int, ...]
    box: tuple[int, ...]


def tensor_map(data: bytes) -> TensorMap:
    address, _, kind, swizzle, rank, _, *rest = struct.unpack_from("<QQ4H5I4x4Q6H", data)
    dims, strides, box, magic = rest[:5], rest[5:9], rest[9:14], rest[14]
    assert magic == 0x7A7A
    return TensorMap(address, kind, swizzle, tuple(dims[:rank]), tuple(strides[: rank - 1]), tuple(box[:rank]))


def build(folder: Path) -> Path:
    """The stub, compiled: a libcuda.so.1."""
    library = folder / "libcuda.so.1"
    command = [shutil.which("cc") or "gcc", "-O1", "-shared", "-fPIC", "-Wall", "-Werror", "-I", INCLUDE]
    subprocess.run([*command, "-Wl,-soname,libcuda.so.1", SOURCE, "-o", library], check=True)
    return library


@cache
def load(library: Path):
    """(the stub, Triton's functions on it); for this process from now on, where a real driver is not loaded yet."""
    stub = ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)  # whoever asks for libcuda.so.1 gets this one
    stub.stub_launch.restype = ctypes.POINTER(_Launch)
    stub.stub_host.argtypes = [ctypes.c_uint64, ctypes.c_uint64]
    knobs.nvidia.libcuda_path = str(library.parent)
    from triton.backends.nvidia.driver import CudaUtils

    return stub, CudaUtils()


class StubDriver(FakeDriver):
    """As `FakeDriver`, with Triton's own loading and launching. python_args: what each launch was given in Python."""

    def __init__(self, arch: int, library: Path):
        super().__init__(arch)
        self.stub, utils = load(library)
        self.stub.stub_device(arch, SHARED_MEMORY[arch])
        self.utils = SimpleNamespace(**{name: getattr(utils, name) for name in vars(utils)})
        self.utils.get_device_properties = lambda device: utils.get_device_properties(0)
        self.utils.load_binary = lambda name, kernel, shared, device: utils.load_binary(name, kernel, shared, 0)
        self.sources: list = []

    def launcher_cls(self, src, metadata):
        from triton.backends.nvidia.driver import CudaLauncher

        launch, note = CudaLauncher(src, metadata), super().launcher_cls(src, metadata)

        def launch_and_note(*args):
            launch(*args)
            note(*args)
            self.sources.append(src)

        return launch_and_note

    def recorded(self) -> list[Recorded]:
        return [_recorded(self.stub.stub_launch(i).contents) for i in range(self.stub.stub_count())]


def _recorded(launch: _Launch) -> Recorded:
    places = zip(launch.offset[: launch.count], launch.size[: launch.count], strict=True)
    data = bytes(launch.bytes)
    parameters = [data[offset : offset + size] for offset, size in places]
    return Recorded(launch.name.decode(), tuple(launch.grid), launch.block[0], launch.shared, launch.stream, parameters)


@contextmanager
def stub_gpu(arch: int, library: Path) -> Iterator[StubDriver]:
    """Inside, fastattn runs its Triton kernels on CPU tensors, compiled for `arch` and launched on the stub."""
    from fastattn import dispatch, plans

    made = []

    def make(arch):
        made.append(StubDriver(arch, library))
        return made[0]

    driver, fake_device.FakeDriver = fake_device.FakeDriver, make
    try:
        with compiling_for(arch):
            dispatch.KERNELS = tuple(
                row._replace(supports={**row.supports, "device": {"cpu"}}) for row in dispatch.KERNELS
            )
            plans.forget()
            yield made[0]
    finally:
        fake_device.FakeDriver = driver


FORMATS = {"i1": "<i", "i32": "<i", "i64": "<q", "u1": "<I", "u32": "<I", "u64": "<Q", "fp32": "<f"}


def expected_parameters(src, args: tuple) -> list[bytes | TensorDescriptor]:
    """The bytes of each parameter, by what the kernel was compiled for; a descriptor where a tensor map belongs."""
    found: list = []
    for kind, arg in zip(src.signature.values(), args, strict=True):
        _add(found, kind, arg)
    return [*found, bytes(8), bytes(8)]  # two kinds of scratch memory, of which our kernels need none


def _add(found: list, kind, arg) -> None:
    if isinstance(kind, tuple):
        for inner, x in zip(kind, arg, strict=True):
            _add(found, inner, x)
    elif kind.startswith("tensordesc"):
        found += [arg, *(struct.pack("<i", x) for x in arg.shape), *(struct.pack("<q", x) for x in arg.strides)]
    elif kind.startswith("*"):
        found.append(struct.pack("<Q", arg.data_ptr() if isinstance(arg, torch.Tensor) else arg or 0))
    elif kind != "constexpr":
        found.append(struct.pack(FORMATS[kind], arg))
