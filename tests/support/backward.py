"""Gradients, and how they are compared with those of the reference in float64."""

import math

import torch

import fastattn
from cases import Case, inputs
from fastattn.relative import RelativeBias, toeplitz
from fastattn.scores import Place
from fastattn.scores.alibi import alibi_bias
from fastattn.scores.relative import spread
from forward import ROUNDS_WEIGHTS

INF, NAN = math.inf, math.nan


SCORE_TENSORS = ("bias", "relative", "alibi_slopes", "sinks", "softmax_scale")
"""By their terms; the argument of "relative" is `bias`, an object of `fastattn.relative`."""


def cotangents(q, v, seed=1):
    """(dout, dlse) in float64."""
    generator = torch.Generator().manual_seed(seed)
    shape = (*q.shape[:3], v.shape[3])
    return (torch.randn(s, generator=generator, dtype=torch.float64) for s in (shape, shape[:3]))


def score_tensors(kwargs) -> list[str]:
    return [name for name in SCORE_TENSORS if isinstance(kwargs.get(name), torch.Tensor)]


def gradients(q, k, v, kwargs, dout, dlse=None, backend="cpu", of_scores=False) -> dict[str, torch.Tensor]:
    """By name, of everything that has one; an lse of -inf takes no cotangent."""
    leaves = {"q": q, "k": k, "v": v} | {name: kwargs[name] for name in score_tensors(kwargs) if of_scores}
    if of_scores and is_relative(kwargs):
        leaves["relative"] = kwargs["bias"].vector
    leaves = {name: x.detach().requires_grad_() for name, x in leaves.items()}
    arguments = kwargs | leaves
    if "relative" in arguments:
        arguments["bias"] = toeplitz(arguments.pop("relative"))
    out, lse = fastattn.attention(**arguments, return_lse=True, backend=backend)
    results, weights = [out], [dout.to(out.dtype)]
    if dlse is not None:
        results.append(lse.masked_fill(lse == -INF, 0.0))
        weights.append(dlse.to(lse.dtype))
    grads = torch.autograd.grad(results, list(leaves.values()), weights)
    if backend == "cpu":
        assert fastattn.last_call().kernel == "cpu.backward"
    return dict(zip(leaves, grads, strict=True))


def is_relative(kwargs) -> bool:
    return isinstance(kwargs.get("bias"), RelativeBias)


def to_double(kwargs) -> dict:
    doubles = {name: kwargs[name].double() for name in score_tensors(kwargs)}
    return kwargs | doubles | ({"bias": toeplitz(kwargs["bias"].vector.double())} if is_relative(kwargs) else {})


SLACK = {"float32": 2e-6, "float64": 1e-14, "bfloat16": 2**-8, "float16": 2**-11}


def slack_of(gradient, q) -> float:
    """What a gradient may be off where the reference happens to be exact."""
    if ROUNDS_WEIGHTS and q.dtype == torch.bfloat16 and gradient.dtype == torch.float32:
        return 4.0 * SLACK["bfloat16"]  # a sum over rows, each of whose deltas comes from rounded weights
    return SLACK[str(gradient.dtype).removeprefix("torch.")]


def gradient_of_scores(q, k, v, kwargs, dout, dlse) -> torch.Tensor:
    """[B, H, Sq, Sk]: of a bias of each score, by the reference."""
    scores = (*q.shape[:3], k.shape[2])
    bias = kwargs.get("bias", torch.zeros((), dtype=q.dtype))
    if is_relative(kwargs):
        bias = spread(bias.vector.flip(-1), Place(scores[3] - scores[2], *scores[2:]))
    bias = bias.expand(scores).clone()
    return gradients(q, k, v, kwargs | {"bias": bias}, dout, dlse, "reference", of_scores=True)["bias"]


