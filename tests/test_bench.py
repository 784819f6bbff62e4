"""The benchmark itself: it counts the FLOPs that are there, and times no wrong result."""
# ruff: noqa: E402 (bench/ is imported once it is known that its packages are there)

import json
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import torch

import fastattn
from cases import CASES, GRID, Case, inputs, visited_pairs

for package in ("rich", "matplotlib"):
    pytest.importorskip(package, reason="the benchmark needs it")

sys.path.append(str(Path(__file__).parents[1] / "bench"))

import oracle
import peers
import run
import suites
import targets
from rows import SCHEMA, Result, Row
from timing import Contender, Peak, in_turn

SMALL = Case(num_heads=2, seqlen_q=32, head_dim=16)
INSTANT = ["--tiny", "--budget", "0", "--peers", "sdpa"]
TRUTH_CASES = [case for case in CASES if case.dtype == "float32" and case.seqlen_q in (45, 77)]


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    "case, pairs",
    [
        (Case(batch=2, num_heads=3, seqlen_q=5, seqlen_k=7), 2 * 3 * 5 * 7),
        (Case(num_heads=2, seqlen_q=6, causal=True), 2 * 21),
        (Case(seqlen_q=3, seqlen_k=5, causal=True), 3 + 4 + 5),
        (Case(seqlen_q=5, seqlen_k=3, causal=True), 0 + 0 + 1 + 2 + 3),
        (Case(seqlen_q=3, seqlen_k=5, mask="top_left"), 1 + 2 + 3),
        (Case(seqlen_q=10, window_size=(2, 0)), 1 + 2 + 8 * 3),
        (Case(num_heads=4, num_heads_k=2, seqlen_q=5), 4 * 25),
    ],
    ids=str,
)
def test_flops_count_the_visited_pairs(case, pairs):
    row, _, _ = suites._checked_row("grid", str(case), case, 1)
    assert row.pairs == pairs and row.flops == 4 * pairs * case.head_dim
    assert visited_pairs(case) == pairs


def test_flops_of_a_different_value_size():
    row, _, _ = suites._checked_row("grid", "", SMALL._replace(head_dim_v=24), 1)
    assert row.flops == 2 * 2 * 32 * 32 * (16 + 24)


@pytest.mark.parametrize("case", TRUTH_CASES, ids=str)
def test_truth_in_chunks_is_the_reference(case, monkeypatch):
    monkeypatch.setattr(oracle, "SCORES_AT_ONCE", 40 * (case.seqlen_k or case.seqlen_q))
    oracle.truth.cache_clear()
    (q, k, v), kwargs = inputs(case)
    kwargs |= {name: kwargs[name].double() for name in ("bias", "alibi_slopes", "sinks") if name in kwargs}
    whole = fastattn.attention(q.double(), k.double(), v.double(), backend="reference", **kwargs)
    torch.testing.assert_close(oracle.truth(case)[0], whole, rtol=0, atol=1e-13)


@pytest.mark.parametrize("case", TRUTH_CASES, ids=str)
def test_sdpa_computes_the_case_or_refuses_it(case):
    if peers.SDPA.refuse(case):
        assert case.softcap or case.sinks
        return
    (q, k, v), kwargs = inputs(case)
    out = peers.SDPA.prepare(case, q, k, v, kwargs)()
    assert oracle.above_ceiling(oracle.errors(out, oracle.truth(case)[0]), case.dtype) is None


@pytest.mark.parametrize("causal", [False, True])
def test_onnxruntime_computes_the_case(causal):
    case = SMALL._replace(batch=2, causal=causal, softmax_scale=0.3)
    if reason := peers.OnnxRuntime.refuse(case):
        pytest.skip(reason)
    (q, k, v), kwargs = inputs(case)
    out = peers.OnnxRuntime.prepare(case, q, k, v, kwargs)()
    assert oracle.errors(out, oracle.truth(case)[0]).max < 1e-5


@pytest.mark.parametrize("damage", [lambda out: out * 1.001, lambda out: out * float("nan")], ids=["scaled", "nan"])
def test_a_wrong_result_is_not_timed(damage, monkeypatch):
    right = fastattn.attention
    monkeypatch.setattr(fastattn, "attention", lambda *args, **kwargs: damage(right(*args, **kwargs)))
    monkeypatch.setattr(suites, "in_turn", lambda *_: pytest.fail("it was timed"))
    comparison = suites.Comparison("threads", SMALL, 2, SMALL, 1)
    for row in (
        suites.grid_row(SMALL, 1, (peers.SDPA,), 0.0, Peak()),
        suites.comparison_row(comparison, 0.0, Peak()),
        suites.overhead_row(SMALL, (peers.SDPA,)),
    ):
        assert "max error" in row.wrong and row.ours.ms is None


