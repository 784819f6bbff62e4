"""What `attention` takes and what it refuses: one line that names the argument, its value, the rule, the fix."""

import dataclasses
import inspect
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import fastattn
from fastattn import Mask
from fastattn.backends import cpu

BACKENDS = ["reference"] + (["cpu"] if cpu.unavailable() is None else [])
backends = pytest.mark.parametrize("backend", BACKENDS)


SHAPES = (2, 4, 3, 8), (2, 2, 5, 8), (2, 2, 5, 6)


def call(function=fastattn.attention, **changes):
    """A valid call with some arguments replaced: B2 H4/2 S3x5 D8/6."""
    arguments = {name: torch.randn(shape) for name, shape in zip("qkv", SHAPES, strict=True)} | changes
    return function(arguments.pop("q"), arguments.pop("k"), arguments.pop("v"), **arguments)


def ones(*shape, **kwargs):
    return torch.ones(*shape, **kwargs)


SCALARS = {"list": [0.5], "array": np.array(0.5), "numpy float": np.float32(0.5), "str": "a", "complex": 1j}
BAD_INPUT = {  # name: (changed arguments, error, pattern)
    "q rank 3": ({"q": ones(4, 3, 8)}, ValueError, r"q has shape \(4, 3, 8\); .*\[batch, num_heads, .*unsqueeze"),
    "k rank 5": ({"k": ones(1, 2, 2, 5, 8)}, ValueError, r"k has shape \(1, 2, 2, 5, 8\); it must be \[batch"),
    "v rank 0": ({"v": torch.tensor(1.0)}, ValueError, r"v has shape \(\)"),
    "head_dim": (
        {"k": ones(2, 2, 5, 7)},
        ValueError,
        r"k has shape \(2, 2, 5, 7\); .* \(2, 4, 3, 8\) it must be \(2, 2, 5, 8\)",
    ),
    "head_dim 0": ({"q": ones(2, 4, 3, 0), "k": ones(2, 2, 5, 0)}, ValueError, "head_dim=0, .*at least 1"),
    "head_dim_v 0": ({"v": ones(2, 2, 5, 0)}, ValueError, "head_dim_v=0: .*at least 1"),
    "batch of k": ({"k": ones(3, 2, 5, 8)}, ValueError, r"k has shape \(3, 2, 5, 8\); .*must be \(2, 2, 5, 8\)"),
    "batch of v": ({"v": ones(1, 2, 5, 6)}, ValueError, r"v has shape \(1, 2, 5, 6\); .*must be \(2, 2, 5, 6\)"),
    "seqlen of v": ({"v": ones(2, 2, 4, 6)}, ValueError, r"v has shape \(2, 2, 4, 6\); .*must be \(2, 2, 5, 6\)"),
    "heads of v": ({"v": ones(2, 4, 5, 6)}, ValueError, r"v has shape \(2, 4, 5, 6\); .*must be \(2, 2, 5, 6\)"),
    "heads": (
        {"k": ones(2, 3, 5, 8), "v": ones(2, 3, 5, 6)},
        ValueError,
        "num_heads=4 and k has num_heads_k=3; num_heads must be a multiple",
    ),
    "no key heads": ({"k": ones(2, 0, 5, 8), "v": ones(2, 0, 5, 6)}, ValueError, "num_heads_k=0; .*multiple"),
    "flash-attn's layout": (
        {"q": ones(2, 3, 4, 8), "k": ones(2, 5, 4, 8), "v": ones(2, 5, 4, 8)},
        ValueError,
        r"num_heads=3 .*num_heads_k=5; .*transpose\(1, 2\)",
    ),
    "dtype mix": ({"k": ones(2, 2, 5, 8).half()}, TypeError, r"dtypes torch.float32, torch.float16.*cast with .to"),
    "int": ({n: ones(2, 2, 5, 8, dtype=torch.int32) for n in "qkv"}, TypeError, "q has dtype torch.int32; supported"),
    "complex": ({n: ones(2, 2, 5, 8, dtype=torch.complex64) for n in "qkv"}, TypeError, "torch.complex64; supported"),
    "float8": (
        {n: ones(2, 2, 5, 8).to(torch.float8_e4m3fn) for n in "qkv"},
        TypeError,
        "q has dtype torch.float8_e4m3fn; supported are float16, bfloat16, float32, float64",
    ),
    "device mix": ({"k": ones(2, 2, 5, 8, device="meta")}, ValueError, "q, k, v are on cpu, meta, cpu; .*one device"),
    "q None": ({"q": None}, TypeError, "q must be a torch.Tensor, got NoneType"),
    "k list": ({"k": [[1.0]]}, TypeError, "k must be a torch.Tensor, got list"),
    "q array": ({"q": np.ones((2, 4, 3, 8), np.float32)}, TypeError, "q must be a torch.Tensor, got ndarray"),
    "v array": ({"v": np.ones((2, 2, 5, 6), np.float32)}, TypeError, "v must be a torch.Tensor, got ndarray"),
    "all arrays": (
        {n: np.ones((2, 2, 5, 8), np.float32) for n in "qkv"},
        TypeError,
        "q must be a torch.Tensor, got ndarray",
    ),
    "mask list": ({"mask": [[True]]}, TypeError, "mask must be a Mask, a BlockMask or a bool tensor, got list"),
    "mask array": (
        {"mask": np.ones((3, 5), bool)},
        TypeError,
        "mask must be a Mask, a BlockMask or a bool tensor, got ndarray",
    ),
    "mask class": ({"mask": Mask}, TypeError, "mask must be a Mask, a BlockMask or a bool tensor, got type"),
    "mask method": ({"mask": Mask.causal}, TypeError, "mask must be a Mask, a BlockMask or a bool tensor, got method"),
    "mask float": ({"mask": torch.zeros(3, 5)}, TypeError, "mask has dtype torch.float32; it must be bool.*bias="),
    "mask int": ({"mask": ones(3, 5, dtype=torch.int64)}, TypeError, "mask has dtype torch.int64; it must be bool"),
    "mask shape": (
        {"mask": ones(5, 3, dtype=torch.bool)},
        ValueError,
        r"mask has shape \(5, 3\); it must be broadcastable to .*\(2, 4, 3, 5\)",
    ),
    "mask of key heads": ({"mask": ones(2, 2, 3, 5, dtype=torch.bool)}, ValueError, r"mask has shape \(2, 2, 3, 5\)"),
    "mask rank 5": ({"mask": ones(1, 1, 1, 3, 5, dtype=torch.bool)}, ValueError, r"mask has shape \(1, 1, 1, 3, 5\)"),
    "mask device": ({"mask": ones(3, 5, dtype=torch.bool, device="meta")}, ValueError, "mask is on meta, q on cpu"),
    "mask batch": ({"mask": Mask.lengths(torch.tensor([1, 2, 3]))}, ValueError, r"k_end of mask has shape \(3, 1, 1\)"),
    "mask queries": ({"mask": Mask.intervals(ones(1, 1, 4).int())}, ValueError, r"k_start of mask has .*\(1, 1, 4\)"),
    "causal str": ({"causal": "top_left"}, TypeError, "causal='top_left' must be True or False; mask=Mask.causal"),
    "causal tensor": ({"causal": ones(3, 5, dtype=torch.bool)}, TypeError, "causal=tensor.* must be True or False"),
    "window int": ({"window_size": 4}, TypeError, r"window_size=4 must be a pair .*\(n - 1, 0\)"),
    "window triple": ({"window_size": (1, 2, 3)}, TypeError, r"window_size=\(1, 2, 3\) must be a pair"),
    "flash-attn's -1": ({"window_size": (-1, 0)}, ValueError, r"window_size=\(-1, 0\): left must be >= 0; use None"),
    "window negative": ({"window_size": (0, -3)}, ValueError, r"window_size=\(0, -3\): right must be >= 0"),
    "window float": ({"window_size": (2.0, 0)}, TypeError, "left must be an int >= 0 or None, got 2.0"),
    "scale shape": (
        {"softmax_scale": ones(2)},
        ValueError,
        r"softmax_scale has shape \(2,\); it must be one number or \[num_heads\], here \(4,\)",
    ),
    "scale of rank 2": ({"softmax_scale": ones(4, 1)}, ValueError, r"softmax_scale has shape \(4, 1\)"),
    "scale dtype": ({"softmax_scale": ones(4).int()}, TypeError, "softmax_scale has dtype torch.int32; supported are"),
    "scale device": ({"softmax_scale": ones(4, device="meta")}, ValueError, "softmax_scale is on meta, q on cpu"),
    "scale inf": ({"softmax_scale": math.inf}, ValueError, "softmax_scale=inf must be finite"),
    "scale NaN": ({"softmax_scale": math.nan}, ValueError, "softmax_scale=nan must be finite"),
    "softcap negative": ({"softcap": -1.0}, ValueError, r"softcap=-1.0 must be >= 0 \(0 turns it off\)"),
    "softcap None": ({"softcap": None}, TypeError, "softcap=None must be a float"),
    "softcap tensor": ({"softcap": ones(4)}, TypeError, r"softcap is a tensor of shape \(4,\)"),
    "dropout 1": ({"dropout_p": 1.0}, ValueError, r"dropout_p=1.0 must be in \[0, 1\)"),
    "dropout negative": ({"dropout_p": -0.1}, ValueError, r"dropout_p=-0.1 must be in \[0, 1\)"),
    "dropout True": ({"dropout_p": True}, ValueError, r"dropout_p=True must be in \[0, 1\)"),
    "dropout None": ({"dropout_p": None}, TypeError, "dropout_p=None must be a float"),
    "seed negative": ({"dropout_p": 0.1, "seed": -1}, ValueError, r"seed=-1 must be an int in 0 \.\.\. 2\^63 - 1"),
    "seed large": ({"dropout_p": 0.1, "seed": 2**63}, ValueError, "seed=9223372036854775808 must be an int"),
    "seed float": ({"dropout_p": 0.1, "seed": 1.5}, ValueError, "seed=1.5 must be an int"),
    "seed without dropout": ({"seed": "x"}, ValueError, "seed='x' must be an int"),
    "bias bool": ({"bias": ones(3, 5, dtype=torch.bool)}, TypeError, "bias has dtype torch.bool; .*mask="),
    "bias int": ({"bias": ones(3, 5, dtype=torch.int32)}, TypeError, "bias has dtype torch.int32; supported are"),
    "bias shape": ({"bias": ones(3, 4)}, ValueError, r"bias has shape \(3, 4\); .*broadcastable to .*\(2, 4, 3, 5\)"),
    "bias float": ({"bias": 0.5}, TypeError, "bias must be a torch.Tensor, got float"),
    "bias array": ({"bias": np.ones((3, 5), np.float32)}, TypeError, "bias must be a torch.Tensor, got ndarray"),
    "bias device": ({"bias": ones(3, 5, device="meta")}, ValueError, "bias is on meta, q on cpu; .*one device"),
    "slopes shape": ({"alibi_slopes": ones(2)}, ValueError, r"alibi_slopes has shape \(2,\); .*\(4,\) or \(2, 4\)"),
    "slopes list": ({"alibi_slopes": [0.1] * 4}, TypeError, "alibi_slopes must be a torch.Tensor, got list"),
    "slopes dtype": ({"alibi_slopes": ones(4).int()}, TypeError, "alibi_slopes has dtype torch.int32"),
    "slopes device": ({"alibi_slopes": ones(4, device="meta")}, ValueError, "alibi_slopes is on meta, q on cpu"),
    "sinks shape": (
        {"sinks": ones(2, 4)},
        ValueError,
        r"sinks has shape \(2, 4\); it must be \[num_heads\], here \(4,\)",
    ),
    "sinks of key heads": ({"sinks": ones(2)}, ValueError, r"sinks has shape \(2,\)"),
    "sinks float": ({"sinks": 0.0}, TypeError, "sinks must be a torch.Tensor, got float"),
    "sinks array": ({"sinks": np.ones(4, np.float32)}, TypeError, "sinks must be a torch.Tensor, got ndarray"),
    "sinks dtype": ({"sinks": ones(4, dtype=torch.int64)}, TypeError, "sinks has dtype torch.int64"),
    "return_lse str": ({"return_lse": "yes"}, TypeError, "return_lse='yes' must be True or False"),
    "return_lse list": ({"return_lse": []}, TypeError, r"return_lse=\[\] must be True or False"),
    "backend": ({"backend": "cuda"}, ValueError, "backend='cuda' is not a backend; choose one of cpu, triton, ref"),
    "backend kernel": ({"backend": "cpu.prefill"}, ValueError, "backend='cpu.prefill' is not a backend"),
    "backend empty": ({"backend": ""}, ValueError, "backend='' is not a backend"),
    "backend list": ({"backend": ["cpu"]}, ValueError, r"backend=\['cpu'\] is not a backend"),
    **{
        f"{argument} {kind}": ({argument: value}, TypeError, f"{argument}=.* must be a float")
        for argument in ("softmax_scale", "softcap", "dropout_p")
        for kind, value in SCALARS.items()
    },
}


