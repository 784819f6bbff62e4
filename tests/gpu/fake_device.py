"""A GPU that compiles and loads everything and runs nothing: the launchers of fastattn, unchanged, on meta tensors.

Only Triton's driver is replaced, so that specialization, compilation, the check of shared memory and the launch itself
take the path that they take on a device.
"""

import itertools
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import torch
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

KIB = 1024

SHARED_MEMORY = {
    # The most that one block may ask for, bytes. NVIDIA: CUDA C++ programming guide, table of compute capabilities
    # (227 KiB where a multiprocessor has 228, one KiB being the system's). AMD: the LDS of a compute unit.
    **dict.fromkeys((90, 100, 103), 227 * KIB),
    **dict.fromkeys((86, 89, 120), 99 * KIB),
    80: 163 * KIB,
    **dict.fromkeys(("gfx90a", "gfx942", "gfx1100", "gfx1201"), 64 * KIB),
    "gfx950": 160 * KIB,
}


class Binary(NamedTuple):
    """A compiled kernel: its name, Triton's metadata (shared, num_warps, ...), and the text or bytes of each stage."""

    name: str
    metadata: dict
    files: dict[str, Path]

    def text(self, stage: str) -> str:
        return self.files[stage].read_text()


class Launch(NamedTuple):
    """signature: Triton's type of each argument, "constexpr" of what is no parameter of the compiled kernel."""

    binary: Binary
    grid: tuple[int, int, int]
    args: tuple
    signature: tuple


def target_of(arch: int | str) -> GPUTarget:
    """sm_90 is 90, AMD's are named."""
    if isinstance(arch, int):
        return GPUTarget("cuda", arch, 32)
    return GPUTarget("hip", arch, 64 if arch.startswith("gfx9") else 32)


_numbers = itertools.count()  # what Triton keeps in memory launches on the driver that it was compiled for


class FakeDriver:
    """Triton's driver interface for a device that is not there. run: called with each launch, if it is not None."""

    run: Callable[[Launch], None] | None = None

    def __init__(self, arch: int | str):
        self.target, self.number = target_of(arch), next(_numbers)
        self.launches: list[Launch] = []
        self.binaries: dict[int, Binary] = {}
        properties = {"max_shared_mem": SHARED_MEMORY[arch], "multiprocessor_count": 100, "warpSize": 32}
        self.utils = SimpleNamespace(
            get_device_properties=lambda device: properties,
            load_binary=lambda name, kernel, shared, device: (object(), len(self.binaries) + 1, 0, 0, 1024),
            unload_module=lambda module: None,
        )

    def note_load(self, module, function, name, metadata_group, hash) -> None:
        """Triton calls it with the files of a kernel after load_binary."""
        files = {path.suffix[1:]: path for path in map(Path, metadata_group.values())}
        self.binaries[function] = Binary(name, json.loads(files["json"].read_text()), files)

    def launcher_cls(self, src, metadata):
        signature = tuple(src.signature.values())

        def launch(x, y, z, stream, function, packed_metadata, launch_metadata, enter_hook, exit_hook, *args):
            self.launches.append(Launch(self.binaries[function], (x, y, z), args, signature))
            if self.run is not None:
                self.run(self.launches[-1])

        return launch

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> tuple:
        return self.target.backend, self.target.arch, self.number  # the key of Triton's caches

    def get_current_stream(self, device=None) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("meta")


@contextmanager
def fake_gpu(arch: int | str, run: Callable[[Launch], None] | None = None) -> Iterator[list[Launch]]:
    """Inside, kernels compile for `arch` (80, 90, "gfx942", ...); yields the launches, which fills as they happen.

    run: called with each of them; without it nothing runs.
    """
    fake, before = FakeDriver(arch), driver._active
    fake.run = run
    driver.set_active(fake)
    knobs.runtime.kernel_load_end_hook.add(fake.note_load)
    try:
        yield fake.launches
    finally:
        knobs.runtime.kernel_load_end_hook.remove(fake.note_load)
        driver._active = before


class Specialized(NamedTuple):
    """In place of a compiled kernel: what Triton would compile for. Launches are listed as (name, key, grid, args)."""

    name: str
    key: str
    launched: list[tuple]
    function = packed_metadata = None

    def __getitem__(self, grid):
        return None  # would load it

    def run(self, x, y, z, stream, function, metadata, launch_metadata, enter_hook, exit_hook, *args) -> None:
        self.launched.append((self.name, self.key, (x, y, z), args))


@contextmanager
def nothing_compiled() -> Iterator[list[tuple]]:
    """Inside `fake_gpu`, kernels are specialized and launched but not compiled, in no time; yields the launches."""
    from fastattn.kernels import launch

    launched, keys, warmup, hook = [], [], JITFunction.warmup, knobs.runtime.jit_cache_hook

    def note(*, key, **others) -> bool:
        keys.append(str(key))
        return True  # as good as compiled

    def specialize(kernel, *args, **kwargs):
        assert warmup(kernel, *args, **kwargs) is None
        return Specialized(kernel.__name__, keys.pop(), launched)

    knobs.runtime.jit_cache_hook, JITFunction.warmup = note, specialize
    try:
        yield launched
    finally:
        knobs.runtime.jit_cache_hook, JITFunction.warmup = hook, warmup
        launch.forget()
