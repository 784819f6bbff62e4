"""`attention_with_kvcache`: appending in place, pages, int8, rotary embedding, and lists that are wrong."""

import pytest
import torch

import fastattn
from fastattn.layouts.quantization import quantized
from fastattn.layouts.rotary import rotated
from forward import assert_same_bits, dtypes
from isas import needs_cpu
from sequences import into_pages

pytestmark = needs_cpu
BATCH, HEADS, HEADS_K, CAPACITY, DIM, DIM_V = 3, 4, 2, 600, 24, 40
SEQLENS = torch.tensor([500, 0, 37], dtype=torch.int32)


def inputs(seqlen_q=3, new=3, dtype=torch.float32, seed=0):
    """q, k_cache, v_cache, k, v"""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    caches = normal(BATCH, HEADS_K, CAPACITY, DIM), normal(BATCH, HEADS_K, CAPACITY, DIM_V)
    rows = normal(BATCH, HEADS_K, new, DIM), normal(BATCH, HEADS_K, new, DIM_V)
    return normal(BATCH, HEADS, seqlen_q, DIM), *caches, *(rows if new else (None, None))


def cached(*args, **options):
    found = fastattn.attention_with_kvcache(*args, **options, return_lse=True, backend="cpu")
    assert fastattn.last_call().kernel == "cpu.cache"
    return found


def alone(q, keys, values, alibi_slopes=None, **options):
    """`attention` for each sequence of lists of keys and values [1, heads, rows, dim]."""
    found = []
    for i in range(len(q)):
        slopes = {} if alibi_slopes is None else {"alibi_slopes": alibi_slopes[i]}
        options = {"causal": True, **options}
        found.append(fastattn.attention(q[i : i + 1], keys[i], values[i], return_lse=True, **options, **slopes))
    return tuple(torch.cat(x) for x in zip(*found, strict=True))


def appended(cache, rows, seqlens=SEQLENS, entries=range(BATCH)):
    """What the cache is to hold afterwards."""
    cache = cache.clone()
    for i, entry in enumerate(entries):
        cache[entry, :, int(seqlens[i]) : int(seqlens[i]) + rows.shape[2]] = rows[i]
    return cache


def used(cache, new, seqlens=SEQLENS, entries=range(BATCH), pads=(0, 0, 0)):
    return [cache[entry, :, pads[i] : int(seqlens[i]) + new][None] for i, entry in enumerate(entries)]


OPTIONS = [
    {}, {"causal": False}, {"window_size": (40, 0)}, {"softcap": 2.0}, {"softmax_scale": 0.3},
    {"sinks": torch.tensor([1.0, -1.0, 0.0, 0.5])}, {"alibi_slopes": torch.linspace(0.01, 0.9, 12).view(3, 4)},
]  # fmt: skip


@dtypes
@pytest.mark.parametrize("seqlen_q", [1, 3, 40])
@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "-".join(options))
def test_bits_are_those_of_the_keys_alone(options, seqlen_q, dtype):
    q, k_cache, v_cache, k, v = inputs(seqlen_q, seqlen_q, getattr(torch, dtype))
    wanted = appended(k_cache, k), appended(v_cache, v)
    expected = alone(q, *[used(x, seqlen_q) for x in wanted], **options)
    assert_same_bits(cached(q, k_cache, v_cache, k, v, cache_seqlens=SEQLENS, **options), expected)
    assert_same_bits((k_cache, v_cache), wanted)  # and every other byte is what it was


def test_nothing_is_appended_and_one_length_is_a_number():
    q, k_cache, v_cache, *_ = inputs(2, 0)
    before = k_cache.clone(), v_cache.clone()
    expected = alone(q, *[used(x, 0, [70] * 3) for x in before])
    assert_same_bits(cached(q, k_cache, v_cache, cache_seqlens=70), expected)
    assert_same_bits((k_cache, v_cache), before)


def test_any_strides():
    q, k_cache, v_cache, k, v = inputs()
    expected = cached(q, k_cache.clone(), v_cache.clone(), k, v, cache_seqlens=SEQLENS)
    q, k_cache, v_cache, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k_cache, v_cache, k, v))
    wide = torch.zeros(*k_cache.shape, 2)
    wide[..., 1] = k_cache
    for caches in ((k_cache.clone(), v_cache.clone()), (wide[..., 1], v_cache)):
        out, lse = cached(q, *caches, k, v, cache_seqlens=SEQLENS.long())
        assert_same_bits((out.contiguous(), lse), expected)
    assert not wide[..., 0].any()


