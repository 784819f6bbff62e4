"""`KVCache`: what it holds after appending, truncating, forking and errors."""

import re
from pathlib import Path

import pytest
import torch

import fastattn
from fastattn import KVCache
from forward import assert_same_bits
from isas import needs_cpu

pytestmark = needs_cpu
FORMS = [{}, {"page_size": 16}, {"page_size": 7}]
forms = pytest.mark.parametrize("form", FORMS, ids=str)


def rows(new, batch=2, heads=2, dim=24, dtype=torch.float32, seed=0):
    return torch.randn(batch, heads, new, dim, generator=torch.Generator().manual_seed(seed)).to(dtype)


def step(seed, new=1, **kwargs):
    """q, k, v"""
    return (
        rows(new, heads=4, seed=seed, **kwargs),
        rows(new, seed=seed + 1, **kwargs),
        rows(new, seed=seed + 2, **kwargs),
    )


@forms
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_prompt_and_steps(form, dtype):
    cache = KVCache(2, 2, 24, 100, dtype=dtype, **form)
    keys, values = rows(0, dtype=dtype), rows(0, dtype=dtype)
    for i, new in enumerate((40, 1, 1, 3, 30)):
        q, k, v = step(10 * i, new, dtype=dtype)
        keys, values = torch.cat([keys, k], 2), torch.cat([values, v], 2)
        out, lse = cache.attend(q, k, v, return_lse=True)
        assert_same_bits((out, lse), fastattn.attention(q, keys, values, causal=True, return_lse=True))
        assert cache.lengths == [keys.shape[2]] * 2
    for i in range(2):
        assert_same_bits(cache.gathered(i), (keys[i], values[i]))
    q = rows(5, heads=4, dtype=dtype)
    assert_same_bits(cache.attend(q, causal=False), fastattn.attention(q, keys, values))


@forms
def test_appending_alone_and_rotary_embedding(form):
    angles = torch.outer(torch.arange(100.0), torch.linspace(1, 0.1, 12))
    rotary = {"rotary_cos": angles.cos(), "rotary_sin": angles.sin()}
    one, other = (KVCache(2, 2, 24, 100, **form) for _ in range(2))
    for new in (20, 1, 2):
        q, k, v = step(new, new)
        one.append(k, v, **rotary)
        other.attend(q, k, v, **rotary)
    for i in range(2):
        assert_same_bits(one.gathered(i), other.gathered(i))


@forms
def test_truncate_and_reset(form):
    cache = KVCache(2, 2, 24, 100, **form)
    q, k, v = step(0, 50)
    cache.append(k, v)
    cache.truncate([20, 33])
    for i, length in enumerate((20, 33)):
        assert_same_bits(cache.gathered(i), (k[i, :, :length], v[i, :, :length]))
    q, k_new, v_new = step(5, 2)
    out = cache.attend(q, k_new, v_new)
    for i, length in enumerate((20, 33)):
        keys, values = torch.cat([k[i, :, :length], k_new[i]], 1), torch.cat([v[i, :, :length], v_new[i]], 1)
        assert_same_bits(out[i : i + 1], fastattn.attention(q[i : i + 1], keys[None], values[None], causal=True))
    free = cache.free_pages
    cache.reset([1])
    assert cache.lengths == [22, 0] and cache.free_pages >= free
    cache.reset()
    assert cache.lengths == [0, 0] and cache.free_pages == (len(cache._rows.holders) if form else 0)


@forms
def test_some_of_the_sequences(form):
    cache = KVCache(3, 2, 24, 100, **form)
    for chosen, new in (([2, 0], 9), ([1], 4), ([0], 30)):
        q, k, v = (x[: len(chosen)] for x in step(new, new))
        out = cache.attend(q, k, v, chosen)
        held = [cache.gathered(i) for i in chosen]
        for i, (keys, values) in enumerate(held):
            assert_same_bits(out[i : i + 1], fastattn.attention(q[i : i + 1], keys[None], values[None], causal=True))
    assert cache.lengths == [39, 4, 9]


