"""Every kernel compiled for every architecture by Triton's own compiler: what its code consists of, and what must hold.

`make kernel-report` writes golden.json anew after a change that is meant. What a figure says about speed is for the
person who reads the difference; that it fits the device, uses its matrix units and does not spill is asserted here, of
the file, all of it in seconds. `test_golden` compiles what the file says. Another Triton's code has other figures: what
must hold is asserted of what it compiles.
"""

import re

import process

process.require(interpreted=False)

import pytest  # noqa: E402
import torch  # noqa: E402
import triton  # noqa: E402
import triton.language as tl  # noqa: E402
from triton.runtime.errors import OutOfResources  # noqa: E402

import kernel_report  # noqa: E402
import launching  # noqa: E402
from fake_device import SHARED_MEMORY, fake_gpu, nothing_compiled  # noqa: E402
from fastattn.kernels import config, tuning  # noqa: E402
from kernel_report import ARCHS, MORE, SPECS, arch_name, attend, compiling_for, describe  # noqa: E402
from machine_code import analyze  # noqa: E402

MATRIX_UNIT = {
    **dict.fromkeys((80, 86, 89, 120), {"HMMA"}),
    90: {"HGMMA"},
    **dict.fromkeys((100, 103), {"UTCHMMA", "HMMA"}),
    **dict.fromkeys(("gfx90a", "gfx942", "gfx950"), {"v_mfma"}),
    **dict.fromkeys(("gfx1100", "gfx1201"), {"v_wmma"}),
}
QUICK_SPECS = {f"{name} D128 bfloat16" for name in ("prefill", "prefill causal", "decode", "block_sparse", "backward")}
QUICK_SPECS |= {"prefill D64 bfloat16"}
QUICK_ARCHS = (80, 90, 120, "gfx942")
REFUSED = {arch for arch in ARCHS if config.refusal(config.Device(arch_name(arch), 0, 1), triton.__version__)}
"""AMD's, for Triton before 3.9."""

CASES = [(arch, str(spec)) for arch, spec in kernel_report.CASES if arch not in REFUSED]
GOLDEN = kernel_report.read_golden()
IS_OF_GOLDEN = GOLDEN["triton"] == triton.__version__


def to_compile(cases) -> list:
    """`make test-triton` compiles a few of the cases, `make test-all` all."""
    quick = {(arch, spec) for arch, spec in cases if arch in QUICK_ARCHS and spec in QUICK_SPECS}
    return [pytest.param(arch, spec, marks=[] if (arch, spec) in quick else [pytest.mark.slow]) for arch, spec in cases]


def params(cases) -> list:
    """For the tests that take `kernels`."""
    return cases if IS_OF_GOLDEN else to_compile(cases)


@pytest.fixture(scope="session")
def compiled(request) -> dict:
    """What this session's tests ask for, compiled now on all cores."""
    items = [item for item in request.session.items if "compiled" in item.fixturenames]
    wanted = {(item.callspec.params["arch"], item.callspec.params["spec"]) for item in items}
    return kernel_report.compile_all([case for case in kernel_report.CASES if (case[0], str(case[1])) in wanted])


if IS_OF_GOLDEN:

    @pytest.fixture
    def kernels(arch, spec) -> dict[str, dict]:
        return GOLDEN["kernels"][arch_name(arch)][spec]

    @pytest.mark.parametrize("arch, spec", to_compile(CASES))
    def test_golden(compiled, arch, spec):
        """A difference is no failure of the kernel: read it, and if it is meant, `make kernel-report`."""
        name = arch_name(arch)
        assert differences(compiled[name][spec], GOLDEN["kernels"][name][spec]) == []

else:  # there are no figures to compare with: what must hold is asserted of what this Triton compiles

    @pytest.fixture
    def kernels(compiled, arch, spec) -> dict[str, dict]:
        return compiled[arch_name(arch)][spec]


def of_16_bits(spec: str) -> bool:
    return "float32" not in spec


def test_the_golden_file_is_of_the_triton_that_is_tested():
    """Else its figures would be compared nowhere."""
    (tested,) = re.findall(
        r"^TRITON \?= (\S+)", (kernel_report.DOCUMENT.parents[1] / "Makefile").read_text(), re.MULTILINE
    )
    assert GOLDEN["triton"] == tested


def test_the_document_shows_the_golden_file():
    text = kernel_report.table(GOLDEN)
    assert kernel_report.DOCUMENT.read_text() == kernel_report.document_with(text)


