"""Tiles whose code no other call takes, executed: each row of the tables, candidates of a measurement; and delta of a
rounded out. test_executed.py and test_executed_amd.py hold everything else."""

import json
from functools import cache

import process

process.require(interpreted=False)

import pytest  # noqa: E402
import torch  # noqa: E402
import triton  # noqa: E402

from accuracy import assert_gradients  # noqa: E402
from cases import Case, inputs  # noqa: E402
from emulator.device import executing  # noqa: E402
from executed import forward  # noqa: E402
from fake_device import SHARED_MEMORY  # noqa: E402
from fastattn import api, outputs  # noqa: E402
from fastattn.kernels import config, tuning  # noqa: E402
from kernel_report import arch_name  # noqa: E402

ARCHS = (80, 86, 90, 120, "gfx1100", "gfx942")
HEAD_DIMS = (64, 128, 256, 80, 96, 192)
KINDS = {  # of calls, by the tables
    "plain": {}, "masked": {"causal": True}, "learned": {"learned_scale": "per_head"},
    "learned, masked": {"learned_scale": "per_head", "causal": True}, "heavy": {"bias": "per_head"},
    "float32": {"dtype": "float32", "bias": "per_head"},
}  # fmt: skip
# The last tile of queries and of keys is not full, and the largest ones, of 128, make two rounds.
CASE = Case(num_heads=2, num_heads_k=1, seqlen_q=140, seqlen_k=170, dtype="bfloat16")
DECODING = Case(num_heads=4, num_heads_k=2, seqlen_q=1, seqlen_k=700, dtype="bfloat16")
BACKWARD, DECODE = ("prefill", "key_value", "query", "bias"), ("decode",)


