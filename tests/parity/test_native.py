"""The C++ without Python (native/parity.cpp) under sanitizers and on emulated CPUs; Python under sanitizers."""

import os
import re
import shutil
import sys
from pathlib import Path

import pytest

from building import ROOT, compile_kernels, compiler, output, run, setup, tool
from isas import supported_isas

MACHINE = setup.machine()
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer"]
CROSS = "aarch64-linux-gnu-g++"
PANELS = {"": [], "wide": ["-DFASTATTN_WIDE_L1=0"], "narrow": ["-DFASTATTN_WIDE_L1=INT64_MAX"]}
"""avx512 takes panels of two vectors where the L1 is large, else of one: flags for either, whatever this CPU has."""
PANELS |= {"of two vectors": ["-DFASTATTN_NV=2", "-DFASTATTN_MR=10"]}  # of emulated
BF16 = "_bf16"  # of an instruction set's name where products are of pairs of bfloat16
KERNELS = [
    f"{isa}{panels}"
    for isa in supported_isas()
    for panels in ((" wide", " narrow") if isa.startswith("avx512") else ("",))
]
KERNELS += ["emulated_bf16", "emulated_bf16 of two vectors", "emulated_amx_bf16"] if MACHINE == "x86_64" else []


def build(folder: Path, cxx: str, machine: str, isas: list[str], *flags: str) -> tuple[Path, dict[str, list[Path]]]:
    """(native/parity.cpp linked with the kernels of `isas`; ISA -> those kernels' objects)"""
    isas = [isa.removesuffix(BF16) for isa in isas]
    objects = {isa: compile_kernels(folder, cxx, isa, *flags, machine=machine) for isa in isas}
    host_only = ROOT.glob("csrc/drive/*.cpp")
    sources = [*sorted(ROOT.glob("tests/native/*.cpp")), *sorted(host_only)]
    host = [*setup.COMMON_FLAGS, *[f"-DFASTATTN_HAVE_{isa.upper()}" for isa in isas], *flags, "-I", ROOT / "csrc"]
    host += ["-Wall", "-Wextra", "-rdynamic", "-pthread", "-ldl"]
    program = folder / "parity"
    output(cxx, *sources, *[x for pair in objects.values() for x in pair], "-o", program, *host)
    return program, objects


def assert_all_pass(isa: str, *command) -> None:
    text = output(*command, FASTATTN_CPU_ISA=isa)
    assert text.startswith(f"{isa}\n") and re.search(r"^[1-9]\d{2,} passed, 0 failed$", text, re.M), text


@pytest.mark.slow
@pytest.mark.parametrize("flags", [["-O1", "-g", *SANITIZE], []], ids=["sanitized", "as shipped"])
@pytest.mark.parametrize("kernels", KERNELS)
def test_parity(tmp_path, kernels, flags):
    isa, _, panels = kernels.partition(" ")
    assert_all_pass(isa, build(tmp_path, compiler(), MACHINE, [isa], *PANELS[panels], *flags)[0])


@pytest.fixture(scope="module")
def as_shipped(tmp_path_factory) -> Path:
    return build(tmp_path_factory.mktemp("as_shipped"), compiler(), MACHINE, list(setup.isa_flags(MACHINE)))[0]


def assert_chooses(isa: str, lacking: str, program: Path, *emulator) -> None:
    """A CPU without `lacking` runs on `isa`: no other instruction is met, and the choice looks at the CPU."""
    text = output(*emulator, program, 30, FASTATTN_CPU_ISA="")
    assert text.startswith(f"{isa}\n") and text.endswith(" 0 failed\n"), text
    result = run(*emulator, program, FASTATTN_CPU_ISA=lacking)
    assert result.returncode == 2 and f"FASTATTN_CPU_ISA={lacking}: this CPU does not have it" in result.stdout


@pytest.mark.slow
@pytest.mark.parametrize("cpu, isa, lacking", [("Nehalem", "scalar", "avx2"), ("Haswell", "avx2", "avx512")])
def test_emulated_older_x86(as_shipped, cpu, isa, lacking):
    if MACHINE != "x86_64":
        pytest.skip("the kernels of x86")
    assert_chooses(isa, lacking, as_shipped, tool("qemu-x86_64", "qemu-x86_64-static"), "-cpu", cpu)


@pytest.fixture(scope="module")
def aarch64(tmp_path_factory) -> tuple[Path, dict[str, list[Path]]]:
    tool(CROSS)
    # static: no libraries of the other machine needed at run time
    return build(tmp_path_factory.mktemp("aarch64"), CROSS, "aarch64", list(setup.isa_flags("aarch64")), "-static")


@pytest.mark.slow
@pytest.mark.parametrize("isa", ["neon_bf16", "neon", "scalar"])
def test_emulated_aarch64(aarch64, isa):
    assert_all_pass(isa, tool("qemu-aarch64", "qemu-aarch64-static"), "-cpu", "max", aarch64[0], 100)


@pytest.mark.slow
def test_emulated_older_aarch64(aarch64):
    assert_chooses("neon", "neon_bf16", aarch64[0], tool("qemu-aarch64", "qemu-aarch64-static"), "-cpu", "cortex-a57")


@pytest.mark.slow
def test_neon_multiply_adds(aarch64):
    code = output(tool("aarch64-linux-gnu-objdump"), "-d", *aarch64[1]["neon"])
    assert len(re.findall(r"fmla\tv\d+\.4s", code)) > 300 and len(re.findall(r"fmla\tv\d+\.2d", code)) > 100
    assert len(re.findall(r"bfmmla\tv\d+\.4s", code)) > 300


@pytest.mark.slow
def test_python_under_sanitizers(tmp_path):
    """The extension with sanitizers: every parity test, guard pages, threads and forks."""
    cxx = compiler()
    libraries = [output(cxx, f"-print-file-name=lib{name}").strip() for name in ("asan.so", "ubsan.so", "stdc++.so.6")]
    if not all(map(os.path.isabs, libraries)):
        pytest.skip("the sanitizers' libraries are not installed")
    ignore = shutil.ignore_patterns("*.so", "__pycache__")
    for name in ("csrc", "fastattn", "kernels", "tests"):
        shutil.copytree(ROOT / name, tmp_path / name, symlinks=True, ignore=ignore)
    for path in (ROOT / "setup.py", ROOT / "pyproject.toml", *ROOT.glob("*.md")):
        shutil.copy(path, tmp_path)
    flags = " ".join([*SANITIZE, "-g1"])
    build_environment = {"CFLAGS": flags, "CXXFLAGS": flags, "LDFLAGS": SANITIZE[0], "FASTATTN_BUILD_EXT": "1"}
    output(sys.executable, "setup.py", "--quiet", "build_ext", "--inplace", cwd=tmp_path, **build_environment)
    files = [f"tests/parity/test_{name}.py" for name in ("prefill", "prefill_bits", "prefill_rules")]
    files += ["tests/unit/test_memory.py", "tests/unit/test_threads.py"]
    # what allocates is slower and larger under the sanitizer, which ends a process without memory; the other ISAs have
    # run in test_parity
    selected = "not leak and not extra_memory and not out_of_memory and not every_isa"
    output(
        *(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files, "-k", selected),
        cwd=tmp_path,
        PYTHONPATH=str(tmp_path),
        PYTHONMALLOC="malloc",
        LD_PRELOAD=" ".join(libraries),
        ASAN_OPTIONS="detect_leaks=0:handle_segv=0",  # the guard pages' signal stays a signal
    )
