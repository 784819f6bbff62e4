"""The self-check refuses nothing for what rounding, overflow and underflow do to it, in the interpreter."""

import process

process.require(interpreted=True)

import pytest  # noqa: E402
import torch  # noqa: E402

import fastattn  # noqa: E402
from checking import BASE, begin_process, compiling_device, note_checks  # noqa: E402
from fastattn import outputs  # noqa: E402
from fastattn.backends import proven, selfcheck  # noqa: E402
from on_device import on_device  # noqa: E402
from strict_interpreter import harden  # noqa: E402

harden()


@pytest.fixture(autouse=True)
def device(tmp_path):
    with compiling_device(tmp_path):
        yield


@pytest.fixture
def checks(monkeypatch) -> list[str]:
    """Each process checks: none has proven anything."""
    monkeypatch.setattr(proven, "add", lambda *args: None)
    return note_checks(monkeypatch)


def train(q, k, v, generator, factor: float = 1.0, **kwargs) -> None:
    """A forward and a backward pass; factor: of the cotangent."""
    begin_process()
    q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
    learned = [x for x in kwargs.values() if isinstance(x, torch.Tensor) and x.requires_grad]
    out = fastattn.attention(q, k, v, backend="triton", **kwargs)
    dout = (torch.randn(out.shape, generator=generator) * factor).to(out.dtype)
    torch.autograd.grad(out, (q, k, v, *learned), dout)


@pytest.mark.parametrize("delta", ["of out in float32", "of out in 16 bits", "of all weights"])
def test_delta_beside_rounded_weights(delta, checks, monkeypatch):
    """Rows of few keys, whose dq and dk are what is left of dP - delta: seeds at which delta's own rounding is most of
    their error."""
    monkeypatch.setattr(outputs, "ROUNDED_DELTA", delta == "of out in 16 bits")
    more = {"sinks": torch.zeros(1, requires_grad=True)} if delta == "of all weights" else {}
    for seed in (2, 3, 5):
        generator = torch.Generator().manual_seed(seed)
        qkv = [torch.randn(4, 1, 16, 64, generator=generator).bfloat16() for _ in range(3)]
        train(*qkv, generator, causal=True, **more)
    assert {where.partition("[")[0] for where in checks} == {"out", "lse", "dq", "dk", "dv"}


@pytest.mark.parametrize("factor", [1e-6, 1.5e4])
def test_cotangents_of_a_scaled_loss(factor, checks):
    """In float16 gradients fall below its smallest number, or dS overflows."""
    (q, k, v), kwargs = on_device(BASE._replace(dtype="float16", head_dim=64))
    train(q, k, v, torch.Generator().manual_seed(3), factor, **kwargs)
    assert any(where.startswith("dq") for where in checks)


def test_gradients_below_the_smallest_normal_number(checks):
    (q, k, v), kwargs = on_device(BASE)
    train(q, k, v, torch.Generator().manual_seed(3), 1e-39, **kwargs)
    assert any(where.startswith("dv") for where in checks)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_rows_that_a_finite_bias_hides(dtype, checks):
    """Such a row has an lse that is no number in units of log2."""
    (q, k, v), kwargs = on_device(BASE._replace(dtype=dtype))
    bias = torch.zeros(40, 50, dtype=q.dtype)
    bias[:, 20:] = bias[5] = torch.finfo(q.dtype).min
    out, _ = fastattn.attention(q, k, v, bias=bias, return_lse=True, backend="triton", **kwargs)
    assert checks and out.isfinite().all()
    train(q, k, v, torch.Generator().manual_seed(3), bias=bias, **kwargs)


def test_dropout_of_most_weights(checks):
    (q, k, v), kwargs = on_device(BASE._replace(dtype="float16", dropout_p=0.95))
    train(q, k, v, torch.Generator().manual_seed(3), **kwargs)
    assert checks


def test_without_keys(checks, recwarn):
    """There is nothing to compare: the next call with the same code is."""
    (q, k, v), _ = on_device(BASE._replace(causal=False))
    fastattn.attention(q, k[:, :, :0], v[:, :, :0], backend="triton")
    assert checks == [] and not [x for x in recwarn if "self-check" in str(x.message)]
    fastattn.attention(q, k, v, backend="triton")
    assert checks


def test_a_result_that_may_be_anything_is_not_compared():
    """Beside a tolerance that is not finite, an infinity where rounding decides of it, a number below the smallest."""

    def mismatch(value, expected, tolerance, dtype=torch.float16):
        value, expected, tolerance = (torch.tensor([x]) for x in (value, expected, tolerance))
        off, _, is_free = selfcheck._mismatch(selfcheck.Found("x", value.to(dtype), expected, tolerance))
        return off.item(), bool(is_free)

    inf, nan = float("inf"), float("nan")
    assert mismatch(nan, 1.0, inf) == mismatch(1.0, 2.0, nan) == mismatch(1.0, nan, 0.0) == (0.0, True)
    assert mismatch(inf, 65500.0, 100.0) == (0.0, True) and mismatch(-inf, -inf, 0.0) == (0.0, False)
    assert mismatch(6e-8, 0.0, 0.0) == (0.0, False) and mismatch(1e-40, 0.0, 0.0, torch.bfloat16) == (0.0, False)
    assert mismatch(nan, 65500.0, 100.0)[0] == mismatch(inf, 60000.0, 100.0)[0] == mismatch(0.0, -inf, 0.0)[0] == inf
    assert mismatch(1.0, 0.5, 0.25)[0] == 0.5
