"""`attention_varlen`: the bits of a call for each sequence, forward and backward; lists that are wrong."""

import pytest
import torch

import fastattn
from forward import DTYPES, assert_same_bits
from isas import needs_cpu
from sequences import LENGTHS, one_by_one, packed, starts

pytestmark = needs_cpu
SLOPES = torch.linspace(0.1, 0.8, 4 * len(LENGTHS)).view(len(LENGTHS), 4)
OPTIONS = [
    {}, {"causal": True}, {"window_size": (20, 5)}, {"causal": True, "window_size": (50, None)}, {"softcap": 3.0},
    {"sinks": torch.tensor([0.3, -1.0, 0.0, 2.0])}, {"alibi_slopes": SLOPES[0]},
    {"alibi_slopes": SLOPES * 30.0, "causal": True}, {"softmax_scale": -0.2}, {"dropout_p": 0.3, "seed": 11},
    {"softmax_scale": torch.tensor([0.1, 0.2, 0.3, 0.4]), "dropout_p": 0.2, "seed": 2**62, "causal": True,
     "softcap": 5.0, "sinks": torch.tensor([0.3, -1.0, 0.0, 2.0]), "alibi_slopes": SLOPES},
]  # fmt: skip


@pytest.fixture(autouse=True)
def restore_threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def varlen(*args, **options):
    found = fastattn.attention_varlen(*args, **options, return_lse=True, backend="cpu")
    assert fastattn.last_call().kernel == "cpu.varlen"
    return found


@pytest.mark.parametrize("dtype, options", [
    (dtype, options) for options in OPTIONS for dtype in (DTYPES if options is OPTIONS[-1] else DTYPES[:2])
], ids=lambda x: x if isinstance(x, str) else "-".join(x))  # fmt: skip
def test_bits_are_those_of_a_call_for_each_sequence(dtype, options):
    call = packed(dtype=getattr(torch, dtype))
    assert_same_bits(varlen(*call, **options), one_by_one(*call, **options))


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_bits_do_not_depend_on_threads(threads):
    lengths = [(300, 2000), (600, 600), (1, 5000), (40, 1200)]
    call = packed(lengths, num_heads=2, num_heads_k=1)
    torch.set_num_threads(1)
    expected = varlen(*call, causal=True)
    torch.set_num_threads(threads)
    assert_same_bits(varlen(*call, causal=True), expected)


def test_rows_may_lie_anywhere():
    q, k, v, *bounds = packed()
    apart = [torch.stack([x, x + 1], 1).flatten(1, 2)[:, : x.shape[1]] for x in (q, k, v)]
    expected = varlen(*[x.contiguous() for x in apart], *bounds, causal=True)
    transposed = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in apart]
    strided = [torch.stack([x, x], -1)[..., 0] for x in apart]
    for form in (apart, transposed, strided):
        assert_same_bits(varlen(*form, *[x.long() for x in bounds], 200, 2100, causal=True), expected)


def gradients(function, call, options, cotangents):
    """Gradients of q, k, v and of the terms that are tensors."""
    q, k, v, *bounds = call
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    learned = {name: x.clone().requires_grad_() for name, x in options.items() if isinstance(x, torch.Tensor)}
    results = function(*leaves, *bounds, **{**options, **learned})
    return torch.autograd.grad(results, [*leaves, *learned.values()], cotangents)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("options", OPTIONS[::2], ids=lambda options: "-".join(options))
def test_gradients_are_those_of_a_call_for_each_sequence(options, dtype):
    lengths = (*LENGTHS[:7], (600, 1100))
    options = {name: x[: len(lengths)] if name == "alibi_slopes" and x.dim() == 2 else x for name, x in options.items()}
    call = packed(lengths, dtype=getattr(torch, dtype))
    out, lse = one_by_one(*call, **options)
    cotangents = torch.randn(out.shape, dtype=torch.float64).to(out.dtype), torch.randn_like(lse)
    ours = gradients(varlen, call, options, cotangents)
    expected = gradients(one_by_one, call, options, cotangents)
    for x, y in zip(ours[:3], expected[:3], strict=True):
        assert torch.equal(x, y)  # but for the sign of a zero, which autograd's own sums take away
    for x, y in zip(ours[3:], expected[3:], strict=True):  # summed in float64 by one, in the term's dtype by the other
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-4)


def test_rows_that_are_not_used():
    q, k, v, *bounds = packed([(5, 9), (4, 6)])
    used = {"seqused_q": torch.tensor([3, 4]), "seqused_k": torch.tensor([9, 2], dtype=torch.int32)}
    out, lse = varlen(q, k, v, *bounds, **used)
    pieces = torch.cat([q[:3], q[5:]]), torch.cat([k, k[:0]])[[*range(9), 9, 10]], v[[*range(9), 9, 10]]
    expected = varlen(*pieces, starts([3, 4]), starts([9, 2]))
    assert_same_bits((torch.cat([out[:3], out[5:]]), torch.cat([lse[:, :3], lse[:, 5:]], 1)), expected)
    assert not out[3:5].any() and (lse[:, 3:5] == -torch.inf).all()
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    grads = torch.autograd.grad(varlen(*leaves, *bounds, **used)[0].sum(), leaves)
    assert not grads[0][3:5].any() and not grads[1][11:].any() and not grads[2][11:].any()


