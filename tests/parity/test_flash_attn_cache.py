"""flash-attn's function for caches, against its formulas for what a sequence's part of the cache holds."""

import pytest
import torch

from fastattn.compat import flash_attn
from fastattn.compat.flash_attn import fa3
from flash import angles, attend, randn, turned

with_kvcache = flash_attn.flash_attn_with_kvcache
LENGTHS = torch.tensor([4, 0, 9], dtype=torch.int32)
CAPACITY, NEW = 12, 3


def caches(entries=3):
    torch.manual_seed(0)
    return randn(entries, CAPACITY, 2, 8), randn(entries, CAPACITY, 2, 6)


def step(seqlen_q=NEW):
    """q, k, v of a step of three sequences."""
    return randn(3, seqlen_q, 4, 8), randn(3, NEW, 2, 8), randn(3, NEW, 2, 6)


def check(found, q, rows_k, rows_v, **options):
    """(out, lse) are those of each sequence with its own keys and values."""
    parts = [attend(q[i : i + 1], rows_k[i][None], rows_v[i][None], **options) for i in range(len(q))]
    expected = tuple(torch.cat(x) for x in zip(*parts, strict=True))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("seqlen_q", [1, 3, 5])
@pytest.mark.parametrize("causal", [False, True])
def test_append_and_attend(causal, seqlen_q):
    k_cache, v_cache = caches()
    before = k_cache.clone(), v_cache.clone()
    q, k, v = step(seqlen_q)
    found = with_kvcache(
        q, k_cache, v_cache, k, v, cache_seqlens=LENGTHS, causal=causal, softcap=3.0, return_softmax_lse=True
    )
    rows_k, rows_v = ([torch.cat([old[i, :n], new[i]]) for i, n in enumerate(LENGTHS)]
                      for old, new in zip(before, (k, v), strict=True))  # fmt: skip
    check(found, q, rows_k, rows_v, causal=causal, softcap=3.0)
    for cache, old, new in zip((k_cache, v_cache), before, (k, v), strict=True):
        for i, n in enumerate(LENGTHS):  # the new rows, and nothing else
            old[i, n : n + NEW] = new[i]
        assert torch.equal(cache, old)
    alone = with_kvcache(q, k_cache, v_cache, cache_seqlens=LENGTHS + NEW, causal=causal, softcap=3.0)
    assert torch.equal(alone, found[0])  # nothing appended, the same keys


def test_lengths_as_an_int_and_a_full_cache():
    (k_cache, v_cache), (q, _, _) = caches(), step()
    found = with_kvcache(q, k_cache, v_cache, cache_seqlens=5, return_softmax_lse=True)
    check(found, q, k_cache[:, :5], v_cache[:, :5])
    check(with_kvcache(q, k_cache, v_cache, return_softmax_lse=True), q, k_cache, v_cache)


def test_rows_without_keys():
    (k_cache, v_cache), (q, _, _) = caches(), step()
    out, lse = with_kvcache(q, k_cache, v_cache, cache_seqlens=LENGTHS, return_softmax_lse=True)
    assert (out[1] == 0).all() and (lse[1] == -torch.inf).all() and lse.shape == (3, 4, NEW)


@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("causal, window", [(True, (-1, -1)), (False, (4, 0)), (False, (-1, -1))])
def test_rotary(causal, window, interleaved):
    """Queries are turned each by its own position if causal or local, else all by that of the first new key."""
    k_cache, v_cache = caches()
    before = k_cache.clone()
    q, k, v = step()
    cos, sin = angles(40, 3)
    found = with_kvcache(
        q, k_cache, v_cache, k, v, cos, sin, LENGTHS, causal=causal, window_size=window,
        rotary_interleaved=interleaved, return_softmax_lse=True,
    )  # fmt: skip
    rows_k, turned_q = [], torch.empty_like(q)
    for i, n in enumerate(LENGTHS.tolist()):
        new = torch.stack([turned(row, n + j, interleaved) for j, row in enumerate(k[i])])
        torch.testing.assert_close(k_cache[i, n : n + NEW], new, rtol=0, atol=1e-12)
        rows_k.append(torch.cat([before[i, :n], new]))
        for j in range(NEW):
            turned_q[i, j] = turned(q[i, j], n + j if causal or window != (-1, -1) else n, interleaved)
    options = {"causal": causal, "window": tuple(None if side < 0 else side for side in window)}
    check(found, turned_q, rows_k, [v_cache[i, : n + NEW] for i, n in enumerate(LENGTHS)], **options)


def test_interleaved_is_the_default():
    q, k, v = step()
    tables = angles(40, 3)
    found = with_kvcache(q, *caches(), k, v, *tables, LENGTHS)
    assert torch.equal(found, with_kvcache(q, *caches(), k, v, *tables, LENGTHS, rotary_interleaved=True))


@pytest.mark.parametrize("appended", [False, True])
def test_left_padding(appended):
    """Keys begin at cache_leftpad; cache_seqlens counts from the start of the cache."""
    k_cache, v_cache = caches()
    q, k, v = step()
    left = torch.tensor([1, 0, 5], dtype=torch.int32)
    new = (k, v) if appended else (None, None)
    found = with_kvcache(
        q, k_cache, v_cache, *new, cache_seqlens=LENGTHS, cache_leftpad=left, causal=True, return_softmax_lse=True
    )
    ends = LENGTHS + NEW * appended
    rows = ([cache[i, a:b] for i, (a, b) in enumerate(zip(left, ends, strict=True))] for cache in (k_cache, v_cache))
    check(found, q, *rows, causal=True)


