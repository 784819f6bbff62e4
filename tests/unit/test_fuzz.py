"""Random calls, wrong ones among them: every answer is right, or an error that names what is wrong; nothing crashes.

2,000 calls in `make test`, 100,000 in `make test-all`. A failure prints its seed, which is all it takes to repeat it.
"""

import faulthandler
import random
import re

import pytest
import torch

import fastattn
from fastattn.backends import cpu
from fastattn.masks import UNBOUNDED
from fastattn.terms import Terms

pytestmark = pytest.mark.skipif(cpu.unavailable() is not None, reason="the CPU kernels are not built")


def counts(few: int, many: int):
    """How many calls, in `make test` and in `make test-all`."""
    return pytest.mark.parametrize("count", [few, pytest.param(many, marks=pytest.mark.slow)])


TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}

JUNK = (
    None, "x", -1, 0, 2, 10**400, float("nan"), float("inf"), True, (1, 2, 3), [None], b"", object(),
    torch.ones(3, 3), torch.ones(2, dtype=torch.int32), torch.ones(1, 1, 1, 1, device="meta"), torch.zeros(0),
)  # fmt: skip
OPTIONS = (
    "mask", "causal", "window_size", "softmax_scale", "softcap", "alibi_slopes", "bias", "sinks", "dropout_p", "seed",
    "skip_negligible", "return_lse", "backend",
)  # fmt: skip
OF_QKV = r"\b(q|k|v|batch|num_heads|num_heads_k|seqlen_q|seqlen_k|head_dim|head_dim_v|dtype|device)\b"


def strided(rng, x):
    """The same values, laid out in another way."""
    if x.dim() != 4:
        return x
    return rng.choice(
        (
            lambda: x,
            lambda: x.transpose(1, 2).contiguous().transpose(1, 2),
            lambda: x.repeat_interleave(2, 3)[..., ::2],
            lambda: x.flip(2).flip(2),
            lambda: torch._neg_view(-x) if x.is_floating_point() else x,
        )
    )()


def valid(rng):
    """(q, k, v, options of attention) of a call that is right."""
    b, hk, sq, sk = rng.randint(0, 2), rng.randint(1, 2), rng.choice((0, 1, 2, 17, 40)), rng.choice((0, 1, 3, 18, 33))
    h, d, dv = hk * rng.randint(1, 3), rng.choice((1, 3, 8, 17)), rng.choice((1, 4, 9))
    dtype = rng.choice(list(TOLERANCE))

    def normal(*shape):
        return torch.randn(shape, dtype=torch.float64).to(dtype)

    possible = {
        "mask": lambda: rng.choice(
            (
                torch.rand(b, 1, sq, sk) < 0.7,
                fastattn.Mask.causal("top_left"),
                fastattn.Mask.lengths(torch.randint(0, sk + 1, (b,))),
                fastattn.BlockMask.from_dense(torch.rand(1, 1, sq, sk) < 0.5, block_size=16),
            )
        ),
        "causal": lambda: rng.random() < 0.5,
        "window_size": lambda: (rng.choice((None, 0, 5)), rng.choice((None, 0, 2))),
        "softmax_scale": lambda: rng.choice((0.0, 0.3, torch.rand(h))),
        "softcap": lambda: rng.choice((0.0, 2.0)),
        "alibi_slopes": lambda: torch.rand(h),
        "bias": lambda: normal(rng.choice((1, b)), rng.choice((1, h)), rng.choice((1, sq)), sk),
        "sinks": lambda: normal(h),
        "skip_negligible": lambda: rng.choice((None, True, False)),
    }
    options = {name: make() for name, make in possible.items() if rng.random() < 0.25}
    qkv = normal(b, h, sq, d), normal(b, hk, sk, d), normal(b, hk, sk, dv)
    return *(strided(rng, x) for x in qkv), options


def attempt(call):
    """(result, None) or (None, error); another kind of error, or a crash, is a failure."""
    try:
        return call(), None
    except (TypeError, ValueError, NotImplementedError) as error:
        return None, error


@pytest.mark.filterwarnings("ignore::fastattn.FallbackWarning")
@counts(400, 20000)
def test_valid_calls_are_right(count):
    for seed in range(count):
        rng = random.Random(seed)
        torch.manual_seed(seed)
        q, k, v, options = valid(rng)
        out, lse = fastattn.attention(q, k, v, **options, return_lse=True, backend="cpu")
        wide = [x.double() for x in (q, k, v)]
        exact, exact_lse = fastattn.attention(*wide, **options, return_lse=True, backend="reference")
        tolerance = TOLERANCE[q.dtype]
        torch.testing.assert_close(
            out.double(), exact, rtol=tolerance, atol=tolerance, msg=lambda m, s=seed: f"{s}: {m}"
        )
        torch.testing.assert_close(
            lse.double(),
            exact_lse,
            rtol=max(tolerance, 1e-5),
            atol=max(tolerance, 1e-5),
            msg=lambda m, s=seed: f"{s}: {m}",
        )