@pytest.mark.parametrize("page_size", [1, 16, 48, 256])
@pytest.mark.parametrize("seqlen_q", [1, 20])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_pages_are_the_contiguous_cache(page_size, seqlen_q, dtype):
    q, k_cache, v_cache, k, v = inputs(seqlen_q, seqlen_q, getattr(torch, dtype))
    (k_pages, table), (v_pages, _) = (into_pages(x, page_size) for x in (k_cache, v_cache))
    before = k_pages.clone()
    expected = cached(q, k_cache, v_cache, k, v, cache_seqlens=SEQLENS)
    found = cached(q, k_pages, v_pages, k, v, cache_seqlens=SEQLENS, block_table=table)
    assert_same_bits(found, expected)
    for i in range(BATCH):
        for row in range(CAPACITY):
            place = int(table[i, row // page_size]), slice(None), row % page_size
            is_new = 0 <= row - int(SEQLENS[i]) < seqlen_q
            assert torch.equal(k_pages[place], k_cache[i, :, row] if is_new else before[place])
    changed = (k_pages != before).flatten(1).any(1).nonzero().flatten().tolist()
    assert set(changed) <= set(table.flatten().tolist())


def test_entries_and_left_padding():
    q, k_cache, v_cache, k, v = inputs()
    index, pads = torch.tensor([2, 0, 1]), torch.tensor([499, 0, 5], dtype=torch.int32)
    wanted = [appended(x, rows, entries=index.tolist()) for x, rows in ((k_cache, k), (v_cache, v))]
    expected = alone(q, *[used(x, 3, entries=index.tolist(), pads=pads.tolist()) for x in wanted])
    options = {"cache_seqlens": SEQLENS, "cache_batch_idx": index, "cache_leftpad": pads}
    assert_same_bits(cached(q, k_cache, v_cache, k, v, **options), expected)
    assert_same_bits((k_cache, v_cache), wanted)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("options", [{}, {"causal": False}, {"causal": False, "window_size": (9, 9)}], ids=str)
def test_rotary_embedding(options, interleaved, dtype):
    q, k_cache, v_cache, k, v = inputs(dtype=getattr(torch, dtype))
    angles = torch.outer(torch.arange(610.0), 100.0 ** -torch.linspace(0, 1, 8))
    cos, sin = angles.cos().to(q.dtype), angles.sin().to(q.dtype)
    steps = options != {"causal": False}
    turned_q, turned_k = torch.empty_like(q), torch.empty_like(k)
    for i, length in enumerate(SEQLENS.tolist()):
        positions = torch.arange(length, length + 3)
        turned_k[i] = rotated(k[i], positions, cos, sin, interleaved)
        turned_q[i] = rotated(q[i], positions if steps else positions[:1], cos, sin, interleaved)
    caches = k_cache.clone(), v_cache.clone()
    expected = cached(turned_q, *caches, turned_k, v, cache_seqlens=SEQLENS, **options)
    rotary = {"rotary_cos": cos, "rotary_sin": sin, "rotary_interleaved": interleaved}
    found = cached(q, k_cache, v_cache, k, v, cache_seqlens=SEQLENS, **rotary, **options)
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5}.get(q.dtype, 2e-2)
    for x, y in zip((*found, k_cache, v_cache), (*expected, *caches), strict=True):
        torch.testing.assert_close(x, y, rtol=tolerance, atol=tolerance)


def test_rotary_embedding_is_that_of_transformers():
    pytest.importorskip("transformers")
    from transformers.models.gptj import modeling_gptj as gptj
    from transformers.models.llama import modeling_llama as llama

    _, k_cache, v_cache, k, v = inputs()
    angles = torch.outer(torch.arange(610.0), 100.0 ** -torch.linspace(0, 1, DIM // 2))
    positions = torch.stack([torch.arange(length, length + 3) for length in SEQLENS.tolist()])
    cos, sin = angles.cos(), angles.sin()
    doubled = [torch.cat([x, x], -1)[positions] for x in (cos, sin)]
    turned = {False: llama.apply_rotary_pos_emb(k, k, *doubled)[0]}
    turned[True] = gptj.apply_rotary_pos_emb(k.transpose(1, 2), sin[positions], cos[positions]).transpose(1, 2)
    for interleaved, expected in turned.items():
        rotary = {"rotary_cos": cos, "rotary_sin": sin, "rotary_interleaved": interleaved}
        cached(inputs()[0], k_cache, v_cache, k, v, cache_seqlens=SEQLENS, **rotary)
        for i, length in enumerate(SEQLENS.tolist()):
            torch.testing.assert_close(k_cache[i, :, length : length + 3], expected[i], rtol=1e-5, atol=1e-5)


def int8_caches(k_cache, v_cache):
    (k8, k_scale), (v8, v_scale) = quantized(k_cache), quantized(v_cache)
    return k8, v8, {"k_scale": k_scale, "v_scale": v_scale}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("seqlen_q", [1, 3, 40])
@pytest.mark.parametrize("page_size", [None, 16, 7])
def test_int8(dtype, seqlen_q, page_size):
    q, k_cache, v_cache, k, v = inputs(seqlen_q, seqlen_q, getattr(torch, dtype))
    wanted = appended(k_cache, k).float(), appended(v_cache, v).float()
    exact = [(numbers * factors[..., None]) for numbers, factors in map(quantized, wanted)]
    for x, y in zip(exact, wanted, strict=True):
        assert ((x - y).abs() <= y.abs().amax(-1, keepdim=True) / 253.9).all()  # half a step of 127
    expected = alone(q.float(), *[used(x, seqlen_q) for x in exact])
    k8, v8, scales = int8_caches(k_cache, v_cache)
    numbers, factors = quantized(wanted[0])
    options = {}
    if page_size is not None:
        k8, v8 = (into_pages(x, page_size)[0] for x in (k8, v8))
        scales, tables = zip(*[into_pages(x[..., None], page_size) for x in scales.values()], strict=True)
        scales = dict(zip(("k_scale", "v_scale"), [x[..., 0] for x in scales], strict=True))
        options["block_table"] = tables[0]
    out, lse = cached(q, k8, v8, k, v, cache_seqlens=SEQLENS, **scales, **options)
    tolerance = 1e-4 if dtype == "float32" else 1e-2
    torch.testing.assert_close(out.float(), expected[0], rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(lse, expected[1], rtol=1e-4, atol=1e-4)
    if page_size is None:
        assert torch.equal(k8, numbers)
        torch.testing.assert_close(scales["k_scale"], factors, rtol=1e-6, atol=0.0)


def test_int8_keeps_what_is_not_finite():
    q, k_cache, v_cache, k, v = inputs()
    k8, v8, scales = int8_caches(k_cache, v_cache)
    k[0, 0, 2, 5] = torch.nan  # a key that the last query of sequence 0 alone sees
    out, _ = cached(q, k8, v8, k, v, cache_seqlens=SEQLENS, **scales)
    assert out[0, :2, 2].isnan().all() and not out[0, :, :2].isnan().any() and not out[1:].isnan().any()


WRONG = [
    ({"cache_seqlens": torch.tensor([500, 0, 598])}, r"cache_seqlens\[2\]=598 must be in 0 ... 597"),
    ({"cache_seqlens": torch.tensor([500, -1, 5])}, r"cache_seqlens\[1\]=-1"),
    ({"cache_seqlens": 601}, r"cache_seqlens\[0\]=601"),
    ({"cache_seqlens": -(2**63)}, r"cache_seqlens\[0\]=-9223372036854775808"),
    ({"cache_leftpad": torch.tensor([0, 1, 0])}, r"cache_leftpad\[1\]=1 must be in 0 ... 0"),
    ({"cache_batch_idx": torch.tensor([0, 3, 1])}, r"cache_batch_idx\[1\]=3 must be in 0 ... 2"),
    ({"cache_batch_idx": torch.tensor([0, 2, 2])}, "entry 2 would be written by sequence 1 and by sequence 2"),
    ({"rotary_cos": torch.ones(40, 4), "rotary_sin": torch.ones(40, 4)}, r"cache_seqlens\[0\]=500 leads beyond the 40"),
]
WRONG_PAGES = [
    ([[0, 1], [2, 3], [4, 6]], [500, 0, 400], r"block_table\[2, 1\]=6 must be a page, 0 <= page < 6"),
    ([[0, -1], [2, 3], [4, 5]], [500, 0, 37], r"block_table\[0, 1\]=-1"),
    ([[0, 1], [2, 3], [4, 5]], [500, 0, 598], r"cache_seqlens\[2\]=598"),
    ([[0, 1], [2, 3], [2, 5]], [500, 0, 37], "page 2 would be written by sequence 1 and by sequence 2"),
]


@pytest.mark.parametrize("wrong, rule", WRONG)
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_a_list_that_is_wrong_writes_nothing(wrong, rule, backend):
    q, k_cache, v_cache, k, v = inputs()
    before = k_cache.clone(), v_cache.clone()
    with pytest.raises(ValueError, match=rule if backend == "cpu" else None):
        fastattn.attention_with_kvcache(
            q, k_cache, v_cache, k, v, **{"cache_seqlens": SEQLENS, **wrong}, backend=backend
        )
    assert_same_bits((k_cache, v_cache), before)


@pytest.mark.parametrize("table, seqlens, rule", WRONG_PAGES)
def test_a_table_that_is_wrong_writes_nothing(table, seqlens, rule):
    q, k_cache, v_cache, k, v = inputs()
    pages = [x.unflatten(2, (2, 300)).transpose(1, 2).flatten(0, 1).contiguous() for x in (k_cache, v_cache)]
    before = [x.clone() for x in pages]
    options = {"cache_seqlens": torch.tensor(seqlens), "block_table": torch.tensor(table)}
    with pytest.raises(ValueError, match=rule):
        cached(q, *pages, k, v, **options)
    assert_same_bits(pages, before)


def test_a_table_may_hold_anything_behind_the_last_page():
    q, k_cache, v_cache, k, v = inputs()
    pages = [x.unflatten(2, (2, 300)).transpose(1, 2).flatten(0, 1).contiguous() for x in (k_cache, v_cache)]
    table = torch.tensor([[0, 1], [2, -9], [4, 2**31 - 1]], dtype=torch.int32)
    expected = cached(q, k_cache, v_cache, k, v, cache_seqlens=SEQLENS)
    assert_same_bits(cached(q, *pages, k, v, cache_seqlens=SEQLENS, block_table=table), expected)


def test_arguments_that_are_wrong():
    q, k_cache, v_cache, k, v = inputs()
    ones = torch.ones(600, 4)
    for change, error, rule in (
        ({"k": None}, ValueError, "k and v"),
        ({"k": k.half()}, TypeError, "k has dtype"),
        ({"k": k[:, :, :, :3]}, ValueError, "k has shape"),
        ({"rotary_cos": ones}, ValueError, "must be given together"),
        ({"k": None, "v": None, "rotary_cos": ones, "rotary_sin": ones}, ValueError, "pass k and v with it"),
        ({"rotary_cos": torch.ones(600, 13), "rotary_sin": torch.ones(600, 13)}, ValueError, "rotary_dim <= head_dim"),
        ({"k_scale": torch.ones(3, 2, 600)}, ValueError, "k_scale must be given for int8"),
        ({"k_cache": k_cache.to(torch.int8)}, TypeError, "dtypes"),
        ({"k_cache": k_cache.double()}, TypeError, "must agree"),
        ({"cache_seqlens": torch.tensor([1.0, 2.0, 3.0])}, TypeError, "cache_seqlens has dtype"),
        ({"cache_seqlens": torch.tensor([1, 2])}, ValueError, "cache_seqlens has shape"),
        ({"cache_seqlens": True}, TypeError, "cache_seqlens"),
        ({"k_cache": k_cache[:2], "v_cache": v_cache[:2]}, ValueError, "cache_batch_idx="),
        ({"k_cache": k_cache[:1].expand(3, -1, -1, -1)}, ValueError, "share memory"),
        ({"softmax_scale": torch.ones(())}, TypeError, "softmax_scale must be a float"),
        ({"q": q.clone().requires_grad_()}, ValueError, "no gradients"),
        ({"num_splits": -1}, ValueError, "num_splits=-1"),
    ):
        call = {"q": q, "k_cache": k_cache, "v_cache": v_cache, "k": k, "v": v, "cache_seqlens": SEQLENS} | change
        with pytest.raises(error, match=rule):
            fastattn.attention_with_kvcache(**call)


def test_the_plain_route_gives_the_same():
    for options in ({}, {"causal": False}):
        q, k_cache, v_cache, k, v = inputs()
        angles = torch.outer(torch.arange(610.0), 100.0 ** -torch.linspace(0, 1, 8))
        options |= {"rotary_cos": angles.cos(), "rotary_sin": angles.sin(), "cache_seqlens": SEQLENS}
        pages = [into_pages(x, 48) for x in (k_cache, v_cache)]
        ours, plain = ([x.clone() for x, _ in pages] for _ in range(2))
        options["block_table"] = pages[0][1]
        found = cached(q, *ours, k, v, **options)
        expected = fastattn.attention_with_kvcache(q, *plain, k, v, **options, return_lse=True, backend="reference")
        for x, y in zip((*found, *ours), (*expected, *plain), strict=True):
            torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-4)


def test_threads_change_no_bit():
    q, k_cache, v_cache, k, v = inputs(1, 1)
    threads = torch.get_num_threads()
    found = []
    for count in (1, 2, 5):
        torch.set_num_threads(count)
        found.append(cached(q, k_cache.clone(), v_cache.clone(), k, v, cache_seqlens=SEQLENS))
    torch.set_num_threads(threads)
    for other in found[1:]:
        assert_same_bits(other, found[0])


def test_a_step_is_remembered_and_its_tensors_are_not():
    q, k_cache, v_cache, k, v = inputs(1, 1)
    for step in range(3):
        lengths = SEQLENS + step
        wanted = appended(k_cache, k, lengths), appended(v_cache, v, lengths)
        expected = alone(q, *[used(x, 1, lengths) for x in wanted])
        assert_same_bits(cached(q, k_cache, v_cache, k, v, cache_seqlens=lengths), expected)
