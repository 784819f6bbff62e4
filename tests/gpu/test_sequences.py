"""Packed sequences and caches on the Triton kernels beside the C++ ones, or the reference where these are not built."""

import process

process.require_runnable()

import pytest  # noqa: E402
import torch  # noqa: E402

import fastattn  # noqa: E402
from fastattn.backends import cpu  # noqa: E402
from fastattn.layouts.quantization import quantized  # noqa: E402
from on_device import DEVICE, to  # noqa: E402
from sequences import into_pages, packed  # noqa: E402

if process.INTERPRETED:
    from strict_interpreter import harden

    harden()
THEIRS = "reference" if cpu.unavailable() else "cpu"
LENGTHS = ((5, 9), (0, 4), (33, 33), (1, 150), (7, 0), (70, 90), (0, 0), (64, 40))
OPTIONS = {
    "plain": {},
    "causal": {"causal": True},
    "window": {"window_size": (20, 5), "softcap": 3.0},
    "sinks": {"causal": True, "sinks": torch.tensor([0.3, -1.0, 0.0, 2.0]), "softmax_scale": -0.2},
    "learned": {"softmax_scale": torch.tensor([0.1, 0.2, 0.3, 0.4])},
}


def on(device, tensors):
    return [to(device, x) for x in tensors]


def varlen(backend, call, options, backward: bool, **more):
    """(kernel, [out, lse, gradients of q, k, v and of what is learned])"""
    device = DEVICE if backend == "triton" else "cpu"
    call = on(device, call)
    options = {name: to(device, x) for name, x in options.items()} | {name: to(device, x) for name, x in more.items()}
    leaves = [*call[:3], *(x for x in options.values() if isinstance(x, torch.Tensor) and x.is_floating_point())]
    leaves = [x.requires_grad_(backward) for x in leaves]
    out, lse = fastattn.attention_varlen(*call, **options, return_lse=True, backend=backend)
    kernel, found = fastattn.last_call().kernel, [out.detach(), lse.detach()]
    if backward:
        loss = (out * torch.linspace(-1, 1, out.numel(), device=device).view_as(out)).sum()
        found += torch.autograd.grad(loss + lse[lse > -torch.inf].sum(), leaves)
    return kernel, [x.cpu() for x in found]


@pytest.mark.parametrize("backward", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["forward", "backward"])
@pytest.mark.parametrize("name", OPTIONS)
def test_packed_sequences(name, backward):
    call = packed(LENGTHS, head_dim_v=16)
    kernel, found = varlen("triton", call, OPTIONS[name], backward)
    assert kernel == "triton.varlen"
    _, expected = varlen(THEIRS, call, OPTIONS[name], backward)
    assert len(found) == len(expected)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=2e-5)


def test_parts_of_packed_sequences():
    call = packed(LENGTHS)
    used = {
        "seqused_q": torch.tensor([3, 0, 33, 1, 0, 40, 0, 64]),
        "seqused_k": torch.tensor([9, 0, 5, 150, 0, 1, 0, 0]),
    }
    for backward in (False, True):  # backward, all that packed sequences are is here
        found, expected = (
            varlen(backend, call, {"causal": True}, backward, **used)[1] for backend in ("triton", THEIRS)
        )
        for ours, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=2e-5)


def test_what_counts_from_the_beginning_of_a_sequence_is_a_call_for_each():
    call = packed(LENGTHS[:4])
    slopes = torch.linspace(0.1, 0.4, 4)
    for options in ({"alibi_slopes": slopes}, {"dropout_p": 0.3, "seed": 5}):
        kernel, found = varlen("triton", call, options, False)
        assert kernel in ("triton.decode", "triton.prefill")  # the last one
        for ours, theirs in zip(found, varlen(THEIRS, call, options, False)[1], strict=True):
            torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=2e-5)


def test_wrong_lists_are_named():
    q, k, v, cu_seqlens_q, cu_seqlens_k = packed(LENGTHS)
    cu_seqlens_k[3] = 1 << 20
    with pytest.raises(ValueError, match=r"cu_seqlens_k\[3\]=1048576"):
        varlen("triton", (q, k, v, cu_seqlens_q, cu_seqlens_k), {}, False)


