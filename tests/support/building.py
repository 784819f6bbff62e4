"""The build as tests run it: setup.py as a module, compilers, binary tools."""

import importlib.util
import os
import shutil
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def load_setup():
    spec = importlib.util.spec_from_file_location("fastattn_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


setup = load_setup()


def run(*command, cwd=None, **env) -> subprocess.CompletedProcess:
    command = [str(part) for part in command]
    return subprocess.run(command, cwd=cwd, env={**os.environ, **env}, capture_output=True, text=True)


def output(*command, cwd=None, **env) -> str:
    result = run(*command, cwd=cwd, **env)
    assert result.returncode == 0, f"{' '.join(map(str, command))}\n{result.stdout}{result.stderr}"
    return result.stdout


def tool(*names: str) -> str:
    """The path of the first of these that is installed."""
    path = next(filter(None, map(shutil.which, names)), None)
    if path is None:
        pytest.skip(f"{' or '.join(names)} is not installed")
    return path


def compiler() -> str:
    words = (os.environ.get("CXX") or sysconfig.get_config_var("CXX") or "g++").split()
    return tool(words[1] if words[0].endswith("ccache") and len(words) > 1 else words[0])  # a cache before the compiler


def compile_kernels(folder: Path, cxx: str, isa: str, *flags, machine: str | None = None) -> list[Path]:
    """The objects of csrc/isa_<isa>.cpp with the flags of setup.py for `machine` (this one), one for each real type."""
    flags = [*setup.isa_flags(machine or setup.machine(), [isa])[isa], "-I", ROOT / "csrc", *flags]
    objects = {real: folder / f"{isa}_{real}.o" for real in setup.REALS}

    def build(real):
        output(cxx, ROOT / f"csrc/isa_{isa}.cpp", "-c", f"-DFASTATTN_REAL={real}", "-o", objects[real], *flags)

    with ThreadPoolExecutor(setup.jobs()) as pool:
        list(pool.map(build, objects))
    return list(objects.values())
