"""`attention()`: arguments -> Problem -> select -> run."""

import inspect
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch.autograd import forward_ad as _forward_ad

from . import cpu, dispatch
from .block_mask import BlockMask, from_flex, is_flex
from .masks import UNBOUNDED, Mask, Window, check_window, diagonal_bounds
from .problem import FLOATS, Problem, Terms

_is_grad_enabled = torch.is_grad_enabled
_current_backend = dispatch.current_backend
_note = dispatch.note
_signature = cpu.signature
_functorch_level = torch._C._functorch.peek_interpreter_stack
_CAUSAL = (Window(None, 0),)


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    mask: Mask | BlockMask | torch.Tensor | None = None,
    causal: bool = False,
    window_size: tuple[int | None, int | None] | None = None,
    softmax_scale: float | torch.Tensor | None = None,
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    seed: int | None = None,
    skip_negligible: bool | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """softmax(scale * q k^T + bias, masked) v, without ever storing the n x n scores.

    q             [batch, num_heads, seqlen_q, head_dim], any strides; float32, bfloat16, float16 or float64
    k             [batch, num_heads_k, seqlen_k, head_dim], same dtype; num_heads is a multiple of num_heads_k, and
                  query head h reads key head h // (num_heads // num_heads_k)
    v             [batch, num_heads_k, seqlen_k, head_dim_v], same dtype
    mask          a `Mask`, a `BlockMask` (or FlexAttention's), or a bool tensor broadcastable to
                  [batch, num_heads, seqlen_q, seqlen_k], True = attend
    causal        query i sees keys up to i + seqlen_k - seqlen_q: bottom-right aligned (see `Mask` for pictures of
                  both alignments; `mask=Mask.causal("top_left")` is torch's rule)
    window_size   (left, right), inclusive: query i sees keys i + seqlen_k - seqlen_q - left ... + right; None: open
    softmax_scale factor of the scores, default head_dim ** -0.5; or a float tensor, one number or [num_heads], which
                  may be learned (temperature)
    softcap       c > 0 turns scores s into c * tanh(s / c), before bias and mask
    alibi_slopes  [num_heads] or [batch, num_heads]: adds -slope * |i + seqlen_k - seqlen_q - j|
    bias          float tensor of any dtype, broadcastable to [batch, num_heads, seqlen_q, seqlen_k], added to the
                  scores; an entry of -inf masks
    sinks         [num_heads], any float dtype: one more logit a head in the softmax denominator
    dropout_p     probability in [0, 1) that a weight is dropped (the others grow by 1 / (1 - dropout_p))
    seed          of the dropout mask, 0 ... 2^63 - 1; None draws one from torch's generator
    skip_negligible  leave out keys whose weights must all be 0 (see below); None: where that is known to pay, True:
                  look for them in any case, False: never
    return_lse    also return the log of the softmax denominator
    backend       "cpu", "triton" or "reference": only its kernels, an error instead of a fallback

    Returns out [batch, num_heads, seqlen_q, head_dim_v] in q's dtype and memory order, or (out, lse) with lse
    [batch, num_heads, seqlen_q], natural log, float32 (float64 for float64 inputs).

    mask, causal and window_size combine: a key is seen if all allow it. A query that sees no key gives out = 0 and
    lse = -inf (the sink's logit, with sinks). NaN or Inf in a masked key or value never reaches the result. The bits
    of a row do not depend on the number of threads or on what else is in the batch.

    skip_negligible changes the time of a call and none of its results, gradients included (which may only differ in the
    sign of a zero). Norms bound a tile's scores, |q| |k| plus ALiBi's largest term; where that is so far below the
    row's largest score so far, or in the backward pass below lse, that every weight underflows to 0, the tile is
    skipped. It pays with ALiBi at long seqlens (None does it there) and where a few early keys have far higher scores
    than the rest; on other data it finds nothing. With a bias nothing is skipped, nor where a value that is not finite
    would show.

    Memory is O(seqlen) beyond inputs and outputs, except on the reference (where every kernel refuses, with a
    `FallbackWarning`), which is O(seqlen_q * seqlen_k).

    Raises TypeError or ValueError that names the argument, its value and the rule; `UnsupportedError` if the named
    backend refuses. Method: Vaswani et al., arXiv 1706.03762; tiled as in FlashAttention-2, arXiv 2307.08691.
    """
    # The hot path of a tiny call: no helper is called, no attribute read twice.
    try:
        needs_grad = _is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
        scale = block_mask = None
        if mask is window_size is alibi_slopes is bias is sinks is seed is softmax_scale is None and causal is False:
            windows, k_start, k_end, extras = (), None, None, None
        else:
            mask, block_mask, windows, k_start, k_end = _bounds_of(mask, causal, window_size)
            if isinstance(softmax_scale, torch.Tensor):
                scale, softmax_scale = softmax_scale, None
            extras, extra_grad = _describe(block_mask, mask, k_start, k_end, bias, alibi_slopes, sinks, scale)
            needs_grad = needs_grad or extra_grad
            _check_seed(seed)
        # Forward-mode tangents may hide in any input; under torch.func, tensors have no memory.
        transformed = _forward_ad._current_level >= 0 or _functorch_level() is not None
        key = None if transformed else _signature(q, k, v)
        key = key or _python_signature(q, k, v)
    except AttributeError:
        _raise_not_a_tensor(q=q, k=k, v=v, bias=bias, alibi_slopes=alibi_slopes, sinks=sinks)
        raise
    if backend is None:
        backend = _current_backend()
    settings = (
        needs_grad, transformed, windows, softmax_scale, softcap, dropout_p, return_lse, extras, skip_negligible,
        backend,
    )  # fmt: skip
    try:
        plan = _plans.get((key, settings))
    except TypeError:  # an argument is not hashable: _make_plan says which
        plan = None
    if plan is None:
        plan = _make_plan(key, settings, q, k, v)
    choice, kernel, problem, terms = plan
    if extras is not None or problem.dropout:
        if problem.dropout and seed is None:
            seed = int(torch.randint(2**63 - 1, ()))
        softmax_scale, softcap, lo, hi, *_ = terms
        terms = Terms(
            softmax_scale if scale is None else scale, softcap, lo, hi, k_start, k_end, mask, block_mask, bias,
            alibi_slopes, sinks, dropout_p, seed, skip_negligible, problem.seqlen_k - problem.seqlen_q,
        )  # fmt: skip
    _note(choice)
    out, lse = kernel(problem, q, k, v, terms)
    return (out, lse) if return_lse else out


