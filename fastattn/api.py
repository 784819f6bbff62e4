"""`attention()`: arguments -> bound call -> run; `explain()`: the same call, printed."""

import inspect

import torch

from . import dispatch, plans
from .calls import current_backend, in_graph, note
from .checks import check_flag, check_one_device, check_tensors, refuse_subclasses
from .differentiable import train, train_plain
from .dispatch import KernelError
from .layouts import csr, jagged
from .masks import flex
from .masks.block_mask import BlockMask
from .masks.intervals import Mask, Window, check_window
from .operators import dense as operator
from .plans import Bound, recall
from .scores import dropout, scale
from .scores import rotary as rotaries
from .scores import softcap as softcap_scores
from .scores.dropout import check_seed
from .scores.relative import RelativeBias, Rewriting
from .torch_internals import is_memoryless, is_transformed, num_dispatch_modes

_Tensor, _is_grad_enabled = torch.Tensor, torch.is_grad_enabled
_is_traced = torch.compiler.is_dynamo_compiling
_num_modes = num_dispatch_modes  # of make_fx, export, counters of operations: they see operators alone


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *misplaced,
    mask: Mask | BlockMask | torch.Tensor | None = None,
    causal: bool = False,
    window_size: tuple[int | None, int | None] | None = None,
    softmax_scale: float | torch.Tensor | None = None,
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    bias: torch.Tensor | RelativeBias | None = None,
    sinks: torch.Tensor | None = None,
    rotary: tuple[torch.Tensor, torch.Tensor] | None = None,
    rotary_interleaved: bool = False,
    dropout_p: float = 0.0,
    seed: int | None = None,
    skip_negligible: bool | None = None,
    return_lse: bool = False,
    backend: str | None = None,
    **unknown,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """softmax(scale * q k^T + bias, masked) v, without ever storing the n x n scores.

    q             [batch, num_heads, seqlen_q, head_dim], any strides; float32, bfloat16, float16 or float64
    k, v          [batch, num_heads_k, seqlen_k, head_dim], [batch, num_heads_k, seqlen_k, head_dim_v], same dtype;
                  num_heads is a multiple of num_heads_k: query head h reads key head h // (num_heads // num_heads_k).
                  q, k and v may be jagged (torch.nested): one call of `attention_varlen` then, and so is the result
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
                  scores; an entry of -inf masks. Or an object of `fastattn.relative`: a bias that follows from
                  positions, with the gradients of its tables and without an n x n tensor
    sinks         [num_heads], any float dtype: one more logit a head in the softmax denominator
    rotary        (cos, sin), float [positions, rotary_dim / 2] or [batch, positions, rotary_dim / 2]: the first
                  rotary_dim columns of q and k turn on their way into the products, key j by row j, query i by row
                  i + seqlen_k - seqlen_q (arXiv 2104.09864); no turned copy is stored. See `fastattn.nn.Rotary`
    rotary_interleaved  columns 2 i and 2 i + 1 are a pair (GPT-J); else i and i + rotary_dim / 2 (GPT-NeoX, Llama)
    dropout_p     probability in [0, 1) that a weight is dropped (the others grow by 1 / (1 - dropout_p))
    seed          of the dropout mask, 0 ... 2^63 - 1; None draws one from torch's generator
    skip_negligible  leave out tiles of keys whose weights must all underflow to 0, which no result shows (but for the
                  sign of a zero); None: where that is known to pay (ALiBi, long seqlens), True: always, False: never
    return_lse    also return the log of the softmax denominator
    backend       "cpu", "triton" or "reference": only its kernels, an error instead of a fallback

    Returns out [batch, num_heads, seqlen_q, head_dim_v] in q's dtype and memory order, or (out, lse) with lse
    [batch, num_heads, seqlen_q], natural log, float32 (float64 for float64 inputs).

    mask, causal and window_size combine: a key is seen if all allow it. A query that sees no key gives out = 0 and
    lse = -inf (the sink's logit, with sinks). NaN or Inf in a masked key or value never reaches the result. The bits
    of a row do not depend on the number of threads or on what else is in the batch.

    Memory is O(seqlen) beyond inputs and outputs, except on the reference (where every kernel refuses, with a
    `FallbackWarning`), which is O(seqlen_q * seqlen_k).

    Raises TypeError or ValueError that names the argument, its value and the rule; `UnsupportedError` if the named
    backend refuses. Method: Vaswani et al., arXiv 1706.03762; tiled as in FlashAttention-2, arXiv 2307.08691.
    """
    if misplaced or unknown:
        raise misnamed("attention", misplaced, unknown)
    is_traced, bound, run = _is_traced() or _num_modes(), None, train_plain
    if not is_traced:
        if backend is None:
            backend = current_backend()
        if mask is window_size is alibi_slopes is bias is sinks is rotary is seed is None and type(causal) is bool:
            given = causal, softmax_scale, softcap, dropout_p, skip_negligible, rotary_interleaved, return_lse, backend
            bound = recall(q, k, v, given)
    if bound is None:
        run = train
        options = {
            "mask": mask, "causal": causal, "window_size": window_size, "softmax_scale": softmax_scale,
            "softcap": softcap, "alibi_slopes": alibi_slopes, "bias": bias, "sinks": sinks, "rotary": rotary,
            "rotary_interleaved": rotary_interleaved, "dropout_p": dropout_p, "seed": seed,
            "skip_negligible": skip_negligible, "return_lse": return_lse, "backend": backend,
        }  # fmt: skip
        bound, result = _bound_or_done(q, k, v, is_traced, options)
        if bound is None:
            return result
    if bound.problem.dropout and bound.terms.seed is None:
        seed = torch.randint(2**63 - 1, ())
        seed = seed if bound.problem.transformed else int(seed)  # under vmap, perhaps one a sample
        bound = bound._replace(terms=bound.terms._replace(seed=seed))
    while True:
        note(bound, q, k)
        choice, problem, terms, _ = bound
        try:
            if choice.train is None:
                out, lse = choice.forward(problem, q, k, v, terms)
            else:
                out, lse = run(bound, q, k, v)
            return (out, lse) if return_lse else out
        except KernelError as error:
            bound = plans.after_failure(bound, error)


