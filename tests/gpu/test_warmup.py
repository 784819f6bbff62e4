"""`python -m fastattn warmup` and measured tiles, on a device that compiles and runs nothing."""

import json
import os
import subprocess
import sys
from pathlib import Path

import process

process.require(interpreted=False)

import pytest  # noqa: E402
import torch  # noqa: E402
import triton  # noqa: E402
from triton import knobs  # noqa: E402

import fastattn  # noqa: E402
from fake_device import Specialized, nothing_compiled  # noqa: E402
from fastattn import cli  # noqa: E402
from fastattn.backends import triton as gpu  # noqa: E402
from fastattn.cli import warmup  # noqa: E402
from fastattn.kernels import backward, config, launch, tuning  # noqa: E402
from kernel_report import compiling_for  # noqa: E402

ROOT = Path(fastattn.__file__).parents[1]
SHAPE = "1,4,2,64,96,32"
FILE = f"fake-triton-{triton.__version__}.json"
BACKWARD = ["forward_kernel", "delta_kernel", "key_value_kernel", "query_kernel"]


@pytest.fixture
def device(monkeypatch, tmp_path):
    """A fake sm_90, its own folder of tuned tiles, and the command line believing that there is a device."""
    monkeypatch.setattr(warmup, "DEVICE", "meta")
    monkeypatch.setattr(gpu, "unavailable", lambda: None)
    monkeypatch.setenv("FASTATTN_TUNED", str(tmp_path / "tuned"))
    monkeypatch.setenv("FASTATTN_AUTOTUNE", "0")  # --tune sets it, for a process that ends then
    clear_caches()
    with compiling_for(90) as launches:
        yield launches
    clear_caches()


def clear_caches():
    tuning._read.cache_clear(), tuning._warn.cache_clear(), tuning.tiles.cache_clear(), launch.forget()


def names(launches) -> list[str]:
    return [launch.binary.name for launch in launches]


