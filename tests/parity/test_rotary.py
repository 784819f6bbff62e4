"""Rotary embedding in the kernels: the formula, transformers' own, gradients, masks, transforms, bits, memory."""

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

import fastattn
from backward import INF
from fastattn import BlockMask, relative
from forward import assert_same_bits
from guarded import Guarded, in_child, printed_by_child, reset_peak, status
from isas import needs_cpu, run_tests_on, supported_isas
from rotary_formula import angles, assert_as_turned, double, qkv, turned

pytestmark = [needs_cpu, pytest.mark.usefixtures("one_thread")]

LENGTHS = [(7, 7), (5, 9), (1, 6), (40, 150), (133, 133), (0, 4)]


# --- formulas --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_formula(lengths, interleaved):
    for pairs, options in ((5, {"causal": True}), (3, {}), (1, {"window_size": (3, 0)})):
        assert_as_turned(*qkv(*lengths), *angles(lengths[1] + 2, pairs), interleaved, **options)


def terms(seqlen_q, seqlen_k):
    mask = torch.rand(2, 1, seqlen_q, seqlen_k) < 0.7
    return {
        "softcap": {"softcap": 2.0}, "alibi": {"alibi_slopes": torch.rand(4)}, "sinks": {"sinks": torch.randn(4)},
        "bias": {"bias": double(4, seqlen_q, seqlen_k)}, "mask": {"mask": mask}, "scale": {"softmax_scale": double(4)},
        "toeplitz": {"bias": relative.toeplitz(double(4, seqlen_q + seqlen_k - 1))},
        "dropout": {"dropout_p": 0.3, "seed": 5}, "padding": {"mask": fastattn.Mask.lengths(torch.tensor([3, 60]))},
        "blocks": {"mask": BlockMask.from_dense(mask, block_size=32)},
    }  # fmt: skip


