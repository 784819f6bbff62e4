"""Rules of `attention_csr`: strides, bits, queries without edges, poison, memory."""

import pytest
import torch

import fastattn
from backward import strided
from fastattn.backends import cpu
from fastattn.layouts.edges import Edges
from forward import DTYPES, INF, NAN
from graphs import BIASES, Graph, assert_same, cotangents, inputs, results, run
from guarded import Guarded, in_child, reset_peak, status

pytestmark = [
    pytest.mark.skipif(cpu.unavailable() is not None, reason="the CPU kernels are not built"),
    pytest.mark.usefixtures("one_thread"),
]


# --- strides ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("how", ["transposed", "sliced", "every second", "columns first"])
def test_strides_change_nothing(how, dtype):
    tensors, kwargs = inputs(Graph(dtype=dtype, bias="full"))
    dout = cotangents(tensors[0], tensors[2])[0].to(tensors[0].dtype)
    expected = results(tensors, kwargs, dout=dout)
    tensors = [strided(x, how) for x in tensors[:3]] + [torch.stack([x, x], -1)[:, 0] for x in tensors[3:]]
    kwargs = {"edge_bias": kwargs["edge_bias"].transpose(0, 2).contiguous().transpose(0, 2)}
    actual = results(tensors, kwargs, dout=strided(dout, how))
    assert_same(actual, expected)
    if how == "transposed":
        assert actual["out"].stride() == tensors[0].stride() == actual["dq"].stride()


def test_int32_and_int64_lists_may_be_mixed():
    (q, k, v, indptr, indices), _ = inputs(Graph())
    expected = results([q, k, v, indptr, indices], {})
    assert_same(results([q, k, v, indptr.int(), indices], {}), expected)
    assert_same(results([q, k, v, indptr, indices.int()], {}), expected)


# --- bits ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", BIASES)
def test_bits_do_not_depend_on_threads_or_run(bias, dtype):
    tensors, kwargs = inputs(Graph(400, 300, 20, head_dim=24, dtype=dtype, bias=bias))
    expected = results(tensors, kwargs)
    for threads in (1, 2, 3, 7, 2):
        torch.set_num_threads(threads)
        assert_same(results(tensors, kwargs), expected)


def test_bits_do_not_depend_on_the_batch_or_the_other_rows():
    (q, k, v, indptr, indices), kwargs = inputs(Graph(batch=3, bias="full"))
    together = results([q, k, v, indptr, indices], kwargs)
    for b in range(3):
        alone = [x[b : b + 1] for x in (q, k, v)]
        dout, dlse = (x[b : b + 1] for x in cotangents(q, v))
        alone = results([*alone, indptr, indices], {"edge_bias": kwargs["edge_bias"][b : b + 1]}, dout=dout, dlse=dlse)
        assert_same({name: x[b : b + 1] for name, x in together.items()}, alone)
    out = run(q, k, v, indptr, indices, **kwargs)[0]
    lo, hi = indptr[10], indptr[20]
    some = run(q[:, :, 10:20], k, v, indptr[10:21] - lo, indices[lo:hi], edge_bias=kwargs["edge_bias"][..., lo:hi])[0]
    assert torch.equal(out[:, :, 10:20], some)


# --- rules -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("bias", [None, "edge"])
def test_queries_without_edges(bias, backend):
    tensors, kwargs = inputs(Graph(degree=2, bias=bias))
    indptr = tensors[3]
    empty = indptr.diff() == 0
    if bias:
        kwargs["edge_bias"][indptr[5] : indptr[9]] = -INF
        kept = [(row > -INF).any().item() for row in kwargs["edge_bias"].tensor_split(indptr[1:-1])]
        assert not any(kept[5:9]) and not empty[5:9].all()
        empty = ~torch.tensor(kept)
    actual = results(tensors, kwargs, backend)
    assert 2 < empty.sum() < 37
    assert (actual["out"][:, :, empty] == 0).all() and (actual["lse"][:, :, empty] == -INF).all()
    assert (actual["dq"][:, :, empty] == 0).all() and torch.isfinite(actual["lse"][:, :, ~empty]).all()
    for name, x in actual.items():
        assert name == "lse" or torch.isfinite(x).all(), name
    if bias:
        assert (actual["dedge_bias"][kwargs["edge_bias"] == -INF] == 0).all()


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_graphs_without_edges_and_of_one_node(backend):
    q, k, v = (torch.randn(1, 2, 5, 16) for _ in range(3))
    none = torch.zeros(6, dtype=torch.int64), torch.zeros(0, dtype=torch.int64)
    for kwargs in ({}, {"edge_bias": torch.zeros(2, 0)}):
        actual = results([q, k, v, *none], kwargs, backend)
        assert (actual.pop("lse") == -INF).all() and all((x == 0).all() for x in actual.values())
    one = [x[:, :, :1] for x in (q, k, v)]
    actual = results([*one, torch.tensor([0, 1]), torch.tensor([0])], {}, backend, dlse=torch.zeros(1, 2, 1))
    torch.testing.assert_close(actual["out"], one[2])
    torch.testing.assert_close(actual["lse"], (one[0] * one[1]).sum(-1) / 4)
    torch.testing.assert_close(actual["dv"], cotangents(one[0], one[2])[0].float())
    assert (actual["dq"].abs() < 1e-6).all() and (actual["dk"].abs() < 1e-6).all()


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("poison", [NAN, INF, -INF])
@pytest.mark.parametrize("dtype", DTYPES)
def test_nothing_leaks_from_keys_that_nobody_lists(dtype, poison, backend):
    """Nor from keys whose edges a bias of -inf takes away, nor from queries without edges."""
    tensors, kwargs = inputs(Graph(degree=2, dtype=dtype, bias="edge"))
    q, k, v, indptr, indices = tensors
    kwargs["edge_bias"] = kwargs["edge_bias"].masked_fill((indices == 7) | (indices == 11), -INF)
    expected = results(tensors, kwargs, backend)
    unseen = torch.ones(53, dtype=torch.bool)
    unseen[indices[kwargs["edge_bias"] > -INF]] = False
    blind = expected["lse"][0, 0] == -INF
    assert unseen[7] and unseen[11] and unseen.sum() > 2 and blind.any()
    q, k, v = q.clone(), k.clone(), v.clone()
    q[:, :, blind], k[:, :, unseen], v[:, :, unseen] = poison, poison, poison
    actual = results([q, k, v, indptr, indices], kwargs, backend)
    assert_same(actual, expected)
    assert (actual["dk"][:, :, unseen] == 0).all() and (actual["dv"][:, :, unseen] == 0).all()


