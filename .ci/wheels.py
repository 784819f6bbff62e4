"""`make wheels`: a wheel for every CPython with headers on this machine, tried in that Python, and a table of them.

Writes dist/. Interpreters: those on the command line, else those found on the path and in pyenv's folder. A wheel is
tried without torch, which few of them have: the extension alone, on an object with a tensor's attributes, against
softmax written out.
"""

import glob
import json
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

from fastattn.terms import Terms

ROOT = Path(__file__).resolve().parents[1]
DIST = ROOT / "dist"
OLDEST = (3, 10)
TOOLS = ROOT / "build/tools"  # setuptools and pybind11 for all of them: they are plain Python

TRIAL = """
import ctypes, importlib.util, json, math, sys
path, fields, neutral = sys.argv[1], json.loads(sys.argv[2]), json.loads(sys.argv[3])
spec = importlib.util.spec_from_file_location("_C", path)
_C = importlib.util.module_from_spec(spec)
spec.loader.exec_module(_C)

class Device:
    type = "cpu"

class Plain:
    device, dtype = Device, "float32"
    def __init__(self, *shape):
        self.shape = shape
        self.values = (ctypes.c_float * math.prod(shape))(*(math.sin(7 * i) for i in range(math.prod(shape))))
    def stride(self):
        return tuple(math.prod(self.shape[i + 1:]) for i in range(len(self.shape)))
    def data_ptr(self):
        return ctypes.addressof(self.values)
    def is_neg(self):
        return False

_C.bind_fields("Terms", fields)
S, D = 21, 8
q, k, v, out = (Plain(1, 1, S, D) for _ in range(4))
_C.forward(q, k, v, out, None, None, None, tuple(neutral), 1)
for i in range(S):
    row = lambda x, j: x.values[j * D:(j + 1) * D]
    w = [math.exp(sum(a * b for a, b in zip(row(q, i), row(k, j)))) for j in range(S)]
    for d in range(D):
        exact = sum(w[j] * row(v, j)[d] for j in range(S)) / sum(w)
        assert abs(out.values[i * D + d] - exact) < 1e-5, (i, d)
print("passed on", _C.isa())
"""


def main(chosen: list[str]) -> int:
    """0 if every wheel was built and passed."""
    DIST.mkdir(exist_ok=True)
    _output(
        sys.executable, "-m", "pip", "install", "-q", "--target", TOOLS, "--upgrade", "setuptools>=77", "pybind11>=3"
    )
    print(f"{'tag':<24}{'MiB':>6}{'_C MiB':>8}  {'glibc':<8}{'auditwheel':<26}trial")
    good = True
    for python in chosen or interpreters():
        try:
            print(_row(python, build(python)))
        except (subprocess.CalledProcessError, StopIteration) as error:
            good = False
            print(f"{python}: FAILED\n{getattr(error, 'stdout', '')}{getattr(error, 'stderr', '')}")
    return 0 if good else 1


def interpreters() -> list[str]:
    """One of each version from OLDEST on that has its headers."""
    paths = [*glob.glob(os.path.expanduser("~/.pyenv/versions/*/bin/python3")), *glob.glob("/usr/bin/python3.[0-9]*")]
    found = {}
    code = "import sys, sysconfig, os; path = sysconfig.get_path('include') + '/Python.h'"
    code += "; print(*sys.version_info[:2], os.path.exists(path))"
    for path in [sys.executable, *paths]:
        if path.endswith("-config"):
            continue
        major, minor, has_headers = _output(path, "-c", code).split()
        version = int(major), int(minor)
        if version >= OLDEST and has_headers == "True":
            found.setdefault(version, path)
    return [found[version] for version in sorted(found)]


def build(python: str) -> Path:
    """The wheel of this source for one interpreter, in dist/."""
    before = set(DIST.glob("*.whl"))
    command = [python, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "--no-index", "-w", DIST, ROOT]
    _output(*command, PYTHONPATH=str(TOOLS), FASTATTN_BUILD_EXT="1")
    return max(DIST.glob("*.whl"), key=lambda path: (path not in before, path.stat().st_mtime))


def _row(python: str, wheel: Path) -> str:
    with zipfile.ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if name.endswith(".so"))
        extension = Path(archive.extract(name, ROOT / "build" / wheel.stem))
    symbols = re.findall(r"@GLIBC_(\d+)\.(\d+)", _output("nm", "-D", "--with-symbol-versions", extension))
    newest = ".".join(map(str, max(tuple(map(int, version)) for version in symbols)))
    neutral = Terms(softmax_scale=1.0)
    trial = _output(python, "-c", TRIAL, extension, json.dumps(neutral._fields), json.dumps(neutral)).strip()
    tag, sizes = wheel.stem.split("-", 2)[2], (wheel.stat().st_size / 2**20, extension.stat().st_size / 2**20)
    return f"{tag:<24}{sizes[0]:>6.2f}{sizes[1]:>8.2f}  {newest:<8}{_policy(wheel):<26}{trial}"


def _policy(wheel: Path) -> str:
    """The oldest system that auditwheel says it runs on."""
    try:
        text = _output(sys.executable, "-m", "auditwheel", "show", wheel)
    except subprocess.CalledProcessError:
        return "not installed"
    found = re.search(r'"((?:many|musl)?linux\w+)"', text)
    return found[1] if found else "unknown"


def _output(*command, cwd=None, **environment) -> str:
    command = [str(part) for part in command]
    environment = {**os.environ, **environment}
    return subprocess.run(command, cwd=cwd, env=environment, check=True, capture_output=True, text=True).stdout


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