def _bound_or_done(q, k, v, is_traced, options: dict) -> tuple[Bound | None, object]:
    """(the call bound to a kernel, None), or (None, its result) where it becomes another call or an operator."""
    rotary, bias = options["rotary"], options["bias"]
    if jagged.is_jagged(q):
        return None, jagged.attend(q, k, v, options)
    if rotary is not None and _turns_before(q, rotary, bias, is_traced, options["backend"]):
        return None, _turned_before(q, k, v, options)
    if isinstance(bias, Rewriting):
        return None, bias.attend(attention, bind, q, k, v, options)
    bound = None if is_traced else bind(q, k, v, **options)
    if is_traced or (bound.choice and is_memoryless(q) and not bound.choice.takes_meta):
        return None, _traced(q, k, v, **options)
    if rotary is not None and (bound.choice is None or bound.choice.is_fallback):
        return None, _turned_before(q, k, v, options)
    return bound, None


def _traced(
    q, k, v, *, mask, causal, window_size, softmax_scale, softcap, alibi_slopes, bias, sinks, rotary,
    rotary_interleaved, dropout_p, seed, skip_negligible, return_lse, backend,
):  # fmt: skip
    """`attention` as an operator: in graphs, and for tensors without memory. What depends on the values of tensors,
    and whether shapes fit, is checked when the operator runs."""
    check_tensors(q=q, k=k, v=v)
    refuse_subclasses(q, k, v)
    check_one_device(q, k, v)
    check_seed(seed)
    tensors = {"alibi_slopes": alibi_slopes, "sinks": sinks}
    tensors = {name: x for name, x in tensors.items() if x is not None}
    if bias is not None:
        _add_bias(tensors, bias, q, k)
    if rotary is not None:
        tensors["rotary_cos"], tensors["rotary_sin"] = rotaries.checked(rotary)
    windows = _add_mask(tensors, mask, window_size)
    number = softmax_scale
    if isinstance(softmax_scale, _Tensor):
        tensors["softmax_scale"], number = softmax_scale, None
    check_tensors(**{name: x for name, x in tensors.items() if name != "block_mask"})
    return_lse = check_flag("return_lse", return_lse)
    if backend is None and in_graph:
        backend = in_graph[-1]
    # None is the default of an operator's option; most calls have few others.
    numbers = {
        "causal": check_flag("causal", causal) or None,
        "scale": scale.TERM.check(number),
        "softcap": softcap_scores.TERM.check(softcap) or None,
        "dropout_p": dropout.P.check(dropout_p) or None,
        "skip_negligible": None if skip_negligible is None else check_flag("skip_negligible", skip_negligible),
        "rotary_interleaved": check_flag("rotary_interleaved", rotary_interleaved) or None,
        "return_lse": return_lse or None,
        "backend": dispatch.check_backend(backend, "backend"),
    }
    out, lse = operator.call(q, k, v, windows, tensors, seed, numbers)
    return (out, lse) if return_lse else out


