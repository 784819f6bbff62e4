"""`make bench-gpu` has never met a GPU here: what can be checked on a CPU is its arithmetic and its path."""

import json

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend

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
    case = Case(seqlen_q=120, num_heads=2, head_dim=16, causal=True)
    monkeypatch.setattr(gpu_parity, "all_calls", lambda: {"one": gpu_parity.of_case(case)})
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


def without_a_quarter(shape, q, k, v):
    return gpu.ours(shape._replace(causal=False), q, k[:, :, shape.seqlen_k // 4 :], v[:, :, shape.seqlen_k // 4 :])()


def without_the_last_tile(shape, q, k, v):
    return gpu.ours(shape, q, k[:, :, :-64], v[:, :, :-64])()


def with_another_gradient(shape, q, k, v):
    """Of v alone, in the last keys of the last head: a tenth of it is lost."""
    kept = torch.ones_like(v)
    kept[-1, -1, -64:] = 0.9
    return gpu.ours(shape, q, k, v * kept + (v * (1 - kept)).detach())()


LONG = Shape("dense", 2, 2, 2, 1000, 1000, 16, "bfloat16")
WRONG = {
    "all of it larger, of few keys": (SMALL, "forward", lambda *call: gpu.ours(*call)() * 1.1),
    "all of it larger": (LONG, "forward", lambda *call: gpu.ours(*call)() * 1.1),
    "zeros": (LONG, "forward", lambda *call: gpu.ours(*call)() * 0),
    "zeros of one row": (LONG._replace(suite="decode", seqlen_q=1), "forward", lambda *call: gpu.ours(*call)() * 0),
    "a quarter of the keys": (LONG, "forward", without_a_quarter),
    "the last keys": (LONG, "forward", without_the_last_tile),
    "no mask": (LONG._replace(causal=True), "forward", lambda shape, *qkv: gpu.ours(LONG, *qkv)()),
    "a gradient": (LONG._replace(causal=True), "forward+backward", with_another_gradient),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_contender_is_not_timed(tmp_path, monkeypatch, name):
    """Rows of many keys are means, so small: they go by their own size."""
    shape, passes, wrong = WRONG[name]
    right = gpu.ours
    monkeypatch.setattr(gpu, "CONTENDERS", {
        "fastattn": lambda *call: lambda: wrong(*call), "flex": right, "none": lambda *call: "not here"
    })  # fmt: skip
    out = tmp_path / "x.json"
    arguments = ["--device", "cpu", "--suite", shape.suite, "--passes", passes, "--out", str(out)]
    assert main(arguments, (shape,), matmul=64) == 1
    rows = {row["contender"]: row for row in json.loads(out.read_text())["rows"]}
    result = "dv" if name == "a gradient" else "out"
    assert rows["fastattn"]["refused"].startswith(f"{result} is wrong by") and "ms" not in rows["fastattn"]
    assert rows["flex"]["ms"] > 0 and rows["flex"]["error"] < 5e-3


def test_queries_at_the_end_of_the_keys(tmp_path, monkeypatch):
    """Contenders mask a part of a prompt as we do: by the last key."""
    monkeypatch.setitem(gpu.CONTENDERS, "sdpa flash", gpu.sdpa(SDPBackend.MATH))
    monkeypatch.setitem(gpu.CONTENDERS, "flex", lambda *call: "compiles for half a minute")
    out = tmp_path / "x.json"
    shape = LONG._replace(suite="decode", seqlen_q=64, causal=True)
    assert main(["--device", "cpu", "--suite", "decode", "--out", str(out)], (shape,), matmul=64) == 0
    rows = {row["contender"]: row for row in json.loads(out.read_text())["rows"]}
    assert rows["fastattn"]["ms"] > 0 and rows["sdpa flash"]["ms"] > 0


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

    cases = [Case(seqlen_q=120, head_dim=head_dim, causal=True, dtype="bfloat16") for head_dim in (16, 24)]
    calls = {str(case): gpu_parity.of_case(case) for case in cases}
    assert all(row["right"] for row in gpu_parity.results("cpu", calls))
    monkeypatch.setattr(gpu_parity, "_attend", wrong)
    (row, failed) = [row for row in gpu_parity.results("cpu", calls) if not row["right"]]
    assert row["result"] == "dk" and 0.09 < row["error"] < 0.11
    assert failed["failed"] == "ValueError: no"


def test_what_parity_calls_is_right_on_a_cpu():
    """All of it, packed sequences and caches in pages among them."""
    rows = gpu_parity.results("cpu")
    assert [row for row in rows if not row["right"]] == []
    assert {row["result"] for row in rows} == {"out", "lse", "dq", "dk", "dv"}
    assert {"packed sequences", "a cache in pages", "a cache in pages of int8"} < {row["case"] for row in rows}


def test_how_far_a_result_is_off():
    """By blocks of rows, each of its own size; an infinity has to be where it is."""
    x = torch.randn(2, 3, 130, 16)
    x[:, :, 64:] *= 1e-3
    assert gpu_parity.share_off(x, x) == 0
    later = x.clone()
    later[1, 2, 64:128] *= 1.5
    assert gpu_parity.share_off(later, x) == pytest.approx(0.5, rel=1e-3)
    later[1, 2, 129] = torch.nan
    assert gpu_parity.share_off(later, x) == torch.inf
    lse = torch.randn(1, 2, 70)
    lse[0, 0, 3] = -torch.inf
    assert gpu_parity.share_off(lse, lse) == 0 and gpu_parity.share_off(lse.nan_to_num(), lse) == torch.inf


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
