"""csrc/ for macOS and Windows: compiled by zig, whose compiler and headers are for all systems. It is never run."""

import shutil
import sys
import sysconfig
from pathlib import Path

import pybind11
import pytest

from building import ROOT, output, setup

pytestmark = pytest.mark.slow
pytest.importorskip("ziglang")

WINDOWS = "x86_64-windows-gnu"
TARGETS = "x86_64-macos", "aarch64-macos", WINDOWS
MACHINES = {target: setup.isa_flags(target.split("-")[0]) for target in TARGETS}
KERNELS = [(target, isa, real) for target in TARGETS for isa in MACHINES[target] for real in setup.REALS]
OTHERS = setup.extension("x86_64", []).sources

SIZES = {"VOID_P": 8, "SIZE_T": 8, "LONG_LONG": 8, "INT": 4, "SHORT": 2, "FLOAT": 4, "DOUBLE": 8, "FPOS_T": 8}
"""Of C types, on all of them; what CPython's configure would find there."""


@pytest.fixture(scope="module", params=TARGETS)
def target(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def headers(target, tmp_path_factory) -> Path:
    """Python's, with a pyconfig.h of the other system in place of this one's."""
    folder = shutil.copytree(sysconfig.get_path("include"), tmp_path_factory.mktemp("headers") / "python")
    on_windows = target == WINDOWS
    sizes = SIZES | {"LONG": 4 if on_windows else 8, "WCHAR_T": 2 if on_windows else 4, "TIME_T": 8, "PID_T": 4}
    lines = [f"#define SIZEOF_{name} {size}" for name, size in sizes.items()]
    names = ["HAVE_WCHAR_H", "WITH_THREAD", *(["MS_WINDOWS", "MS_WIN64", "NT_THREADS"] if on_windows else [])]
    if not on_windows:
        names += ["HAVE_PTHREAD_H", "_POSIX_THREADS", "HAVE_SYS_TIME_H", "HAVE_SYS_SELECT_H", "HAVE_UNISTD_H"]
    lines += [f"#define {name} 1" for name in names]
    (folder / "pyconfig.h").write_text("\n".join(lines) + "\n")
    return folder


def compile_for(target: str, source: str, to: Path, *flags) -> None:
    cache = str(ROOT / "build/zig")
    flags = [flag for flag in flags if flag not in setup.LINUX_FLAGS]
    flags = ["-march=x86_64" if flag == "-march=x86-64" else flag for flag in flags]  # zig's spelling
    output(
        *(sys.executable, "-m", "ziglang", "c++", "-target", target, "-c", ROOT / source, "-o", to / "unit.o"),
        *("-I", ROOT / "csrc", *flags),
        ZIG_GLOBAL_CACHE_DIR=cache,
        ZIG_LOCAL_CACHE_DIR=cache,
    )
    assert (to / "unit.o").stat().st_size > 0


@pytest.mark.parametrize("system, isa, real", KERNELS)
def test_kernels_compile(system, isa, real, tmp_path):
    compile_for(system, f"csrc/isa_{isa}.cpp", tmp_path, *MACHINES[system][isa], f"-DFASTATTN_REAL={real}")


@pytest.mark.parametrize("source", OTHERS)
def test_the_rest_compiles(target, headers, source, tmp_path):
    extension = setup.extension(target.split("-")[0], [])
    macros = [f"-D{name}={value}" for name, value in extension.define_macros]
    include = ("-isystem", headers, "-isystem", pybind11.get_include())
    compile_for(target, source, tmp_path, *extension.extra_compile_args, *macros, *include)
