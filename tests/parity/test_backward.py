"""The backward kernel against the reference in float64: values, strides, rules, bits."""

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

import fastattn
from backward import INF, NAN, SHAPES, assert_parity, cotangents, gradients, strided
from cases import CASES, Case, inputs
from fastattn import Mask, dispatch
from fastattn.backends import cpu
from forward import DTYPES
from isas import run_tests_on, supported_isas

pytestmark = [
    pytest.mark.skipif(cpu.unavailable() is not None, reason="the CPU kernels are not built"),
    pytest.mark.usefixtures("one_thread"),
]


# --- values ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES, ids=str)
def test_parity(case):
    assert_parity(case, of_scores=True)


BIAS_SHAPES = [(1, 1, 1, 1), (3, 4, 45, 77), (1, 4, 45, 77), (3, 1, 45, 77), (45, 77), (3, 1, 1, 77), (77,), (1,)]
BIAS_SHAPES += [(1, 4, 1, 77), (4, 45, 1), (3, 1, 45, 1), (3, 4, 1, 1), (4, 1, 1)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", BIAS_SHAPES, ids=str)
def test_bias_of_any_broadcast(shape, dtype):
    case = Case(batch=3, num_heads=4, num_heads_k=2, seqlen_q=45, seqlen_k=77, head_dim=8, dtype=dtype, causal=True)
    (q, k, v), kwargs = inputs(case._replace(softcap=2.0, sinks=True))
    assert_parity(case, (q, k, v), kwargs | {"bias": torch.randn(shape, dtype=q.dtype)}, of_scores=True)


def test_expanded_bias_has_the_gradient_of_its_shape():
    (q, k, v), _ = inputs(Case(batch=2, num_heads=2, seqlen_q=20, head_dim=8))
    bias = torch.randn(20).requires_grad_()
    grads = [
        torch.autograd.grad(fastattn.attention(q, k, v, bias=x, backend="cpu").square().sum(), bias)[0]
        for x in (bias, bias.expand(2, 2, 20, 20), bias.expand(20, 20).transpose(0, 1).transpose(0, 1))
    ]
    torch.testing.assert_close(grads[1], grads[0])
    torch.testing.assert_close(grads[2], grads[0])


@pytest.mark.parametrize("shape", [(4,), (3, 4)])
def test_alibi_slopes(shape):
    case = Case(batch=3, num_heads=4, seqlen_q=150, seqlen_k=1100, head_dim=8, sinks=True)
    qkv, kwargs = inputs(case)
    slopes = torch.rand(shape, generator=torch.Generator().manual_seed(0)) * 0.1
    assert_parity(case, qkv, kwargs | {"alibi_slopes": slopes}, of_scores=True)


@pytest.mark.slow  # a handful is in test_isas.py
@pytest.mark.parametrize("isa", supported_isas())
def test_parity_on_each_isa(isa):
    run_tests_on(isa, __file__, "-k", "test_parity and not isa and (S150x400 or S5x2100 or S45x77 or S130)")


KINDS = {
    "dense": {},
    "causal": {"causal": True},
    "window": {"window_size": (2, 1)},
    "lengths": {"mask": Mask.lengths(torch.tensor([3, 6]))},
    "documents": {"mask": Mask.documents(torch.tensor([[0, 0, 0, 1, 1, 2, 2]] * 2)), "causal": True},
    "tensor": {"mask": torch.rand(2, 4, 7, 7, generator=torch.Generator().manual_seed(0)) < 0.6},
    "softcap": {"softcap": 1.5},
    "scaled": {"softmax_scale": 0.7},
    "bias": {"bias": torch.randn(4, 7, 7, dtype=torch.float64)},
    "bias of -inf": {"bias": torch.randn(7, 7, dtype=torch.float64).masked_fill(torch.eye(7) == 1, -INF)},
    "dropout": {"dropout_p": 0.3, "seed": 5, "causal": True},
    "alibi, sinks": {"alibi_slopes": torch.rand(4, dtype=torch.float64), "sinks": torch.randn(4, dtype=torch.float64)},
}


@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck(kind):
    """Through the kernel in float64: out and lse, with grouped heads and head_dim_v != head_dim."""
    q, k, v = (torch.randn(2, h, 7, d, dtype=torch.float64).requires_grad_() for h, d in ((4, 5), (2, 5), (2, 3)))

    def call(q, k, v):
        out, lse = fastattn.attention(q, k, v, **KINDS[kind], return_lse=True, backend="cpu")
        return out, lse.masked_fill(lse == -INF, 0.0)

    assert gradcheck(call, (q, k, v), fast_mode=False)


SCORES = [
    "alibi_slopes", "sinks", "softmax_scale", "scale per head",
    *map(str, [(7, 7), (2, 4, 7, 7), (2, 1, 1, 7), (4, 7, 1), ()]),
]  # fmt: skip
BESIDE = ["causal", "softcap", "tensor", "dropout"]
QUICK = {("dense", name) for name in SCORES} | {(BESIDE[i % 4], name) for i, name in enumerate(SCORES)}


@pytest.mark.parametrize(
    "kind, name",
    [
        pytest.param(kind, name, marks=[] if (kind, name) in QUICK else [pytest.mark.slow])
        for kind in ["dense", *BESIDE]
        for name in SCORES
    ],
)
def test_gradcheck_of_score_tensors(kind, name):
    q, k, v = (torch.randn(2, h, 7, d, dtype=torch.float64) for h, d in ((4, 5), (2, 5), (2, 3)))
    argument = "bias" if name[0] == "(" else "softmax_scale" if "scale" in name else name
    shape = eval(name) if name[0] == "(" else () if name == "softmax_scale" else (4,)
    x = torch.randn(shape, dtype=torch.float64).requires_grad_()
    kwargs = {"sinks": torch.randn(4)} | KINDS[kind]

    def call(x, **more):
        return fastattn.attention(q, k, v, **kwargs | {argument: x}, **more)

    assert gradcheck(lambda x: call(x, return_lse=True, backend="cpu"), (x,), fast_mode=False)
    assert gradgradcheck(call, (x,), fast_mode=True)


@pytest.mark.parametrize("kind", KINDS)
def test_double_backward(kind, fresh_fallbacks):
    """On the kernel, and its derivative in blocks of rows: both are recorded, and none is a fallback."""
    q, k, v = (torch.randn(2, h, 7, d, dtype=torch.float64).requires_grad_() for h, d in ((4, 5), (2, 5), (2, 3)))

    def call(q, k, v):
        out, lse = fastattn.attention(q, k, v, **KINDS[kind], return_lse=True)
        return out, lse.masked_fill(lse == -INF, 0.0)

    assert gradgradcheck(call, (q, k, v), fast_mode=True)
    (grad,) = torch.autograd.grad(call(q, k, v)[0].sum(), q, create_graph=True)
    assert fastattn.last_call().kernel == "cpu.backward" and fastattn.last_call().problem.direction == "backward"
    grad.sum().backward()
    assert fastattn.last_call().kernel == "reference.second" and fastattn.last_call().problem.direction == "second"
    assert not fresh_fallbacks


def test_double_backward_of_one_tensor_thrice():
    x = torch.randn(1, 2, 4, 3, dtype=torch.float64).requires_grad_()
    (grad,) = torch.autograd.grad(fastattn.attention(x, x, x).sum(), x)
    (again,) = torch.autograd.grad(fastattn.attention(x, x, x).sum(), x, create_graph=True)
    torch.testing.assert_close(grad, again)
    assert gradgradcheck(lambda x: fastattn.attention(x, x, x), (x,), fast_mode=True)


def test_large_bias_keeps_its_weights():
    """Beside -1e38, lse alone could not tell two equal weights from two factors."""
    low = torch.finfo(torch.float32).min
    (q, k, v), _ = inputs(Case(seqlen_q=20, seqlen_k=40, head_dim=16))
    kwargs = {"bias": torch.full((20, 40), low)}
    dout, _ = cotangents(q, v)
    actual, expected = (gradients(q, k, v, kwargs, dout, backend=backend) for backend in ("cpu", "reference"))
    for name in "qkv":
        torch.testing.assert_close(actual[name], expected[name], atol=1e-6, rtol=1e-5)


# --- strides ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("how", ["transposed", "sliced", "every second", "columns first"])
def test_strides_change_nothing(how, dtype):
    case = Case(batch=2, num_heads=4, num_heads_k=2, seqlen_q=33, seqlen_k=50, head_dim=12, dtype=dtype, causal=True)
    (q, k, v), kwargs = inputs(case)
    dout, dlse = cotangents(q, v)
    dout = dout.to(q.dtype)
    expected = gradients(q, k, v, kwargs, dout, dlse)
    actual = gradients(*(strided(x, how) for x in (q, k, v)), kwargs, strided(dout, how), dlse)
    for name, grad in expected.items():
        assert torch.equal(actual[name], grad), name


@pytest.mark.parametrize("dims", [(3,), (2,), (0, 1, 2, 3)])
def test_expanded_dout(dims):
    """What `out.sum().backward()` gives: one number with strides of 0."""
    (q, k, v), kwargs = inputs(Case(batch=2, num_heads=2, seqlen_q=20, head_dim=8))
    dout = torch.randn([1 if d in dims else size for d, size in enumerate(q.shape)]).expand(q.shape)
    expected = gradients(q, k, v, kwargs, dout.contiguous())
    for name, grad in gradients(q, k, v, kwargs, dout).items():
        assert torch.equal(grad, expected[name])


def test_gradients_follow_the_memory_order_of_their_tensors():
    (q, k, v), kwargs = inputs(Case(batch=2, num_heads=2, seqlen_q=20, head_dim=8, layout="bshd"))
    for grad in gradients(q, k, v, kwargs, torch.randn_like(q)).values():
        assert grad.stride() == q.stride()


# --- rules -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sinks", [False, True])
def test_fully_masked_rows_have_zero_gradients(sinks):
    (q, k, v), kwargs = inputs(Case(batch=2, num_heads=2, seqlen_q=40, seqlen_k=33, head_dim=16, sinks=sinks))
    blind = torch.rand(40) < 0.4
    kwargs["mask"] = ~blind[:, None].expand(40, 33)
    dout, dlse = cotangents(q, v)
    grads = gradients(q, k, v, kwargs, dout, dlse)
    assert (grads["q"][:, :, blind] == 0).all()
    seen = gradients(q, k, v, kwargs, dout.masked_fill(blind[:, None], 1e6), dlse)
    assert all(torch.equal(grads[name], seen[name]) for name in "qkv")
    for kwargs in (
        {"mask": torch.zeros(40, 33, dtype=torch.bool)},
        {"mask": Mask.lengths(torch.zeros(2, dtype=torch.int64))},
    ):
        for grad in gradients(q, k, v, kwargs, dout, dlse).values():
            assert (grad == 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("poison", [NAN, INF, -INF])
@pytest.mark.parametrize("kind", ["tensor", "interval", "bias", "window"])
def test_nothing_leaks_from_behind_a_mask(kind, poison, dtype):
    """NaN or Inf in a masked key or value, or in a query that sees nothing, changes no gradient of the others."""
    (q, k, v), _ = inputs(
        Case(batch=1, num_heads=2, num_heads_k=1, seqlen_q=45, seqlen_k=140, head_dim=24, dtype=dtype)
    )
    visible = torch.rand(45, 140) < 0.8
    visible[:, 60:70], visible[11:13] = False, False
    kwargs = {
        "tensor": {"mask": visible},
        "interval": {
            "mask": Mask.intervals(torch.zeros(1, 1, 45).int(), torch.where(visible.any(-1), 60, 0)[None, None])
        },
        "bias": {"bias": torch.zeros(45, 140).masked_fill(~visible, -INF)},
        "window": {"window_size": (20, 0)},
    }[kind]
    kwargs |= {"backend": "cpu"}
    out, lse = fastattn.attention(q, k, v, **kwargs, return_lse=True)
    kwargs.pop("backend")
    dout, dlse = cotangents(q, v)
    expected = gradients(q, k, v, kwargs, dout, dlse)
    unseen = (expected["v"][0, 0] == 0).all(-1)
    blind = lse[0, 0] == -INF
    assert unseen.any() and (blind.any() or kind == "window")
    q, k, v = q.clone(), k.clone(), v.clone()
    k[:, :, unseen], v[:, :, unseen], q[:, :, blind] = poison, poison, poison
    for name, grad in gradients(q, k, v, kwargs, dout, dlse).items():
        torch.testing.assert_close(grad, expected[name], atol=2e-2 if "16" in dtype else 1e-5, rtol=1e-2)


def test_nan_reaches_only_the_rows_that_see_it():
    (q, k, v), _ = inputs(Case(seqlen_q=50, head_dim=16))
    dout, _ = cotangents(q, v)
    expected = gradients(q, k, v, {"causal": True}, dout)["q"]
    v[:, :, 30] = NAN
    actual = gradients(q, k, v, {"causal": True}, dout)["q"]
    torch.testing.assert_close(actual[:, :, :30], expected[:, :, :30])
    assert actual[:, :, 30:].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_bits_do_not_depend_on_threads_or_run(shape, dtype):
    (q, k, v), kwargs = inputs(SHAPES[shape]._replace(dtype=dtype))
    dout, dlse = cotangents(q, v)
    expected = gradients(q, k, v, kwargs, dout, dlse, of_scores=True)
    for threads in (1, 2, 3, 2):
        torch.set_num_threads(threads)
        for name, grad in gradients(q, k, v, kwargs, dout, dlse, of_scores=True).items():
            assert torch.equal(grad, expected[name]), (threads, name)


@pytest.mark.parametrize("shape", ["one head", "grouped", "few rows"])
def test_bits_do_not_depend_on_the_batch(shape):
    (q, k, v), kwargs = inputs(SHAPES[shape]._replace(batch=3))
    dout, dlse = cotangents(q, v)
    together = gradients(q, k, v, kwargs, dout, dlse)
    for b in range(3):
        alone = gradients(*(x[b : b + 1] for x in (q, k, v)), kwargs, dout[b : b + 1], dlse[b : b + 1])
        assert all(torch.equal(alone[name], together[name][b : b + 1]) for name in "qkv")


@pytest.mark.parametrize("zero", ["batch", "num_heads", "seqlen_q", "seqlen_k"])
def test_empty_sizes(zero):
    sizes = {"batch": 2, "num_heads": 3, "seqlen_q": 4, "seqlen_k": 5} | {zero: 0}
    (q, k, v), kwargs = inputs(Case(**sizes, head_dim=8, head_dim_v=6))
    dout, dlse = cotangents(q, v)
    for name, grad in gradients(q, k, v, kwargs, dout, dlse).items():
        assert grad.shape == {"q": q, "k": k, "v": v}[name].shape and (grad == 0).all()


@pytest.mark.parametrize("wanted", ["q", "k", "v", "qk", "qv", "kv"])
def test_only_what_is_asked_for(wanted):
    (q, k, v), kwargs = inputs(Case(batch=2, num_heads=2, seqlen_q=40, head_dim=16, causal=True))
    dout, _ = cotangents(q, v)
    expected = gradients(q, k, v, kwargs, dout)
    leaves = {name: x.requires_grad_(name in wanted) for name, x in {"q": q, "k": k, "v": v}.items()}
    fastattn.attention(**leaves, **kwargs, backend="cpu").backward(dout.float())
    for name, x in leaves.items():
        assert torch.equal(x.grad, expected[name]) if name in wanted else x.grad is None


@pytest.mark.parametrize("results", ["out", "lse", "both"])
def test_each_result_alone(results):
    (q, k, v), kwargs = inputs(Case(batch=2, num_heads=2, seqlen_q=20, head_dim=16, dtype="float64"))
    grads = []
    for backend in ("cpu", "reference"):
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        out, lse = fastattn.attention(*leaves, **kwargs, return_lse=True, backend=backend)
        loss = sum(x.square().sum() for name, x in (("out", out), ("lse", lse)) if results in (name, "both"))
        grads.append(torch.autograd.grad(loss, leaves, materialize_grads=True))
    for x, y in zip(*grads, strict=True):
        torch.testing.assert_close(x, y)
    if results == "lse":
        assert (grads[0][2] == 0).all()


# --- what is refused -------------------------------------------------------------------------------------------------


def test_refusals_go_to_the_reference(fresh_fallbacks):
    (q, k, v), kwargs = inputs(Case(num_heads=2, seqlen_q=8, head_dim=600))
    with pytest.warns(fastattn.FallbackWarning, match="head_dim=600"):
        fastattn.attention(q.requires_grad_(), k, v)
    assert dispatch.select(fastattn.last_call().problem, None).row.name == "reference"
