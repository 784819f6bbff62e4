"""`make bench-gpu` has never met a GPU here: what can be checked on a CPU is its arithmetic and its path."""

import json

import pytest
import torch
import torch.nn.functional as F

import gpu
from gpu import Shape, main, shapes

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


def test_every_shape_is_what_it_says():
    assert len(set(shapes())) == len(shapes()) and {shape.suite for shape in shapes()} == {"dense", "sparse", "decode"}
    assert all((shape.window is not None) == (shape.suite == "sparse") for shape in shapes())


def no_gradient(shape, q, k, v):
    return lambda: F.scaled_dot_product_attention(
        q.detach(), k.detach(), v.detach(), is_causal=shape.causal, enable_gqa=True
    )


def test_the_whole_path_on_a_cpu(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(gpu.CONTENDERS, "flex", no_gradient)  # to compile takes half a minute
    of = (SMALL, SMALL._replace(suite="sparse", window=7), Shape("decode", 2, 4, 2, 1, 40, 16, "bfloat16"))
    assert main(["--device", "cpu", "--out", str(tmp_path / "x.json")], of, matmul=64) == 0
    found = json.loads((tmp_path / "x.json").read_text())
    assert found["device"] == "cpu" and found["matmul_tflops"] > 0 and found["copy_gbps"] > 0
    assert {(row["suite"], row["passes"]) for row in found["rows"]} == {
        ("dense", "forward"), ("dense", "forward+backward"), ("sparse", "forward"), ("sparse", "forward+backward"),
        ("decode", "forward"),
    }  # fmt: skip
    assert len(found["rows"]) == 5 * len(gpu.CONTENDERS)
    assert all(row["ms"] > 0 for row in found["rows"] if row["contender"] == "fastattn")
    assert any(row.get("refused") == "flash-attn is not installed" for row in found["rows"])
    of_flex = [row for row in found["rows"] if row["contender"] == "flex" and row["suite"] == "dense"]
    assert "ms" in of_flex[0] and "grad" in of_flex[1]["refused"]
    assert "dense forward B2 H4/4 S48x48 D16 bfloat16 causal" in capsys.readouterr().out


def test_a_wrong_contender_is_not_timed(tmp_path, monkeypatch):
    monkeypatch.setitem(gpu.CONTENDERS, "fastattn", lambda shape, q, k, v: lambda: gpu.ours(shape, q, k, v)() * 1.1)
    out = tmp_path / "x.json"
    assert main(["--device", "cpu", "--passes", "forward", "--out", str(out)], (SMALL,), matmul=64) == 1
    rows = {row["contender"]: row for row in json.loads(out.read_text())["rows"]}
    assert "wrong" in rows["fastattn"]["refused"] and "ms" not in rows["fastattn"]


def test_without_a_gpu_it_says_so(capsys):
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(SystemExit):
        main([])
    assert "torch sees no GPU" in capsys.readouterr().err
