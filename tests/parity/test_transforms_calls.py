"""How transforms are called: dual numbers, Jacobians, samples of all kinds, dtypes, strides, empty sizes, what runs."""

import pytest
import torch
from torch.autograd import forward_ad, functional
from torch.func import grad, hessian, jacfwd, jacrev, jvp, linearize, vjp, vmap

import fastattn
from eager import eager, ours
from fastattn import Mask, dispatch, plans
from isas import needs_cpu

pytestmark = [
    needs_cpu,
    pytest.mark.usefixtures("one_thread"),
]

close, attention = torch.testing.assert_close, fastattn.attention
Q, K, V = (torch.randn(2, 4, 5, 8, generator=torch.Generator().manual_seed(i), dtype=torch.float64) for i in range(3))


def plain(q, k, v, **kwargs):
    return eager(q, k, v, **kwargs)[0]


def squares(function, **kwargs):
    return lambda *x: function(*x, **kwargs).square().sum()


def test_dual_numbers_and_their_gradients():
    found = []
    for function in (attention, plain):
        primals = [x.clone().requires_grad_() for x in (Q, K, V)]
        tangents = [x.sin().requires_grad_() for x in (Q, K, V)]
        with forward_ad.dual_level():
            duals = [forward_ad.make_dual(x, t) for x, t in zip(primals, tangents, strict=True)]
            out, tout = forward_ad.unpack_dual(function(*duals))
            grads = torch.autograd.grad(tout.square().sum() + out.sin().sum(), [*primals, *tangents])
        found.append((out, tout, *grads))
    close(*found)


def test_forward_over_reverse_with_dual_numbers():
    found = []
    for function in (attention, plain):
        primals = [x.clone().requires_grad_() for x in (Q, K, V)]
        with forward_ad.dual_level():
            duals = [forward_ad.make_dual(x, x.detach().cos()) for x in primals]
            grads = torch.autograd.grad(squares(function)(*duals), duals)
            found.append([forward_ad.unpack_dual(x).tangent for x in grads])
    close(*found)


@pytest.mark.filterwarnings("ignore:Attempted to insert a get_attr Node")
@pytest.mark.parametrize(
    "of",
    {
        "jacrev": lambda f: jacrev(f, (0, 1, 2))(Q, K, V),
        "jacrev in chunks": lambda f: jacrev(f, (0, 2), chunk_size=50)(Q, K, V),
        "jacfwd": lambda f: jacfwd(f, (0, 1, 2))(Q, K, V),
        "hessian": lambda f: hessian(lambda *x: f(*x).square().sum(), (0, 1, 2))(*(x[:1, :2, :3] for x in (Q, K, V))),
        "hessian of one tensor": lambda f: hessian(lambda x: f(x, x, x).square().sum())(Q[:1, :2]),
        "vjp": lambda f: vjp(f, Q, K, V)[1](V),
        "vmap of vjp": lambda f: vmap(vjp(f, Q, K, V)[1])(torch.stack([V, Q])),
        "linearize": lambda f: linearize(f, Q, K, V)[1](V, Q, K),
        "functional.jacobian": lambda f: functional.jacobian(f, (Q, K, V), vectorize=True),
        "functional.jacobian, forward": lambda f: functional.jacobian(
            f, (Q, K, V), vectorize=True, strategy="forward-mode"
        ),
        "functional.hvp": lambda f: functional.hvp(lambda *x: f(*x).square().sum(), (Q, K, V), (K, V, Q)),
        "functional.vhp": lambda f: functional.vhp(lambda *x: f(*x).square().sum(), (Q, K, V), (K, V, Q)),
        "functional.jvp": lambda f: functional.jvp(f, (Q, K, V), (K, V, Q)),
    }.items(),
    ids=lambda item: item[0],
)
def test_derivative(of, fresh_fallbacks):
    close(of[1](attention), of[1](plain))
    assert not fresh_fallbacks


@pytest.mark.filterwarnings("ignore:Attempted to insert a get_attr Node")
@pytest.mark.parametrize("name", ["causal", "mask", "alibi_slopes", "sinks"])
def test_linearize(name):
    values = {"causal": True, "mask": torch.rand(5, 5) < 0.3}
    kwargs = {name: values.get(name, torch.rand(4, dtype=torch.float64))}
    expected = jvp(lambda *x: plain(*x, **kwargs), (Q, K, V), (V, Q, K))[1]
    close(linearize(lambda *x: attention(*x, **kwargs), Q, K, V)[1](V, Q, K), expected)


