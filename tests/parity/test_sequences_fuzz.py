"""Random lists, lengths and strides into the C++ entry: an error that writes nothing, or a right answer."""

import random

import pytest
import torch

from fastattn.backends import cpu
from fastattn.layouts import each
from fastattn.layouts.placing import place
from fastattn.layouts.sequences import Sequences
from fastattn.masks.intervals import UNBOUNDED
from fastattn.problem import Problem
from guarded import Guarded
from isas import needs_cpu

pytestmark = needs_cpu
CALLS_IN_A_BLOCK = 150
GUARDED: list[Guarded] = []
"""The memory of a call's tensors: who leaves it dies, or is found out afterwards."""


def number(rng, low, high):
    """Mostly in the range, often at its ends, sometimes far from it."""
    kind = rng.random()
    if kind < 0.75:
        return rng.randint(low, max(low, high))
    return rng.choice([low, high, low - 1, high + 1, -(2**31), 2**31 - 1, 2**40, -(2**63), 2**63 - 1])


def integers(rng, values):
    is_small = all(-(2**31) <= x < 2**31 for x in values)
    x = torch.tensor(values, dtype=rng.choice([torch.int32, torch.int64]) if is_small else torch.int64)
    return torch.stack([x, x + 1], -1)[..., 0] if rng.random() < 0.3 else x


def starts(rng, count, total):
    """count + 1 starts, mostly right."""
    found = [0, *sorted(rng.randint(0, total) for _ in range(count - 1)), total] if count else [0]
    if rng.random() < 0.2:
        i = rng.randrange(len(found))
        found[i] = number(rng, 0, total)
    return integers(rng, found)


def rows(rng, generator, *shape):
    """A tensor of any strides; sometimes with too many or too few of something."""
    order, form = rng.sample(range(4), 4), rng.random()
    x = torch.randn([shape[i] for i in order], generator=generator)
    if x.numel():
        GUARDED.append(Guarded(x, rng.choice(["start", "end"])))
        x = GUARDED[-1].tensor
    x = x.permute([order.index(i) for i in range(4)])
    if form < 0.25:
        x = torch.stack([x, x], -1)[..., rng.randint(0, 1)]
    elif form < 0.3 and shape[0]:
        x = x[:1].expand(*shape)
    elif form < 0.35 and min(x.shape):
        x = x.narrow(rng.randrange(4), 0, 1)
    return x


