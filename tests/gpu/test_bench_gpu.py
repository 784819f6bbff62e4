"""`make bench-gpu` has never met a GPU here: what can be checked on a CPU is its arithmetic and its path."""

import json

import pytest
import torch
import torch.nn.functional as F

import gpu
import gpu_parity
from cases import Case
from gpu import Shape, main, shapes
from gpu_bounds import static_bound
from plots import draw_gpu

SMALL = Shape("dense", 2, 4, 4, 48, 48, 16, "bfloat16", causal=True)


def dense_mask(shape: Shape) -> torch.Tensor:
    i = torch.arange(shape.seqlen_q)[:, None] + shape.seqlen_k - shape.seqlen_q
    j = torch.arange(shape.seqlen_k)[None, :]
    seen = j <= i if shape.causal else torch.ones(shape.seqlen_q, shape.seqlen_k, dtype=torch.bool)
    return seen if shape.window is None else seen & (i - j <= shape.window)


@pytest.mark.parametrize(
    "shape", [SMALL, SMALL._replace(causal=False), SMALL._replace(window=7), SMALL._replace(seqlen_q=9)], ids=str
)
def test_pairs_are_those_of_the_mask(shape):
    assert shape.pairs == int(dense_mask(shape).sum()) * shape.batch * shape.num_heads
    assert shape.flops("forward") == 4 * 16 * shape.pairs and shape.flops("forward+backward") == 14 * 16 * shape.pairs


def test_bytes_of_decoding():
    shape = Shape("decode", 3, 8, 2, 1, 100, 64, "bfloat16")
    q, k, v = gpu.tensors(shape, "cpu", "forward")
    assert shape.bytes == sum(x.numel() * x.element_size() for x in (q, k, v, q))


@pytest.mark.parametrize("full", [False, True])
def test_every_shape_is_what_it_says(full):
    made = shapes(full)
    assert len(set(made)) == len(made) and {shape.suite for shape in made} == {"dense", "sparse", "decode"}
    assert all((shape.window is not None) == (shape.suite == "sparse") for shape in made)
    assert set(shapes()) <= set(shapes(full=True))


def no_gradient(shape, q, k, v):
    return lambda: F.scaled_dot_product_attention(
        q.detach(), k.detach(), v.detach(), is_causal=shape.causal, enable_gqa=True
    )