@pytest.mark.parametrize("with_grad", [True, False], ids=["grad", "no_grad"])
@pytest.mark.parametrize("name", BAD_INPUT)
def test_bad_input(name, with_grad):
    changes, error, pattern = BAD_INPUT[name]
    with torch.set_grad_enabled(with_grad):
        for function in (fastattn.attention, fastattn.explain):
            for _ in range(2):  # the second call must not find anything cached
                with pytest.raises(error, match=pattern) as caught:
                    call(function, **changes)
                assert "\n" not in str(caught.value), "one line"
                assert len(str(caught.value)) < 300


def to_meta(x):
    if isinstance(x, Mask):
        bounds = {name: getattr(x, name) for name in ("k_start", "k_end")}
        return dataclasses.replace(x, **{name: to_meta(bound) for name, bound in bounds.items()})
    return x.to("meta") if isinstance(x, torch.Tensor) else x


@pytest.mark.parametrize("name", [name for name in BAD_INPUT if "device" not in name])
def test_bad_input_on_a_device(name):
    """The same errors, and no value is read from a tensor to find them: those on "meta" have none."""
    changes, error, pattern = BAD_INPUT[name]
    arguments = {n: torch.empty(shape, device="meta") for n, shape in zip("qkv", SHAPES, strict=True)}
    arguments |= {name: to_meta(x) for name, x in changes.items()}
    with pytest.raises(error, match=pattern):
        call(**{"backend": "triton"} | arguments)


