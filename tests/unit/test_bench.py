"""The benchmark itself: it counts the FLOPs that are there, and times no wrong result."""
# ruff: noqa: E402 (bench/ is imported once it is known that its packages are there)

import json
import sys
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch

import fastattn
from cases import CASES, Case, inputs, visited_pairs

sys.path.append(str(Path(__file__).parents[2] / "bench"))

import compiled
import decoding
import dense_vs_sparse
import oracle
import peers
import report
import run
import suites
import targets
from fastattn.cli.timing import Contender, Peak, in_turn, peak_by_isa
from rows import SCHEMA, Result, Row
from work import FORWARD, TRAINING, Work, tensors

pytestmark = pytest.mark.usefixtures("one_thread")
SMALL = Case(num_heads=2, seqlen_q=32, head_dim=16)
PASSES = ("forward", "backward", "forward+backward")
INSTANT = ["--tiny", "--budget", "0", "--passes", "1", "--peers", "sdpa"]
TRUTH_CASES = [case for case in CASES if case.dtype == "float32" and case.seqlen_q in (45, 77)]
TRUTH_CASES = [case for case in TRUTH_CASES if "distances" not in (case.bias or "")]  # no row of the benchmark has them


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
    row, _ = suites._checked_row("grid", str(case), Work(case), 1)
    assert row.pairs == pairs and row.flops == 4 * pairs * case.head_dim
    assert visited_pairs(case) == pairs


@pytest.mark.parametrize("passes, products", [("forward", (1, 1)), ("backward", (3, 2)), ("forward+backward", (4, 3))])
def test_flops_of_a_different_value_size(passes, products):
    row, _ = suites._checked_row("grid", "", Work(SMALL._replace(head_dim_v=24), passes), 1)
    assert row.flops == 2 * 2 * 32 * 32 * (16 * products[0] + 24 * products[1])


@pytest.mark.parametrize("passes, dropout_p", [("forward", 0.0), ("forward+backward", 0.0), ("forward+backward", 0.3)])
@pytest.mark.parametrize("case", TRUTH_CASES, ids=str)
def test_truth_in_chunks_is_the_reference(case, passes, dropout_p, monkeypatch):
    monkeypatch.setattr(oracle, "SCORES_AT_ONCE", 40 * (case.seqlen_k or case.seqlen_q))
    oracle.truth.cache_clear()
    work = Work(case._replace(dropout_p=dropout_p or case.dropout_p), passes)
    leaves, kwargs, dout = tensors(work, torch.float64)
    whole = fastattn.attention(**leaves, **kwargs, backend="reference")
    expected = {"out": whole.detach()}
    if work.trains:
        expected |= zip(leaves, torch.autograd.grad(whole, [*leaves.values()], dout), strict=True)
    torch.testing.assert_close(oracle.truth(work)[0], expected, rtol=1e-12, atol=1e-12)


def assert_right_or_refused(peer, work, missing):
    """`missing`: fields of the case that the peer may refuse."""
    row = Row("grid", "", 1, "", work.spec)
    suites._prepared(row, (peer,), work)
    result = row.results[peer.name]
    assert (result.refused is None) == (not any(getattr(work.case, name) for name in missing)), result.refused
    assert result.refused or result.max_error < 1e-5


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("passes", PASSES)
@pytest.mark.parametrize("case", TRUTH_CASES, ids=str)
def test_torch_computes_the_work_or_refuses_it(case, passes, dropout_p):
    work = Work(case._replace(dropout_p=dropout_p or case.dropout_p), passes)
    assert_right_or_refused(peers.SDPA, work, ("softcap", "sinks", "learned_scale"))
    qkv, kwargs = inputs(case)
    _, lse = fastattn.attention(*qkv, **kwargs, return_lse=True, backend="reference")
    if lse.isfinite().all():  # a softmax over no key is NaN in plain torch
        assert_right_or_refused(peers.Eager, work, ())


@pytest.mark.parametrize("causal", [False, True])
def test_onnxruntime_computes_the_case(causal):
    work = Work(SMALL._replace(batch=2, causal=causal, softmax_scale=0.3))
    if reason := peers.OnnxRuntime.refuse(work):
        pytest.skip(reason)
    assert_right_or_refused(peers.OnnxRuntime, work, ())