def test_many_cotangents_at_once():
    x = Q.clone().requires_grad_()
    found = [
        torch.autograd.grad(f(x, K, V), x, torch.stack([Q, K, V]), is_grads_batched=True) for f in (attention, plain)
    ]
    close(*found)


def test_nested_and_chunked_vmap():
    x = torch.randn(3, 2, 2, 4, 5, 8, dtype=torch.float64)
    many = x.movedim(1, 2), torch.stack([K, V]), x.movedim(0, 3)
    close(*(vmap(vmap(f, (1, 0, 0)), (0, None, 3))(*many) for f in (attention, plain)))
    close(*(vmap(grad(squares(f), (0, 1, 2)), chunk_size=2)(x[:, 0], x[:, 1], x[:, 1]) for f in (attention, plain)))


@pytest.mark.parametrize("name", ["mask", "lengths"])
def test_samples_with_masks_of_their_own(name):
    masks = torch.rand(3, 2, 1, 5, 5) < 0.6 if name == "mask" else torch.tensor([[1, 5], [2, 3], [4, 4]])

    def call(x, mask):
        mask = mask if name == "mask" else Mask.lengths(mask)
        return ours(x, K, V, mask=mask)[0]

    x = torch.stack([Q, K, V])
    close(vmap(call)(x, masks), torch.stack([call(*sample) for sample in zip(x, masks, strict=True)]))
    grads = grad(lambda *x: call(*x).square().sum())
    close(vmap(grads)(x, masks), torch.stack([grads(*sample) for sample in zip(x, masks, strict=True)]))


def test_seeds_that_are_drawn():
    call = lambda *x: attention(*x, dropout_p=0.5)  # noqa: E731
    many = [x[:1].expand(3, 1, 4, 5, 8) for x in (Q, K, V)]
    with pytest.raises(RuntimeError, match="random"):
        vmap(call)(*many)
    same, different = (vmap(call, randomness=x)(*many) for x in ("same", "different"))
    assert torch.equal(same[0], same[1]) and not torch.equal(different[0], different[1])
    torch.manual_seed(3)
    expected = call(Q, K, V)
    torch.manual_seed(3)
    assert torch.equal(jvp(call, (Q, K, V), (Q, K, V))[0], expected)


@pytest.mark.parametrize("dtype, tolerance", [("float32", 1e-5), ("bfloat16", 3e-2), ("float16", 5e-3)])
def test_dtypes(dtype, tolerance):
    low = [x.to(getattr(torch, dtype)) for x in (Q, K, V)]
    exact = tuple(x.double() for x in low)
    kwargs = {"causal": True, "alibi_slopes": torch.rand(4)}

    def pairs(f, *x):
        loss = lambda *x: f(*x, **kwargs).to(torch.promote_types(x[0].dtype, torch.float32)).square().sum()  # noqa: E731
        tangent = jvp(lambda *x: f(*x, **kwargs), x, x)[1]
        return tangent, *jvp(grad(loss, (0, 1, 2)), x, x)[1], *vmap(grad(loss, (0, 1, 2)))(*(y[:, None] for y in x))

    for x, y in zip(pairs(attention, *low), pairs(plain, *exact), strict=True):
        assert x.dtype == low[0].dtype
        close(x.double(), y, rtol=4 * tolerance, atol=4 * tolerance)


def test_strides():
    swapped = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (Q, K, V)]
    expanded = [Q[:1, :1].expand(2, 4, 5, 8), K[:, :1].expand(2, 4, 5, 8), V.flip(-1)]
    close(*(jvp(f, tuple(swapped), tuple(expanded)) for f in (attention, plain)))
    close(*(grad(squares(f), (0, 1, 2))(*expanded) for f in (attention, plain)))
    grads = [
        vmap(grad(squares(f), (0, 1, 2)), (None, 0, None))(expanded[0], torch.stack(expanded), V)
        for f in (attention, plain)
    ]
    close(*grads)


@pytest.mark.parametrize(
    "kwargs", [{}, {"causal": True}, {"sinks": torch.ones(4)}, {"mask": torch.zeros(1, 1) > 0}], ids=str
)
@pytest.mark.parametrize("sizes", [(0, 5, 5), (2, 0, 5), (2, 5, 0), (2, 1, 1)], ids=str)
def test_empty_sizes(sizes, kwargs):
    batch, *lengths = sizes
    x = tuple(torch.randn(batch, 4, n, 8, dtype=torch.float64) for n in (lengths[0], lengths[1], lengths[1]))
    assert jvp(lambda *x: attention(*x, **kwargs), x, x)[1].isfinite().all()
    grads = grad(squares(attention, **kwargs), (0, 1, 2))
    for found in (grads(*x), jvp(grads, x, x)[1], vmap(grads)(*(torch.stack([y, y]) for y in x))):
        assert all(y.isfinite().all() for y in found)


