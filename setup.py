"""Builds fastattn._C from csrc/; the metadata is in pyproject.toml. Needs setuptools and pybind11, never torch.

FASTATTN_BUILD_EXT   auto (default): if the C++ build fails, install the Python package alone and say why
                     1: a failed build is an error
                     0: build no C++
FASTATTN_ISAS        instruction sets to build kernels for, such as avx2: quicker while one works on a kernel, and not
                     for wheels (default: all in the machine's row of ISA_FLAGS)
MAX_JOBS             how many compilers run at once (default: one per core)
"""

import copy
import datetime
import gzip
import json
import os
import shlex
import subprocess
import sys
import sysconfig
import tarfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_clib import build_clib
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py
from setuptools.command.sdist import sdist

ROOT = Path(__file__).resolve().parent
BUILD_EXT = os.environ.get("FASTATTN_BUILD_EXT", "auto")
ISAS = os.environ.get("FASTATTN_ISAS", "").replace(",", " ").split()
ERROR_FILE = "_build_error.txt"  # fastattn/backends/cpu.py reads it

# x86-64-v2, spelled out for compilers older than its name (GCC 11). In every x86 row, to override a -march in CFLAGS.
X86_64_V2 = ["-march=x86-64", "-mcx16", "-mpopcnt", "-msse4.2"]