def bind(
    q, k, v, *, mask=None, causal=False, window_size=None, softmax_scale=None, softcap=0.0, alibi_slopes=None,
    bias=None, sinks=None, rotary=None, rotary_interleaved=False, dropout_p=0.0, seed=None, skip_negligible=None,
    return_lse=False, backend=None,
) -> Bound:  # fmt: skip
    """The call that these arguments of `attention` are, checked. It computes nothing and draws no seed."""
    tensors, windows = {}, ()
    if seed is not None:
        check_seed(seed)
    if causal is not True and causal is not False:
        causal = check_flag("causal", causal, '; mask=Mask.causal("top_left") is torch\'s alignment')
    settings = causal, softmax_scale, softcap, dropout_p, skip_negligible, rotary_interleaved, return_lse, backend
    try:
        needs_grad = _is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
        if mask is not None or window_size is not None:
            windows = _add_mask(tensors, mask, window_size)
        if bias is not None:
            _add_bias(tensors, bias, q, k)
        if alibi_slopes is not None:
            tensors["alibi_slopes"] = alibi_slopes
        if sinks is not None:
            tensors["sinks"] = sinks
        if rotary is not None:
            _add_rotary(tensors, rotary, q, k)
        if isinstance(softmax_scale, _Tensor):
            tensors["softmax_scale"], settings = softmax_scale, (causal, None, *settings[2:])
        if _is_grad_enabled() and not needs_grad:
            needs_grad = any([x.requires_grad for name, x in tensors.items() if name != "block_mask"])
        if seed is not None:
            tensors["seed"] = seed
        return plans.find(q, k, v, windows, tensors, settings, needs_grad)
    except AttributeError:
        check_tensors(q=q, k=k, v=v, **{name: x for name, x in tensors.items() if name not in ("seed", "block_mask")})
        raise


def _turns_before(q, rotary, bias, is_traced, backend) -> str:
    """Why q and k are turned before the call, by torch's operators; "": they are not."""
    if rotaries.wants_grad(rotary):
        return "the tables have gradients, which no kernel computes"
    if isinstance(bias, Rewriting):
        return f"bias={bias!r} reads q and k as they are then"
    if not is_traced:
        return "a transform differentiates by q and k" if is_transformed() else ""
    return "Triton's kernels take q and k turned" if q.device.type != "cpu" or backend == "triton" else ""


def _turned_before(q, k, v, options: dict):
    """`attention` without rotary=, of q and k turned."""
    q, k = rotaries.before(q, k, options["rotary"], options["rotary_interleaved"])
    return attention(q, k, v, **options | {"rotary": None, "rotary_interleaved": False})


class Explanation(str):
    """Text that shows itself unquoted at the prompt."""

    __repr__ = str.__str__


