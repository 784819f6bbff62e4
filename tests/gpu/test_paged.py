"""Decoding from caches in pages and in int8: the same bits as from a plain cache, and whatever the page table holds."""

import process

process.require_runnable()

import pytest  # noqa: E402
import torch  # noqa: E402

from accuracy import assert_accuracy  # noqa: E402
from fastattn import Mask  # noqa: E402
from fastattn.api import bind  # noqa: E402
from fastattn.kernels import decode  # noqa: E402
from on_device import DEVICE, to  # noqa: E402

if process.INTERPRETED:
    from strict_interpreter import harden

    harden()

LENGTHS = [70, 0, 133]
"""Of the sequences' caches, one of them empty; the tables have room for 144 keys."""

CALLS = {
    "one": {},
    "few": {"seqlen_q": 3, "softcap": 5.0},
    "wide": {"head_dim": 192, "head_dim_v": 80},
    "alibi": {"alibi_slopes": torch.tensor([0.5, 0.25, 0.1, 0.3])},
}


def pages_of(x: torch.Tensor, table: torch.Tensor, page_size: int, count: int) -> torch.Tensor:
    """[batch, heads, seqlen, ...] in pages; what no key lies in is NaN, or -128."""
    pages = x.new_full((count, x.shape[1], page_size, *x.shape[3:]), -128 if x.dtype == torch.int8 else torch.nan)
    for sequence, row in zip(x, table, strict=True):
        for place, page in enumerate(row.tolist()):
            part = sequence[:, place * page_size : (place + 1) * page_size]
            pages[page, :, : part.shape[1]] = part
    return pages


def draw(page_size, dtype, seqlen_q=1, head_dim=40, head_dim_v=40, **terms):
    """(q, k, v, block_table, keyword arguments) of three sequences with their own pages, in random order."""
    blocks = 144 // page_size
    q = torch.randn(3, 4, seqlen_q, head_dim).to(dtype)
    k, v = (torch.randn(3, 2, 144, d).to(dtype) for d in (head_dim, head_dim_v))
    table = torch.randperm(3 * blocks + 2)[: 3 * blocks].reshape(3, blocks).int()
    return q, k, v, table, {"mask": Mask.lengths(torch.tensor(LENGTHS, dtype=torch.int32)), **terms}


def run(q, k, v, kwargs, held_k, held_v, **cache):
    """out and lse by the kernel, where `held_k` and `held_v` hold the keys that `k` and `v` are."""
    kwargs = {name: to(DEVICE, x) for name, x in kwargs.items()}
    bound = bind(*(x.to(DEVICE) for x in (q, k, v)), **kwargs, return_lse=True, backend="triton")
    held = (x.to(DEVICE) for x in (q, held_k, held_v))
    cache = decode.Cache(**{name: x.to(DEVICE) for name, x in cache.items()})
    return [x.cpu() for x in decode.forward(bound.problem, *held, bound.terms, cache)]


DTYPES = [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("page_size", [pytest.param(1, marks=pytest.mark.slow), 16, 48])
@pytest.mark.parametrize("call", CALLS)
def test_pages_have_the_bits_of_a_plain_cache(call, page_size, dtype):
    q, k, v, table, kwargs = draw(page_size, dtype, **CALLS[call])
    paged = (pages_of(x, table, page_size, int(table.max()) + 1) for x in (k, v))
    found = run(q, k, v, kwargs, *paged, block_table=table)
    for ours, plain in zip(found, run(q, k, v, kwargs, k, v), strict=True):
        assert torch.equal(ours, plain)
    assert_accuracy(found, q, k, v, **kwargs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("page_size", [pytest.param(None, marks=pytest.mark.slow), 16])
@pytest.mark.parametrize("call", CALLS)
def test_int8_is_what_its_numbers_say(call, page_size, dtype):
    """As exact as the same numbers in q's dtype."""
    q, k, v, table, kwargs = draw(page_size or 16, dtype, **CALLS[call])
    scales, small = [], []
    for x in (k, v):
        scale = (x.float().abs().amax(-1) / 127).log2().round().exp2()  # a power of two: k * scale has no rounding
        scales.append(scale)
        small.append((x.float() / scale[..., None]).round().clamp(-127, 127).to(torch.int8))
    k, v = ((x * scale[..., None]).to(dtype) for x, scale in zip(small, scales, strict=True))
    cache = dict(zip(("k_scale", "v_scale"), scales, strict=True))
    if page_size is not None:
        small, scales = ([pages_of(x, table, page_size, int(table.max()) + 1) for x in xs] for xs in (small, scales))
        cache = {"k_scale": scales[0], "v_scale": scales[1], "block_table": table}
    assert_accuracy(run(q, k, v, kwargs, *small, **cache), q, k, v, **kwargs)


def test_a_nan_scale_shows_in_the_queries_that_see_its_key_alone():
    q, k, v, table, kwargs = draw(16, torch.float32)
    small, ones = torch.ones_like(k, dtype=torch.int8), torch.ones(3, 2, 144)
    bad = ones.clone()
    bad[0, :, 69], bad[2, :, 140] = torch.nan, torch.nan  # the last key that is seen; one that is not
    out, lse = run(q, k, v, kwargs, small, small, k_scale=ones, v_scale=bad)
    assert out[0].isnan().all() and not out[1:].isnan().any() and not lse.isnan().any()


@pytest.mark.skipif(not process.INTERPRETED, reason="the strict interpreter sees where a kernel reads")
@pytest.mark.parametrize("seed", range(3))
def test_no_page_number_leads_out_of_bounds(seed):
    """The interpreter raises OutOfBounds otherwise."""
    q, k, v, table, kwargs = draw(16, torch.float16, head_dim=16, head_dim_v=16)
    paged = [pages_of(x, table, 16, int(table.max()) + 1) for x in (k, v)]
    generator = torch.Generator().manual_seed(seed)
    wild = torch.randint(-(2**31), 2**31, table.shape, generator=generator).int()
    run(q, k, v, kwargs, *paged, block_table=torch.where(torch.rand(table.shape) < 0.5, table, wild))


def test_many_splits_of_pages():
    q, k, v, table, kwargs = draw(16, torch.bfloat16)
    k, v = (torch.cat([x] * 8, 2) for x in (k, v))
    table = torch.randperm(3 * 72).reshape(3, 72).int()
    kwargs["mask"] = Mask.lengths(torch.tensor([1100, 0, 600], dtype=torch.int32))
    paged = (pages_of(x, table, 16, 3 * 72) for x in (k, v))
    found = run(q, k, v, kwargs, *paged, block_table=table)
    assert all(torch.equal(a, b) for a, b in zip(found, run(q, k, v, kwargs, k, v), strict=True))