@pytest.mark.parametrize("head_dim", [16, 7])
@pytest.mark.parametrize("name", ["k", "v"])
def test_nan_reaches_the_queries_that_list_it_and_no_others(name, head_dim):
    (q, k, v, indptr, indices), _ = inputs(Graph(head_dim=head_dim, head_dim_v=head_dim))
    expected = run(q, k, v, indptr, indices)[0]
    {"k": k, "v": v}[name][:, :, 9] = NAN
    rows = torch.arange(37).repeat_interleave(indptr.diff())
    hit = torch.zeros(37, dtype=torch.bool)
    hit[rows[indices == 9]] = True
    actual = run(q, k, v, indptr, indices)[0]
    assert hit.any() and actual[:, :, hit].isnan().all() and torch.equal(actual[:, :, ~hit], expected[:, :, ~hit])


def test_large_bias_keeps_its_weights():
    """Beside -1e38, lse alone could not tell two equal weights from two factors."""
    tensors, _ = inputs(Graph())
    kwargs = {"edge_bias": torch.full((len(tensors[4]),), torch.finfo(torch.float32).min)}
    actual, expected = (results(tensors, kwargs, backend) for backend in ("cpu", "reference"))
    for name in ("out", "dq", "dk", "dv"):
        torch.testing.assert_close(actual[name], expected[name], atol=2e-6, rtol=1e-5)


# --- memory ----------------------------------------------------------------------------------------------------------


def guarded_calls(say, dtype, side):
    """Both passes between pages that kill the process when touched."""
    torch.use_deterministic_algorithms(False)
    for d, dv in ((1, 1), (7, 16), (16, 33), (64, 8)):
        for bias in (None, "full"):
            say((d, dv, bias))
            (q, k, v, indptr, indices), kwargs = inputs(Graph(head_dim=d, head_dim_v=dv, dtype=dtype, bias=bias))
            indices[-1], indices[0] = 52, 0
            bias = kwargs["edge_bias"] if bias else None
            real = torch.float64 if dtype == "float64" else torch.float32
            dout = torch.randn(2, 4, 37, dv).to(q.dtype)
            out, lse, parts = torch.empty_like(dout), *(torch.empty(2, 4, 37, *s, dtype=real) for s in ((), (2,)))
            exact = torch.empty_like(out, dtype=real)
            grads = [torch.empty_like(x) for x in (q, k, v)] + [bias if bias is None else bias.to(real) * 0]
            placed = [x if x is None else Guarded(x, side) for x in (q, k, v, indptr, indices, bias, dout)]
            written = [x if x is None else Guarded(x, side) for x in (out, lse, parts, exact, *grads)]
            q, k, v, indptr, indices, bias, dout = (x and x.tensor for x in placed)
            out, lse, parts, exact, *grads, dbias = (x and x.tensor for x in written)
            edges, dedges = Edges(indptr, indices, bias, 0.3), Edges(None, None, dbias, None)
            cpu._C.csr_forward(q, k, v, out, lse, parts, exact, edges, 1)
            cpu._C.csr_backward(q, k, v, exact, parts, edges, dout, None, *grads, dedges, 1)
            for x in written:
                assert x is None or x.assert_untouched_outside() is None


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("side", ["end", "start"])
def test_guard_pages(side, dtype):
    in_child(guarded_calls, dtype, side)


def test_extra_memory():
    """Beyond the results less than 4 MiB forward and 8 MiB backward, where the gathered keys would take 1 GiB."""
    n, degree = 16384, 32
    q, k, v = (torch.randn(1, 4, n, 64).requires_grad_() for _ in range(3))
    indptr, indices = torch.arange(0, n * degree + 1, degree), torch.randint(0, n, (n * degree,))
    before = reset_peak()
    out = fastattn.attention_csr(q, k, v, indptr, indices)
    assert out.nbytes <= status("VmHWM") - before < out.nbytes + 4 * 2**20
    dout = torch.randn_like(out)
    before = reset_peak()
    grads = torch.autograd.grad(out, (q, k, v), dout)
    results = sum(x.nbytes for x in grads)
    assert results <= status("VmHWM") - before < results + 8 * 2**20