def explain(*args, backend: str | None = None, **kwargs) -> Explanation:
    """Which kernel `attention`, or with lists of edges `attention_csr`, with these arguments would run, and why each
    other one would not. Computes nothing."""
    backend = current_backend() if backend is None else dispatch.check_backend(backend, "backend")
    if len(args) > 3 or "indptr" in kwargs:
        problem = csr.bind(*args, backend=backend, **kwargs).problem
    else:
        if unknown := kwargs.keys() - inspect.signature(bind).parameters.keys():
            raise misnamed("explain", (), unknown)
        bound, why = bind(*args, backend=backend, **kwargs), ""
        if (rotary := kwargs.get("rotary")) is not None:
            why = _turns_before(args[0] if args else kwargs["q"], rotary, kwargs.get("bias"), False, backend)
            if not why and (bound.choice is None or bound.choice.is_fallback):
                why = "no kernel but the reference turns them"
        if why:
            bound = bind(*args, backend=backend, **kwargs | {"rotary": None, "rotary_interleaved": False})
            return Explanation(
                f"{dispatch.explain(bound.problem, backend)}\n  rotary: q and k are turned before, {why}"
            )
        problem = bound.problem
    return Explanation(dispatch.explain(problem, backend))


_PARAMETERS = inspect.signature(attention).parameters.values()
attention.__signature__ = inspect.signature(attention).replace(
    parameters=[x for x in _PARAMETERS if x.kind not in (x.VAR_POSITIONAL, x.VAR_KEYWORD)]
)  # without what is only there for a better error
explain.__signature__ = attention.__signature__.replace(return_annotation=Explanation)

_INSTEAD = {
    "attn_mask": "mask= takes a bool tensor, bias= a float one",
    "attention_mask": "mask= takes a bool tensor, bias= a float one",
    "key_padding_mask": "mask=fastattn.Mask.padding(keep), keep True at tokens",
    "is_causal": "causal= (bottom-right), or mask=fastattn.Mask.causal('top_left') for torch's alignment",
    "scale": "softmax_scale=",
    "dropout": "dropout_p=",
    "window": "window_size=",
    "return_attn_probs": "return_lse= returns the log of the softmax denominator",
    "enable_gqa": "nothing: fewer heads of k and v are grouped queries",
    "deterministic": "nothing: gradients always are",
}


def misnamed(function: str, misplaced, unknown) -> TypeError:
    """The error of arguments that `function` does not have, with what takes their place."""
    if misplaced:
        return TypeError(
            f"{function}() takes 3 positional arguments, q, k and v, but {3 + len(misplaced)} were given; name the "
            "others (fastattn.scaled_dot_product_attention takes torch's arguments in torch's order)"
        )
    name = sorted(unknown)[0]
    instead = f"; use {_INSTEAD[name]}" if name in _INSTEAD else ""
    torchs = {"attn_mask", "is_causal", "scale", "enable_gqa", "query", "key", "value"}
    hint = " (fastattn.scaled_dot_product_attention takes torch's names)" if name in torchs else ""
    return TypeError(f"{function}() got an unexpected keyword argument {name!r}{instead}{hint}")


def _add_bias(tensors: dict, bias, q, k) -> None:
    """The tensor that `bias` is, or that it stands for, into `tensors`."""
    if not isinstance(bias, RelativeBias):
        tensors["bias"] = bias
    elif all(isinstance(x, _Tensor) and x.dim() == 4 for x in (q, k)):  # else the checks of q and k say so
        tensors |= bias.terms(q, k)


def _add_rotary(tensors: dict, rotary, q, k) -> None:
    """The rows of the tables that the call reads into `tensors`."""
    if all(isinstance(x, _Tensor) and x.dim() == 4 for x in (q, k)):  # else the checks of q and k say so
        tensors |= rotaries.tables(rotary, q, k)


def _add_mask(tensors: dict, mask, window_size) -> tuple[Window, ...]:
    """The windows of `mask` and `window_size`; what else the mask consists of goes into `tensors`."""
    windows = ()
    if isinstance(mask, Mask):
        windows = mask.windows
        if mask.k_start is not None:
            tensors["k_start"] = mask.k_start
        if mask.k_end is not None:
            tensors["k_end"] = mask.k_end
    elif isinstance(mask, _Tensor):
        tensors["mask"] = mask
    elif isinstance(mask, BlockMask):
        tensors["block_mask"] = mask
    elif flex.is_flex(mask):
        tensors["block_mask"] = flex.converted(mask, BlockMask.from_flex)
    elif mask is not None:
        raise TypeError(f"mask must be a Mask, a BlockMask or a bool tensor, got {type(mask).__name__}")
    return windows if window_size is None else (*windows, Window(*check_window(window_size)))