ISA_FLAGS = {
    "x86_64": {
        "scalar": X86_64_V2,
        "avx2": [*X86_64_V2, "-mavx2", "-mfma", "-mf16c"],
        "avx512": [*X86_64_V2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mf16c"],
    },
    "aarch64": {"scalar": [], "neon": []},
}
"""Machine -> ISA -> flags: the only place with a -m flag. csrc/isa_<name>.cpp is compiled with the flags of its row."""
EMULATED_FLAGS = [*ISA_FLAGS["x86_64"]["avx2"], "-O1", "-Wno-psabi"]
OTHER_ISAS = {"amx": ISA_FLAGS["x86_64"]["avx512"], "emulated": EMULATED_FLAGS, "emulated_amx": EMULATED_FLAGS}
"""x86_64's that are built only if FASTATTN_ISAS names them: `amx` has run on no machine, the emulated are for tests."""
REALS = "float", "double"  # once for each, so that two compilers at once have units of like size
NO_SIMD = {"scalar": []}  # any other machine

ON_LINUX = sysconfig.get_platform().startswith("linux")

# No -ffast-math: it would delete the rounding trick of exp2 and the rules for NaN and Inf.
COMMON_FLAGS = ["-O3", "-std=c++17", "-g0", "-fvisibility=hidden"]
COMMON_FLAGS += ["-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math"]
# GCC 12 warns about its own intrinsics headers.
KERNEL_FLAGS = [*COMMON_FLAGS, "-fno-exceptions", "-fno-rtti", "-Wno-uninitialized", "-Wno-maybe-uninitialized"]
# Of a shared library for Linux: nothing that glibc 2.28 lacks (csrc/glibc.h). libstdc++ is linked into it, without what
# is not used; libgcc_s, which torch has loaded, is not: its static form asks for a symbol of glibc 2.35.
LINUX_FLAGS = ["-DFASTATTN_OLD_GLIBC"] if ON_LINUX else []
LINUX_LINK_FLAGS = [
    "-static-libstdc++", "-Wl,--gc-sections", "-Wl,--exclude-libs,ALL", "-Wl,--version-script=csrc/exports.map",
    "-Wl,-z,relro,-z,now", "-Wl,--as-needed",
]  # fmt: skip
LINK_FLAGS = LINUX_LINK_FLAGS if ON_LINUX else []
HARDENING_FLAGS = ["-fstack-protector-strong", "-U_FORTIFY_SOURCE", "-D_FORTIFY_SOURCE=2"]


def machine() -> str:
    """The target's key in ISA_FLAGS, or another name that stands for the scalar kernels alone."""
    name = sysconfig.get_platform().rsplit("-", 1)[-1]
    return {"amd64": "x86_64", "arm64": "aarch64"}.get(name, name)


def isa_flags(target: str, isas: list[str] = ISAS) -> dict[str, list[str]]:
    """ISA -> flags of csrc/isa_<name>.cpp, for the ISAs of one machine: its row, or those that are named."""
    flags_of = ISA_FLAGS.get(target, NO_SIMD)
    if target == "x86_64":
        flags_of = flags_of | {isa: flags for isa, flags in OTHER_ISAS.items() if isa in isas}
    if unknown := set(isas) - set(flags_of):
        sys.exit(f"FASTATTN_ISAS={','.join(isas)!r}: {target} has {', '.join(flags_of)} and not {', '.join(unknown)}")
    return {isa: [*KERNEL_FLAGS, *flags] for isa, flags in flags_of.items() if isa in isas or not isas}


def libraries(target: str, headers: list[str]) -> list[tuple[str, dict]]:
    """One static library per ISA and real type, as setuptools' build_clib takes them."""
    return [
        (
            f"fastattn_{isa}_{real}",
            {
                "sources": [f"csrc/isa_{isa}.cpp"],
                "include_dirs": ["csrc"],
                "cflags": [*flags, *LINUX_FLAGS, f"-DFASTATTN_REAL={real}"],
                "obj_deps": {"": headers},
            },
        )
        for isa, flags in isa_flags(target).items()
        for real in REALS
    ]


def extension(target: str, headers: list[str]) -> Extension:
    """fastattn._C: everything in csrc/ but the isa_*.cpp, for the oldest CPU, and the libraries of all ISAs."""
    isas = isa_flags(target)
    return Extension(
        "fastattn._C",
        sources=sorted(
            path.relative_to(ROOT).as_posix() for path in ROOT.glob("csrc/**/*.cpp") if not path.name.startswith("isa_")
        ),
        include_dirs=["csrc"],
        define_macros=[(f"FASTATTN_HAVE_{isa.upper()}", "1") for isa in isas],
        extra_compile_args=[*COMMON_FLAGS, *ISA_FLAGS.get(target, NO_SIMD)["scalar"], *LINUX_FLAGS, *HARDENING_FLAGS],
        extra_link_args=LINK_FLAGS,
        depends=[*headers, "csrc/exports.map", *(f"csrc/isa_{isa}.cpp" for isa in isas)],
        language="c++",
    )


class Sdist(sdist):
    """A tar.gz of the same bytes wherever and by whomever it is packed: setuptools keeps owners, times and umask."""

    def make_archive(self, base_name, format, root_dir=None, base_dir=None, owner=None, group=None):
        if format != "gztar":
            return super().make_archive(base_name, format, root_dir, base_dir, owner, group)

        def plain(member):
            member.uid = member.gid = 0
            member.uname = member.gname = ""
            member.mtime, member.mode = source_time(), 0o755 if member.isdir() or member.mode & 0o100 else 0o644
            return member

        name = f"{base_name}.tar.gz"
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        with open(name, "wb") as file, gzip.GzipFile("", "wb", fileobj=file, mtime=source_time()) as packed:
            with tarfile.open(fileobj=packed, mode="w", format=tarfile.PAX_FORMAT) as archive:
                archive.add(base_dir, filter=plain)  # in the order of names
        return name


class BuildWheel(bdist_wheel):
    """With a list of what is in it (PEP 770). One whose C++ build failed is for any machine, and its name says so."""

    def get_tag(self):
        return ("py3", "none", "any") if failures else super().get_tag()

    def write_wheelfile(self, wheelfile_base, *arguments, **options):
        super().write_wheelfile(wheelfile_base, *arguments, **options)
        folder = Path(wheelfile_base, "sboms")
        folder.mkdir(exist_ok=True)
        text = json.dumps(bill_of_materials(self.distribution), indent=1, sort_keys=True)
        (folder / "fastattn.cdx.json").write_text(text + "\n")


def bill_of_materials(distribution) -> dict:
    """What a wheel holds, and what it was built with, in CycloneDX 1.6."""
    name, version = distribution.get_name(), distribution.get_version()
    root = {"type": "library", "bom-ref": name, "name": name, "version": version, "purl": f"pkg:pypi/{name}@{version}"}
    root["licenses"] = [{"license": {"id": "BSD-3-Clause"}}]
    parts = []
    if distribution.has_ext_modules() and not failures:
        compiler = subprocess.run([*cxx(), "-dumpfullversion", "-dumpversion"], capture_output=True, text=True).stdout
        parts.append({"type": "library", "bom-ref": "pybind11", "name": "pybind11", "version": pybind11_version()})
        parts.append({"type": "library", "bom-ref": "libstdc++", "name": "libstdc++", "version": compiler.strip()})
    when = datetime.datetime.fromtimestamp(source_time(), datetime.timezone.utc).isoformat().replace("+00:00", "Z")
    return {
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "version": 1,
        "metadata": {"timestamp": when, "component": root},
        "components": parts,
        "dependencies": [{"ref": name, "dependsOn": [part["bom-ref"] for part in parts]}],
    }


def source_time() -> int:
    """SOURCE_DATE_EPOCH, or a time that no build depends on: that of the oldest file a zip can hold."""
    return int(os.environ.get("SOURCE_DATE_EPOCH") or 315532800)


def cxx() -> list[str]:
    return shlex.split(os.environ.get("CXX") or sysconfig.get_config_var("CXX") or "g++")


def pybind11_version() -> str:
    import pybind11

    return pybind11.__version__


class BuildPython(build_py):
    def run(self):
        super().run()
        if BUILD_EXT == "0":
            note_error(self.editable_mode, self.build_lib, "built with FASTATTN_BUILD_EXT=0")


class BuildLibraries(build_clib):
    def run(self):
        attempt(super().run)

    def build_libraries(self, libraries):
        with ThreadPoolExecutor(jobs()) as pool:
            list(pool.map(self.build_alone, libraries))

    def build_alone(self, library):
        """In a folder of its own: the libraries of an ISA have the same source."""
        command = copy.copy(self)
        command.build_temp = f"{self.build_temp}/{library[0]}"
        super(BuildLibraries, command).build_libraries([library])


class BuildExtension(build_ext):
    def run(self):
        inplace = self.inplace
        self.run_command("build_clib")  # `setup.py build_ext --inplace` alone would not run it
        attempt(self.compile)
        self.inplace = inplace
        if failures:
            self.remove_stale()
            self.extensions = []
        note_error(inplace, self.build_lib, failures[0] if failures else None)

    def compile(self):
        import pybind11
        from pybind11.setup_helpers import ParallelCompile

        self.include_dirs.append(pybind11.get_include())
        stamp = Path(self.build_temp, "isas.txt")  # newer than what was compiled for other FASTATTN_ISAS
        if not stamp.exists() or stamp.read_text() != str(ISAS):
            stamp.parent.mkdir(parents=True, exist_ok=True)
            stamp.write_text(str(ISAS))
        self.extensions[0].depends.append(str(stamp))

        def outdated(obj, source):
            inputs = (source, *self.extensions[0].depends)
            return self.force or max(map(os.path.getmtime, inputs)) > os.path.getmtime(obj)

        with ParallelCompile("MAX_JOBS", default=jobs(), needs_recompile=outdated):
            super().run()

    def remove_stale(self):
        """An extension of an earlier build must not pass for this one's."""
        build_py = self.get_finalized_command("build_py")
        for ext in self.extensions:
            for path in self._get_inplace_equivalent(build_py, ext)[0 if self.inplace else 1 :]:
                Path(path).unlink(missing_ok=True)


failures: list[str] = []


def attempt(step) -> None:
    """Run a step of the C++ build; after a failure with FASTATTN_BUILD_EXT=auto, this and later ones are skipped."""
    if failures:
        return
    try:
        step()
    except Exception as error:
        if BUILD_EXT == "1":
            raise
        header = Path(sysconfig.get_path("include"), "Python.h")
        failures.append(f"{error}" if header.exists() else f"{error}; the Python headers ({header}) are missing")


def note_error(in_source: bool, build_lib: str, error: str | None) -> None:
    """Leave the reason beside the package for `fastattn.explain`, and make it hard to miss in the log."""
    path = Path("fastattn" if in_source else f"{build_lib}/fastattn", ERROR_FILE)
    if error is None:
        path.unlink(missing_ok=True)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(error + "\n")
    bar = "*" * 100
    advice = "A C++17 compiler builds them; FASTATTN_BUILD_EXT=1 turns a failed build into an error."
    print(f"{bar}\nfastattn is built WITHOUT its CPU kernels: {error}\n{advice}\n{bar}", file=sys.stderr, flush=True)


def jobs() -> int:
    return int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)


def main() -> None:
    if BUILD_EXT not in ("auto", "1", "0"):
        sys.exit(f"FASTATTN_BUILD_EXT={BUILD_EXT!r} must be auto, 1 or 0")
    os.umask(0o022)  # a wheel keeps the modes of what the build writes
    # setup.py is one of them: an edited flag rebuilds too
    headers = ["setup.py", *sorted(path.relative_to(ROOT).as_posix() for path in ROOT.glob("csrc/**/*.h"))]
    native = {"libraries": libraries(machine(), headers), "ext_modules": [extension(machine(), headers)]}
    setup(
        cmdclass={
            "sdist": Sdist,
            "bdist_wheel": BuildWheel,
            "build_py": BuildPython,
            "build_clib": BuildLibraries,
            "build_ext": BuildExtension,
        },
        **({} if BUILD_EXT == "0" else native),
    )


if __name__ == "__main__":
    main()