def differences(found: dict[str, dict], golden: dict[str, dict]) -> list[str]:
    """What is not as it was, a line a figure."""
    lines = []
    for name in found.keys() | golden.keys():
        new, old = found.get(name, {}), golden.get(name, {})
        lines += [
            f"{name}: {figure} was {old.get(figure)}, is {new.get(figure)}"
            for figure in old.keys() | new.keys()
            if old.get(figure) != new.get(figure)
        ]
    return sorted(lines)


LARGE_TILES = {  # whose loops with masks may spill a little: the static bound of the ones without is that much better
    90: {"backward D128 bfloat16"},
    100: {
        f"{name} D128 bfloat16" for name in ("backward", "backward causal", "backward window", "block_sparse backward")
    },
}
FEW_SPILLS = 32


def assert_no_spills(name: str, kernel: dict, is_large: bool) -> None:
    """In no loop; with a large tile, few in those with masks, and with another Triton's registers in any."""
    first, *others = [loop["spills"] for loop in kernel["loops"]] or [0]
    few = FEW_SPILLS if is_large else 0
    assert first <= (0 if IS_OF_GOLDEN else few) and max(others, default=0) <= few, name


@pytest.mark.parametrize("arch, spec", params(CASES))
def test_nothing_spills_in_a_loop(kernels, arch, spec):
    for name, kernel in kernels.items():
        assert_no_spills(name, kernel, name == "key_value_kernel" and spec in LARGE_TILES.get(arch, ()))


ALONE = (
    "nothing", "causal", "window", "intervals", "blocks", "bool mask", "scale below 0", "learned scales", "softcap",
    "bias", "bias in float32", "slopes", "sinks", "dropout",
)  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("arch", [80, 90, 120, "gfx1100"])
@pytest.mark.parametrize("kind", ALONE)
def test_nothing_spills_beside_one_modifier(kind, arch):
    """A spec has none or all of them."""
    with compiling_for(arch) as launches:
        launching.call(**launching.variants(256, 256)[kind], head_dim=128, backward=True)
    assert launches
    for name, kernel in [(launch.binary.name, describe(launch.binary)) for launch in launches]:
        assert_no_spills(name, kernel, name == "key_value_kernel" and arch in LARGE_TILES)


@pytest.mark.parametrize("arch, spec", params(CASES))
def test_shared_memory_fits(kernels, arch, spec):
    """The fake device refuses more, as a real one; this is what it was asked for."""
    assert all(kernel["shared"] <= SHARED_MEMORY[arch] for kernel in kernels.values())


SMALL_TILES = {  # of sm_90: fewer rows than the 64 that an HGMMA takes, where larger ones spill or do more besides
    *(
        (f"decode{of} D{head_dim} bfloat16", "decode_kernel")
        for of in ("", " everything", " learned scale", " blocks", " blocks everything", " pages", " pages of int8")
        for head_dim in (64, 128, 256)
    ),
    *(
        (f"backward{of} D256 bfloat16", "key_value_kernel")
        for of in ("", " causal", " everything", " window", " learned scale")
    ),
    *(("backward everything D256 bfloat16", f"query_kernel{number}") for number in ("", " 2")),
    *((f"backward everything D{head_dim} bfloat16", "bias_kernel") for head_dim in (64, 80, 96, 128, 256)),
    ("block_sparse backward everything D128 bfloat16", "bias_kernel"),
}


@pytest.mark.parametrize("arch, spec", params(CASES))
def test_products_are_of_matrix_instructions(kernels, arch, spec):
    """In every loop that there is; float32 on NVIDIA multiplies exactly, on its float32 lanes."""
    loops = [(name, loop["kind"]) for name, kernel in kernels.items() for loop in kernel["loops"]]
    assert loops
    for name, kind in loops:
        units = MATRIX_UNIT[arch] if of_16_bits(spec) else {"FFMA", "v_mfma", "v_fma", "v_dual_fma"}
        if arch == 90 and (spec, name) in SMALL_TILES:
            units = {"HMMA"}
        assert any(kind.startswith(unit) for unit in units), name


@pytest.mark.parametrize(
    "arch, spec", params([case for case in CASES if of_16_bits(case[1]) and isinstance(case[0], int)])
)
def test_loads_are_asynchronous(kernels, arch, spec):
    """cp.async or TMA in every main loop, with as many tiles in flight as there are stages less one. Where the number
    of a page is loaded before its keys, that takes a stage, too, if there is one to spare."""
    for name, kernel in kernels.items():
        if kernel["loops"] and kernel["stages"] > 1:
            of_tiles = max(2, kernel["stages"] - 1) if spec.startswith("decode pages") else kernel["stages"]
            assert kernel["loops"][0]["copies"] > 0, name
            assert kernel["depth"] >= of_tiles - 1, name


