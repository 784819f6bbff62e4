"""What is built and shipped: the extension's dependencies, symbols and instructions; sdist, wheel and installs."""

import json
import os
import re
import shutil
import sys
import sysconfig
import tarfile
import time
import venv
import zipfile
from pathlib import Path

import pytest

import fastattn
from building import ROOT, compile_kernels, compiler, output, run, setup, tool
from fastattn.backends import cpu

TORCH_SYMBOL = re.compile(r"\b(c10|at|torch|caffe2)::|\bTHP")


ISAS = setup.isa_flags(setup.machine())


@pytest.fixture(scope="module")
def extension() -> Path:
    if cpu.unavailable():
        compiler()
        pytest.fail(f"{cpu.unavailable()} (python setup.py build_ext --inplace)")
    return Path(cpu._C.__file__)


@pytest.fixture(scope="module")
def kernel_objects(tmp_path_factory) -> dict[str, list[Path]]:
    """ISA -> its compiled kernels: the libraries of the last build, or compiled here where they are absent or older."""
    newest = max(path.stat().st_mtime for path in [ROOT / "setup.py", *ROOT.glob("csrc/**/*.*")])
    objects, folder = {}, tmp_path_factory.mktemp("objects")
    for isa in ISAS:
        built = [p for p in ROOT.glob(f"build/temp.*/libfastattn_{isa}_*.a") if p.stat().st_mtime > newest]
        objects[isa] = built if len(built) == len(setup.REALS) else compile_kernels(folder, compiler(), isa, "-fPIC")
    return objects


# The build


def test_flags():
    for target in ("x86_64", "aarch64", "riscv64"):
        headers = []
        flags = [flag for isa in setup.isa_flags(target).values() for flag in isa]
        flags += setup.extension(target, headers).extra_compile_args
        assert not {"-ffast-math", "-Ofast", "-march=native", "-mcpu=native"} & set(flags)
        assert [name for name, _ in setup.libraries(target, headers)][0] == "fastattn_scalar_float"
    assert list(setup.isa_flags("x86_64")) == ["scalar", "avx2", "avx512"]
    assert list(setup.isa_flags("aarch64")) == ["scalar", "neon"]
    assert not any(flag.startswith("-mavx") for flag in setup.extension("x86_64", []).extra_compile_args)


def test_flags_of_an_isa_stand_in_setup_only():
    for name in ("Makefile", "pyproject.toml", ".ci/run"):
        assert not re.search(r"-m(avx|fma|f16c|arch|cpu)", (ROOT / name).read_text()), name


def test_every_isa_has_a_source_and_a_switch():
    macros = {name for name, _ in setup.extension(setup.machine(), []).define_macros}
    assert macros == {f"FASTATTN_HAVE_{isa.upper()}" for isa in ISAS}
    for flags in setup.ISA_FLAGS.values():
        for isa in flags:
            assert (ROOT / f"csrc/isa_{isa}.cpp").exists()


# The extension


def test_extension_links_no_torch(extension):
    needed = set(re.findall(r"NEEDED.*\[(.*)\]", output(tool("readelf"), "-d", extension)))
    needed = {name for name in needed if not name.startswith(("ld-linux", "libpthread", "libdl"))}
    assert needed <= {"libgcc_s.so.1", "libc.so.6", "libm.so.6"}


def test_extension_has_no_torch_symbols(extension):
    symbols = output(tool("nm"), "-D", "-C", extension)
    assert [line for line in symbols.splitlines() if TORCH_SYMBOL.search(line)] == []


def test_extension_runs_on_an_old_glibc(extension):
    """manylinux_2_28: no symbol of glibc is newer."""
    versions = re.findall(r"@GLIBC_([\d.]+)", output(tool("nm"), "-D", "--with-symbol-versions", extension))
    assert versions and max(tuple(map(int, version.split("."))) for version in versions) <= (2, 28)


def test_extension_exports_its_module_alone(extension):
    symbols = output(tool("nm"), "-D", "-C", "--defined-only", extension)
    assert [line.split()[-1] for line in symbols.splitlines()] == ["PyInit__C"]