def test_a_refusal_leaves_the_call_usable():
    expected = call(q=ones(2, 4, 3, 8), k=ones(2, 2, 5, 8), v=ones(2, 2, 5, 6))
    with pytest.raises(ValueError, match="softcap"):
        call(softcap=-1.0)
    assert torch.equal(expected, call(q=ones(2, 4, 3, 8), k=ones(2, 2, 5, 8), v=ones(2, 2, 5, 6)))


def test_unknown_keyword():
    for function in (fastattn.attention, fastattn.explain):
        for name in ("attn_mask", "is_causal", "scale", "window", "deterministic"):
            with pytest.raises(TypeError, match=f"unexpected keyword argument '{name}'"):
                call(function, **{name: None})


def test_options_are_keywords():
    with pytest.raises(TypeError, match="3 positional arguments"):
        fastattn.attention(ones(1, 1, 2, 4), ones(1, 1, 2, 4), ones(1, 1, 2, 4), None)


def test_explain_takes_what_attention_takes():
    def names_and_defaults(function):
        return [(p.name, p.kind, p.default) for p in inspect.signature(function).parameters.values()]

    assert names_and_defaults(fastattn.explain) == names_and_defaults(fastattn.attention)


FIXED = {"q": torch.ones(2, 4, 3, 8), "k": torch.arange(160.0).view(2, 2, 5, 8) / 160, "v": torch.ones(2, 2, 5, 6)}