def sizes_of_slope_sums(q, k, v, kwargs, dout, dlse) -> torch.Tensor:
    """Of the terms of both signs that dalibi_slopes sums, in float64."""
    distance = alibi_bias(torch.ones(q.shape[1]).double(), Place(k.shape[2] - q.shape[2], q.shape[2], k.shape[2]))
    terms = gradient_of_scores(q, k, v, kwargs, dout, dlse) * distance
    return terms.abs().sum((2, 3)).sum_to_size(kwargs["alibi_slopes"].shape)


def sizes_of_scale_sums(q, k, v, kwargs, dout, dlse) -> torch.Tensor:
    """Of those that dsoftmax_scale sums."""
    products = q @ k.repeat_interleave(q.shape[1] // k.shape[1], 1).transpose(2, 3)
    terms = gradient_of_scores(q, k, v, kwargs, dout, dlse) * products
    return terms.abs().sum((2, 3)).sum_to_size(kwargs["softmax_scale"].shape)


SIZES_OF_SUMS = {"alibi_slopes": sizes_of_slope_sums, "softmax_scale": sizes_of_scale_sums}


def assert_parity(case, qkv=None, kwargs=None, sums=("alibi_slopes",), **options):
    """Each gradient's error is at most twice the reference's in the same dtype, against the reference in float64.

    Those of `sums` may also be half an ulp of the sum of the sizes of their terms: few results of very many terms, so
    that the reference's error is a matter of luck, and another on another CPU.
    """
    (q, k, v), kwargs = (qkv, kwargs) if qkv else inputs(case)
    dout, dlse = cotangents(q, v)
    dout = dout.to(q.dtype).double()
    doubles = q.double(), k.double(), v.double(), to_double(kwargs), dout, dlse
    actual = gradients(q, k, v, kwargs, dout, dlse, **options)
    same_dtype = gradients(q, k, v, kwargs, dout, dlse, "reference", **options)
    oracle = gradients(*doubles, "reference", **options)
    for name, expected in oracle.items():
        x, y = actual[name], same_dtype[name]
        assert (x.shape, x.dtype) == (y.shape, y.dtype), name
        size = expected.abs().clamp(min=1.0)
        floor = SIZES_OF_SUMS[name](*doubles) * 2**-24 / size if name in sums else 0.0
        errors, reference_errors = ((z.double() - expected).abs() / size for z in (x, y))
        largest, reference_error = (e.amax() if e.numel() else 0.0 for e in (errors - floor, reference_errors))
        allowed = 2.0 * reference_error + slack_of(x, q)
        assert largest <= allowed, f"d{name}: error {largest:.3g}, allowed {allowed:.3g}"


def strided(x, how):
    """x's values in other memory."""
    b, h, s, d = x.shape
    if how == "transposed":
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if how == "sliced":
        return torch.zeros(b, h, s, 2 * d, dtype=x.dtype).copy_(torch.cat([x, x], -1))[..., :d]
    if how == "every second":
        return torch.stack([x, x], -1).flatten(-2)[..., ::2]
    if how == "columns first":
        return x.transpose(2, 3).contiguous().transpose(2, 3)
    return x


SHAPES = {
    "one head": Case(seqlen_q=300, seqlen_k=2100, head_dim=16, causal=True),
    "grouped": Case(batch=2, num_heads=4, num_heads_k=2, seqlen_q=260, head_dim=40, head_dim_v=24),
    "masked": Case(batch=3, num_heads=2, seqlen_q=130, head_dim=16, mask="documents", alibi=True, sinks=True),
    "few rows": Case(batch=2, num_heads=4, seqlen_q=3, seqlen_k=1300, head_dim=8),
    "shared bias": Case(batch=2, num_heads=2, seqlen_q=200, seqlen_k=1100, head_dim=8, bias="shared", sinks=True),
    "key bias": Case(
        batch=2, num_heads=4, num_heads_k=2, seqlen_q=200, seqlen_k=1100, head_dim=8, bias="key", alibi=True
    ),
    "query bias": Case(batch=2, num_heads=4, num_heads_k=2, seqlen_q=200, head_dim=8, bias="query", sinks=True),
}