def test_extension_is_hardened(extension):
    text = output(tool("readelf"), "-W", "-d", "-l", extension)
    assert "BIND_NOW" in text or re.search(r"FLAGS.*NOW", text)
    assert "GNU_RELRO" in text
    assert re.search(r"GNU_STACK.*", text).group().split()[-2] == "RW"


# The kernels of one ISA must not run on a CPU without it


@pytest.mark.parametrize("isa", ISAS)
def test_weak_symbols_carry_the_isa(kernel_objects, isa):
    """Of equal weak symbols the linker keeps any: one that was compiled for AVX-512 may serve every CPU."""
    lines = output(tool("nm"), "--defined-only", *kernel_objects[isa]).splitlines()
    symbols = [line.split()[-2:] for line in lines if len(line.split()) == 3]
    assert symbols
    assert [name for kind, name in symbols if kind in "WVu" and f"8fastattn{len(isa)}{isa}" not in name] == []


@pytest.mark.parametrize("isa", ISAS)
def test_kernels_call_into_c_alone(kernel_objects, isa):
    lines = output(tool("nm"), "--undefined-only", *kernel_objects[isa]).splitlines()
    names = [line.split()[-1] for line in lines if len(line.split()) == 2]
    assert [name for name in names if name.startswith("_Z") and "fastattn" not in name] == []


@pytest.mark.parametrize("isa", ISAS)
def test_registers(kernel_objects, isa):
    if setup.machine() != "x86_64":
        pytest.skip("the registers of x86")
    code = output(tool("objdump"), "-d", "--no-show-raw-insn", *kernel_objects[isa])
    assert ("%zmm" in code, "%ymm" in code) == {
        "scalar": (False, False), "avx2": (False, True), "avx512": (True, True),
    }[isa]  # fmt: skip


@pytest.mark.parametrize("isa", ISAS)
def test_multiply_adds(kernel_objects, isa):
    """The products are fused multiply-adds on whole vectors; the baseline must have none."""
    if setup.machine() != "x86_64":
        pytest.skip("the registers of x86")
    code = output(tool("objdump"), "-d", "--no-show-raw-insn", *kernel_objects[isa])
    register = {"scalar": "", "avx2": "%ymm", "avx512": "%zmm"}[isa]
    count = len(re.findall(rf"vfmadd\w+p[sd] .*{register}", code))
    assert count == 0 if isa == "scalar" else count > 300


def test_only_the_kernels_need_a_newer_cpu(extension):
    """Outside of fastattn::avx2 and fastattn::avx512 the extension has no AVX instruction."""
    if setup.machine() != "x86_64":
        pytest.skip("the registers of x86")
    code = output(tool("objdump"), "-d", "--no-show-raw-insn", extension)
    functions = re.findall(r"^[0-9a-f]+ <(.*?)>:\n(.*?)(?:\n\n|\Z)", code, re.M | re.S)
    guilty = {name for name, body in functions if re.search(r"%[yz]mm|\tv[a-z0-9]+ +.*%xmm", body)}
    assert guilty
    assert [name for name in guilty if not re.search(r"8fastattn(4avx2|6avx512)", name)] == []


# What is shipped


def outside(tmp_path: Path) -> dict[str, str]:
    """Environment of a build that must need no network and no torch: importing torch raises there."""
    (tmp_path / "torch.py").write_text("raise ImportError('the build imports torch')\n")
    nowhere = "http://127.0.0.1:9"
    return {
        "PYTHONPATH": str(tmp_path),
        "PIP_NO_INDEX": "1",
        "PIP_NO_CACHE_DIR": "1",
        **dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), nowhere),
    }


PIP = (sys.executable, "-m", "pip", "--disable-pip-version-check")
WHEEL = (*PIP, "wheel", "--no-deps", "--no-build-isolation", "-v", "-w")