def test_the_whole_path_on_a_cpu(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(gpu.CONTENDERS, "flex", no_gradient)  # to compile takes half a minute
    monkeypatch.setattr(gpu_parity, "CASES", (Case(seqlen_q=20, num_heads=2, head_dim=16, causal=True),))
    of = (SMALL, SMALL._replace(suite="sparse", window=7), Shape("decode", 2, 4, 2, 1, 40, 16, "bfloat16"))
    assert main(["--device", "cpu", "--out", str(tmp_path / "x.json")], of, matmul=64) == 0
    found = json.loads((tmp_path / "x.json").read_text())
    assert [row["result"] for row in found["parity"]] == ["out", "lse", "dq", "dk", "dv"]
    assert all(row["right"] for row in found["parity"]) and found["left_out"] == [] and (tmp_path / "x.png").exists()
    assert found["device"] == "cpu" and found["matmul_tflops"] > 0 and found["copy_gbps"] > 0
    assert {(row["suite"], row["passes"]) for row in found["rows"]} == {
        ("dense", "forward"), ("dense", "forward+backward"), ("sparse", "forward"), ("sparse", "forward+backward"),
        ("decode", "forward"),
    }  # fmt: skip
    assert len(found["rows"]) == 5 * len(gpu.CONTENDERS)
    assert all(row["ms"] > 0 for row in found["rows"] if row["contender"] == "fastattn")
    for name in ("flash-attn", "flash-attn 3"):
        assert any(row.get("refused") == f"{name} is not installed" for row in found["rows"])
    of_flex = [row for row in found["rows"] if row["contender"] == "flex" and row["suite"] == "dense"]
    assert "ms" in of_flex[0] and "grad" in of_flex[1]["refused"]
    printed = capsys.readouterr().out
    assert "dense forward B2 H4/4 S48x48 D16 bfloat16 causal" in printed
    assert "parity: 5 of 5 results are right" in printed and "x.png" in printed


def test_a_wrong_contender_is_not_timed(tmp_path, monkeypatch):
    monkeypatch.setitem(gpu.CONTENDERS, "fastattn", lambda shape, q, k, v: lambda: gpu.ours(shape, q, k, v)() * 1.1)
    monkeypatch.setitem(gpu.CONTENDERS, "flex", no_gradient)
    out = tmp_path / "x.json"
    arguments = ["--device", "cpu", "--suite", "dense", "--passes", "forward", "--out", str(out)]
    assert main(arguments, (SMALL,), matmul=64) == 1
    rows = {row["contender"]: row for row in json.loads(out.read_text())["rows"]}
    assert "wrong" in rows["fastattn"]["refused"] and "ms" not in rows["fastattn"]


def test_a_contender_of_ours_that_fails_is_reported_and_the_rest_goes_on(tmp_path, monkeypatch):
    def fail(shape, q, k, v):
        raise RuntimeError("no kernel image\nand more")

    monkeypatch.setitem(gpu.CONTENDERS, "fastattn", fail)
    monkeypatch.setitem(gpu.CONTENDERS, "flex", no_gradient)
    out = tmp_path / "x.json"
    arguments = ["--device", "cpu", "--suite", "dense", "--passes", "forward", "--out", str(out)]
    assert main(arguments, (SMALL, SMALL._replace(causal=False)), matmul=64) == 1
    rows = json.loads(out.read_text())["rows"]
    ours = [row for row in rows if row["contender"] == "fastattn"]
    assert [row["refused"] for row in ours] == ["RuntimeError: no kernel image"] * 2 and "fail(" not in ours[0][
        "refused"
    ]
    assert "raise RuntimeError" in ours[0]["traceback"] and any("ms" in row for row in rows)


def test_what_there_is_no_time_for_is_named(tmp_path):
    out = tmp_path / "x.json"
    arguments = ["--device", "cpu", "--suite", "dense", "--seconds", "0", "--out", str(out)]
    assert main(arguments, (SMALL,), matmul=64) == 0
    found = json.loads(out.read_text())
    assert found["rows"] == [] and len(found["left_out"]) == 2 and "forward+backward" in found["left_out"][1]
    assert not (tmp_path / "x.png").exists()


def test_parity_says_what_is_wrong(monkeypatch):
    """A result that is off by a little more than rounding, and a call that fails."""
    right = gpu_parity._attend

    def wrong(case, device, backend):
        found = right(case, device, backend)
        if backend == "triton" and case.head_dim == 24:
            raise ValueError("no\nmore")
        if backend == "triton":
            found["dk"][..., 3, 0] += 0.1 * found["dk"].abs().max()
        return found

    cases = [Case(seqlen_q=20, head_dim=head_dim, causal=True, dtype="bfloat16") for head_dim in (16, 24)]
    assert all(row["right"] for row in gpu_parity.results("cpu", cases))
    monkeypatch.setattr(gpu_parity, "_attend", wrong)
    rows = gpu_parity.results("cpu", cases)
    (row, failed) = [row for row in rows if not row["right"]]
    assert row["result"] == "dk" and 0.09 < row["error"] / (row["allowed"] / 2e-2) < 0.11
    assert failed["failed"] == "ValueError: no"


def test_the_static_bound_is_that_of_the_golden_file():
    shape = Shape("dense", 2, 16, 16, 8192, 8192, 128, "bfloat16", causal=True)
    forward, both = (static_bound("sm_90", shape, passes) for passes in gpu.PASSES)
    assert 0.3 < both < forward < 1.0  # scores are computed twice more for gradients than the rate counts
    assert static_bound("sm_90", shape._replace(suite="decode"), "forward") is None
    assert static_bound("gfx942", shape, "forward") is None and static_bound("sm_999", shape, "forward") is None


def test_the_picture(tmp_path):
    """Of invented figures, with gaps; none where nothing was timed."""
    rows = []
    for shape in shapes():
        for passes in gpu.PASSES if shape.suite != "decode" else gpu.PASSES[:1]:
            for place, name in enumerate(gpu.CONTENDERS):
                figures = {"ms": 1.0, "share_of_matmul": 0.1 * place + 0.2, "share_of_copy": 0.9 - 0.1 * place}
                rows.append({**shape._asdict(), "passes": passes, "contender": name, **figures, "static_bound": 0.6})
                if name == "sdpa cudnn" and shape.window is not None:
                    rows[-1] = {**shape._asdict(), "passes": passes, "contender": name, "refused": "no window"}
    found = {"rows": rows, "parity": [{"right": True}], "device": "A GPU", "matmul_tflops": 700.0, "copy_gbps": 3000.0}
    assert draw_gpu(tmp_path / "x.png", found) and (tmp_path / "x.png").stat().st_size > 20_000
    assert not draw_gpu(tmp_path / "y.png", found | {"rows": [row for row in rows if "refused" in row]})


def test_without_a_gpu_it_says_so(capsys):
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(SystemExit):
        main([])
    assert "torch sees no GPU" in capsys.readouterr().err