class Explanation(str):
    """Text that shows itself unquoted at the prompt."""

    __repr__ = str.__str__


class _Explain(NamedTuple):
    """In place of a backend: the plan of the call is wanted, not its result."""

    backend: str | None


class _ProblemFound(BaseException):  # no Exception: nothing on the way may catch it
    pass


def explain(*args, backend: str | None = None, **kwargs) -> Explanation:
    """Which kernel `attention`, or with lists of edges `attention_csr`, with these arguments would run, and why each
    other one would not. Computes nothing."""
    from .csr import attention_csr

    function = attention_csr if len(args) > 3 or "indptr" in kwargs else attention
    backend = _current_backend() if backend is None else dispatch.check_backend(backend, "backend")
    try:
        function(*args, backend=_Explain(backend), **kwargs)
    except _ProblemFound as found:
        return Explanation(dispatch.explain(found.args[0], backend))


explain.__signature__ = inspect.signature(attention).replace(return_annotation=Explanation)


def _bounds_of(mask, causal, window_size) -> tuple:
    """(bool tensor, BlockMask, windows, k_start, k_end) that say what mask, causal and window_size say together."""
    block_mask, windows, k_start, k_end = None, (), None, None
    if mask is not None:
        if isinstance(mask, Mask):
            mask, windows, k_start, k_end = None, mask.windows, mask.k_start, mask.k_end
        elif isinstance(mask, BlockMask):
            mask, block_mask = None, mask
        elif is_flex(mask):
            mask, block_mask = None, from_flex(mask)
        elif not isinstance(mask, torch.Tensor):
            raise TypeError(f"mask must be a Mask, a BlockMask or a bool tensor, got {type(mask).__name__}")
    if window_size is not None:
        windows += (Window(*check_window(window_size)),)
    if causal is not False and _check_flag("causal", causal, '; mask=Mask.causal("top_left") is torch\'s alignment'):
        windows += _CAUSAL
    return mask, block_mask, windows, k_start, k_end


def _describe(block_mask: BlockMask | None, *tensors: torch.Tensor | None) -> tuple[tuple | None, bool]:
    """(what decides about the optional tensors, None without any; whether one wants a gradient)"""
    is_any, wants_grad = block_mask is not None, False
    extras = [block_mask._described if is_any else None]
    for t in tensors:
        if t is None:
            extras.append(None)
        else:
            extras.append((t.shape, t.dtype, t.device, t.requires_grad))
            is_any, wants_grad = True, wants_grad or t.requires_grad
    return (tuple(extras), wants_grad and _is_grad_enabled()) if is_any else (None, False)


def _check_seed(seed) -> None:
    if seed is not None and not (isinstance(seed, int) and 0 <= seed < 2**63):
        raise ValueError(f"seed={seed!r} must be an int in 0 ... 2^63 - 1, or None")