BARS = {  # least static tensor-core bound
    (80, "prefill D128 bfloat16"): 0.66,
    (90, "prefill D128 bfloat16"): 0.66,
    (120, "prefill D128 bfloat16"): 0.80,
    (80, "prefill D64 bfloat16"): 0.61,
    (90, "prefill D64 bfloat16"): 0.49,
}


@pytest.mark.parametrize("arch, spec", params(BARS))
def test_static_bound(kernels, arch, spec):
    (kernel,) = [kernel for kernel in kernels.values() if kernel["loops"]]
    assert round(kernel["bound"], 2) >= BARS[arch, spec]


TWO_WAVES = [(arch, "prefill D128 bfloat16") for arch in ("gfx942", "gfx950") if arch not in REFUSED]


@pytest.mark.parametrize("arch, spec", params(TWO_WAVES))
def test_two_waves(kernels, arch, spec):
    """512 vector registers of a SIMD: two waves have 256 each."""
    assert all(kernel["registers"] <= 256 and kernel["spills"] == 0 for kernel in kernels.values())


# --- warps of their own ----------------------------------------------------------------------------------------------


@pytest.fixture
def take(monkeypatch):
    """take(tiles): the forward kernel has these tiles, with warps of their own."""

    def take(*tiles) -> None:
        monkeypatch.setitem(tuning.TABLES, "prefill", lambda *args: config.Config(*tiles, specialize=True))
        tuning.tiles.cache_clear()

    yield take
    tuning.tiles.cache_clear()


SPECIALIZED = (
    (100, (64, 128, 4, 2), {"head_dim": 64}),
    (100, (128, 64, 8, 3), {"head_dim": 128, "kwargs": {"causal": True}}),
    (100, (128, 128, 4, 2), {"head_dim": 128, "backward": True}),
    (100, (64, 64, 4, 2), {"head_dim": 256, "dtype": torch.float16}),
    (103, (128, 64, 8, 3), {"head_dim": 128}),
)


@pytest.mark.parametrize(
    "arch, tiles, call", [SPECIALIZED[0], *(pytest.param(*row, marks=pytest.mark.slow) for row in SPECIALIZED[1:])]
)
def test_warps_of_their_own(take, arch, tiles, call):
    """A candidate of measurements: two warps load, one multiplies, some rescale the sums, the others do the rest."""
    take(*tiles)
    with compiling_for(arch) as launches:
        launching.call(**call)
    binary = launches[0].binary
    code, ptx, num_warps = binary.text("ttgir"), binary.text("ptx"), binary.metadata["num_warps"]
    assert code.count("ttg.warp_specialize(") == 1 and "partition2(" in code and "setmaxnreg" in ptx
    assert tiles[2] + 4 < num_warps <= 32 and f".reqntid {32 * num_warps}\n" in ptx
    assert describe(binary)["shared"] <= SHARED_MEMORY[arch]


@pytest.mark.parametrize("call, expected", [({}, True), ({"offset": 1}, False), ({"head_dim": 192}, False)])
def test_warps_of_their_own_need_descriptors(take, call, expected):
    """What was measured with them serves calls without as well."""
    take(64, 64, 4, 2)
    with compiling_for(100), nothing_compiled() as launched:
        launching.call(**call)
    ((name, _, _, args),) = launched
    assert name == "forward_kernel" and args[-1] is expected  # SPECIALIZE


# --- mistakes that must be caught ------------------------------------------------------------------------------------


@triton.jit
def product(x, y, out, n, N: tl.constexpr, D: tl.constexpr, MATRIX: tl.constexpr):
    i, d = tl.arange(0, N), tl.arange(0, D)
    acc = tl.zeros([N, N], tl.float32)
    for k in tl.range(0, n, D):
        a = tl.load(x + i[:, None] * n + k + d[None, :])
        b = tl.load(y + i[None, :] * n + k + d[:, None])
        if MATRIX:
            acc = tl.dot(a, b, acc)
        else:
            acc += tl.sum(a.to(tl.float32)[:, :, None] * b.to(tl.float32)[None, :, :], 1)
    tl.store(out + i[:, None] * N + i[None, :], acc)