def test_values_that_equal_their_plain_form():
    """True, 1 and 1.0 hash alike: whichever comes first, each is accepted and means the same."""
    for first, second in ((0.0, False), (False, 0.0)):
        call(dropout_p=first, softcap=0.25), call(dropout_p=second, softcap=0.25)
    for value in (1, True, 1.0, np.float64(1.0)):
        assert torch.equal(call(**FIXED, softmax_scale=value), call(**FIXED, softmax_scale=1.0))
    assert torch.equal(call(**FIXED, causal=1), call(**FIXED, causal=True))
    assert torch.equal(call(**FIXED, causal=None), call(**FIXED))
    assert torch.equal(call(**FIXED, window_size=[1, 0]), call(**FIXED, window_size=(1, 0)))
    assert torch.equal(call(**FIXED, window_size=(2**70, None)), call(**FIXED))
    assert isinstance(call(return_lse=1), tuple) and isinstance(call(return_lse=None), torch.Tensor)


# --- sizes of zero ---------------------------------------------------------------------------------------------------

EVERY_OPTION = {  # for batch b, heads h, lengths sq and sk
    "plain": lambda b, h, sq, sk: {},
    "causal": lambda b, h, sq, sk: {"causal": True},
    "window": lambda b, h, sq, sk: {"window_size": (2, 1)},
    "bool": lambda b, h, sq, sk: {"mask": ones(b, h, sq, sk, dtype=torch.bool)},
    "lengths": lambda b, h, sq, sk: {"mask": Mask.lengths(torch.full((b,), sk))},
    "bias": lambda b, h, sq, sk: {"bias": torch.zeros(b, 1, sq, sk)},
    "sinks and alibi": lambda b, h, sq, sk: {"sinks": ones(h), "alibi_slopes": ones(b, h)},
    "dropout": lambda b, h, sq, sk: {"dropout_p": 0.5, "seed": 1},
    "gradient": lambda b, h, sq, sk: {"bias": torch.zeros(sq, sk, requires_grad=True)},
}