def test_a_peer_that_drops_nothing_is_not_timed():
    class Undropped(peers.SDPA):
        @staticmethod
        def prepare(work, *arguments):
            return peers.SDPA.prepare(work._replace(case=work.case._replace(dropout_p=0.0)), *arguments)

    row = Row("grid", "", 1, "", {})
    assert suites._prepared(row, (Undropped,), Work(SMALL._replace(dropout_p=0.1), "forward+backward")) == {}
    assert "max error" in row.results["sdpa"].refused


def test_what_cannot_train_refuses():
    work = Work(SMALL, "backward")
    assert "backward" in peers.Flex.refuse(work) and peers.OnnxRuntime.refuse(work)
    assert peers.Flex.refuse(Work(SMALL)) is None


def test_the_backward_is_timed_alone(monkeypatch):
    calls, right = [], fastattn.attention
    monkeypatch.setattr(fastattn, "attention", lambda *args, **kwargs: calls.append(1) or right(*args, **kwargs))
    row, run = suites._checked_row("grid", "", Work(SMALL._replace(bias="per_head"), "backward"), 1)
    assert len(calls) == 1 and row.wrong is None
    run(), run()
    assert len(calls) == 1
    assert [x.shape[1:] for x in run()] == [(2, 32, 16)] * 3 + [(2, 32, 32)]


@pytest.mark.parametrize("passes", PASSES)
@pytest.mark.parametrize("damage", [lambda out: out * 1.001, lambda out: out * float("nan")], ids=["scaled", "nan"])
def test_a_wrong_result_is_not_timed(damage, passes, monkeypatch):
    right = fastattn.attention
    monkeypatch.setattr(fastattn, "attention", lambda *args, **kwargs: damage(right(*args, **kwargs)))
    monkeypatch.setattr(suites, "in_turn", lambda *_: pytest.fail("it was timed"))
    work = Work(SMALL, passes)
    for row in (
        suites.grid_row(work, 1, (peers.SDPA,), 0.0, Peak()),
        suites.comparison_row(suites.Comparison("threads", work, 2, work, 1), 0.0, Peak()),
        suites.overhead_row(work, (peers.SDPA,)),
    ):
        assert "max error" in row.wrong and row.ours.ms is None