@pytest.fixture(scope="module")
def sdist(tmp_path_factory) -> Path:
    """FASTATTN_DIST is a folder with the sdist and the wheel to test; without it they are built."""
    folder = Path(os.environ.get("FASTATTN_DIST") or tmp_path_factory.mktemp("sdist")).resolve()
    if not list(folder.glob("fastattn-*.tar.gz")):
        base = tmp_path_factory.mktemp("egg")
        output(sys.executable, "setup.py", "-q", "egg_info", "--egg-base", base, "sdist", "-d", folder, cwd=ROOT)
    return next(folder.glob("fastattn-*.tar.gz"))


@pytest.fixture(scope="module")
def source(sdist, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("source")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
    return next(folder.iterdir())


@pytest.fixture(scope="module")
def wheel(sdist, tmp_path_factory) -> Path:
    built = list(sdist.parent.glob("fastattn-*.whl"))
    if built:
        return built[0]
    compiler()
    folder = tmp_path_factory.mktemp("wheel")
    before = os.times()
    output(*WHEEL, folder, sdist, FASTATTN_BUILD_EXT="1", **outside(tmp_path_factory.mktemp("outside")))
    after = os.times()  # CPU time: other work on the machine may take half of the clock's
    took = after.children_user - before.children_user + after.children_system - before.children_system
    assert took < 2 * 90, f"a build must take less than 180 s of CPU time, 90 s on two cores, not {took:.0f} s"
    return next(folder.glob("*.whl"))


@pytest.mark.slow
def test_sdist_is_complete(sdist):
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    for folder in ("csrc", "kernels", "tests", "bench", "examples", "docs"):
        files = [path for path in (ROOT / folder).rglob("*") if path.suffix in (".py", ".h", ".cpp", ".md")]
        assert {path.relative_to(ROOT).as_posix() for path in files} <= names
    assert {"setup.py", "pyproject.toml", "Makefile", "constraints.txt", "LICENSE"} <= names
    assert [name for name in names if name.endswith((".so", ".pyc", ".o", "_build_error.txt"))] == []


@pytest.mark.slow
def test_wheel_holds_the_package_alone(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (info,) = {name.split("/")[0] for name in names} - {"fastattn"}
        top_level = archive.read(f"{info}/top_level.txt").decode().split()
        metadata = archive.read(f"{info}/METADATA").decode()
    assert info == f"fastattn-{fastattn.__version__}.dist-info"
    assert top_level == ["fastattn"]
    requirements = re.findall(r"^Requires-Dist: (.*)", metadata, re.M)
    assert [line for line in requirements if "extra ==" not in line] == ["torch>=2.4"]
    modules = {path.relative_to(ROOT).as_posix() for path in (ROOT / "fastattn").rglob("*.py")}
    modules |= {f"fastattn/{path.relative_to(ROOT).as_posix()}" for path in (ROOT / "kernels").rglob("*.py")}
    assert {name for name in names if name.endswith(".py")} == modules
    others = [
        name
        for name in names
        if name.startswith("fastattn/") and not name.endswith((".py", ".pyi", ".typed", ".json", ".html"))
    ]
    assert others == ["fastattn/_C" + sysconfig.get_config_var("EXT_SUFFIX")]


@pytest.mark.slow
def test_wheel_links_no_torch(wheel, tmp_path):
    with zipfile.ZipFile(wheel) as archive:
        extension = archive.extract("fastattn/_C" + sysconfig.get_config_var("EXT_SUFFIX"), tmp_path)
    test_extension_links_no_torch(extension)
    test_extension_has_no_torch_symbols(extension)
    test_extension_runs_on_an_old_glibc(extension)
    test_extension_exports_its_module_alone(extension)
    test_extension_is_hardened(extension)


@pytest.mark.slow
def test_wheel_lists_what_is_in_it(wheel):
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if "/sboms/" in name)
        bill = json.loads(archive.read(name))
    assert name.endswith(".dist-info/sboms/fastattn.cdx.json") and bill["bomFormat"] == "CycloneDX"
    assert bill["metadata"]["component"]["version"] == fastattn.__version__
    assert [part["name"] for part in bill["components"]] == ["pybind11", "libstdc++"]
    assert all(re.fullmatch(r"[\d.]+", part["version"]) for part in bill["components"])


@pytest.mark.slow
def test_auditwheel_is_content(wheel):
    pytest.importorskip("auditwheel")
    text = output(sys.executable, "-m", "auditwheel", "show", wheel)
    oldest = re.search(rf'"manylinux_2_(\d+)_{setup.machine()}"', text)
    assert oldest and int(oldest[1]) <= 28, text
    assert "libgomp" not in text and "libstdc++" not in text


def make_venv(folder: Path) -> Path:
    """Python of an empty environment that borrows this one's packages (torch, setuptools), but not fastattn."""
    venv.create(folder)
    python = folder / "bin/python"
    packages = output(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip()
    lender = Path(sysconfig.get_path("purelib"))
    # a .pth line puts a folder on sys.path without running the .pth files in it: no editable install comes along
    Path(packages, "lender.pth").write_text(f"{lender}\n")
    found = output(python, "-c", "from importlib.util import find_spec; print(find_spec('fastattn'))", cwd=folder)
    if found.strip() != "None":
        pytest.skip("fastattn is installed beside torch, not in editable mode")
    return python


SMOKE = """
import torch, fastattn
q, k, v = torch.randn(3, 2, 4, 33, 24).unbind()
out = fastattn.attention(q, k, v, causal=True, backend="cpu")
torch.testing.assert_close(out, fastattn.attention(q, k, v, causal=True, backend="reference"))
print(fastattn.__file__)
"""


@pytest.mark.slow
def test_wheel_installs_offline(wheel, tmp_path):
    python = make_venv(tmp_path / "venv")
    (tmp_path / "outside").mkdir()
    install = ("--python", python, "install", "-q", "--no-index", "--no-deps", wheel)
    output(*PIP, *install, **outside(tmp_path / "outside"))
    assert str(tmp_path / "venv") in output(python, "-c", SMOKE, cwd=tmp_path)


def build_without_compiler(sdist, folder, mode):
    (folder / "outside").mkdir()
    env = outside(folder / "outside")
    return run(*WHEEL, folder, sdist, CXX="/bin/false", FASTATTN_BUILD_EXT=mode, **env)


def reason(python, folder, **env) -> str:
    code = "import torch, fastattn; print(fastattn.explain(*torch.randn(3, 1, 1, 4, 8).unbind()))"
    return output(python, "-c", code, cwd=folder, **env)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["auto", "0"])
def test_without_compiler(sdist, tmp_path, mode):
    result = build_without_compiler(sdist, tmp_path, mode)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "WITHOUT its CPU kernels" in result.stdout + result.stderr
    (built,) = tmp_path.glob("*.whl")
    assert built.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(built) as archive:
        assert [name for name in archive.namelist() if name.endswith(".so")] == []
        archive.extractall(tmp_path / "site")
    why = "FASTATTN_BUILD_EXT=0" if mode == "0" else "/bin/false"
    python = make_venv(tmp_path / "venv")
    assert re.search(f"kernels are missing .*{why}", reason(python, tmp_path, PYTHONPATH=str(tmp_path / "site")))


@pytest.mark.slow
def test_without_compiler_is_an_error_on_demand(sdist, tmp_path):
    result = build_without_compiler(sdist, tmp_path, "1")
    assert result.returncode != 0
    assert "/bin/false" in result.stdout + result.stderr


@pytest.mark.slow
def test_unknown_build_mode():
    result = run(sys.executable, "setup.py", "--version", cwd=ROOT, FASTATTN_BUILD_EXT="yes")
    assert result.returncode != 0
    assert "FASTATTN_BUILD_EXT='yes' must be auto, 1 or 0" in result.stderr


# Small sources in place of csrc/: these tests are about the build, not about the kernels

BINDINGS = """
#include <pybind11/pybind11.h>
#include "number.h"
PYBIND11_MODULE(_C, m) {
  m.attr("number") = NUMBER;
  m.def("isa", [] { return "scalar"; });
  for (const char* name : {"bind_fields", "signature", "shapes"})
    m.def(name, [](pybind11::args) { return pybind11::none(); });
}
"""


@pytest.fixture
def small_source(source, tmp_path) -> Path:
    tree = shutil.copytree(source, tmp_path / "tree")
    shutil.rmtree(tree / "csrc")
    (tree / "csrc").mkdir()
    shutil.copy(source / "csrc/exports.map", tree / "csrc")
    (tree / "csrc/number.h").write_text("#define NUMBER 1\n")
    (tree / "csrc/bindings.cpp").write_text(BINDINGS)
    (tree / "kernels/algorithm.py").touch()
    for isa in ISAS:
        (tree / f"csrc/isa_{isa}.cpp").write_text(f"int fastattn_{isa}() {{ return 0; }}\n")
    return tree


@pytest.mark.slow
def test_the_same_bytes_in_another_folder(small_source, tmp_path):
    """sdist and wheel, with another umask, at another time. The kernels are small, their flags those of all."""
    made = []
    for number, umask in ((1, 0o022), (2, 0o077)):
        tree = shutil.copytree(small_source, tmp_path / f"folder{number}" / ("x" * number))
        for path in tree.rglob("*"):
            os.utime(path, (number * 10**9, number * 10**9))
        dist, before = tmp_path / f"dist{number}", os.umask(umask)
        try:
            environment = {"SOURCE_DATE_EPOCH": "1700000000", "FASTATTN_BUILD_EXT": "1", "CXX": compiler()}
            to = ("-d", dist)
            output(sys.executable, "setup.py", "-q", "sdist", *to, "bdist_wheel", *to, cwd=tree, **environment)
        finally:
            os.umask(before)
        made.append({path.name: path.read_bytes() for path in dist.iterdir()})
    assert len(made[0]) == 2 and made[0] == made[1]


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["lenient", "strict"])
@pytest.mark.parametrize("cxx", [None, "/bin/false"])
def test_editable_install(small_source, tmp_path, mode, cxx):
    if cxx is None:
        cxx = compiler()
    (tmp_path / "outside").mkdir()
    python = make_venv(tmp_path / "venv")
    install = ("--python", python, "install", "-q", "--no-index", "--no-deps", "--no-build-isolation")
    strict = ("--config-settings", f"editable_mode={mode}")
    output(*PIP, *install, *strict, "-e", small_source, CXX=cxx, **outside(tmp_path / "outside"))
    code = "import fastattn.kernels.algorithm, fastattn.backends.cpu as c; print(c.__file__, c._C and c._C.number)"
    path, number = output(python, "-c", code, cwd=tmp_path).split()
    assert small_source in Path(path).resolve().parents
    if cxx == "/bin/false":
        assert number == "None"
        assert "kernels are missing" in reason(python, tmp_path)
    else:
        assert number == "1"


@pytest.mark.slow
def test_a_header_edit_rebuilds_and_a_failure_leaves_nothing_stale(small_source, tmp_path):
    python = make_venv(tmp_path / "venv")

    def number():
        code = "import torch, fastattn.backends.cpu as c; print(c._C and c._C.number, c.unavailable())"
        return output(python, "-c", code, cwd=small_source)

    def build(cxx):
        return output(sys.executable, "setup.py", "build_ext", "--inplace", cwd=small_source, CXX=cxx)

    build(compiler())
    assert number().startswith("1 None")
    before = {path: path.stat().st_mtime_ns for path in small_source.glob("build/temp.*/**/*.o")}
    time.sleep(0.02)
    (small_source / "csrc/number.h").write_text("#define NUMBER 2\n")
    build(compiler())
    assert number().startswith("2 None")
    assert all(path.stat().st_mtime_ns > stamp for path, stamp in before.items())
    assert len(before) == 1 + len(ISAS) * len(setup.REALS)
    time.sleep(0.02)
    (small_source / "csrc/number.h").write_text("#define NUMBER 3\n")
    build("/bin/false")
    assert number().startswith("None") and "/bin/false" in number()
    build(compiler())
    assert number().startswith("3 None")