@backends
@pytest.mark.parametrize("option", EVERY_OPTION)
@pytest.mark.parametrize("zero", ["batch", "num_heads", "seqlen_q", "seqlen_k", "both seqlens", "all"])
def test_zero_sizes_are_valid(zero, option, backend):
    b, h, sq, sk = (
        0 if zero in names else size
        for size, names in (
            (2, ("batch", "all")),
            (3, ("num_heads", "all")),
            (4, ("seqlen_q", "both seqlens", "all")),
            (5, ("seqlen_k", "both seqlens", "all")),
        )
    )
    kwargs = EVERY_OPTION[option](b, h, sq, sk)
    if option in ("dropout", "gradient"):
        backend = None
    q, k, v = torch.randn(b, h, sq, 8), torch.randn(b, h, sk, 8), torch.randn(b, h, sk, 6)
    out, lse = fastattn.attention(q, k, v, **kwargs, return_lse=True, backend=backend)
    assert out.shape == (b, h, sq, 6) and lse.shape == (b, h, sq) and out.dtype == q.dtype
    if zero == "seqlen_k":
        assert (out == 0).all() and (lse == (1.0 if "sinks" in kwargs else -math.inf)).all()


@backends
def test_grouped_heads_of_none(backend):
    out = fastattn.attention(ones(1, 0, 2, 8), ones(1, 3, 2, 8), ones(1, 3, 2, 8), backend=backend)
    assert out.shape == (1, 0, 2, 8)


# --- tensors of every make -------------------------------------------------------------------------------------------


@backends
@pytest.mark.parametrize("name", ["q", "k", "v", "bias", "mask", "alibi_slopes", "sinks", "k_end"])
@pytest.mark.parametrize("how", ["transposed", "strided", "broadcast", "offset"])
def test_any_strides(name, how, backend):
    tensors = {
        "q": torch.randn(2, 4, 3, 8),
        "k": torch.randn(2, 2, 5, 8),
        "v": torch.randn(2, 2, 5, 6),
        "bias": torch.randn(2, 4, 3, 5),
        "mask": torch.rand(2, 4, 3, 5) < 0.8,
        "alibi_slopes": torch.rand(2, 4),
        "sinks": torch.randn(4),
        "k_end": torch.randint(0, 6, (2, 4, 3)),
    }
    x = tensors[name]
    if how == "transposed":
        x = x.mT.contiguous().mT if x.dim() > 1 else x.flip(0)
    elif how == "strided":
        x = torch.stack([x, x], -1).flatten(-2)[..., ::2]
    elif how == "broadcast":
        x = x[:1].expand(x.shape)
    else:
        x = torch.cat([x.flatten(), x.flatten()])[x.numel() - 1 :][: x.numel()].view(x.shape)

    def run(**changed):
        arguments = {**tensors, **changed}
        k_end, mask = arguments.pop("k_end"), arguments.pop("mask")
        q, k, v = arguments.pop("q"), arguments.pop("k"), arguments.pop("v")
        mask = Mask.intervals(k_end=k_end) if name == "k_end" else mask
        return fastattn.attention(q, k, v, mask=mask, **arguments, backend=backend)

    torch.testing.assert_close(run(**{name: x}), run(**{name: x.clone(memory_format=torch.contiguous_format)}))