def test_no_sequence_and_no_row():
    q, k, v = (torch.zeros(0, 4, 8) for _ in range(3))
    assert varlen(q, k, v, starts([]), starts([]))[0].shape == (0, 4, 8)
    assert varlen(q, k, v, starts([0, 0]), starts([0, 0]))[1].shape == (4, 0)


@pytest.mark.parametrize("page_size", [1, 16, 48, 256])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_pages(page_size, dtype):
    lengths = [(5, 90), (1, 300), (150, 170), (2, 0)]
    call = packed(lengths, dtype=getattr(torch, dtype))
    q, k, v, bounds_q, bounds_k = call
    entries = -(-300 // page_size)
    table = torch.randperm(4 * entries, generator=torch.Generator().manual_seed(1)).view(4, entries).int()
    pages = [x.new_full((4 * entries, page_size, *x.shape[1:]), torch.nan) for x in (k, v)]
    for x, to in zip((k, v), pages, strict=True):
        for i, (first, end) in enumerate(zip(bounds_k.tolist(), bounds_k.tolist()[1:], strict=False)):
            for j in range(end - first):
                to[table[i, j // page_size], j % page_size] = x[first + j]
    expected = varlen(*call, causal=True)
    assert_same_bits(varlen(q, *pages, bounds_q, bounds_k, causal=True, block_table=table), expected)
    used = {"block_table": table.long(), "seqused_k": bounds_k.diff()}
    assert_same_bits(varlen(q, *pages, bounds_q, None, causal=True, **used), expected)


@pytest.mark.parametrize(
    "change, rule",
    [
        ({"q": [1, 9, 14]}, r"cu_seqlens_q\[0\]=1 must be 0"),
        ({"q": [0, 9, 13]}, r"cu_seqlens_q\[2\]=13 must be the number of rows, 14"),
        ({"q": [0, 15, 14]}, r"cu_seqlens_q\[1\]=15 must be at most 14"),
        ({"q": [0, -1, 14]}, r"cu_seqlens_q\[1\]=-1 is below the entry before it"),
        ({"k": [0, 9, 8, 14]}, r"cu_seqlens_k has shape \(4,\); it must be \[3\]"),
        ({"k": [0, 2**40, 14]}, r"cu_seqlens_k\[1\]=1099511627776 must be at most 14"),
        ({"used": [6, 3]}, r"seqused_k\[0\]=6 must be in 0 ... 5"),
        ({"used": [1, -3]}, r"seqused_k\[1\]=-3 must be in 0 ... 9"),
    ],
)
def test_lists_that_are_wrong(change, rule):
    q, k, v, bounds, _ = packed([(5, 5), (9, 9)])
    lists = {"q": bounds, "k": bounds} | {name: torch.tensor(x) for name, x in change.items()}
    with pytest.raises(ValueError, match=rule):
        varlen(q, k, v, lists["q"], lists["k"], seqused_k=lists.get("used"))


def test_arguments_that_are_wrong():
    q, k, v, *bounds = packed([(5, 5), (9, 9)])
    for wrong, error, rule in (
        ({"max_seqlen_q": 1.5}, TypeError, "max_seqlen_q=1.5 must be an int"),
        ({"alibi_slopes": torch.zeros(3, 4)}, ValueError, "alibi_slopes has shape"),
        ({"seqused_q": torch.zeros(2)}, TypeError, "seqused_q has dtype"),
        ({"backend": "gpu"}, ValueError, "backend='gpu'"),
        ({"window_size": 3}, TypeError, "window_size=3"),
        ({"dropout_p": 1.0}, ValueError, "dropout_p=1.0"),
    ):
        with pytest.raises(error, match=rule):
            fastattn.attention_varlen(q, k, v, *bounds, **wrong)
    with pytest.raises(ValueError, match=r"q has shape \(1, 14, 4, 24\); it must be \[total, heads, dim\]"):
        fastattn.attention_varlen(q[None], k, v, *bounds)
    with pytest.raises(TypeError, match="cu_seqlens_k must be a tensor"):
        fastattn.attention_varlen(q, k, v, bounds[0], None)


def test_other_backends_and_transforms_run_each_sequence():
    call = packed(LENGTHS[:6])
    ours = varlen(*call, causal=True)
    found = fastattn.attention_varlen(*call, causal=True, return_lse=True, backend="reference")
    for x, y in zip(found, ours, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5)
    q, k, v, *bounds = call
    tangent = torch.randn_like(q)

    def of_q(q):
        return fastattn.attention_varlen(q, k, v, *bounds, causal=True)

    out, moved = torch.func.jvp(of_q, (q,), (tangent,))
    assert_same_bits(out, ours[0])
    expected = torch.func.jvp(lambda q: one_by_one(q, k, v, *bounds, causal=True)[0], (q,), (tangent,))[1]
    torch.testing.assert_close(moved, expected)


def test_gradients_can_be_differentiated_again():
    q, k, v, *bounds = packed([(3, 4), (2, 2)], dtype=torch.float64)
    found = []
    for function in (varlen, one_by_one):
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        out, lse = function(*leaves, *bounds, causal=True)
        grads = torch.autograd.grad((out.square().sum(), lse.sum()), leaves, create_graph=True)
        found.append(torch.autograd.grad([x.square().sum() for x in grads], leaves))
    for x, y in zip(*found, strict=True):
        torch.testing.assert_close(x, y)