@forms
@pytest.mark.parametrize("dtype", [torch.float32, torch.int8])
def test_forks_share_a_prefix_and_diverge(form, dtype):
    cache = KVCache(2, 2, 24, 100, dtype=dtype, num_pages=60 if form else None, **form)
    cache.append(*step(0, 37)[1:])
    before = [cache.gathered(i) for i in range(2)]
    free = cache.free_pages
    fork = cache.fork([0, 0, 1])
    assert cache.free_pages == free  # nothing is copied yet, where there are pages
    k, v = (torch.cat([x, x[:1] + 1]) for x in step(7, 2)[1:])
    fork.append(k, v)
    for i, source in enumerate((0, 0, 1)):
        keys, values = fork.gathered(i)
        assert_same_bits((keys[:, :37], values[:, :37]), before[source])
    assert not torch.equal(fork.gathered(0)[0][:, 37:], fork.gathered(1)[0][:, 37:])
    for i in range(2):
        assert_same_bits(cache.gathered(i), before[i])
    cache.append(*step(9, 1)[1:])
    assert_same_bits(fork.gathered(2)[0][:, :37], before[1][0])
    if form:
        assert cache.free_pages < free
        del fork
        cache.reset()
        assert cache.free_pages == 60


@forms
def test_int8(form):
    exact, narrow = (KVCache(2, 2, 24, 300, dtype=dtype, **form) for dtype in (torch.float32, torch.int8))
    for new in (120, 1, 40):
        q, k, v = step(new, new)
        found, expected = narrow.attend(q, k, v), exact.attend(q, k, v)
        torch.testing.assert_close(found, expected, rtol=0.03, atol=0.03)
    error = fastattn.quantization_error(k)
    assert 0.001 < error.rms < 0.01 and 0.001 < error.largest < 0.005
    keys, values = narrow.gathered(1)
    torch.testing.assert_close(keys, exact.gathered(1)[0], rtol=0, atol=4 / 250)
    assert fastattn.quantization_error(torch.zeros(3, 4)) == (0.0, 0.0)


def test_a_full_cache_and_pages_that_are_all_taken_change_nothing():
    cache = KVCache(2, 2, 24, 40, page_size=16, num_pages=5)
    cache.append(*step(0, 30)[1:])
    for new, error, rule in (
        (11, ValueError, "sequence 0 holds 30 keys of capacity=40"),
        (3, RuntimeError, "2 pages are"),
    ):
        with pytest.raises(error, match=rule):
            cache.append(*step(0, new)[1:])
        assert cache.lengths == [30, 30] and cache.free_pages == 1
    with pytest.raises(TypeError, match="k has dtype"):
        cache.attend(*[x[:1].double() if i else x[:1] for i, x in enumerate(step(0, 3))], [1])
    assert cache.lengths == [30, 30] and cache.free_pages == 1


def test_arguments_that_are_wrong():
    cache = KVCache(2, 2, 24, 40)
    for wrong, error, rule in (
        (lambda: KVCache(0, 2, 24, 40), ValueError, "batch=0"),
        (lambda: KVCache(1, 2, 24, 40, dtype=torch.int32), TypeError, "dtype=torch.int32"),
        (lambda: KVCache(1, 2, 24, 40, num_pages=3), ValueError, "needs page_size="),
        (lambda: cache.truncate([1, 0]), ValueError, r"lengths\[0\]=1 is more than the 0"),
        (lambda: cache.truncate([0]), ValueError, "one for each of 2"),
        (lambda: cache.reset([2]), ValueError, "sequence 2 must be below batch=2"),
        (lambda: cache.append(*step(0, 1)[1:], sequences=[0, 0]), ValueError, "different ones"),
        (lambda: cache.append(None, None), TypeError, "k must be a torch.Tensor"),
        (lambda: cache.append(rows(1)[0], rows(1)[0]), ValueError, "k has shape"),
    ):
        with pytest.raises(error, match=rule):
            wrong()


def test_the_code_of_the_document_runs():
    text = (Path(__file__).parents[2] / "docs" / "generation.md").read_text()
    exec("\n".join(re.findall(r"```python\n(.*?)```", text, re.S)), {})