def test_a_wrong_result_fails_the_run(monkeypatch, tmp_path, capsys):
    right = fastattn.attention
    monkeypatch.setattr(fastattn, "attention", lambda *args, **kwargs: right(*args, **kwargs) + 0.01)
    assert run.main([*INSTANT, "--only", "S64-D32-float32", "--out", str(tmp_path)]) == 1
    assert "WRONG" in capsys.readouterr().out
    assert all(row["wrong"] for row in json.loads((tmp_path / "bench.json").read_text())["rows"])


def test_a_peer_that_fails_or_is_wrong_is_a_refusal_with_its_reason():
    class Broken:
        name = "broken"

        @staticmethod
        def refuse(case):
            return None

        @staticmethod
        def prepare(case, q, k, v, kwargs):
            raise RuntimeError("no such thing\nat line 3")

    class Wrong(Broken):
        name = "wrong"

        @staticmethod
        def prepare(case, q, k, v, kwargs):
            return lambda: torch.zeros_like(q)

    row = suites.grid_row(SMALL, 1, (Broken, Wrong), 0.0, Peak())
    assert row.results["broken"].refused == "RuntimeError: no such thing"
    assert row.results["wrong"].refused.startswith("max error")
    assert row.ours.ms > 0 and row.metrics.keys() <= {"share"}


def test_json_has_the_documented_schema(tmp_path):
    assert run.main([*INSTANT, "--only", "S64-D64-float32-causal", "--out", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "bench.json").read_text(), parse_constant=lambda name: pytest.fail(name))
    assert found["schema"] == SCHEMA and found.keys() == {"schema", "header", "rows", "targets"}
    assert {"date", "cpu", "cores", "isa", "torch", "fastattn", "load_average", "environment"} <= found["header"].keys()
    assert {row["suite"] for row in found["rows"]} >= {"grid"}
    for row in found["rows"]:
        assert row.keys() == {field.name for field in fields(Row)}
        assert Case(**row["spec"] | {"window_size": None}).causal and row["repro"].startswith("python bench/run.py")
        assert all(result.keys() == {field.name for field in fields(Result)} for result in row["results"].values())
    assert len(found["targets"]) == len(targets.TARGETS)
    text = (tmp_path / "bench.md").read_text()
    assert "| B1H2-S64-D64-float32-causal" in text and "not measured" in text
    assert (tmp_path / "bench.png").stat().st_size > 10_000


def test_targets_take_the_worst_row_and_ignore_a_peak_that_is_too_low(monkeypatch):
    def row(seqlen, **metrics):
        return Row("grid", f"S{seqlen}", 1, "", Case(num_heads=8, seqlen_q=seqlen)._asdict(), metrics=metrics)

    first, second, *_ = targets.judge([row(1024, share=0.9, **{"vs sdpa": 1.5}), row(2048, share=0.8)])
    assert (first["value"], first["row"], first["met"]) == (0.8, "S2048", False)
    assert (second["value"], second["met"], second["rows"], second["of"]) == (1.5, True, 1, 2)

    monkeypatch.setattr("timing.fma_rate", lambda dtype, seconds, threads: 1e6)
    found = suites.grid_row(SMALL, 1, (), 0.0, Peak())
    assert "share" not in found.metrics and "matmul" in found.flags[0]


def test_every_target_has_rows_in_the_plan():
    rows = [Row("grid", str(case), 1, "", case._asdict()) for case in GRID]
    rows += [Row(c.kind, c.name, c.threads, "", c.case._asdict()) for c in suites.COMPARISONS]
    rows += [Row("overhead", "", 1, "", suites.TINY._asdict()), Row("memory", "", 1, "", suites.LONG_MEMORY._asdict())]
    lost = [
        judged["what"] for judged in targets.judge(rows) if not judged["of"] and "two threads" not in judged["what"]
    ]
    assert not lost


def test_contenders_run_in_turn():
    order = []
    times = in_turn({name: Contender(lambda name=name: order.append(name), 1) for name in "ab"}, 0.0)
    rounds = "".join(order[4:]).replace("a" * 200, "A").replace("b" * 200, "B")
    assert rounds == "AB" * 5 and len(times["a"]) == 1000


def test_only_an_exact_name_wins(tmp_path):
    options = run._options(["--only", str(GRID[2])])
    assert [name for name, _ in run._plan(options, Peak())] == [str(GRID[2])]
    assert len(run._plan(run._options(["--only", "S1024"]), Peak())) > 5
    assert run.main(["--only", "no such row", "--out", str(tmp_path)]) == 2