def test_nan_behind_a_mask():
    k, v = K.clone(), V.clone()
    k[:, :, 3:], v[:, :, 3:] = torch.nan, torch.inf
    seen = Q, K[:, :, :3], V[:, :, :3]
    padded = {"mask": Mask.lengths(torch.tensor([3, 3]))}
    close(jvp(lambda *x: attention(*x, **padded), (Q, k, v), (Q, k, v)), jvp(plain, seen, seen))
    found = jvp(grad(squares(attention, **padded), (0, 1, 2)), (Q, k, v), (Q, k, v))[1]
    expected = jvp(grad(squares(plain), (0, 1, 2)), seen, seen)[1]
    close([found[0], found[1][:, :, :3], found[2][:, :, :3]], list(expected))
    tangent = jvp(lambda *x: attention(*x, causal=True), (Q, k, v), (Q, k, v))[1]
    expected = jvp(lambda *x: plain(*x, causal=True), (Q, K, V), (Q, K, V))[1]
    close(tangent[:, :, :3], expected[:, :, :3])


def test_what_only_the_reference_takes():
    x = tuple(torch.randn(2, 2, 4, 520, dtype=torch.float64) for _ in range(3))
    close(*(grad(squares(f, causal=True), (0, 1, 2))(*x) for f in (attention, plain)))
    close(*(jvp(grad(squares(f, causal=True), (0, 1, 2)), x, x) for f in (attention, plain)))


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_what_runs(backend, fresh_fallbacks):
    with fastattn.use(backend), fastattn.record() as calls:
        jvp(grad(squares(attention)), (Q, K, V), (K, V, Q))
    kernels = {call.problem.direction: call.kernel for call in calls}
    forward = {"cpu": "cpu.prefill", "reference": "reference"}[backend]
    assert kernels["forward"] == forward and kernels["backward"] == f"{backend}.backward"
    assert kernels["second"] == "reference.second" and "tangent" in kernels
    assert not fresh_fallbacks and all(call.problem.transformed for call in calls)


def test_gradient_penalty():
    found = []
    for function in (attention, plain):
        leaves = [x.clone().requires_grad_() for x in (Q, K, V)]
        out = function(*leaves, causal=True)
        grads = torch.autograd.grad(out.sin().sum(), leaves, create_graph=True)
        (out.sum() + sum(x.square().sum() for x in grads)).backward()
        found.append([x.grad for x in leaves])
    close(*found)


def test_samples_have_the_bits_of_calls_of_their_own():
    many = [torch.randn(3, 2, 4, 40, 16, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    grads = grad(squares(attention, causal=True), (0, 1, 2))
    samples = list(zip(*many, strict=True))
    assert torch.equal(vmap(attention)(*many), torch.stack([attention(*x) for x in samples]))
    found, expected = vmap(grads)(*many), zip(*[grads(*x) for x in samples], strict=True)
    assert all(torch.equal(x, torch.stack(parts)) for x, parts in zip(found, expected, strict=True))


def test_rows_of_tangents_are_chosen_as_others(monkeypatch, fresh_fallbacks):
    """A kernel before the reference runs what it takes, under every backend that is its own; nothing falls back."""
    row = dispatch.Row(
        "cpu.tangent", "fastattn.backends.reference:tangent", None, {"direction": {"tangent"}, "softcap": {False}}
    )
    others = [other for other in dispatch.KERNELS if other.name != row.name]
    monkeypatch.setattr(dispatch, "KERNELS", (row, *others))
    plans.forget()
    try:
        for backend, softcap, kernel in (
            (None, 0.0, "cpu.tangent"),
            ("cpu", 0.0, "cpu.tangent"),
            ("reference", 0.0, "reference.tangent"),
            ("cpu", 1.0, "reference.tangent"),
        ):
            jvp(lambda q: attention(q, K, V, softcap=softcap, backend=backend), (Q,), (V,))  # noqa: B023
            assert fastattn.last_call().kernel == kernel
    finally:
        monkeypatch.undo()
        plans.forget()
    assert not fresh_fallbacks