def test_entries_of_the_cache():
    k_cache, v_cache = caches(entries=5)
    before = k_cache.clone()
    q, k, v = step()
    entries = torch.tensor([4, 0, 2], dtype=torch.int32)
    found = with_kvcache(
        q, k_cache, v_cache, k, v, cache_seqlens=LENGTHS, cache_batch_idx=entries, causal=True, return_softmax_lse=True
    )
    rows = ([cache[e, : n + NEW] for e, n in zip(entries, LENGTHS, strict=True)] for cache in (k_cache, v_cache))
    check(found, q, *rows, causal=True)
    assert torch.equal(k_cache[[1, 3]], before[[1, 3]])


@pytest.mark.parametrize("page_size", [1, 4, 5, 16])
def test_pages(page_size):
    """Bit for bit what a contiguous cache gives."""
    k_cache, v_cache = caches()
    q, k, v = step()
    per_sequence = -(-CAPACITY // page_size)
    table = torch.randperm(3 * per_sequence, dtype=torch.int32).view(3, per_sequence)
    pages = []
    for cache in (k_cache, v_cache):
        room = torch.zeros(3, per_sequence * page_size, *cache.shape[2:], dtype=cache.dtype)
        room[:, :CAPACITY] = cache
        page = torch.empty(3 * per_sequence, page_size, *cache.shape[2:], dtype=cache.dtype)
        page[table.flatten().long()] = room.view(-1, page_size, *cache.shape[2:])
        pages.append(page)
    options = {"cache_seqlens": LENGTHS, "causal": True, "return_softmax_lse": True}
    expected = with_kvcache(q, k_cache, v_cache, k, v, **options)
    found = with_kvcache(q, *pages, k, v, block_table=table, **options)
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])
    for cache, page in zip((k_cache, v_cache), pages, strict=True):
        gathered = page[table.long()].flatten(1, 2)
        for i, n in enumerate(LENGTHS + NEW):
            assert torch.equal(gathered[i, :n], cache[i, :n])
    found = fa3.flash_attn_with_kvcache(q, *pages, cache_seqlens=LENGTHS + NEW, page_table=table, causal=True)
    assert torch.equal(found, expected[0])
    if page_size == 16:  # without lengths the pages are full
        everything = with_kvcache(q, *pages, block_table=table)
        assert torch.equal(everything, with_kvcache(q, *pages, block_table=table, cache_seqlens=16))


def test_qv():
    k_cache, v_cache = caches()
    q, qv = randn(3, 2, 4, 8), randn(3, 2, 4, 6)
    found = fa3.flash_attn_with_kvcache(q, k_cache, v_cache, qv=qv, cache_seqlens=LENGTHS, return_softmax_lse=True)
    rows = [cache[i, :n] for cache in (torch.cat([k_cache, v_cache], -1),) for i, n in enumerate(LENGTHS)]
    check(found, torch.cat([q, qv], -1), rows, [v_cache[i, :n] for i, n in enumerate(LENGTHS)])


def test_a_step_past_the_capacity_writes_nothing():
    k_cache, v_cache = caches()
    before = k_cache.clone(), v_cache.clone()
    q, k, v = step()
    lengths = torch.tensor([4, 10, 0], dtype=torch.int32)
    with pytest.raises(ValueError, match=r"cache_seqlens.*1"):
        with_kvcache(q, k_cache, v_cache, k, v, cache_seqlens=lengths)
    assert torch.equal(k_cache, before[0]) and torch.equal(v_cache, before[1])


Q, K, V = step()
CUT = torch.tensor([0, 3, 6, 9], dtype=torch.int32)
TABLE = torch.zeros(3, 1, dtype=torch.int32)
REFUSALS = {
    "list": (with_kvcache, {"k_cache": [1.0]}, "k_cache must be a torch.Tensor, got list"),
    "rank": (with_kvcache, {"q": Q[0]}, r"q has shape \(3, 4, 8\); it must be \[batch, seqlen, num_heads, head_dim\]"),
    "table": (with_kvcache, {"block_table": [0]}, "block_table must be a torch.Tensor, got list"),
    "no lengths": (with_kvcache, {"k": K, "v": V}, "cache_seqlens=None: k cannot be appended"),
    "rotary alone": (with_kvcache, dict(zip(("rotary_cos", "rotary_sin"), angles(40, 3), strict=True)), "rotary_cos"),
    "gradient": (with_kvcache, {"q": Q.clone().requires_grad_()}, "no gradients"),
    "qv and k": (fa3.flash_attn_with_kvcache, {"k": K, "v": V, "qv": Q}, "k together with qv=tensor"),
    "no pages": (fa3.flash_attn_with_kvcache, {"cu_seqlens_q": CUT}, "cu_seqlens_q without page_table"),
    "packed and k": (
        fa3.flash_attn_with_kvcache,
        {"cu_seqlens_q": CUT, "page_table": TABLE, "k": K, "v": V},
        "k together with cu_seqlens_q",
    ),
    **{name: (fa3.flash_attn_with_kvcache, {name: CUT}, f"{name}=tensor.* is not supported")
       for name in ("cu_seqlens_k_new", "rotary_seqlens", "attention_chunk", "q_descale", "k_descale", "v_descale")},
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSALS)
def test_refusals(name):
    function, given, pattern = REFUSALS[name]
    k_cache, v_cache = caches()
    with pytest.raises((TypeError, ValueError, NotImplementedError), match=pattern) as caught:
        function(**{"q": Q, "k_cache": k_cache, "v_cache": v_cache, **given})
    assert "\n" not in str(caught.value)