@pytest.fixture(autouse=True)
def empty_is_nan():
    """Memory that nobody wrote is NaN; and tiles that a test has changed are forgotten."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
    tuning.tiles.cache_clear()


@cache
def calls_of_each_kind(case: Case) -> list:
    """(name, case, problem)"""
    found = []
    for kind, options in KINDS.items():
        for head_dim in HEAD_DIMS:
            call = case._replace(head_dim=head_dim, **options)
            (q, k, v), kwargs = inputs(call)
            found.append((f"{kind} D{head_dim}", call, api.bind(q, k, v, **kwargs).problem))
    return found


def rows_of(problem, arch, kernels: tuple[str, ...]) -> set[int]:
    """Identities of the rows that a call takes of the tables."""
    device = config.Device(arch_name(arch), SHARED_MEMORY[arch], 100)
    kernels = [name for name in kernels if name != "bias" or problem.bias != "none"]
    return {id(config._look_up(getattr(config, f"_{name.upper()}"), problem, device)) for name in kernels}


def calls(case: Case, kernels: tuple[str, ...]) -> list:
    """(case, architecture) that together take every row of an architecture: each some that those before it do not."""
    found = []
    for arch in ARCHS:
        taken: set = set()
        for name, call, problem in calls_of_each_kind(case):
            rows = rows_of(problem, arch, kernels)
            if not rows <= taken:
                found.append(pytest.param(call, arch, id=f"{name}-{arch_name(arch)}"))
            taken |= rows
    return found


def test_every_row_is_taken():
    """Of those of the architectures that are executed; what they share stands under "gfx9" and "other"."""
    found = {
        row
        for case, kernels in ((CASE, BACKWARD), (DECODING, DECODE))
        for _, _, problem in calls_of_each_kind(case)
        for arch in ARCHS
        for row in rows_of(problem, arch, kernels)
    }
    names = {*map(arch_name, ARCHS), "gfx9", "other"}
    tables = [table for kernel in tuning.TABLES for table in getattr(config, f"_{kernel.upper()}").values()]
    rows = [tiles for table in tables for name in names & table.keys() for _, tiles in table[name]]
    assert len(rows) > 50 and [tiles for tiles in rows if id(tiles) not in found] == []


@pytest.mark.slow
@pytest.mark.parametrize("case, arch", calls(CASE, BACKWARD))
def test_backward(case, arch, monkeypatch):
    forward(case, arch=arch)
    with executing(arch):
        assert_gradients(case, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("case, arch", calls(DECODING, DECODE))
def test_decode(case, arch):
    assert [launch.binary.name for launch in forward(case, arch=arch)] == ["decode_kernel", "combine_kernel"]


def change_tiles(monkeypatch, **changed) -> None:
    """Of all kernels: those of the tables, but for what is changed."""
    for name, table in tuning.TABLES.items():
        monkeypatch.setitem(tuning.TABLES, name, lambda *args, table=table: table(*args)._replace(**changed))
    tuning.tiles.cache_clear()


@pytest.mark.parametrize("arch", [80, *(pytest.param(arch, marks=pytest.mark.slow) for arch in ARCHS[1:])])
@pytest.mark.parametrize("dtype", ["bfloat16", pytest.param("float32", marks=pytest.mark.slow)])
def test_decode_by_two_warps(dtype, arch, monkeypatch):
    change_tiles(monkeypatch, num_warps=2)
    first, _ = forward(DECODING._replace(dtype=dtype), arch=arch)
    assert first.binary.metadata["num_warps"] == 2


BIASED = CASE._replace(head_dim=64, causal=True, bias="per_head", alibi=True, learned_scale="per_head")


OF_BACKWARD = pytest.param(BIASED, marks=pytest.mark.slow)


@pytest.mark.parametrize("fastest", ["first", "last"])
@pytest.mark.parametrize("case", [DECODING, OF_BACKWARD], ids=str)
def test_a_measurement(case, fastest, monkeypatch, tmp_path):
    """Each kernel with its table's tiles and with others: all results agree, whatever memory held before."""
    measured, candidates = [], tuning.candidates
    sign = 1.0 if fastest == "first" else -1.0
    monkeypatch.setenv("FASTATTN_AUTOTUNE", "1")
    monkeypatch.setenv("FASTATTN_TUNED", str(tmp_path))
    monkeypatch.setattr(tuning, "candidates", lambda *args: list(candidates(*args))[:2])
    monkeypatch.setattr(triton.testing, "do_bench", lambda call: measured.append(call) or sign * len(measured))
    if case == DECODING:
        forward(case, arch=80)
    else:
        with executing(80):
            assert_gradients(case, monkeypatch)
    (file,) = tmp_path.iterdir()
    tiles = {name.split()[0]: config.Config(**fields) for name, fields in json.loads(file.read_text()).items()}
    assert tiles.keys() == ({"decode"} if case == DECODING else {"prefill", "key_value", "query", "bias"})
    assert len(measured) == 2 * len(tiles)
    if case != DECODING:  # delta_kernel notes what blocks of as many queries see
        assert tiles["key_value"].BLOCK_M == (32 if fastest == "first" else 64)


OF_KPACK = [CASE._replace(head_dim=64), CASE._replace(dtype="float16", head_dim=128), CASE._replace(dtype="float32")]


@pytest.mark.parametrize(
    "case", [DECODING, *(pytest.param(case, marks=pytest.mark.slow) for case in OF_KPACK)], ids=str
)
def test_kpack(case, monkeypatch):
    """Two loads of a factor made one, on gfx942: other layouts of LDS."""
    change_tiles(monkeypatch, kpack=2)
    launches = forward(case, arch="gfx942")
    if case in OF_KPACK:
        with executing("gfx942") as of_backward:
            assert_gradients(case, monkeypatch)
        launches += of_backward
    width = 2 if case.dtype == "float32" else 8  # numbers of a factor that a thread reads at once
    packed = {launch.binary.name for launch in launches if f"kWidth = {width}" in launch.binary.text("ttgir")}
    assert packed == ({"decode_kernel"} if case == DECODING else {"forward_kernel", "key_value_kernel", "query_kernel"})


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHS)
def test_delta_of_the_rounded_out(arch, monkeypatch):
    """FASTATTN_ROUNDED_DELTA=1: no out in float32, and gradients by the rule all the same where values have no mean."""
    monkeypatch.setattr(outputs, "ROUNDED_DELTA", True)
    with executing(arch) as launches:
        assert_gradients(CASE, monkeypatch)
    (delta,) = [launch for launch in launches if launch.binary.name == "delta_kernel"]
    assert delta.args[0].dtype == torch.bfloat16  # out