@pytest.mark.parametrize("name", terms(1, 1))
def test_terms_and_masks(name):
    for lengths in ((37, 70), (70, 70)):
        for interleaved in (False, True):
            assert_as_turned(*qkv(*lengths), *angles(70, 4), interleaved, causal=True, **terms(*lengths)[name])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("of_tables", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_dtypes(dtype, of_tables):
    rates = torch.rand(60, 16) * 6
    for interleaved in (False, True):
        x = [x.to(dtype) for x in qkv(50, 60, dim=37)]
        tolerance = 1e-4 if dtype == torch.float32 else 4 * torch.finfo(dtype).eps
        assert_as_turned(*x, rates.cos().to(of_tables), rates.sin().to(of_tables), interleaved, dtype, tolerance)


@pytest.mark.parametrize("pairs", [1, 7, 16, 33, 64, 65, 100, 128])
def test_any_number_of_pairs(pairs):
    for interleaved in (False, True):
        x = qkv(6, 9, dim=2 * pairs + pairs % 3)
        assert_as_turned(*x, *angles(9, pairs), interleaved, softmax_scale=0.01)
        assert_as_turned(*x, *angles(9, pairs), interleaved, torch.float32, 1e-4, softmax_scale=0.01)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", [{}, {"causal": True}, {"window_size": (90, 0)}, {"softcap": 3.0}], ids=str)
def test_few_queries(dtype, options):
    """What cpu.decode takes, which reads keys as they lie; it rounds those of 16 bits when they have turned."""
    tolerance = {torch.float64: 1e-11, torch.float32: 1e-5, torch.bfloat16: 4e-2}[dtype]
    for seqlen_q, seqlen_k, dim, pairs in ((1, 1, 8, 4), (1, 700, 64, 32), (3, 333, 20, 7), (2, 1500, 6, 3)):
        rates = double(seqlen_k, pairs)
        for interleaved in (False, True):
            q, k, v = (x.to(dtype) for x in qkv(seqlen_q, seqlen_k, dim=dim))
            rotary = {"rotary": (rates.cos(), rates.sin()), "rotary_interleaved": interleaved}
            with fastattn.record() as calls:
                found = fastattn.attention(q, k, v, **rotary, **options, return_lse=True)
            assert [call.kernel for call in calls] == ["cpu.decode"]
            a, b = (
                turned(x.double(), rates.cos(), rates.sin(), first, interleaved)
                for x, first in ((q, seqlen_k - seqlen_q), (k, 0))
            )
            expected = fastattn.attention(a, b, v.double(), **options, return_lse=True, backend="reference")
            for x, y in zip(found, expected, strict=True):
                torch.testing.assert_close(x.double(), y, atol=tolerance, rtol=tolerance)


def test_skipping():
    """Bounds of tiles are those of turned keys, whose norms tables that are no rotations change."""
    q, k, v = qkv(600, 1200, dim=8)
    cos, sin = angles(1200, 4)
    for skip in (None, True, False):
        options = {"alibi_slopes": torch.tensor([8.0, 2.0, 0.5, 0.0]), "causal": True, "skip_negligible": skip}
        assert_as_turned(q, k, v, 30 * cos, 30 * sin, tolerance=1e-9, **options)


def test_what_is_masked_stays_hidden():
    q, k, v = qkv(40, 60)
    cos, sin = angles(60, 4)
    dirty = [x.clone() for x in (k, v)]
    for x, value in zip(dirty, (float("nan"), INF), strict=True):
        x[:, :, 50:] = value
    found = []
    for keys, values in ((k, v), dirty):
        leaves = [x.detach().requires_grad_() for x in (q, keys, values)]
        hidden = fastattn.Mask.lengths(torch.tensor([50, 50]))
        out = fastattn.attention(*leaves, rotary=(cos, sin), mask=hidden, backend="cpu")
        found.append((out, *torch.autograd.grad(out.square().sum(), leaves)))
    torch.testing.assert_close(*found)


# --- layouts ---------------------------------------------------------------------------------------------------------


def test_strides_and_tables():
    q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in qkv(20, 33))
    wide = double(80, 8, 2)
    cos, sin = wide[::2, ::2].unbind(-1)
    assert cos.stride(-1) != 1
    for tables in (
        (cos, sin), (double(4, 50).mT, double(50, 4)), angles(33, 4, 2), angles(40, 4, 1),
        (double(1, 1, 4).expand(2, 33, 4), double(2, 33, 4)), (double(3, 40, 4)[1:], double(2, 40, 8)[..., :4]),
    ):  # fmt: skip
        for interleaved in (False, True):
            assert_as_turned(q, k, v, *tables, interleaved, causal=True)
    assert_as_turned(q[..., 1:], k.flip(-1)[..., :9], v, cos, sin)


def test_transformers(llama):
    q, k, v = torch.randn(2, 4, 30, 16), torch.randn(2, 2, 30, 16), torch.randn(2, 2, 30, 16)
    cos, sin = fastattn.nn.Rotary(16).tables(torch.arange(30)[None])
    doubled = (torch.cat((x, x), -1) for x in (cos, sin))
    expected = fastattn.attention(*llama.apply_rotary_pos_emb(q, k, *doubled), v, causal=True)
    torch.testing.assert_close(fastattn.attention(q, k, v, rotary=(cos, sin), causal=True), expected)


@pytest.fixture
def llama():
    pytest.importorskip("transformers")
    from transformers.models.llama import modeling_llama

    return modeling_llama


# --- derivatives -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("interleaved", [False, True])
def test_gradcheck(interleaved):
    leaves = [x.requires_grad_() for x in qkv(2, 3, 2, 1, dim=5)]
    rotary = {"rotary": angles(3, 2), "rotary_interleaved": interleaved}

    def call(q, k, v):
        return fastattn.attention(q, k, v, **rotary, causal=True, return_lse=True)

    assert gradcheck(call, leaves)
    assert gradgradcheck(call, leaves)


