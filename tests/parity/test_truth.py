"""Every way into fastattn tells the truth: the result is right or an error names what is not supported, and the kernel
that `record` names is the one that ran, counted in C++."""

from collections import Counter

import pytest
import torch
from torch import nn

import fastattn
import formula
from fastattn import Mask
from fastattn.backends import cpu
from fastattn.compat.flash_attn import flash_attn_func, flash_attn_kvpacked_func, flash_attn_qkvpacked_func

GENERATOR = torch.Generator().manual_seed(0)
NATIVE = {"cpu.prefill": "forward", "cpu.decode": "decode", "cpu.backward": "backward", "cpu.tangent": "tangent",
          "cpu.csr": "csr_forward", "cpu.csr_backward": "csr_backward", "cpu.varlen": "sequences_forward",
          "cpu.varlen_backward": "sequences_backward", "cpu.cache": "sequences_forward"}  # fmt: skip
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}


def draw(*shape, dtype=torch.float32):
    return torch.randn(*shape, generator=GENERATOR).to(dtype)


def qkv(seqlen_q=40, seqlen_k=40, heads_k=4, dim=16, dim_v=16, dtype=torch.float32):
    shapes = (2, 4, seqlen_q, dim), (2, heads_k, seqlen_k, dim), (2, heads_k, seqlen_k, dim_v)
    return tuple(draw(*shape, dtype=dtype) for shape in shapes)


