"""`python -m fastattn bench`, `compare` and `doctor`: tiny calls, made-up limits; nothing here is about time."""

import json
import math
import re
from pathlib import Path

import pytest
import torch

import fastattn
from fastattn import cli, plans
from fastattn.backends import cpu
from fastattn.cli import bench, compare, doctor, limits, machine, ratios, regimes, roofline, trace

ROOT = Path(fastattn.__file__).parents[1]

pytestmark = pytest.mark.skipif(cpu.unavailable() is not None, reason="the CPU kernels are not built")

LIMITS = {
    "caches": {"L2": 1 << 10}, "fma": {"float32 x 1": 100.0}, "fma_by_isa": {"avx2": 100.0}, "dot16": None,
    "matmul": {"float32": 90.0}, "read": {"1": {"L2": 50.0, "memory": 10.0}},
}  # fmt: skip
TINY = tuple(
    regime._replace(
        seqlen_q=min(regime.seqlen_q, 40), seqlen_k=min(regime.seqlen_k, 60 if regime.seqlen_q == 1 else 40)
    )
    for regime in regimes.REGIMES
)


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(regimes, "REGIMES", TINY)
    monkeypatch.setattr(limits, "measure", lambda peak: LIMITS)
    monkeypatch.setattr("fastattn.cli.timing.BURST", 1e-5)
    monkeypatch.setattr("fastattn.cli.timing.MAX_ROUNDS", 6)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def result(tmp_path):
    assert cli.main(["bench", "--quick", "--json", str(tmp_path / "a.json")]) == 0
    return json.loads((tmp_path / "a.json").read_text())


def test_every_regime_is_checked_and_measured(result):
    assert result["schema"] == "fastattn-machine/1" and result["limits"] == LIMITS
    assert [row["name"] for row in result["rows"]] == [str(regime) for regime in TINY]
    for row in result["rows"]:
        assert row["wrong"] is None and row["kernel"].startswith("cpu.")
        assert len(row["ms"]) == len(row["torch_ms"]) >= 5 and row["ratio"][1] <= row["ratio"][0] <= row["ratio"][2]
        assert 0 < row["gflops"] and row["verdict"] in ("same", "faster", "slower", "unclear")


@pytest.mark.parametrize("regime", TINY, ids=str)
def test_flops_are_those_of_the_pairs(regime):
    call = regimes.Call(regime)
    r = call.regime
    window = (None, None) if r.window == (None, None) else r.window
    mask = fastattn.Mask.window(*window) if window != (None, None) else fastattn.Mask()
    pairs = int(mask.to_dense(r.seqlen_q, r.seqlen_k).sum()) * r.batch * r.num_heads
    assert call.flops == pairs * r.head_dim * (14 if r.training else 4)