def compile_product(arch, N, D, MATRIX=True, **options) -> dict:
    x, out = torch.empty(N, 4096, dtype=torch.bfloat16, device="meta"), torch.empty(N, N, device="meta")
    with fake_gpu(arch) as launches:
        product[(1,)](x, x, out, 4096, N, D, MATRIX, enable_fp_fusion=True, **options)
    (launch,) = launches
    assert launch.grid == (1, 1, 1)
    return describe(launch.binary)


@pytest.mark.parametrize("arch, unit", [(80, "HMMA"), (90, "HGMMA"), (100, "UTCHMMA"), ("gfx942", "v_mfma")])
def test_a_good_loop_is_seen(arch, unit):
    kernel = compile_product(arch, 128, 64, num_warps=8, num_stages=3)
    (loop,) = kernel["loops"]
    assert loop["kind"].startswith(unit) and loop["spills"] == 0
    if isinstance(arch, int):
        assert loop["copies"] > 0 and kernel["depth"] >= 2


def test_spills_are_seen():
    """A tile of 256 x 256 floats has no room in the registers of four warps."""
    kernel = compile_product(80, 256, 32, num_warps=4, num_stages=2)
    assert kernel["spills"] > 0 and any(loop["spills"] for loop in kernel["loops"])


@pytest.mark.skipif(triton.__version__.startswith("3.7."), reason="Triton 3.7 makes a matrix product of these sums")
def test_products_without_matrix_instructions_are_seen():
    """Sums of float32 products, as the kernels for float32 have them: a loop like any other."""
    kernel = compile_product(80, 64, 16, MATRIX=False, num_warps=4)
    assert kernel["matrix"] == 0 and {loop["kind"] for loop in kernel["loops"]} == {"FFMA"} and kernel["bound"] is None


def test_synchronous_loads_are_seen():
    kernel = compile_product(80, 128, 64, num_warps=8, num_stages=1)
    assert kernel["loops"][0]["copies"] == 0 and kernel["depth"] == 0


def test_too_much_shared_memory_is_refused():
    assert SHARED_MEMORY[86] < compile_product(90, 128, 128, num_warps=8, num_stages=3)["shared"] <= SHARED_MEMORY[90]
    with pytest.raises(OutOfResources, match="shared memory"):
        compile_product(86, 128, 128, num_warps=8, num_stages=3)


def test_the_limits_are_those_of_the_kernels():
    """Two lists, one here and one in the package, were written down apart."""
    assert {name: config.SMEM.get(name) for name in map(arch_name, SHARED_MEMORY) if name in config.SMEM} == {
        arch_name(arch): size for arch, size in SHARED_MEMORY.items() if arch_name(arch) in config.SMEM
    }


TABLES = {name: getattr(config, f"_{name.upper()}") for name in tuning.TABLES}


def test_every_architecture_of_a_table_is_compiled_for():
    named = {name for tables in TABLES.values() for table in tables.values() for name in table} | set(config.SMEM)
    same = {"sm_87", "sm_110", "sm_121"}  # built as sm_80, sm_100 and sm_120 are
    assert named - same - {"gfx9", "other"} <= set(map(arch_name, ARCHS))


@pytest.mark.skipif(bool(REFUSED), reason="needs a Triton that compiles for all of them")
def test_every_entry_of_a_table_is_compiled(monkeypatch):
    """Some spec takes it: no tiles that nobody has seen compiled."""
    entries = {
        id(tiles): f"{kernel} {kind}, {arch}, head_dim {head_dim}"
        for kernel, tables in TABLES.items()
        for kind, table in tables.items()
        for arch, rows in table.items()
        for head_dim, tiles in rows
    }
    look_up, taken = config._look_up, set()

    def note(*args):
        tiles = look_up(*args)
        taken.add(id(tiles))
        return tiles

    monkeypatch.setattr(config, "_look_up", note)
    for arch, specs in ARCHS.items():
        tuning.tiles.cache_clear()
        with compiling_for(arch), nothing_compiled():
            for spec in specs:
                attend(spec)
    assert len(entries) > 50 and {entry for number, entry in entries.items() if number not in taken} == set()


def test_the_analysis_reads_a_kernel_without_loops():
    @triton.jit
    def copy(x, y):
        i = tl.arange(0, 128)
        tl.store(y + i, tl.load(x + i))

    x = torch.empty(128, device="meta")
    for arch in (80, "gfx942"):
        with fake_gpu(arch) as launches:
            copy[(1,)](x, x, enable_fp_fusion=True)
        code = analyze(launches[0].binary)
        assert code.registers > 0 and code.loops == () and code.matrix == 0


def test_specs_are_told_apart():
    assert len({str(spec) for spec in SPECS + MORE}) == len(SPECS + MORE)