def truthful(call, expected, kernels, dtype=torch.float32):
    """`call()` gives `expected`, and `kernels` ran, no more and no less: by what Python says and by what C++ counts."""
    before = Counter(cpu.runs())
    with fastattn.record() as calls:
        found = call()
    ran = Counter(cpu.runs()) - before
    said = Counter(one.kernel for one in calls)
    assert said == Counter(kernels)
    assert ran == Counter(NATIVE[kernel] for kernel in said.elements() if kernel in NATIVE)
    assert fastattn.last_call().kernel == kernels[-1]
    torch.testing.assert_close(found.double(), expected.double(), rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


KEEP = draw(2, 4, 40, 40) > -1.0
BIAS, SLOPES, SINKS = draw(4, 40, 40), torch.tensor([0.5, 0.25, 0.1, 0.0]), draw(4)
LENGTHS = torch.tensor([40, 17])
TOKENS = torch.arange(40) < LENGTHS[:, None]
BLOCKS = torch.ones(3, 3, dtype=torch.bool).tril()
BY_BLOCKS = BLOCKS.repeat_interleave(16, 0).repeat_interleave(16, 1)[:40, :40]

# name: (shapes of q, k, v; arguments of `attention`; arguments of the formula)
ATTENTION = {
    "plain": ({}, {}, {}),
    "causal": ({}, {"causal": True}, {"causal": "bottom_right"}),
    "causal, longer keys": ({"seqlen_k": 50}, {"causal": True}, {"causal": "bottom_right"}),
    "causal, longer queries": ({"seqlen_k": 30}, {"causal": True}, {"causal": "bottom_right"}),
    "top-left causal": ({"seqlen_k": 50}, {"mask": Mask.causal("top_left")}, {"causal": "top_left"}),
    "window": ({}, {"window_size": (5, 2)}, {"window": (5, 2)}),
    "grouped": ({"heads_k": 2}, {}, {}),
    "one key head": ({"heads_k": 1}, {"causal": True}, {"causal": "bottom_right"}),
    "softcap": ({}, {"softcap": 1.5}, {"softcap": 1.5}),
    "alibi": ({}, {"alibi_slopes": SLOPES}, {"alibi": SLOPES}),
    "bias": ({}, {"bias": BIAS}, {"bias": BIAS}),
    "bias of 16 bits, causal": ({}, {"bias": BIAS.half(), "causal": True}, {"bias": BIAS.half(), "causal": "top_left"}),
    "sinks": ({}, {"sinks": SINKS}, {"sinks": SINKS}),
    "bool mask": ({}, {"mask": KEEP}, {"keep": KEEP}),
    "lengths": ({}, {"mask": Mask.lengths(LENGTHS)}, {"keep": TOKENS[:, None, None]}),
    "blocks": ({}, {"mask": fastattn.BlockMask.from_dense(BY_BLOCKS[None, None])}, {"keep": BY_BLOCKS}),
    "own scale": ({}, {"softmax_scale": -0.7}, {"scale": -0.7}),
    "learned scale": ({}, {"softmax_scale": torch.tensor(0.3)}, {"scale": 0.3}),
    "other columns of v": ({"dim_v": 24}, {}, {}),
    "all at once": (
        {"heads_k": 2},
        {"softcap": 2.0, "alibi_slopes": SLOPES, "bias": BIAS, "mask": KEEP, "causal": True, "window_size": (30, 30)},
        {"softcap": 2.0, "alibi": SLOPES, "bias": BIAS, "keep": KEEP, "causal": "top_left", "window": (30, 30)},
    ),
    "no keys": ({"seqlen_k": 0}, {}, {}),
}


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("name", ATTENTION)
def test_attention(name, backend):
    shapes, options, spec = ATTENTION[name]
    inputs = qkv(**shapes)
    kernel = "reference" if backend else "cpu.prefill"
    truthful(
        lambda: fastattn.attention(*inputs, **options, backend=backend), formula.attention(*inputs, **spec), [kernel]
    )


@pytest.mark.parametrize("name", ["plain", "causal", "grouped", "softcap", "bias", "sinks", "lengths", "all at once"])
def test_gradients(name):
    shapes, options, spec = ATTENTION[name]
    inputs = [x.requires_grad_() for x in qkv(**shapes)]
    weights = draw(2, 4, 40, 16)

    def gradients(function, options):
        out = (function(*inputs, **options) * weights).sum()
        return torch.cat([x.flatten() for x in torch.autograd.grad(out, inputs)])

    expected = gradients(formula.attention, spec)
    truthful(lambda: gradients(fastattn.attention, options), expected, ["cpu.prefill", "cpu.backward"])


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_dtypes_and_few_rows(dtype):
    inputs = qkv(seqlen_q=2, seqlen_k=70, heads_k=2, dtype=dtype)
    expected = formula.attention(*inputs, causal="bottom_right")
    truthful(lambda: fastattn.attention(*inputs, causal=True), expected, ["cpu.decode"], dtype)
    inputs = qkv(dtype=dtype)
    truthful(lambda: fastattn.attention(*inputs), formula.attention(*inputs), ["cpu.prefill"], dtype)


def test_tangent():
    inputs, tangents = qkv(), qkv()
    doubled = [x.double() for x in (*inputs, *tangents)]
    expected = torch.func.jvp(formula.attention, tuple(doubled[:3]), tuple(doubled[3:]))[1]
    truthful(lambda: torch.func.jvp(fastattn.attention, inputs, tangents)[1], expected, ["cpu.prefill", "cpu.tangent"])


@pytest.mark.filterwarnings("ignore::fastattn.FallbackWarning")
def test_the_reference_says_that_it_is_one():
    inputs = qkv(dim=600, dim_v=600)
    truthful(lambda: fastattn.attention(*inputs), formula.attention(*inputs), ["reference"])
    assert "head_dim=600" in fastattn.last_call().reason


Q, K, V = qkv()
SHORT = qkv(seqlen_k=25)
SDPA = {  # name: (inputs, arguments of torch's function, arguments of the formula)
    "plain": ((Q, K, V), {}, {}),
    "causal": ((Q, K, V), {"is_causal": True}, {"causal": "top_left"}),
    "causal, fewer keys": (SHORT, {"is_causal": True}, {"causal": "top_left"}),
    "bool mask": ((Q, K, V), {"attn_mask": KEEP}, {"keep": KEEP}),
    "bool mask of one row": ((Q, K, V), {"attn_mask": TOKENS[:, None, None]}, {"keep": TOKENS[:, None, None]}),
    "float mask": ((Q, K, V), {"attn_mask": BIAS}, {"bias": BIAS}),
    "a mask that hides rows": ((Q, K, V), {"attn_mask": TOKENS[1][:, None]}, {"keep": TOKENS[1][:, None]}),
    "scale": ((Q, K, V), {"scale": 0.1}, {"scale": 0.1}),
    "grouped": (qkv(heads_k=2), {"enable_gqa": True}, {}),
    "broadcast batch": ((Q, K[:1], V[:1]), {}, {}),
    "other columns of v": (qkv(dim_v=8), {}, {}),
    "strides": ((Q.mT.contiguous().mT, K.flip(2).flip(2), V[:, :, :, ::2].repeat(1, 1, 1, 2)[..., ::1]), {}, {}),
}


@pytest.mark.parametrize("route", ["function", "patch", "apply"])
@pytest.mark.parametrize("name", SDPA)
def test_scaled_dot_product_attention(name, route):
    inputs, options, spec = SDPA[name]
    whole = [x.expand(2, -1, -1, -1) for x in inputs]
    module = nn.Module()
    module.forward = lambda: nn.functional.scaled_dot_product_attention(*inputs, **options)

    def call():
        if route == "function":
            return fastattn.scaled_dot_product_attention(*inputs, **options)
        replaced = fastattn.apply(module) if route == "apply" else fastattn.patch_sdpa(on_unsupported="error")
        with replaced:
            return module()

    truthful(call, formula.attention(*whole, **spec), ["cpu.prefill"])


def test_scaled_dot_product_attention_of_other_ranks():
    for cut in (lambda x: x[0], lambda x: x[0, 0], lambda x: x[:, None]):
        inputs = [cut(x) for x in (Q, K, V)]
        expected = cut(formula.attention(Q, K, V))
        truthful(lambda inputs=inputs: fastattn.scaled_dot_product_attention(*inputs), expected, ["cpu.prefill"])


INDPTR = torch.arange(0, 40 * 5 + 1, 5)
INDICES = torch.randint(40, (200,), generator=GENERATOR)
EDGE_BIAS = draw(4, 200)


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("grad", [False, True])
def test_attention_csr(with_bias, grad):
    bias = EDGE_BIAS if with_bias else None
    rows = torch.repeat_interleave(torch.arange(40), 5)
    counts = torch.zeros(40, 40).index_put((rows, INDICES), torch.ones(200), accumulate=True)
    # An edge that is listed twice weighs twice: the sum of exponentials of its biases is one bias.
    weights = torch.zeros(4, 40, 40, dtype=torch.float64)
    each = torch.ones(4, 200).double() if bias is None else bias.double().exp()
    weights = weights.index_put((torch.arange(4)[:, None], rows, INDICES), each, accumulate=True)
    spec = {"keep": counts > 0, "bias": weights.clamp(min=1e-300).log()}
    inputs = [x.clone().requires_grad_(grad) for x in (Q, K, V)]

    def result(function, *args, **options):
        out = function(*inputs, *args, **options)
        return torch.cat([x.flatten() for x in torch.autograd.grad(out.sum(), inputs)]) if grad else out

    kernels = ["cpu.csr", "cpu.csr_backward"] if grad else ["cpu.csr"]
    expected = result(formula.attention, **spec)
    truthful(lambda: result(fastattn.attention_csr, INDPTR, INDICES, edge_bias=bias), expected, kernels)


ENDS = torch.tensor([0, 13, 13, 40])
VARLEN = {  # name: (arguments of attention_varlen, arguments of the formula)
    "plain": ({}, {}),
    "causal": ({"causal": True}, {"causal": "top_left"}),
    "window and softcap": ({"window_size": (4, 4), "softcap": 2.0}, {"window": (4, 4), "softcap": 2.0}),
    "sinks": ({"sinks": SINKS}, {"sinks": SINKS}),
}


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("name", VARLEN)
def test_attention_varlen(name, grad):
    options, spec = VARLEN[name]
    owner = torch.searchsorted(ENDS, torch.arange(40), right=True)
    inputs = [x[:1].clone().requires_grad_(grad) for x in (Q, K, V)]
    weights = draw(4, 40, 16).transpose(0, 1)

    def result(function):
        out = function()
        return torch.cat([x.flatten() for x in torch.autograd.grad((out * weights).sum(), inputs)]) if grad else out

    def packed():
        return fastattn.attention_varlen(*(x[0].transpose(0, 1) for x in inputs), ENDS, ENDS, **options)

    expected = result(lambda: formula.attention(*inputs, keep=owner[:, None] == owner, **spec)[0].transpose(0, 1))
    truthful(lambda: result(packed), expected, ["cpu.varlen", "cpu.varlen_backward"] if grad else ["cpu.varlen"])


@pytest.mark.parametrize("new", [1, 20])
def test_attention_with_kvcache(new):
    seen = 40 - new
    caches = [torch.cat([x[:, :, :seen], torch.zeros(2, 4, 60 - seen, 16)], 2) for x in (K, V)]
    q, k, v = (x[:, :, seen:] for x in (Q, K, V))
    expected = formula.attention(q, K, V, causal="bottom_right")
    truthful(lambda: fastattn.attention_with_kvcache(q, *caches, k, v, cache_seqlens=seen), expected, ["cpu.cache"])
    assert torch.equal(caches[0][:, :, :40], K)


FLASH = {  # name: (arguments of flash_attn_func, arguments of the formula)
    "plain": ({}, {}),
    "causal": ({"causal": True}, {"causal": "bottom_right"}),
    "window": ({"window_size": (5, -1)}, {"window": (5, 1000)}),
    "softcap": ({"softcap": 2.0, "softmax_scale": 0.2}, {"softcap": 2.0, "scale": 0.2}),
    "alibi": ({"alibi_slopes": SLOPES}, {"alibi": SLOPES}),
    "deterministic": ({"deterministic": True}, {}),
}


@pytest.mark.parametrize("name", FLASH)
def test_flash_attn(name):
    options, spec = FLASH[name]
    q, k, v = (x.transpose(1, 2) for x in (Q, K, V))
    expected = formula.attention(Q, K, V, **spec).transpose(1, 2)
    for call in (
        lambda: flash_attn_func(q, k, v, **options),
        lambda: flash_attn_qkvpacked_func(torch.stack([q, k, v], 2), **options),
        lambda: flash_attn_kvpacked_func(q, torch.stack([k, v], 2), **options),
        lambda: flash_attn_func(q, k, v, return_attn_probs=True, **options)[0],
    ):
        truthful(call, expected, ["cpu.prefill"])


TRANSFORMERS = {  # name: (mask, arguments of the attention function, arguments of the formula)
    "causal module": (None, {}, {"causal": "top_left"}),
    "is_causal": (None, {"is_causal": False}, {}),
    "bool mask": (KEEP, {}, {"keep": KEEP}),
    "float mask": (BIAS[None], {}, {"bias": BIAS}),
    "sliding_window": (None, {"sliding_window": 4}, {"window": (3, 0)}),
    "softcap": (None, {"softcap": 2.0}, {"softcap": 2.0, "causal": "top_left"}),
    "s_aux": (None, {"s_aux": SINKS}, {"sinks": SINKS, "causal": "top_left"}),
    "position_bias": (KEEP, {"position_bias": BIAS[None], "scaling": 1.0}, {"keep": KEEP, "bias": BIAS, "scale": 1.0}),
}


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_transformers(name):
    pytest.importorskip("transformers")
    from fastattn.integrations.transformers import attention_forward

    mask, options, spec = TRANSFORMERS[name]
    module = nn.Module()
    module.is_causal = True
    expected = formula.attention(Q, K, V, **spec).transpose(1, 2)
    truthful(lambda: attention_forward(module, Q, K, V, mask, **options)[0], expected, ["cpu.prefill"])


def test_transformers_refuses_what_it_does_not_know():
    pytest.importorskip("transformers")
    from fastattn.integrations.transformers import attention_forward

    with pytest.raises(NotImplementedError, match="mystery=1 is not supported"):
        attention_forward(nn.Module(), Q, K, V, None, mystery=1)
    with pytest.raises(ValueError, match="attention_mask has shape"):
        attention_forward(nn.Module(), Q, K, V, KEEP[0, 0])


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("grad", [False, True])
def test_multihead_attention(grad, masked, need_weights):
    torch.manual_seed(0)
    module = nn.MultiheadAttention(16, 4, batch_first=True).eval()
    x = draw(2, 40, 16)
    padding = ~TOKENS if masked else None
    projected = nn.functional.linear(x, module.in_proj_weight, module.in_proj_bias)
    q, k, v = projected.view(2, 40, 3, 4, 4).permute(2, 0, 3, 1, 4)
    out = formula.attention(q, k, v, keep=TOKENS[:, None, None] if masked else None).transpose(1, 2).flatten(2)
    expected = nn.functional.linear(out, module.out_proj.weight.double(), module.out_proj.bias.double())

    def call():
        with torch.set_grad_enabled(grad), fastattn.apply(module, on_unsupported="error") as handle:
            out = module(x, x, x, key_padding_mask=padding, need_weights=need_weights)[0]
        assert [(row.kernel, row.calls) for row in handle.report().rows] == [("cpu.prefill", 1)]
        return out

    truthful(call, expected, ["cpu.prefill"])


ODD = qkv(dim=600, dim_v=600)
REFUSED = {  # name: (call, error, what its text names)
    "torch's name": (lambda: fastattn.attention(Q, K, V, attn_mask=KEEP), TypeError, "attn_mask"),
    "fourth position": (lambda: fastattn.attention(Q, K, V, KEEP), TypeError, "3 positional"),
    "causal": (lambda: fastattn.attention(Q, K, V, causal="top_left"), TypeError, "causal"),
    "dropout_p": (lambda: fastattn.attention(Q, K, V, dropout_p=1.5), ValueError, "dropout_p=1.5"),
    "mask's shape": (lambda: fastattn.attention(Q, K, V, mask=KEEP[..., :9]), ValueError, "mask"),
    "mask's dtype": (lambda: fastattn.attention(Q, K, V, mask=KEEP.int()), TypeError, "mask"),
    "window_size": (lambda: fastattn.attention(Q, K, V, window_size=(-2, 0)), ValueError, "window_size"),
    "dtypes": (lambda: fastattn.attention(Q, K.double(), V), TypeError, "dtype"),
    "heads": (lambda: fastattn.attention(Q, *(x[:, :3] for x in (K, V))), ValueError, "num_heads"),
    "cpu refuses": (lambda: fastattn.attention(*ODD, backend="cpu"), fastattn.UnsupportedError, "head_dim=600"),
    "triton refuses": (lambda: fastattn.attention(Q, K, V, backend="triton"), fastattn.UnsupportedError, "triton"),
    "no backend": (lambda: fastattn.attention(Q, K, V, backend="metal"), ValueError, "backend='metal'"),
    "seed": (lambda: fastattn.attention(Q, K, V, dropout_p=0.1, seed=-1), ValueError, "seed=-1"),
    "sinks": (lambda: fastattn.attention(Q, K, V, sinks=SINKS[:3]), ValueError, "sinks"),
    "mask and is_causal": (
        lambda: fastattn.scaled_dot_product_attention(Q, K, V, KEEP, is_causal=True), ValueError, "exclude each other",
    ),
    "sdpa's heads": (lambda: fastattn.scaled_dot_product_attention(Q, K[:, :2], V[:, :2]), ValueError, "enable_gqa"),
    "sdpa's mask": (
        lambda: fastattn.scaled_dot_product_attention(Q, K, V, KEEP.int()), TypeError, "attn_mask has dtype",
    ),
    "csr's list": (lambda: fastattn.attention_csr(Q, K, V, INDPTR, INDICES + 30), ValueError, "indices"),
    "flash_attn's heads": (lambda: flash_attn_func(*(x.transpose(1, 2)[:, :, :n] for x, n in ((Q, 4), (K, 3), (V, 3)))),
                           ValueError, "num_heads"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_supported_is_named_and_nothing_runs(name):
    call, error, text = REFUSED[name]
    before = cpu.runs()
    with pytest.raises(error, match=text.replace("(", r"\(")) as caught:
        call()
    assert "\n" not in str(caught.value) and cpu.runs() == before


def test_counts_are_of_this_process_and_named_after_the_functions():
    assert {*NATIVE.values()} <= set(cpu.runs()) and all(count >= 0 for count in cpu.runs().values())