@backends
def test_lazily_negated_memory(backend):
    """The imaginary part of a conjugate is stored with the other sign."""
    negated = torch.randn(1, 2, 5, 8, dtype=torch.complex64).conj().imag
    bias = torch.randn(5, 5, dtype=torch.complex64).conj().imag
    assert negated.is_neg() and bias.is_neg()
    plain = negated.resolve_neg()
    expected = fastattn.attention(plain, plain + 1, plain, bias=bias.resolve_neg(), backend=backend)
    torch.testing.assert_close(fastattn.attention(negated, plain + 1, plain, bias=bias, backend=backend), expected)
    torch.testing.assert_close(fastattn.attention(plain, plain + 1, negated, bias=bias, backend=backend), expected)


def test_tensors_without_memory_do_not_crash_the_process():
    """Fake tensors (torch.compile, torch.export) reach the kernel only if nobody stops them."""
    code = """
import torch, fastattn
from torch._subclasses.fake_tensor import FakeTensorMode
print("started", flush=True)
with FakeTensorMode():
    q = torch.empty(1, 2, 64, 32)
    fastattn.attention(q, q, q)
"""
    root = Path(fastattn.__file__).parents[1]
    result = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert "started" in result.stdout, result.stderr
    assert result.returncode in (0, 1), f"died of signal {-result.returncode}"


@pytest.mark.parametrize("name", ["q", "k", "v", "bias", "mask"])
def test_sparse_tensors_raise(name):
    sparse = {"q": (2, 4, 3, 8), "k": (2, 2, 5, 8), "v": (2, 2, 5, 6), "bias": (3, 5), "mask": (3, 5)}[name]
    x = torch.ones(sparse, dtype=torch.bool if name == "mask" else torch.float32).to_sparse()
    with pytest.raises((RuntimeError, TypeError, NotImplementedError)):
        call(**{name: x})


def test_inference_tensors():
    with torch.inference_mode():
        q = torch.randn(1, 2, 3, 8)
        inside = fastattn.attention(q, q, q)
    assert torch.equal(inside, fastattn.attention(q, q, q))


# --- derivatives -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["q", "k", "v", "bias", "alibi_slopes", "sinks"])
def test_every_float_input_gets_a_gradient(name):
    x = {
        "q": torch.randn(2, 4, 3, 8),
        "k": torch.randn(2, 2, 5, 8),
        "v": torch.randn(2, 2, 5, 6),
        "bias": torch.randn(4, 1, 5),
        "alibi_slopes": torch.rand(4),
        "sinks": torch.randn(4),
    }[name].requires_grad_()
    out = call(**{name: x})
    out.sum().backward()
    assert x.grad.shape == x.shape and x.grad.abs().sum() > 0
    with torch.no_grad():
        assert not call(**{name: x}).requires_grad


def test_forward_mode_tangents_are_not_dropped():
    q, k, v = (torch.randn(1, 2, 3, 4, dtype=torch.float64) for _ in range(3))
    tangent = torch.randn_like(q)
    step = 1e-6
    expected = (fastattn.attention(q + step * tangent, k, v) - fastattn.attention(q - step * tangent, k, v)) / (
        2 * step
    )
    _, actual = torch.func.jvp(lambda q: fastattn.attention(q, k, v), (q,), (tangent,))
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-8)


def test_torch_func_grad():
    q, k, v = (torch.randn(1, 2, 3, 4) for _ in range(3))
    actual = torch.func.grad(lambda q: fastattn.attention(q, k, v).square().sum())(q)
    q.requires_grad_()
    torch.testing.assert_close(actual, torch.autograd.grad(fastattn.attention(q, k, v).square().sum(), q)[0])


def test_vmap_is_right_or_refused():
    q, k, v = (torch.randn(3, 1, 2, 5, 8) for _ in range(3))
    try:
        actual = torch.vmap(fastattn.attention)(q, k, v)
    except RuntimeError:
        return
    torch.testing.assert_close(actual, torch.stack([fastattn.attention(*x) for x in zip(q, k, v, strict=True)]))