def _python_signature(q, k, v) -> tuple:
    return q.shape, k.shape, v.shape, q.dtype, k.dtype, v.dtype, q.device, k.device, v.device


_Plan = tuple[dispatch.Choice, Callable, Problem, Terms]
_plans: dict[tuple, _Plan] = {}
_MAX_PLANS = 4096


def _make_plan(key, settings, q, k, v) -> _Plan:
    """Validate a call that is new, select its kernel, and remember both."""
    *settings, backend = settings
    _raise_not_a_tensor(q=q, k=k, v=v)
    problem, terms = _problem(*_python_signature(q, k, v), *settings)
    if isinstance(backend, _Explain):
        raise _ProblemFound(problem)
    choice = dispatch.select(problem, dispatch.check_backend(backend, "backend"))
    if len(_plans) >= _MAX_PLANS:
        _plans.clear()
    plan = _plans[key, (*settings, backend)] = (choice, choice.kernel, problem, terms)
    return plan


def _problem(
    q, k, v, q_dtype, k_dtype, v_dtype, q_device, k_device, v_device, needs_grad, transformed, windows, softmax_scale,
    softcap, dropout_p, return_lse, extras, skip_negligible=None,
) -> tuple[Problem, Terms]:  # fmt: skip
    """Validate shapes, dtypes and scalars; q, k, v are shapes. The only place that does. The terms lack tensors."""
    for name, shape in (("q", q), ("k", k), ("v", v)):
        if len(shape) != 4:
            raise ValueError(
                f"{name} has shape {tuple(shape)}; it must be [batch, num_heads, seqlen, head_dim] (unsqueeze what is "
                "missing; scaled_dot_product_attention takes other ranks)"
            )
    batch, num_heads, seqlen_q, head_dim = q
    num_heads_k, seqlen_k, head_dim_v = k[1], k[2], v[3]
    for name, shape, expected in (
        ("k", k, (batch, num_heads_k, seqlen_k, head_dim)),
        ("v", v, (batch, num_heads_k, seqlen_k, head_dim_v)),
    ):
        if tuple(shape) != expected:
            others = "q" if name == "k" else "q and k"
            raise ValueError(
                f"{name} has shape {tuple(shape)}; with {others} of shape {tuple(q)}"
                + (f" and {tuple(k)}" if name == "v" else "")
                + f" it must be {expected}"
            )
    if head_dim == 0 or head_dim_v == 0:
        raise ValueError(f"head_dim={head_dim}, head_dim_v={head_dim_v}: both must be at least 1")
    if num_heads != num_heads_k and (num_heads_k == 0 or num_heads % num_heads_k):
        raise ValueError(
            f"q has num_heads={num_heads} and k has num_heads_k={num_heads_k}; num_heads must be a multiple of "
            "num_heads_k" + _layout_hint(q, k)
        )
    dtype = str(q_dtype).removeprefix("torch.")
    if not q_dtype == k_dtype == v_dtype:
        raise TypeError(f"q, k, v have dtypes {q_dtype}, {k_dtype}, {v_dtype}; they must agree (cast with .to)")
    if dtype not in FLOATS:
        raise TypeError(f"q has dtype {q_dtype}; supported are {', '.join(FLOATS)}")
    if not q_device == k_device == v_device:
        raise ValueError(f"q, k, v are on {q_device}, {k_device}, {v_device}; they must be on one device")
    softmax_scale = _check_real("softmax_scale", head_dim**-0.5 if softmax_scale is None else softmax_scale)
    if _check_real("softcap", softcap) < 0.0:
        raise ValueError(f"softcap={softcap!r} must be >= 0 (0 turns it off)")
    if not 0.0 <= _check_real("dropout_p", dropout_p) < 1.0:
        raise ValueError(f"dropout_p={dropout_p!r} must be in [0, 1)")

    _check_flag("return_lse", return_lse)
    _check_flag("skip_negligible", skip_negligible, " (None: where it is known to pay)")

    block_mask, mask, k_start, k_end, bias, alibi_slopes, sinks, scale = extras or (None,) * 8
    scores, heads = (batch, num_heads, seqlen_q, seqlen_k), (batch, num_heads)
    if mask is not None and mask[1] != torch.bool:
        raise TypeError(f"mask has dtype {mask[1]}; it must be bool, True = attend (an additive mask goes to bias=)")
    floats = {"bias": bias, "alibi_slopes": alibi_slopes, "sinks": sinks, "softmax_scale": scale}
    for name, extra in floats.items():
        if extra is not None and str(extra[1]).removeprefix("torch.") not in FLOATS:
            raise TypeError(
                f"{name} has dtype {extra[1]}; supported are {', '.join(FLOATS)}"
                + (" (a bool mask goes to mask=)" if extra[1] == torch.bool else "")
            )
    _check_broadcast("mask", mask, scores, "[batch, num_heads, seqlen_q, seqlen_k]")
    if block_mask is not None and (block_mask[0][2:] != scores[2:] or not _broadcasts(block_mask[0], scores)):
        raise ValueError(
            f"mask is a BlockMask of shape {block_mask[0]}; it must be [batch|1, num_heads|1, seqlen_q, seqlen_k], "
            f"here {scores}"
        )
    _check_broadcast("bias", bias, scores, "[batch, num_heads, seqlen_q, seqlen_k]")
    _check_broadcast("k_start of mask", k_start, scores[:3], "[batch, num_heads, seqlen_q]")
    _check_broadcast("k_end of mask", k_end, scores[:3], "[batch, num_heads, seqlen_q]")
    if alibi_slopes is not None and tuple(alibi_slopes[0]) not in ((num_heads,), heads):
        raise ValueError(
            f"alibi_slopes has shape {tuple(alibi_slopes[0])}; it must be [num_heads] or [batch, num_heads], here "
            f"({num_heads},) or {heads}"
        )
    if sinks is not None and tuple(sinks[0]) != (num_heads,):
        raise ValueError(f"sinks has shape {tuple(sinks[0])}; it must be [num_heads], here ({num_heads},)")
    if scale is not None and tuple(scale[0]) not in ((), (1,), (num_heads,)):
        raise ValueError(
            f"softmax_scale has shape {tuple(scale[0])}; it must be one number or [num_heads], here ({num_heads},)"
        )
    names = ("mask", "mask", "k_start of mask", "k_end of mask", "bias", "alibi_slopes", "sinks", "softmax_scale")
    for name, extra in zip(names, extras or (), strict=False):
        if extra is not None and extra[2] != q_device:
            raise ValueError(f"{name} is on {extra[2]}, q on {q_device}; they must be on one device")

    lo, hi = diagonal_bounds(windows, seqlen_q, seqlen_k)
    if block_mask is not None:
        kind = "block"
    elif mask is not None:
        kind = "tensor"
    elif k_start is not None or k_end is not None:
        kind = "interval"
    elif lo == -UNBOUNDED and hi == UNBOUNDED:
        kind = "none"
    else:
        kind = "causal" if lo == -UNBOUNDED else "window"
    problem = Problem(
        device=q_device.type, dtype=dtype, batch=batch, seqlen_q=seqlen_q, seqlen_k=seqlen_k, num_heads=num_heads,
        num_heads_k=num_heads_k, head_dim=head_dim, head_dim_v=head_dim_v, mask=kind,
        bias="none" if bias is None else str(bias[1]).removeprefix("torch."), alibi=alibi_slopes is not None,
        softcap=softcap > 0.0, sinks=sinks is not None, learned_scale=scale is not None, dropout=dropout_p > 0.0,
        lse=bool(return_lse), needs_grad=needs_grad, transformed=transformed,
    )  # fmt: skip
    return problem, Terms(softmax_scale, float(softcap), lo, hi, skip_negligible=skip_negligible, query_start=seqlen_k - seqlen_q)


