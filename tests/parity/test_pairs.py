"""Products of pairs of bfloat16 (AVX512_BF16): the operation in C++ against what the instruction was seen to give, the
parity tests on it, the instruction itself in the compiled code, and what a call tells."""

import re
import shutil
import sys

import pytest
import torch

import fastattn
from building import ROOT, compiler, output, setup, tool
from cases import Case, inputs
from fastattn import dispatch, plans
from fastattn.backends import cpu
from isas import needs_cpu

of_x86 = pytest.mark.skipif(setup.machine() != "x86_64", reason="instructions and flags of x86")


@pytest.mark.parametrize("source", ["pairs", pytest.param("tiles", marks=pytest.mark.slow)])
def test_numbers(tmp_path, source):
    program = tmp_path / source
    flags = ["-O1", "-std=c++17", "-Wall", "-Wextra", "-Wno-psabi", "-I", ROOT / "csrc"]
    output(compiler(), ROOT / f"tests/native/pairs/{source}.cpp", "-o", program, *flags)
    assert output(program) == ""


@pytest.mark.slow
def test_numbers_of_arm(tmp_path):
    """BFDOT, BFMMLA and BFCVTN under emulation, alone and in register tiles: bit for bit the architecture's."""
    program = tmp_path / "neon"
    flags = [*setup.isa_flags("aarch64", ["neon"])["neon"], "-static", "-Wall", "-Wextra", "-I", ROOT / "csrc"]
    output(tool("aarch64-linux-gnu-g++"), ROOT / "tests/native/pairs/neon.cpp", "-o", program, *flags)
    text = output(tool("qemu-aarch64", "qemu-aarch64-static"), "-cpu", "max", program)
    assert re.fullmatch(r"[1-9]\d{5,} comparisons, 0 failed\n", text), text


def disassembled(tmp_path, isa: str, text: str) -> list[str]:
    """The functions that `text` instantiates in the namespace of csrc/isa_<isa>.cpp, compiled as in the package."""
    source, compiled = tmp_path / "tile.cpp", tmp_path / "tile.o"
    unit = (ROOT / f"csrc/isa_{isa}.cpp").read_text().replace('#include "isa.h"', '#include "tile/pair_gradients.h"')
    source.write_text(f"{unit}\nnamespace fastattn::{isa} {{\n{text}}}\n")
    output(compiler(), source, "-c", "-o", compiled, *setup.isa_flags("x86_64", [isa])[isa], "-I", ROOT / "csrc")
    code = output(tool("objdump"), "-dC", "--no-show-raw-insn", compiled)
    return re.split(r"\n\n(?=[0-9a-f]+ <)", code)[1:]


@of_x86
def test_instructions(tmp_path):
    """A register tile is the instruction with its pair from memory, and nothing that goes to the stack."""
    *_, narrow, wide = disassembled(
        tmp_path,
        "avx512",
        "template void out_tile<float, MR<1>, 1, Pair>(const Pair*, int64_t, const Pair*, int64_t, bool, float*);\n"
        "template void out_tile<float, MR<2>, 2, Pair>(const Pair*, int64_t, const Pair*, int64_t, bool, float*);\n",
    )
    assert len(re.findall(r"vdpbf16ps .*\(%r\w+\)\{1to16\},%zmm", narrow)) == 8 * 8  # 4 steps at once, 1, and 3 behind
    assert len(re.findall(r"vdpbf16ps %zmm", wide)) >= 5 * 20
    for function in (narrow, wide):
        assert not re.search(r"zmm.*\(%r[sb]p\)|\(%r[sb]p\),%zmm", function)