@pytest.mark.parametrize("arguments, expected", [([], ["forward_kernel"]), (["--backward"], BACKWARD)])
def test_a_process_that_comes_later_compiles_nothing(device, arguments, expected, monkeypatch, tmp_path, capsys):
    """For other lengths and another batch: what is compiled is in Triton's cache."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    hits = []
    monkeypatch.setattr(knobs.compilation, "listener", lambda *, cache_hit, **others: hits.append(cache_hit))
    assert cli.main(["warmup", SHAPE, "--causal", "0", *arguments]) == 0
    assert names(device) == expected and hits == [False] * len(expected)
    assert "1,4,2,64,96,32 bfloat16: 100%" in capsys.readouterr().err
    hits.clear(), launch.forget()
    with compiling_for(90) as later:
        cli.main(["warmup", "3,4,2,200,70,32", "--causal", "0", *arguments])
    assert names(later) == expected and hits == [True] * len(expected)


def test_every_combination_is_called(device, capsys):
    with nothing_compiled() as launched:
        assert cli.main(["warmup", SHAPE, "1,4,4,1,4096,64", "--dtype", "bfloat16", "float16"]) == 0
    kernels = ["forward_kernel"] * 4 + ["decode_kernel", "combine_kernel"] * 4
    assert [name for name, *_ in launched] == kernels
    assert len(set(map(str, launched))) == len(kernels) - 2  # `combine` does not care about causal
    assert "8/8" in capsys.readouterr().err


@pytest.mark.parametrize(
    "shape, message",
    [("1,4,3,64,64,32", "num_heads"), ("1,4,2,64,64,300", "head_dim=300"), ("1,4,2,64,64", "must be six numbers")],
)
def test_a_shape_that_no_kernel_takes(device, shape, message, capsys):
    try:
        assert cli.main(["warmup", shape]) == 1
    except SystemExit as refused:  # argparse's
        assert refused.code == 2
    assert message in capsys.readouterr().err and device == []


def run_command(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]), **environment}
    return subprocess.run(
        [sys.executable, "-m", "fastattn", *arguments], capture_output=True, text=True, env=environment
    )  # fmt: skip


def test_the_command_line():
    """In processes of their own: without a device it says so, in the interpreter it runs."""
    if not torch.cuda.is_available():
        refused = run_command("warmup", SHAPE)
        assert refused.returncode == 1 and refused.stderr.startswith("python -m fastattn warmup: there is no CUDA")
    done = run_command("warmup", "1,2,1,3,5,16", "--dtype", "float32", TRITON_INTERPRET="1")
    assert done.returncode == 0 and "2/2" in done.stderr


# --- tuning ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def times(monkeypatch) -> list:
    """In place of a measurement: the later a candidate comes, up to the fifth, the faster it is."""
    measured = []

    def do_bench(call):
        call()
        measured.append(call)
        return abs(len(measured) - 5.0)

    monkeypatch.setattr(triton.testing, "do_bench", do_bench)
    return measured


def problem_of(head_dim=32) -> fastattn.problem.Problem:
    """Inside `compiling_for`."""
    x = torch.empty(1, 2, 64, head_dim, dtype=torch.bfloat16, device="meta")
    with fastattn.record() as calls, nothing_compiled():
        fastattn.attention(x, x, x, backend="triton")
    return calls[0].problem


def test_a_sweep_is_remembered(device, times, tmp_path, monkeypatch):
    """The best of all candidates is written, read again by a process that comes later, and launched."""
    candidates = list(tuning.candidates("prefill", problem_of(), launch.device_facts(0)))
    assert len(set(candidates)) == len(candidates) > 10
    with nothing_compiled() as launched:
        assert cli.main(["warmup", SHAPE, "--causal", "0", "--tune"]) == 0
        assert len(times) == len(candidates) and len(launched) == 2 * len(candidates) + 1
    (file,) = (tmp_path / "tuned").iterdir()
    assert file.name == FILE
    assert json.loads(file.read_text()) == {"prefill bfloat16 D32 none": candidates[4]._asdict()}
    clear_caches()
    monkeypatch.setenv("FASTATTN_AUTOTUNE", "0")
    with nothing_compiled() as launched:
        cli.main(["warmup", "2,4,2,512,512,32", "--causal", "0"])
    ((_, key, grid, _),) = launched
    assert len(times) == len(candidates)  # nothing was measured again
    assert grid[0] == 2 * 4 * -(-512 // candidates[4].BLOCK_M)
    for option in ("num_warps", "num_stages"):
        assert f"'{option}': {getattr(candidates[4], option)}," in key
    assert tuning.tiles("prefill", problem_of(), launch.device_facts(0)) == candidates[4]
    assert tuning.tiles("prefill", problem_of(64), launch.device_facts(0)) == config.prefill(
        problem_of(64), launch.device_facts(0)
    )


def test_a_sweep_adds_to_the_file(device, times, tmp_path):
    with nothing_compiled():
        cli.main(["warmup", SHAPE, "1,4,2,1,512,32", "--causal", "0", "--tune", "--backward"])
    found = json.loads((tmp_path / "tuned" / FILE).read_text())
    assert {name.split()[0] for name in found} == {"prefill", "key_value", "query"}
    assert len(found) == 3 and all(config.Config(**fields) for fields in found.values())
    first = len(times)
    with nothing_compiled():
        cli.main(["warmup", "1,4,2,1,512,32", "--causal", "0", "--tune"])
        assert len(times) > first
        measured = len(times)
        launch.forget()
        cli.main(["warmup", SHAPE, "1,4,2,1,512,32", "--causal", "0", "--tune"])
    assert len(times) == measured  # what is in the file is not measured again
    assert json.loads((tmp_path / "tuned" / FILE).read_text()).keys() == found.keys() | {
        "decode bfloat16 D32 none 2x1 rows"
    }


@pytest.mark.parametrize("fastest", [32, 64])
def test_bounds_are_those_of_each_candidate(device, fastest, tmp_path, monkeypatch):
    """key_value_kernel takes what delta_kernel has noted of blocks of its tiles' queries, also of the best ones."""
    noted, seen = [], []
    place = backward.key_value_kernel.arg_names.index("BLOCK_M")

    def run(self, x, y, z, stream, function, metadata, of_launch, before, after, *args):
        if self.name == "delta_kernel":
            noted.append(64 * 4 // x)  # queries of four heads, over programs
        elif self.name == "key_value_kernel":
            seen.append((noted[-1], args[place]))

    def do_bench(call):
        call()
        return float(bool(seen) and seen[-1] != (fastest, fastest))

    monkeypatch.setattr(Specialized, "run", run)
    monkeypatch.setattr(triton.testing, "do_bench", do_bench)
    with nothing_compiled():
        cli.main(["warmup", "1,4,2,64,96,128", "--causal", "1", "--tune", "--backward"])
    assert set(seen) == {(32, 32), (64, 64)} and seen[-1] == (fastest, fastest)
    found = json.loads((tmp_path / "tuned" / FILE).read_text())
    assert found["key_value bfloat16 D128 causal"]["BLOCK_M"] == fastest


def test_what_does_not_fit_is_not_chosen(device, monkeypatch):
    """Compiled for real, with more shared memory than the device has."""
    too_large, fits = config.Config(128, 128, 8, 5), config.Config(64, 32, 4, 1)
    monkeypatch.setattr(tuning, "candidates", lambda *args: iter((fits, too_large)))
    monkeypatch.setattr(triton.testing, "do_bench", lambda call: call() or 1.0)
    assert cli.main(["warmup", "1,2,2,256,256,128", "--causal", "0", "--tune"]) == 0
    assert [launch.binary.metadata["num_warps"] for launch in device] == [fits.num_warps] * 3  # tried, timed, called


def test_candidates_fit(device):
    small = config.Device("sm_86", config.SMEM["sm_86"], 80, "small")
    for kernel in tuning.TABLES:
        for problem in (problem_of(128), problem_of(256)):
            first, *others = tuning.candidates(kernel, problem, small)
            assert first == tuning.TABLES[kernel](problem, small) and first not in others
            assert all(config.shared_memory(tiles, problem) <= small.smem for tiles in others)


def test_candidates_of_one_architecture(device):
    """kpack on CDNA, two warps for decoding; the compiler is told of them there alone."""
    problem = problem_of(128)

    def of(kernel, arch, smem=227 * 1024):
        return list(tuning.candidates(kernel, problem, config.Device(arch, smem, 100)))

    assert {tiles.kpack for tiles in of("query", "gfx942", 64 * 1024)} == {1, 2}
    assert {tiles.kpack for tiles in of("query", "gfx950", 160 * 1024)} == {1}
    assert {tiles.num_warps for tiles in of("decode", "sm_80")} == {2, 4, 8}
    two = config.Config(64, 64, 4, 1, kpack=2)
    assert two.options(config.Device("gfx942", 0, 1))["kpack"] == 2
    assert "kpack" not in two.options(config.Device("gfx950", 0, 1)) | two.options(config.Device("sm_90", 0, 1))


def test_candidates_with_warps_of_their_own(device, tmp_path):
    """Forward alone, where Triton makes them and there is a loop without masks; read again from the file."""
    plain = problem_of(128)

    def of(kernel, arch, **changes):
        facts = config.Device(arch, 227 * 1024, 148)
        return [tiles for tiles in tuning.candidates(kernel, plain._replace(**changes), facts) if tiles.specialize]

    blackwell = of("prefill", "sm_100")
    assert len(blackwell) == len(set(blackwell)) == 16 and of("prefill", "sm_103") == blackwell
    assert {tiles.num_stages for tiles in blackwell} == {2, 3} and {tiles.num_warps for tiles in blackwell} == {4, 8}
    assert of("prefill", "sm_100", mask="causal") and of("prefill", "sm_100", softcap=True)
    for changes in ({"dtype": "float32"}, {"bias": "full"}, {"mask": "tensor"}, {"head_dim": 192}, {"head_dim_v": 96}):
        assert of("prefill", "sm_100", **changes) == []
    for kernel, arch in (("prefill", "sm_90"), ("prefill", "sm_120"), ("decode", "sm_100"), ("query", "sm_100")):
        assert of(kernel, arch) == []
    facts = config.Device("sm_100", 227 * 1024, 148)
    tuning._write(tuning.file_of(facts), tuning.name_of("prefill", plain), blackwell[0])
    assert tuning.tiles("prefill", plain, facts) == blackwell[0]


def test_candidates_of_three_stages(device):
    """Wherever they fit: the next tile but one is on its way."""
    problem = problem_of(64)
    for kernel in ("prefill", "decode", "key_value", "query"):
        for arch in ("sm_80", "sm_90", "sm_100", "sm_120"):
            found = tuning.candidates(kernel, problem, config.Device(arch, config.SMEM[arch], 100))
            assert {1, 2, 3} <= {tiles.num_stages for tiles in found}


def test_tiles_that_compute_something_else_or_nothing_are_not_chosen(device):
    """However fast they are; the third of them is right."""
    right = torch.tensor([0.0, 2.0, -2.0, float("nan")])
    kinds = ("right", "wrong", "right", "nothing", "part", "NaN", "fails")
    result, made = torch.zeros(4), []

    def launch_with(tiles):
        kind = kinds[len(made)]
        made.append(tiles)
        if kind == "fails":
            raise RuntimeError("ptxas died")

        def launch() -> float:
            if kind != "nothing":
                result[2 * (kind == "part") :] = right[2 * (kind == "part") :] + (kind == "wrong")
            if kind == "NaN":
                result[0] = float("nan")
            return 9.0 if tiles == made[0] else 5.0 if kind == "right" else 1.0

        return launch

    problem, facts = problem_of(), launch.device_facts(0)
    table = list(tuning.candidates("prefill", problem, facts))[: len(kinds)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tuning, "candidates", lambda *args: iter(table))
        best = tuning.tune("prefill", problem, facts, launch_with, [result], lambda launch: launch())
    assert made == table and best == table[2]


# --- files that are not as they should be ----------------------------------------------------------------------------

NAME = "prefill bfloat16 D32 none"
TILES = {"BLOCK_M": 64, "BLOCK_N": 32, "num_warps": 4, "num_stages": 1}
DAMAGED = {
    "cut off": b'{"prefill',
    "binary": b"\0\xff\xfe",
    "a list": b"[]",
    "null": json.dumps({NAME: None}).encode(),
    "a field too many": json.dumps({NAME: TILES | {"new": 3}}).encode(),
    "fields missing": json.dumps({NAME: {"BLOCK_M": 64}}).encode(),
    "text": json.dumps({NAME: TILES | {"BLOCK_M": "64"}}).encode(),
    "no power of two": json.dumps({NAME: TILES | {"BLOCK_N": 65}}).encode(),
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_a_damaged_file_is_passed_over(device, kind, tmp_path):
    """Its good entries are not; what is measured then is in it."""
    file = tmp_path / "tuned" / FILE
    file.parent.mkdir()
    file.write_bytes(DAMAGED[kind])
    facts = launch.device_facts(0)
    with nothing_compiled() as launched, pytest.warns(RuntimeWarning, match=FILE) as caught:
        assert cli.main(["warmup", SHAPE, "--causal", "0", "--backward"]) == 0
        tuning._write(file, NAME + " more", config.Config(**TILES))
    assert [name for name, *_ in launched] == BACKWARD and len(caught) == 1
    assert json.loads(file.read_text()) == {NAME + " more": config.Config(**TILES)._asdict()}
    file.write_text(json.dumps({NAME: TILES, "key_value bfloat16 D32 none": None}))
    clear_caches()
    with pytest.warns(RuntimeWarning, match=FILE):
        assert tuning.tiles("prefill", problem_of(), facts) == config.Config(**TILES)
        assert tuning.tiles("key_value", problem_of(), facts) == config.key_value(problem_of(), facts)


def test_tiles_that_cannot_be_kept_serve_the_process(device, times, tmp_path, monkeypatch):
    """Each kernel is measured once all the same."""
    (tmp_path / "tuned").write_text("no folder")
    with nothing_compiled() as launched, pytest.warns(RuntimeWarning, match=f"{FILE} cannot be written") as caught:
        assert cli.main(["warmup", SHAPE, "1,4,2,1,512,32", "--causal", "0", "--tune", "--backward"]) == 0
        measured = len(times)
        launch.forget(), launched.clear()
        assert cli.main(["warmup", SHAPE, "--causal", "0", "--tune", "--backward"]) == 0
    assert len(times) == measured > 0 and [name for name, *_ in launched] == BACKWARD and len(caught) == 1
    facts = launch.device_facts(0)
    assert tuning.tiles("prefill", problem_of(), facts) == list(tuning.candidates("prefill", problem_of(), facts))[4]


def test_without_a_home(device, times, tmp_path, monkeypatch):
    """Nothing is kept, unless a folder is named."""

    def home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", home)
    assert tuning.directory() == tmp_path / "tuned"
    monkeypatch.delenv("FASTATTN_TUNED")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert tuning.directory() == tmp_path / "fastattn" / "tuned"
    monkeypatch.delenv("XDG_CACHE_HOME")
    with nothing_compiled() as launched:
        assert cli.main(["warmup", SHAPE, "--causal", "0"]) == 0
        with pytest.warns(RuntimeWarning, match="cannot be written"):
            assert cli.main(["warmup", "1,4,2,64,96,64", "--causal", "0", "--tune"]) == 0
    assert [name for name, *_ in launched[:1]] == ["forward_kernel"] and len(times) > 0


# --- which results are right -----------------------------------------------------------------------------------------


def attend(causal: bool, tile: int, seqlen: int, lost: int = 0) -> torch.Tensor:
    """out of bfloat16, weights rounded as tiles of so many keys have it; the last keys but the first are lost."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, seqlen, 64, generator=generator).bfloat16().float() for _ in range(3))
    rows, total, sums = torch.arange(seqlen)[:, None], torch.zeros(2, seqlen, 1), torch.zeros(2, seqlen, 64)
    largest = torch.full((2, seqlen, 1), -torch.inf)
    for start in range(0, seqlen - lost, tile):
        s = q @ k[:, start : start + tile].mT / 8.0
        if causal:
            s = s.masked_fill(torch.arange(start, start + s.shape[2]) > rows, -torch.inf)
        new = torch.maximum(largest, s.amax(-1, keepdim=True))
        p, shrink, largest = torch.exp(s - new), torch.exp(largest - new), new
        total, sums = total * shrink + p.sum(-1, keepdim=True), sums * shrink
        sums += p.bfloat16().float() @ v[:, start : start + tile]
    return (sums / total).bfloat16()


@pytest.mark.parametrize("causal", [True, False])
def test_rounding_is_told_from_a_fault(causal):
    """By the row: late rows are small beside the first one, and what the last keys add is small."""
    expected = attend(causal, 64, 1024)
    for tile in (32, 128):
        assert tuning._agree(attend(causal, tile, 1024), expected, "bfloat16")
    without_last, of_another = expected.clone(), expected.clone()
    without_last[:, -1], of_another[:, -1] = 0.0, expected[:, 500]
    lost = attend(causal, 64, 1024, lost=64)
    assert not any(tuning._agree(x, expected, "bfloat16") for x in (without_last, of_another, lost))


def test_a_float32_result_of_a_call_in_bfloat16_is_as_rough(device):
    expected = torch.randn(64, 32, generator=torch.Generator().manual_seed(0))
    found = expected * (1.0 + 2.0**-7)
    assert tuning._agree(found, expected, "bfloat16") and not tuning._agree(found, expected, "float32")
    assert tuning._agree(torch.tensor([[torch.inf, 1.0]]), torch.tensor([[torch.inf, 1.0]]))
    assert not tuning._agree(torch.tensor([[-torch.inf, 1.0]]), torch.tensor([[torch.inf, 1.0]]))


def test_warmup_calls_with_random_numbers(monkeypatch):
    """The same each time; zeros would make every tile right."""
    given = []
    monkeypatch.setattr(warmup, "DEVICE", "cpu")
    monkeypatch.setattr(gpu, "unavailable", lambda: None)
    monkeypatch.setattr(
        warmup, "attention", lambda q, k, v, **options: given.append((q, k, v)) or q * k.sum() * v.sum()
    )
    for _ in range(2):
        assert cli.main(["warmup", "1,2,2,8,8,16", "--dtype", "float32", "--causal", "0", "--backward"]) == 0
    first, second = given
    assert all(x.std() > 0.5 for x in first) and all(map(torch.equal, first, second))