@pytest.mark.filterwarnings("ignore::fastattn.FallbackWarning")
@counts(800, 40000)
def test_an_error_names_the_argument(count):
    """One argument of a right call is replaced by something else."""
    refused = 0
    for seed in range(count):
        rng = random.Random(seed)
        torch.manual_seed(seed)
        q, k, v, options = valid(rng)
        arguments = {"q": q, "k": k, "v": v} | options
        name = rng.choice(("q", "k", "v", *OPTIONS))
        arguments[name] = rng.choice(JUNK)
        result, error = attempt(lambda a=arguments: fastattn.attention(**a))
        if error is not None:
            refused += 1
            text = str(error)
            names = name.removesuffix("_p").removesuffix("_size").split("_")[0]
            assert re.search(OF_QKV if name in "qkv" else names, text), (seed, name, text)
            assert text.count("\n") == 0, (seed, text)
    assert refused > count / 3


HUGE = (1 << 56, 1 << 60, (1 << 62) - 1)
"""Sizes of which any product with the others is beyond 64 bits: smaller ones would be calls that take years."""


def odd_tensor(rng):
    """A tensor as _C must bear it: any rank, dtype and layout, sometimes far larger than its memory."""
    shape = [rng.choice((0, 1, 2, 3, 8, 17)) for _ in range(rng.choice((0, 1, 3, 4, 4, 4, 4, 5)))]
    dtype = rng.choice(
        (torch.float32, torch.float32, torch.float16, torch.float64, torch.int32, torch.bool, torch.complex64)
    )
    x = torch.ones(shape, dtype=dtype)
    if shape and rng.random() < 0.2:
        where = rng.randrange(len(shape))
        try:
            return x.narrow(where, 0, 1).expand(*shape[:where], rng.choice(HUGE), *shape[where + 1 :])
        except RuntimeError:  # torch itself refuses so many, or there is none to expand
            return x
    return strided(rng, x) if x.dtype != torch.bool else x


def odd_terms(rng, b, h, sq, sk):
    """Terms, of which some do not fit."""
    fields = {"softmax_scale": 0.5, "diagonal_lo": -UNBOUNDED, "diagonal_hi": UNBOUNDED, "query_start": sk - sq}
    for name in rng.sample(Terms._fields, rng.randint(0, 3)):
        fields[name] = rng.choice((rng.choice(JUNK), odd_tensor(rng), -(10**18), 10**18))
    return rng.choice((Terms(**fields), Terms(**fields), Terms(**fields), tuple(fields), None, 7))


@counts(800, 40000)
def test_native_functions_bear_anything(count):
    """Called as fastattn never does: they refuse or compute. Where they do neither, the process ends, and the traceback
    of faulthandler says where."""
    faulthandler.enable()
    C, outcomes = cpu._C, {}
    for seed in range(count):
        rng = random.Random(seed)
        b, h, sq, sk, d = (
            rng.randint(0, 2),
            rng.randint(0, 3),
            rng.randint(0, 20),
            rng.randint(0, 20),
            rng.randint(0, 9),
        )
        fitting = {name: torch.ones(b, h, s, d) for name, s in (("q", sq), ("k", sk), ("v", sk), ("out", sq))}
        fitting |= {"lse": torch.ones(b, h, sq), "lse_parts": torch.ones(b, h, sq, 2)}
        terms = odd_terms(rng, b, h, sq, sk)

        def pick(name, rng=rng, fitting=fitting):
            return fitting[name].clone() if rng.random() < 0.85 else rng.choice((odd_tensor(rng), rng.choice(JUNK)))

        q, k, v, out, dout, lse = (pick(name) for name in ("q", "k", "v", "out", "out", "lse"))
        parts, threads = pick("lse_parts"), rng.choice((1, 1, 1, 0, -3, 2, "x", None))
        none = Terms(*[None] * len(Terms._fields))
        function, arguments = rng.choice(
            (
                (C.forward, (q, k, v, out, lse, parts, None, terms, threads)),
                (C.decode, (q, k, v, out, lse, parts, None, terms, threads)),
                (C.backward, (q, k, v, out, parts, terms, dout, lse, pick("q"), pick("k"), pick("v"), none, threads)),
                (C.tangent, (q, k, v, terms, pick("q"), pick("k"), pick("v"), none, out, lse, threads)),
                (C.csr_forward, (q, k, v, out, lse, parts, None, terms, threads)),
                (C.signature, (q, k, v, terms)),
                (C.forward, tuple(rng.choice(JUNK) for _ in range(rng.randint(0, 12)))),
            )
        )
        try:
            function(*arguments)
            outcome = "computed"
        except (TypeError, ValueError, RuntimeError, AttributeError, OverflowError, MemoryError, BufferError) as error:
            outcome = type(error).__name__
            assert str(error) or outcome == "MemoryError", seed
        outcomes[outcome] = outcomes.get(outcome, 0) + 1
    assert outcomes["computed"] > count / 10 and outcomes["ValueError"] > count / 10, outcomes