@pytest.mark.slow
@of_x86
def test_tile_instructions(tmp_path):
    """What can be seen of AMX without a machine: a product loads registers in its loop, and stores its sums once."""
    configure, columns, rows = disassembled(
        tmp_path,
        "amx",
        "void configure() { TilesInUse tiles; }\n"
        "template void out_tile<float, 16, 1, Pair>(const Pair*, int64_t, const Pair*, int64_t, bool, float*);\n"
        "template void pair_tile<true, 16, 1>(const Pair*, int64_t, const Pair*, int64_t, float, float*, NoAside&);\n",
    )
    assert re.findall(r"\t(\w*tile\w*)", configure) == ["ldtilecfg", "tilerelease"]
    for function in (columns, rows):
        first, *others = re.findall(r"\t(\w+) .*%tmm", function)
        assert first == "tilezero" and others.count("tdpbf16ps") == others.count("tilestored") == 1
        assert set(others) == {"tileloadd", "tdpbf16ps", "tilestored"}
        assert re.search(r"tdpbf16ps %tmm2,%tmm1,%tmm0", function)  # sums += a b


@needs_cpu
def test_what_a_call_tells(monkeypatch):
    """As on a CPU that has the instruction: those that do not use it say so."""
    monkeypatch.setattr(cpu._C, "pair_isa", lambda: "any_bf16")
    plans.forget()
    try:
        told = {
            "bfloat16": (Case(seqlen_q=20, dtype="bfloat16"), "any_bf16"),
            "float16": (Case(seqlen_q=20, dtype="float16"), cpu.isa()),
            "few rows": (Case(seqlen_q=2, dtype="bfloat16"), cpu.isa()),
        }
        for name, (case, isa) in told.items():
            (q, k, v), kwargs = inputs(case)
            fastattn.attention(q, k, v, **kwargs)
            assert fastattn.last_call().isa == isa, name
            text = fastattn.explain(q, k, v, **kwargs)
            assert f"runs on {isa}" in text and ("products in float32" in text) == (name == "few rows")
        problem = fastattn.last_call().problem._replace(seqlen_q=20, needs_grad=True)
        text = dispatch.explain(problem, "cpu")
        assert text.count("runs on any_bf16") == 2  # forward and backward
        assert "any_bf16" not in dispatch.explain(problem._replace(rotary=True), "cpu")
    finally:
        monkeypatch.undo()
        plans.forget()


@pytest.fixture(scope="module", params=["emulated", "emulated_amx"])
def emulated(request, tmp_path_factory):
    """A copy of the package whose extension has kernels of tests alone, and their name."""
    folder = tmp_path_factory.mktemp(request.param)
    ignore = shutil.ignore_patterns("*.so", "__pycache__")
    for name in ("csrc", "fastattn", "kernels", "tests"):
        shutil.copytree(ROOT / name, folder / name, symlinks=True, ignore=ignore)
    for path in (ROOT / "setup.py", ROOT / "pyproject.toml", *ROOT.glob("*.md")):
        shutil.copy(path, folder)
    build = {"FASTATTN_BUILD_EXT": "1", "FASTATTN_ISAS": request.param}
    output(sys.executable, "setup.py", "--quiet", "build_ext", "--inplace", cwd=folder, **build)
    return folder, f"{request.param}_bf16"


@pytest.mark.slow
@of_x86
@pytest.mark.parametrize("files", ["prefill prefill_bits prefill_rules", "backward backward_autograd", "block_mask",
                                   "varlen dropout skipping sdpa"])  # fmt: skip
def test_parity_in_pairs(emulated, files):
    """Every test of bfloat16, and all others of the same files."""
    folder, isa = emulated
    tests = [f"tests/parity/test_{name}.py" for name in files.split()]
    output(
        *(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests, "-k", "not every_isa"),
        cwd=folder,
        PYTHONPATH=str(folder),
        FASTATTN_CPU_ISA=isa,
    )


@needs_cpu
def test_products_are_of_pairs():
    """Weights are rounded where products are of pairs; else results equal those of the same numbers in float32."""
    q, k, v = (torch.randn(1, 2, 64, 32).bfloat16() for _ in range(3))
    exact = fastattn.attention(q.float(), k.float(), v.float(), backend="cpu").bfloat16()
    assert torch.equal(fastattn.attention(q, k, v, backend="cpu"), exact) != bool(cpu._C.pair_isa())