def random_call(seed):
    """q, k, v, Sequences"""
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    heads_k = rng.randint(1, 2)
    heads, count = heads_k * rng.randint(1, 2), rng.randint(0, 4)
    dim, dim_v = rng.choice([1, 3, 8, 16, 20]), rng.choice([1, 4, 8, 16])
    fields = dict(Sequences(softmax_scale=0.3, diagonal_lo=-UNBOUNDED, diagonal_hi=UNBOUNDED)._asdict())
    if rng.random() < 0.6:
        fields["diagonal_hi"] = rng.choice([0, 2])
    if rng.random() < 0.2:
        fields["diagonal_lo"] = -rng.randint(0, 9)
    is_paged = rng.random() < 0.5
    if rng.random() < 0.5:  # packed
        total_q, total_k = rng.randint(0, 40), rng.randint(0, 40)
        fields["cu_seqlens_q"] = starts(rng, count, total_q)
        if is_paged:
            fields["seqused_k"] = integers(rng, [number(rng, 0, 12) for _ in range(count)])
        else:
            fields["cu_seqlens_k"] = starts(rng, count, total_k)
        if rng.random() < 0.3:
            fields["seqused_q"] = integers(rng, [number(rng, 0, 3) for _ in range(count)])
        q = rows(rng, generator, 1, heads, total_q, dim)
        entries, size = (rng.randint(1, 6), rng.randint(1, 5)) if is_paged else (1, total_k)
    else:
        q = rows(rng, generator, count, heads, rng.randint(0, 3), dim)
        entries, size = rng.randint(1, 6), rng.randint(1, 5) if is_paged else rng.randint(1, 20)
        most = size * 3 if is_paged else size
        new = rng.randint(0, 2)
        lengths = [number(rng, 0, most - new) for _ in range(count)]
        one = rng.random() < 0.2 and count
        fields["cache_seqlens"] = lengths[0] if one else integers(rng, lengths)
        if new:
            fields["k"], fields["v"] = (rows(rng, generator, count, heads_k, new, x) for x in (dim, dim_v))
            if rng.random() < 0.4 and dim > 1:
                angles = torch.randn(rng.choice([most, 5]), rng.randint(1, dim // 2), generator=generator)
                fields |= {"rotary_cos": angles.cos(), "rotary_sin": angles.sin()}
                fields["rotary_interleaved"] = rng.random() < 0.5
        if rng.random() < 0.3:
            fields["cache_leftpad"] = integers(rng, [number(rng, 0, 2) for _ in range(count)])
        if not is_paged and (rng.random() < 0.4 or count > entries):
            order = rng.sample(range(entries), min(count, entries)) + [0] * (count - entries)
            fields["cache_batch_idx"] = integers(rng, [x if rng.random() < 0.9 else number(rng, 0, 5) for x in order])
    if is_paged:
        entries = max(entries, 3 * count)
        pages = [x if rng.random() < 0.95 else number(rng, 0, entries) for x in rng.sample(range(entries), 3 * count)]
        fields["block_table"] = integers(rng, pages).reshape(count, 3)
    k, v = (rows(rng, generator, entries, heads_k, size, x) for x in (dim, dim_v))
    if rng.random() < 0.05:
        name = rng.choice([name for name, x in fields.items() if isinstance(x, torch.Tensor)] or ["k"])
        x = fields[name]
        if isinstance(x, torch.Tensor):
            fields[name] = rng.choice([x[None], x[:-1], x.double(), None, torch.zeros(())])
    return q, k, v, Sequences(**fields)


def check(seed):
    q, k, v, terms = random_call(seed)
    tensors = [q, k, v, *[x for x in terms if isinstance(x, torch.Tensor)]]
    before = [x.clone() for x in tensors]
    out = torch.full((*q.shape[:3], v.shape[3]), 5.0)
    lse = torch.full(q.shape[:3], 5.0)
    try:
        cpu._C.sequences_forward(q, k, v, out, lse, None, None, terms, 1)
    except ValueError:
        assert (out == 5.0).all() and (lse == 5.0).all()
        assert all(torch.equal(x, y) for x, y in zip(tensors, before, strict=True))
        return "error"
    ours_k, ours_v = k.clone(), v.clone()
    plain_k, plain_v = before[1].clone(), before[2].clone()
    sizes = q.shape[0], q.shape[2], k.shape[2], q.shape[1], k.shape[1], q.shape[3], v.shape[3]
    problem = Problem("cpu", "float32", *sizes, lse=True)
    places = place(q, plain_k, terms)  # ValueError if C++ has taken what it must not
    expected, expected_lse = each.reference(problem, q, plain_k, plain_v, terms)
    if terms.cu_seqlens_q is not None:  # rows of no sequence are left as they are
        seen = torch.zeros(q.shape[2], dtype=torch.bool)
        for one in places:
            seen[one.q_rows.start : one.q_rows.stop] = True
        assert (out[:, :, ~seen] == 5.0).all()
        out[:, :, ~seen], lse[:, :, ~seen] = expected[:, :, ~seen], expected_lse[:, :, ~seen]
    for x, y in ((out, expected), (lse, expected_lse), (ours_k, plain_k), (ours_v, plain_v)):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-4)
    return "answer"


def check_block(block, calls=CALLS_IN_A_BLOCK):
    found = []
    for seed in range(block * calls, (block + 1) * calls):
        found.append(check(seed))
        for memory in GUARDED:
            memory.assert_untouched_outside()
        GUARDED.clear()
    for verdict in ("error", "answer"):
        assert found.count(verdict) > calls // 5, f"{found.count(verdict)} of {calls} calls: {verdict}"


@pytest.mark.parametrize("block", range(4))
def test_an_error_or_a_right_answer(block):
    check_block(block)


@pytest.mark.slow
@pytest.mark.parametrize("block", range(4, 60))
def test_an_error_or_a_right_answer_in_many_calls(block):
    check_block(block)