def test_a_wrong_result_is_not_timed(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(regimes.Call, "ours", lambda self: fastattn.attention(self.q, self.k, self.v) + 1e-2)
    assert cli.main(["bench", "--only", "prefill float32", "--json", str(tmp_path / "a.json")]) == 1
    assert "WRONG: largest error 1.0e-02" in capsys.readouterr().out
    assert json.loads((tmp_path / "a.json").read_text())["rows"][0]["ms"] is None


def test_a_name_that_no_regime_has(capsys):
    assert cli.main(["bench", "--only", "nothing"]) == 1
    assert "--only nothing is in no name; names are prefill float32" in capsys.readouterr().err


def test_a_picture(tmp_path):
    pytest.importorskip("matplotlib")
    assert cli.main(["bench", "--only", "decode", "prefill", "--picture", str(tmp_path / "roof.svg")]) == 0
    text = (tmp_path / "roof.svg").read_text()
    assert text.startswith("<?xml") and "decode" in text and "FMA 100 GFLOP/s" in text


def test_limits_of_this_machine(monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(limits, "peak_by_isa", lambda: {"scalar": 1.0})
    monkeypatch.setattr(limits, "LARGE", 1 << 20)
    from fastattn.cli.timing import Peak

    found = limits.measure(Peak(seconds=1e-4))
    assert found["fma"][f"float32 x {torch.get_num_threads()}"] > 0 and json.dumps(found)
    assert all(rate > 0 for rates in found["read"].values() for rate in rates.values())


@pytest.mark.parametrize(
    ("isa", "note"), [("avx512_bf16", "products of pairs"), ("avx512", "above its roof"), (None, "above")]
)
def test_what_is_above_the_roof(isa, note):
    class HalfOfWhatIsReached:
        def near(self, dtype, threads):
            return 1e9, None

    row = {"flops": 2e9, "bytes": 1, "ms": [1e3], "threads": 1, "isa": isa, "notes": []}
    found = roofline.shares(row, {"read": {"1": {"memory": 1e9}}}, HalfOfWhatIsReached(), "bfloat16")
    assert found["share"] == 2.0 and found["bound"] == "compute"
    assert [note in text for text in found["notes"]] == [True]


def test_facts_are_plain_values():
    facts = machine.facts()
    assert json.loads(json.dumps(facts)) == facts
    assert facts["isa"] == cpu.isa() and facts["torch"] == torch.__version__ and facts["usable_cores"] >= 1


def test_cores_that_others_kept_busy(monkeypatch):
    lines, now = (
        iter(["cpu  0 0 0 0 0 0 0 0 0 0", "cpu  150 20 30 900 0 0 0 7 0 0", "nothing"]),
        iter([10.0, 14.0, 15.0]),
    )
    monkeypatch.setattr(machine, "_text", lambda path: next(lines))
    monkeypatch.setattr(machine.time, "monotonic", lambda: next(now))
    monkeypatch.setattr(machine.os, "sysconf", lambda name: 100)
    monkeypatch.setattr(machine.os, "times", lambda: (0.0,) * 5)
    others = machine.Others()
    assert others.cores() == 0.5  # 2 seconds of user, nice and system time within 4
    assert others.cores() is None


# --- ratios ----------------------------------------------------------------------------------------------------------


def test_rounds_that_are_disturbed_together_have_a_steady_ratio():
    ours = [1.0, 1.1, 5.0, 1.2, 0.9, 3.0, 1.0]
    ratio = ratios.paired([2 * x for x in ours], ours)
    assert ratio == (2.0, 2.0, 2.0) and ratio.verdict == "slower"
    assert ratios.paired(ours, ours).verdict == "same"
    assert ratios.unpaired(ours, ours[::-1]).verdict == "unclear"


def test_geometric_mean():
    mean = ratios.geometric_mean([ratios.Ratio(2.0, 2.0, 2.0), ratios.Ratio(0.5, 0.5, 0.5)])
    assert math.isclose(mean.value, 1.0) and mean.low <= 0.5 + 1e-9 and mean.high >= 2.0 - 1e-9


def test_what_is_unsteady():
    assert ratios.unsteady([1.0] * 8) == []
    assert "drifts by +20 %" in ratios.unsteady([1.0] * 4 + [1.2] * 4)
    assert any("noisy" in text for text in ratios.unsteady([1.0, 2.0, 1.0, 2.0, 1.0, 2.0]))


# --- compare ---------------------------------------------------------------------------------------------------------


def write(path, result, factor=1.0):
    rows = [row | {"ms": [1.0 * factor, 1.01 * factor, 1.02 * factor, 1.0 * factor]} for row in result["rows"]]
    path.write_text(json.dumps(result | {"rows": rows}))
    return str(path)


def test_compare(result, tmp_path, capsys):
    a, b = write(tmp_path / "a", result), write(tmp_path / "b", result, 1.2)
    assert cli.main(["compare", a, b]) == 0
    text = capsys.readouterr().out
    assert "geometric mean" in text and "1.20 (" in text and "slower" in text
    assert cli.main(["compare", a, b, "--fail-if-slower", "3%"]) == 1
    assert "TOO SLOW" in capsys.readouterr().out
    assert (
        cli.main(["compare", a, b, "--fail-if-slower", "30%"])
        == cli.main(["compare", b, a, "--fail-if-slower", "0"])
        == 0
    )


def test_compare_says_what_is_not_the_same(result, tmp_path, capsys):
    other = result | {"machine": result["machine"] | {"isa": "scalar"}, "doubts": ["it was night"]}
    assert cli.main(["compare", write(tmp_path / "a", result), write(tmp_path / "b", other)]) == 0
    text = capsys.readouterr().out
    assert f"isa: {result['machine']['isa']} -> scalar" in text and "the second doubts itself: it was night" in text


@pytest.mark.parametrize("content", ["", "[]", '{"rows": []}', '{"schema": "fastattn-machine/9"}'])
def test_compare_refuses_other_files(result, tmp_path, capsys, content):
    (tmp_path / "b").write_text(content)
    assert cli.main(["compare", write(tmp_path / "a", result), str(tmp_path / "b")]) == 1
    assert str(tmp_path / "b") in capsys.readouterr().err


def test_compare_refuses_one_file_and_files_without_a_common_call(result, tmp_path, capsys):
    a = write(tmp_path / "a", result)
    assert cli.main(["compare", a]) == 1
    assert cli.main(["compare", a, write(tmp_path / "b", result | {"rows": []})]) == 1
    assert "no call in common" in capsys.readouterr().err


# --- traces ----------------------------------------------------------------------------------------------------------


def test_a_trace_is_replayed(tmp_path, capsys):
    q, k = torch.randn(2, 4, 20, 8), torch.randn(2, 2, 30, 8)
    bits = torch.ones(1, 1, 20, 30, dtype=torch.bool)
    with fastattn.record(tmp_path / "trace") as calls:
        for _ in range(3):
            fastattn.attention(q, k, k, causal=True)
        fastattn.attention(q, k, k, window_size=(4, 2), softcap=3.0, sinks=torch.zeros(4), alibi_slopes=torch.ones(4))
        fastattn.attention(q, k, k, mask=bits, bias=torch.zeros(1, 1, 20, 30), dropout_p=0.5)
        fastattn.attention(q, k, k, mask=fastattn.Mask.lengths(torch.tensor([3, 4])))
        fastattn.attention(q.bfloat16().requires_grad_(), k.bfloat16(), k.bfloat16()).sum().backward()
        fastattn.attention(q, k, k, mask=fastattn.BlockMask.from_dense(bits.expand(2, 4, 20, 30)))
    replayed = trace.read(tmp_path / "trace")
    assert "not replayed: 1 calls with layout=dense mask=block" in capsys.readouterr().out
    assert [call.count for call in replayed] == [3, 1, 1, 1, 1]
    problems = [call.problem for call in calls if call.problem.direction == "forward"]
    for call in replayed:
        with fastattn.record() as again:
            call.ours()
        assert again[0].problem in problems
    assert replayed[1].regime.window == (4, 2)
    assert cli.main(["bench", "--trace", str(tmp_path / "trace"), "--json", str(tmp_path / "json")]) == 0
    assert "time in attention" in capsys.readouterr().out


@pytest.mark.parametrize("content", ["", "[1]", '{"schema": "fastattn-trace/9"}', '{"schema": "fastattn-trace/1"}'])
def test_what_is_no_trace(tmp_path, capsys, content):
    (tmp_path / "trace").write_text(content)
    assert cli.main(["bench", "--trace", str(tmp_path / "trace")]) == 1
    assert str(tmp_path / "trace") in capsys.readouterr().err


def test_a_trace_that_cannot_be_written_is_an_error_before_the_calls(tmp_path):
    with pytest.raises(FileNotFoundError), fastattn.record(tmp_path / "nowhere/trace"):
        raise AssertionError


# --- doctor ----------------------------------------------------------------------------------------------------------


def test_doctor(tmp_path, capsys):
    assert cli.main(["doctor", "--json", str(tmp_path / "json")]) == 0
    text, document = capsys.readouterr().out, json.loads((tmp_path / "json").read_text())
    assert "all is well" in text and document["schema"] == "fastattn-doctor/1"
    assert document["facts"]["instruction_sets_built"][-1] == "scalar" and document["facts"]["parity_error"] < 1e-4
    assert document["facts"]["backends"]["cpu.prefill"] == "ready"


def test_what_doctor_finds(monkeypatch):
    sound = machine.facts() | {"openmp_runtimes": ["a"], "gpus": []}
    few = {"usable_cores": 1, "cgroup_cores": 0.5, "cores": 1, "threads": 4, "governor": "powersave"}
    monkeypatch.setenv("FASTATTN_FALBACK", "warn")
    found = doctor.look(sound | few | {"openmp": None, "openmp_runtimes": ["a", "b"]})
    texts = " ".join(finding.text for finding in found)
    assert [finding.serious for finding in found][:2] == [True, False] and all(finding.advice for finding in found)
    for text in ("no OpenMP", "2 OpenMP", "4 threads share 0.5 cores", "FASTATTN_FALBACK is not", "powersave"):
        assert text in texts


def test_doctor_without_kernels(monkeypatch, capsys):
    monkeypatch.setattr(cpu, "_C", None)
    monkeypatch.setattr(cpu, "_import_error", ImportError("no such file"), raising=False)
    assert cli.main(["doctor"]) == 1
    assert "PROBLEM: the compiled CPU kernels are missing" in capsys.readouterr().out


def test_doctor_where_no_kernel_runs(monkeypatch, capsys):
    """FASTATTN_CPU_ISA names what this CPU lacks: the one command that tells what to do does not end in a traceback."""

    def refuse():
        raise ValueError("FASTATTN_CPU_ISA=any: this CPU does not have it")

    monkeypatch.setattr(cpu, "isa", refuse)
    plans.forget()
    try:
        assert cli.main(["doctor"]) == 1
    finally:
        plans.forget()
    text = capsys.readouterr().out
    assert "PROBLEM: FASTATTN_CPU_ISA=any: this CPU" in text and "cpu.prefill: FASTATTN_CPU_ISA=any: this CPU" in text
    assert re.search(r"^isa +unknown$", text, re.M) and re.search(r"^instruction_sets_built .*scalar$", text, re.M)


def test_doctor_knows_the_variables_of_the_docs():
    pages = (ROOT / "docs/guide.md").read_text() + (ROOT / "CONTRIBUTING.md").read_text()
    assert doctor.KNOWN == set(re.findall(r"^\| `(FASTATTN_\w+)`", pages, re.M))


def test_explain_says_that_there_is_no_openmp(monkeypatch):
    q = torch.zeros(1, 2, 20, 8)
    assert "one thread" not in fastattn.explain(q, q, q)
    monkeypatch.setattr(cpu, "openmp", lambda: None)
    assert "cpu.prefill" in (text := fastattn.explain(q, q, q)) and "on one thread: torch has loaded no OpenMP" in text
    assert compare.SCHEMA == bench.SCHEMA