@pytest.mark.parametrize("name", ["q", "k", "v", "bias"])
def test_one_wrong_gradient_is_a_wrong_result(name, monkeypatch):
    right = fastattn.attention

    class Damage(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.view_as(x)

        @staticmethod
        def backward(ctx, dx):
            return dx * 1.001

    def damaged(q, k, v, **kwargs):
        arguments = kwargs | {"q": q, "k": k, "v": v}
        return right(**arguments | {name: Damage.apply(arguments[name])})

    monkeypatch.setattr(fastattn, "attention", damaged)
    row, _ = suites._checked_row("grid", "", Work(SMALL._replace(bias="per_head"), "backward"), 1)
    assert f"of d{name} exceeds" in row.wrong


def test_a_wrong_result_fails_the_run(monkeypatch, tmp_path, capsys):
    right = fastattn.attention
    monkeypatch.setattr(fastattn, "attention", lambda *args, **kwargs: right(*args, **kwargs) * 1.01)
    assert run.main([*INSTANT, "--only", "S64-D32-float32", "--out", str(tmp_path)]) == 1
    assert "WRONG" in capsys.readouterr().out
    assert all(row["wrong"] for row in json.loads((tmp_path / "bench.json").read_text())["rows"])


def test_a_peer_that_fails_or_is_wrong_is_a_refusal_with_its_reason():
    class Broken:
        name = "broken"

        @staticmethod
        def refuse(work):
            return None

        @staticmethod
        def prepare(work, q, k, v, kwargs):
            raise RuntimeError("no such thing\nat line 3")

    class Wrong(Broken):
        name = "wrong"

        @staticmethod
        def prepare(work, q, k, v, kwargs):
            return lambda: torch.zeros_like(q)

    row = suites.grid_row(Work(SMALL), 1, (Broken, Wrong), 0.0, Peak())
    assert row.results["broken"].refused == "RuntimeError: no such thing"
    assert row.results["wrong"].refused.startswith("max error")
    assert row.ours.ms > 0 and row.metrics.keys() <= {"share"}


def test_json_has_the_documented_schema(tmp_path):
    assert run.main([*INSTANT, "--only", "S64-D64-float32-causal", "--out", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "bench.json").read_text(), parse_constant=lambda name: pytest.fail(name))
    assert found["schema"] == SCHEMA and found.keys() == {"schema", "header", "rows", "targets"}
    assert {"date", "cpu", "cores", "isa", "torch", "fastattn", "load_average", "environment"} <= found["header"].keys()
    assert {"fma_peak_by_isa", "torch_matmul_gflops", "torch_cpu_capability"} <= found["header"].keys()
    assert {row["kind"] for row in found["rows"]} >= {"grid"}
    assert {row["spec"]["passes"] for row in found["rows"]} == {"forward", "backward"}
    for row in found["rows"]:
        assert row.keys() == {field.name for field in fields(Row)}
        case = {name: value for name, value in row["spec"].items() if name in Case._fields}
        assert Case(**case | {"window_size": None}).causal and row["repro"].startswith("python bench/run.py")
        assert all(result.keys() == {field.name for field in fields(Result)} for result in row["results"].values())
    assert len(found["targets"]) == len(targets.TARGETS)
    text = (tmp_path / "bench.md").read_text()
    assert "| B1H2-S64-D64-float32-causal" in text and "not measured" in text
    assert "| backward B1H2-S64-D64-float32-causal" in text
    assert (tmp_path / "bench.png").stat().st_size > 10_000 < (tmp_path / "backward.png").stat().st_size


def test_rows_of_compiled_graphs(tmp_path):
    assert run.main([*INSTANT, "--only", "compiled", "--out", str(tmp_path)]) == 0
    rows = json.loads((tmp_path / "bench.json").read_text())["rows"]
    assert [row["kind"] for row in rows] == ["compiled", "compiled", "graph"] and not any(row["wrong"] for row in rows)
    assert rows[1]["kernel"] == "cpu.prefill + cpu.backward" and "extra us" in rows[2]["metrics"]


def test_targets_take_the_worst_row_and_ignore_a_peak_that_is_too_low(monkeypatch):
    def row(seqlen, **metrics):
        return Row("grid", f"S{seqlen}", 1, "", Work(Case(num_heads=8, seqlen_q=seqlen)).spec, metrics=metrics)

    first, second, *_ = targets.judge([row(1024, share=0.9, **{"vs sdpa": 1.5}), row(2048, share=0.8)], ["forward"])
    assert (first["value"], first["row"], first["met"]) == (0.8, "S2048", False)
    assert (second["value"], second["met"], second["rows"], second["of"]) == (1.5, True, 1, 2)

    monkeypatch.setattr("fastattn.cli.timing.fma_rate", lambda dtype, seconds, threads: 1e6)
    found = suites.grid_row(Work(SMALL), 1, (), 0.0, Peak())
    assert "share" not in found.metrics and "matmul" in found.flags[0]


def test_a_peer_above_the_float32_peak_spoils_no_16_bit_share():
    def shares(dtype, isa="avx512", **shares):
        row = Row("grid", "", 1, "", {}, isa=isa, results={name: Result(share=share) for name, share in shares.items()})
        suites._judge_shares(row, dtype)
        return row.metrics.get("share"), bool(row.flags)

    assert shares("float32", fastattn=0.8, eager=0.9) == (0.8, False)
    assert shares("float32", fastattn=0.8, eager=1.2) == (None, True)
    assert shares("bfloat16", fastattn=0.8, eager=1.2) == (0.8, True)
    assert shares("bfloat16", fastattn=1.1, eager=0.9) == (None, True)
    assert shares("bfloat16", "avx512_bf16", fastattn=1.6, eager=0.9) == (1.6, False)
    assert shares("bfloat16", "avx512_bf16", fastattn=1.6, eager=1.2) == (1.6, True)


def test_every_target_has_rows_in_the_plan():
    rows = [Row("grid", str(work), 1, "", work.spec) for work in FORWARD + TRAINING]
    rows += [Row(c.kind, c.name, c.threads, "", c.work.spec) for c in suites.COMPARISONS]
    rows += [Row("overhead", "", 1, "", work.spec) for work in suites.TINY]
    rows += [Row("memory", "", 1, "", work.spec) for work in suites.MEMORY]
    rows += [Row("growing", "", 1, "", suites.GROWING.spec), Row("graph", "", 1, "", suites.TINY[0].spec)]
    rows += [Row("compiled", "", 1, "", work.spec) for work in compiled.BLOCKS]
    rows += [Row("decode", s.name, s.threads, "", s.work.spec | {"hot": s.hot}) for s in decoding.STEPS]
    rows = [replace(row, isa=isa) for row in rows for isa in ("avx512", "avx512_bf16")]
    judged = targets.judge(rows, ["forward", "backward"])
    assert len(judged) == len(targets.TARGETS)
    assert not [target["what"] for target in judged if not target["of"] and "two threads" not in target["what"]]


def test_contenders_run_in_turn():
    """Each once a round, in orders that are random and the same in every run."""
    runs = []
    for _ in range(2):
        order = []
        times = in_turn({name: Contender(lambda name=name, to=order: to.append(name), 1) for name in "ab"}, 0.0)
        text = "".join(order[4:])
        bursts = [set(text[i : i + 200]) for i in range(0, len(text), 200)]
        runs.append("".join(name for burst in bursts for name in burst))
        assert all(len(burst) == 1 for burst in bursts) and len(times["a"]) == 1000
    assert {"".join(sorted(runs[0][i : i + 2])) for i in range(0, 10, 2)} == {"ab"}
    assert runs[0] == runs[1] and runs[0] != "ab" * 5


def test_decoding_from_end_to_end(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(decoding, "ROTATED", 1 << 20)
    assert run.main([*INSTANT, "--only", "decode ", "--out", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "bench.json").read_text())["rows"]
    assert {row["kind"] for row in found} == {"decode"}
    built = fastattn.backends.cpu.unavailable() is None
    for row in found:
        assert row["wrong"] is None and row["metrics"]["vs sdpa"] > 0
        assert ("bandwidth" in row["metrics"]) == (built and not row["spec"]["hot"])
    assert "% of bandwidth" in (tmp_path / "bench.md").read_text()


def test_only_an_exact_name_wins(tmp_path):
    options = run._options(["--only", str(FORWARD[2])])
    assert [name for name, _ in run._plan(options, Peak())] == [str(FORWARD[2])]
    assert len(run._plan(run._options(["--only", "S1024"]), Peak())) > 5
    both = [str(FORWARD[2]), str(FORWARD[0])]
    assert [name for name, _ in run._plan(run._options(["--only", *both]), Peak())] == both[::-1]
    assert run.main(["--only", "no such row", "--out", str(tmp_path)]) == 2


def test_a_suite_can_be_run_alone():
    names = {suite: [name for name, _ in run._plan(run._options(["--suite", suite]), Peak())] for suite in run.PICTURES}
    assert all("backward" in name for name in names["backward"])
    assert not any("backward" in name for name in names["forward"])
    both = [name for name, _ in run._plan(run._options([]), Peak())]
    assert sorted(both) == sorted(names["forward"] + names["backward"])


def test_a_row_is_measured_again_until_the_peak_beside_it_is_steady(monkeypatch):
    rates = iter([100.0, 50.0, 80.0, 95.0, 60.0, 70.0, 99.0])

    def row(name):
        def measure():
            rate = next(rates)
            monkeypatch.setattr("fastattn.cli.timing.fma_rate", lambda *_: rate * 1e9)
            peak.read("float32", 1)
            return Row("grid", name, 1, "", Work(SMALL).spec, metrics={"rate": rate})

        return name, measure

    for passes, metrics, doubted in ((3, [100.0, 95.0, 80.0], ["c"]), (1, [99.0], [])):
        monkeypatch.setattr(run.Others, "cores", lambda _: 0.0)
        head, peak = {"kernels_missing": None}, Peak()
        plan = [row("a"), row("b"), row("c")][: len(metrics)]
        rows = run.measured(run.console_of_tables(), plan, head, peak, passes)
        assert [row.name for row in rows] == [name for name, _ in plan]
        assert [row.metrics["rate"] for row in rows] == metrics
        assert [row.name for row in rows if row.flags] == doubted
        assert [doubt.rpartition(" ")[2] for doubt in head["doubts"]] == doubted
    assert head["measured_again"] == 0


def test_peak_by_isa_is_of_those_that_run_here():
    if fastattn.backends.cpu.unavailable():
        pytest.skip("the CPU kernels are not built")
    rates = peak_by_isa()
    assert fastattn.backends.cpu.isa() in rates and all(rate > 0 for rate in rates.values())


def test_sparse_against_dense_from_end_to_end(tmp_path, capsys):
    assert dense_vs_sparse.main(["--quick", *INSTANT, "--out", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "sparse.json").read_text())["rows"]
    assert {row["spec"]["passes"] for row in found} == {"forward", "backward"}
    assert {row["spec"]["pattern"] for row in found} == set(dense_vs_sparse.QUICK)
    for row in found:
        assert row["wrong"] is None and row["metrics"]["speed-up"] > 0 and row["results"]["sdpa"]["refused"] is None
    assert (tmp_path / "sparse.png").stat().st_size > 10_000 and "speed-up" in (tmp_path / "sparse.md").read_text()


def test_a_wrong_sparse_result_is_not_timed(monkeypatch):
    """Dense attention instead of the pattern's."""
    work = Work(Case(num_heads=2, seqlen_q=512, head_dim=16), pattern="window")
    right = fastattn.attention
    monkeypatch.setattr(fastattn, "attention", lambda *args, mask=None, **kwargs: right(*args, **kwargs))
    oracle.truth.cache_clear()
    row = suites.sparse_row(work, (), 0.0, Peak(), False)
    assert "max error" in row.wrong and row.ours.ms is None


def test_skipping_from_end_to_end(tmp_path, capsys):
    assert dense_vs_sparse.main([*INSTANT, "--only", "skip ", "--out", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "sparse.json").read_text())["rows"]
    assert {(row["spec"]["alibi"], row["spec"]["causal"], row["spec"]["passes"]) for row in found} == {
        (alibi, causal, passes) for alibi in (True, False) for causal in (True, False) for passes in PASSES[:2]
    }
    built = fastattn.backends.cpu.unavailable() is None
    for row in found:
        assert row["wrong"] is None and row["metrics"]["speed-up"] > 0
        assert (row["metrics"]["skipped"] > 0) == (row["spec"]["alibi"] and built)
    assert "skip_negligible" in (tmp_path / "sparse.md").read_text()


def test_skipping_that_changes_a_bit_is_not_timed(monkeypatch):
    right = fastattn.attention
    monkeypatch.setattr(
        fastattn,
        "attention",
        lambda *args, **kwargs: right(*args, **kwargs) * (1 + 1e-7 * bool(kwargs.get("skip_negligible"))),
    )
    row = suites.skip_row(Work(Case(num_heads=2, seqlen_q=64, head_dim=16)), 0.0, Peak())
    assert row.wrong == "skipping changed the result" and row.ours.ms is None


@pytest.mark.parametrize("name", ["random128:12.5%", "window", "neighborhood"])
def test_truth_of_a_pattern_is_the_reference(name):
    work = Work(Case(num_heads=2, seqlen_q=512, head_dim=16), "forward+backward", pattern=name)
    leaves, kwargs, dout = tensors(work, torch.float64)
    out = fastattn.attention(**leaves, **kwargs, backend="reference")
    expected = {"out": out.detach()} | dict(
        zip(leaves, torch.autograd.grad(out, [*leaves.values()], dout), strict=True)
    )
    torch.testing.assert_close(oracle.truth(work)[0], expected, rtol=1e-12, atol=1e-12)


def test_edges_against_a_gather():
    for passes in ("forward", "backward"):
        row = suites.edges_row(64, 5, passes, 0.0)
        assert row.wrong is None and row.metrics["vs gather"] > 0 and row.results["gather"].max_error < 1e-5
        assert row.kernel.startswith("cpu.csr") and row.flops == 64 * 5 * (256 if passes == "forward" else 640)


def test_wrong_edges_are_not_timed(monkeypatch):
    right = fastattn.attention_csr
    monkeypatch.setattr(fastattn, "attention_csr", lambda q, *args, **kwargs: right(2 * q, *args, **kwargs))
    row = suites.edges_row(64, 5, "forward", 0.0)
    assert "max error" in row.wrong and row.ours.ms is None


def test_a_report_names_no_folder_of_the_machine(tmp_path):
    command = report.header(["--quick", "--out", str(tmp_path / "found"), "out/bench"])["command"]
    assert command == "python bench/run.py --quick --out found out/bench"