def _check_real(name: str, value) -> float:
    if isinstance(value, torch.Tensor):
        raise TypeError(f"{name} is a tensor of shape {tuple(value.shape)}; it must be a float (use .item())")
    if not isinstance(value, (int, float)):
        raise TypeError(f"{name}={_one_line(value)} must be a float")
    if not math.isfinite(value):
        raise ValueError(f"{name}={value!r} must be finite")
    return float(value)


def _check_flag(name: str, value, hint: str = "") -> bool:
    if value is not None and not isinstance(value, int):
        raise TypeError(f"{name}={_one_line(value)} must be True or False{hint}")
    return bool(value)


def _one_line(value) -> str:
    return " ".join(repr(value).split())[:80]


def _check_broadcast(name: str, extra, target: tuple[int, ...], text: str) -> None:
    if extra is None:
        return
    shape = tuple(extra[0])
    if not _broadcasts(shape, target):
        raise ValueError(f"{name} has shape {shape}; it must be broadcastable to {text}, here {target}")


def _broadcasts(shape: tuple[int, ...], target: tuple[int, ...]) -> bool:
    aligned = zip(reversed(shape), reversed(target), strict=False)
    return len(shape) <= len(target) and all(size in (1, full) for size, full in aligned)


def _layout_hint(q, k) -> str:
    if q[2] == k[2] and q[1] != k[1]:
        return " (if these are [batch, seqlen, num_heads, head_dim], pass q.transpose(1, 2) and so on)"
    return ""


def _raise_not_a_tensor(**arguments) -> None:
    for name, value in arguments.items():
        if not isinstance(value, torch.Tensor) and (value is not None or name in "qkv"):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
