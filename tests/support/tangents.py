"""Calls of the forward-mode kernel, and how their results are compared with the reference in float64."""

import torch
from torch.autograd import forward_ad

from backward import SCORE_TENSORS
from fastattn import api, dispatch
from fastattn.backends import reference
from fastattn.terms import Terms
from forward import max_error

NO_TANGENTS = Terms._make([None] * len(Terms._fields))

SLACK = {"float32": 4e-6, "float64": 1e-14, "bfloat16": 2**-8 + 4e-6, "float16": 2**-11 + 4e-6}
"""Of errors relative to max(1, |value|): those of a few sums, and one rounding of a float32 result to 16 bits."""


def bind(q, k, v, kwargs):
    """(problem, terms) of the tangent of a call."""
    bound = api.bind(q, k, v, return_lse=True, **kwargs)
    return bound.problem._replace(direction="tangent"), bound.terms


def random_tangents(q, k, v, kwargs, seed=1):
    """(tq, tk, tv, tterms), of everything that may have one."""
    generator = torch.Generator().manual_seed(seed)

    def like(x):
        return torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.dtype)

    _, terms = bind(q, k, v, kwargs)
    values = {name: getattr(terms, name) for name in SCORE_TENSORS}
    tterms = {name: like(x) for name, x in values.items() if isinstance(x, torch.Tensor)}
    return like(q), like(k), like(v), NO_TANGENTS._replace(**tterms)


def tangent(q, k, v, kwargs, tangents):
    """(tout, tlse) of cpu.tangent, chosen as any kernel is."""
    problem, terms = bind(q, k, v, kwargs)
    choice = dispatch.select(problem, "cpu")
    assert choice.row.name == "cpu.tangent"
    return choice.forward(problem, q, k, v, terms, tangents)


def expected_tangent(q, k, v, kwargs, tangents, dtype=None):
    """(tout, tlse) of the reference by torch's forward mode, in `dtype` if one is given."""
    problem, terms = bind(q, k, v, kwargs)
    call = reference._dense(problem, q, terms)
    with forward_ad.dual_level():

        def dual(x, tangent):
            if isinstance(x, torch.Tensor) and x.is_floating_point() and dtype is not None:
                x, tangent = x.to(dtype), None if tangent is None else tangent.to(dtype)
            return x if tangent is None else forward_ad.make_dual(x, tangent)

        duals = [dual(x, tangent) for x, tangent in zip((q, k, v), tangents, strict=False)]
        with_tangents = Terms._make([dual(x, tangent) for x, tangent in zip(terms, tangents[3], strict=True)])
        results = [forward_ad.unpack_dual(x) for x in call(*duals, with_tangents)]
        return tuple(torch.zeros_like(x) if t is None else t.clone() for x, t in results)


def _largest_tangent_of_scores(q, k, kwargs, tangents) -> float:
    """At most, by Cauchy-Schwarz."""
    _, terms = bind(q, k, k, kwargs)
    tq, tk, _, tterms = tangents

    def largest(x):
        return x.double().abs().max().item() if isinstance(x, torch.Tensor) and x.numel() else 0.0

    def norm(x):
        return largest(x.double().norm(dim=-1))

    scale = terms.softmax_scale if isinstance(terms.softmax_scale, float) else largest(terms.softmax_scale)
    of_products = scale * (norm(tq) * norm(k) + norm(q) * norm(tk)) + largest(tterms.softmax_scale) * norm(q) * norm(k)
    distance = max(q.shape[2], k.shape[2])
    return of_products + largest(tterms.bias) + largest(tterms.alibi_slopes) * distance + largest(tterms.sinks)


def assert_parity(actual, q, k, v, kwargs, tangents, large_scores=False):
    """Each error is at most twice the reference's in the same dtype, against the reference in float64."""
    same_dtype = expected_tangent(q, k, v, kwargs, tangents)
    oracle = expected_tangent(q, k, v, kwargs, tangents, torch.float64)
    for name, x, y, z in zip(("tout", "tlse"), actual, same_dtype, oracle, strict=True):
        assert (x.shape, x.dtype) == (y.shape, y.dtype)
        slack = SLACK[str(x.dtype).removeprefix("torch.")]
        if large_scores:  # rounding them by eps of their size changes the result by so much
            slack *= 1.0 + _largest_tangent_of_scores(q, k, kwargs, tangents)
        error, allowed = max_error(x, z), 2.0 * max_error(y, z) + slack
        assert error <= allowed, f"{name}: error {error:.3g}, allowed {allowed:.3g}"