# --- caches ----------------------------------------------------------------------------------------------------------

SEQLENS = torch.tensor([100, 0, 37], dtype=torch.int32)
CACHES = {
    "plain": {},
    "int8": {},
    "pages": {},
    "pages of int8": {},
    "entries": {"cache_batch_idx": torch.tensor([2, 0, 4])},
    "padded": {"cache_leftpad": torch.tensor([7, 0, 37])},
    "rotary": {"rotary": True},
    "pages, window, rotary": {"rotary": True, "window_size": (30, 0), "sinks": torch.tensor([0.5, 0.0, -1.0, 2.0])},
    "not causal": {"causal": False, "softcap": 2.0, "rotary": True, "rotary_interleaved": True},
}


def cached(backend, name, seqlen_q, new):
    """(kernel, [out, lse, caches and factors afterwards])"""
    generator, device = torch.Generator().manual_seed(3), DEVICE if backend == "triton" else "cpu"
    options = dict(CACHES[name])

    def normal(*shape):
        return torch.randn(shape, generator=generator)

    q, rows = normal(3, 4, seqlen_q, 24), {"k": normal(3, 2, new, 24), "v": normal(3, 2, new, 40)} if new else {}
    caches = [normal(5 if "entries" in name else 3, 2, 144, d) for d in (24, 40)]
    if options.pop("rotary", False) and new:
        angles = normal(200, 8)
        options |= {"rotary_cos": angles.cos(), "rotary_sin": angles.sin()}
    else:
        options.pop("rotary_interleaved", None)
    if "int8" in name:
        caches, factors = zip(*(quantized(x) for x in caches), strict=True)
        options |= dict(zip(("k_scale", "v_scale"), factors, strict=True))
    if "pages" in name:
        options = {
            x: into_pages(y[..., None], 16)[0][..., 0] if x in ("k_scale", "v_scale") else y for x, y in options.items()
        }
        caches, tables = zip(*(into_pages(x, 16) for x in caches), strict=True)
        options["block_table"] = tables[0]
    caches = [x.clone().to(device) for x in caches]
    options = {x: to(device, y) for x, y in (options | rows).items()}
    out, lse = fastattn.attention_with_kvcache(
        q.to(device), *caches, cache_seqlens=SEQLENS.to(device), **options, return_lse=True, backend=backend
    )
    held = [*caches, *(options[x] for x in ("k_scale", "v_scale") if x in options)]
    return fastattn.last_call().kernel, [x.cpu() for x in (out, lse, *held)]


@pytest.mark.parametrize("seqlen_q, new", [(1, 0), (1, 1), (3, 3)])
@pytest.mark.parametrize("name", CACHES)
def test_caches(name, seqlen_q, new):
    kernel, found = cached("triton", name, seqlen_q, new)
    assert kernel == "triton.cache"
    for i, (ours, theirs) in enumerate(zip(found, cached(THEIRS, name, seqlen_q, new)[1], strict=True)):
        if ours.dtype == torch.int8:  # a factor that is rounded otherwise may move a number by one
            assert (ours.int() - theirs.int()).abs().max() <= 1
        else:
            torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=1e-3 if "int8" in name and i < 2 else 2e-5)


def test_more_queries_are_a_call_for_each():
    kernel, found = cached("triton", "plain", 20, 20)
    assert kernel == "triton.prefill"
    for ours, theirs in zip(found, cached(THEIRS, "plain", 20, 20)[1], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=2e-5)


def test_two_sequences_that_would_write_one_page():
    with pytest.raises(ValueError, match="would write the same entry or page"):
        k = torch.zeros(3, 2, 16, 8, device=DEVICE)
        table = torch.zeros(2, 1, dtype=torch.int32, device=DEVICE)
        rows = torch.zeros(2, 2, 1, 8, device=DEVICE)
        fastattn.attention_with_kvcache(rows, k, k, rows, rows, cache_seqlens=0, block_table=table, backend="triton")