def test_gradients_of_tables():
    cos, sin = (x.requires_grad_() for x in angles(9, 3))
    q, k, v = (x.requires_grad_() for x in qkv(5, 9))
    for interleaved in (False, True):
        found, expected = [
            torch.autograd.grad(out.square().sum(), (q, k, v, cos, sin))
            for out in (
                fastattn.attention(q, k, v, rotary=(cos, sin), rotary_interleaved=interleaved),
                fastattn.attention(turned(q, cos, sin, 4, interleaved), turned(k, cos, sin, 0, interleaved), v),
            )
        ]
        torch.testing.assert_close(found, expected)
    with torch.no_grad(), fastattn.record() as calls:
        fastattn.attention(q, k, v, rotary=(cos, sin))
    assert calls[0].problem.rotary


def test_transforms():
    q, k, v = qkv(5, 9)
    cos, sin = angles(9, 3)

    def inside(q, k, v):
        return fastattn.attention(q, k, v, rotary=(cos, sin), causal=True)

    def outside(q, k, v):
        return fastattn.attention(turned(q, cos, sin, 9 - q.shape[2]), turned(k, cos, sin, 0), v, causal=True)

    tangents = tuple(map(torch.randn_like, (q, k, v)))
    batched = [torch.stack([x, 2 * x]) for x in (q, k, v)]
    for f in (
        lambda call: torch.func.jvp(call, (q, k, v), tangents),
        lambda call: torch.func.grad(lambda *x: call(*x).square().sum(), (0, 1, 2))(q, k, v),
        lambda call: torch.func.vmap(call)(*batched),
        lambda call: torch.func.hessian(lambda x: call(x, k[:1], v[:1]).sum())(q[:1, :, :2]),
    ):
        torch.testing.assert_close(f(inside), f(outside))


# --- bits and memory -------------------------------------------------------------------------------------------------


def test_bits_do_not_depend_on_threads_or_on_the_batch():
    q, k, v = (x.float() for x in qkv(130, 700))
    rotary = tuple(x.float() for x in angles(700, 4))

    def run(q, k, v, threads=1):
        torch.set_num_threads(threads)
        leaves = [x.detach().clone().requires_grad_() for x in (q, k, v)]
        out = fastattn.attention(*leaves, rotary=rotary, causal=True)
        return out.detach(), *torch.autograd.grad(out.square().sum(), leaves)

    expected = run(q, k, v)
    for threads in (2, 3):
        assert_same_bits(run(q, k, v, threads), expected)
    assert_same_bits(run(q[1:], k[1:], v[1:]), [x[1:] for x in expected])


@pytest.mark.slow
@pytest.mark.parametrize("isa", supported_isas())
def test_on_each_isa(isa):
    run_tests_on(isa, __file__, "-k", "formula or terms or dtypes or pairs or few_queries or skipping")


def guarded_calls(say, side):
    for lengths in ((1, 1), (3, 37), (16, 16), (33, 130)):
        for dtype in (torch.float32, torch.float64, torch.bfloat16):
            say((lengths, dtype))
            q, k, v = (x.to(dtype) for x in qkv(*lengths, dim=24))
            tables = [x.float() for x in angles(lengths[1], 11)]
            guarded = tuple(Guarded(x, side) for x in tables)
            for interleaved in (False, True):
                found = [
                    fastattn.attention(q, k, v, rotary=rotary, rotary_interleaved=interleaved)
                    for rotary in (tables, tuple(x.tensor for x in guarded))
                ]
                assert torch.equal(*found)


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
@pytest.mark.parametrize("side", ["end", "start"])
def test_nothing_beside_the_tables_is_read(side):
    in_child(guarded_calls, side)


def extra_bytes(seqlen: int) -> int:
    torch.set_num_threads(1)
    q, k, v = (torch.randn(1, 8, seqlen, 64) for _ in range(3))
    rotary = fastattn.nn.Rotary(64).tables(torch.arange(seqlen))

    def step(length):
        x = [x[:, :, :length] for x in (q, k, v)]
        return fastattn.attention(*x, rotary=rotary, window_size=(64, 0), backend="cpu")

    step(64)
    before = reset_peak()
    step(seqlen)
    return status("VmHWM") - before


def test_nothing_turned_is_stored():
    """out is 16 MiB, q turned another 16, k turned another."""
    assert printed_by_child("test_rotary.extra_bytes(8192)") < 24 * 2**20
