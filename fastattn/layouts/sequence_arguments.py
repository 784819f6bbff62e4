"""The arguments of `attention_varlen` and `attention_with_kvcache`, checked and bound to a kernel."""

import torch

from .. import dispatch
from ..checks import check_flag, check_int, check_one_device, check_tensors, dtype_name, one_line
from ..masks.intervals import Window, check_window, diagonal_bounds
from ..plans import Bound
from ..problem import FLOATS, Problem
from ..scores.dropout import check_seed
from ..terms import TERMS
from ..torch_internals import is_transformed
from ..validation import check_terms, mask_kind
from .sequences import Sequences

_INDEX = torch.int32, torch.int64


def bind_packed(
    q, k, v, places: dict, *, causal=False, window_size=None, softmax_scale=None, softcap=0.0, alibi_slopes=None,
    sinks=None, rotary=None, rotary_interleaved=False, dropout_p=0.0, seed=None, return_lse=False, backend=None,
    needs_grad=None,
) -> Bound:  # fmt: skip
    """The call that these arguments of `attention_varlen` are, q, k and v as [1, heads, total, dim] (k and v as [pages,
    heads, page_size, dim] with a block_table). places: tensors by the names of `layouts.sequences.PLACES`."""
    count = _check_starts(places)
    if places["block_table"] is None and places["cu_seqlens_k"] is None:
        raise TypeError("cu_seqlens_k must be a tensor [sequences + 1]; None needs block_table and seqused_k")
    if places["block_table"] is not None and places["cu_seqlens_k"] is None and places["seqused_k"] is None:
        raise TypeError("block_table without cu_seqlens_k needs seqused_k, the lengths of the sequences")
    problem = _check_rows(q, k, v)._replace(layout="varlen")
    if rotary is not None:
        places = places | check_tables(rotary, problem.head_dim)
        places["rotary_interleaved"] = check_flag("rotary_interleaved", rotary_interleaved)
    elif rotary_interleaved:
        raise ValueError("rotary_interleaved=True says how rotary= turns; pass rotary=(cos, sin), too")
    _check_places(q, places, count)
    options = {"softmax_scale": softmax_scale, "softcap": softcap, "dropout_p": dropout_p}
    tensors = {"alibi_slopes": alibi_slopes, "sinks": sinks, "seed": check_seed(seed)}
    if needs_grad is None:
        learned = (q, k, v, alibi_slopes, sinks, softmax_scale)
        needs_grad = torch.is_grad_enabled() and any(isinstance(x, torch.Tensor) and x.requires_grad for x in learned)
    if needs_grad and places["block_table"] is not None:
        raise ValueError("block_table: attention over pages has no gradients; call it under torch.no_grad()")
    facts = {"lse": check_flag("return_lse", return_lse), "needs_grad": needs_grad}
    facts["rotary"] = rotary is not None
    return _bound(problem, q, count, places, causal, window_size, options, tensors, facts, backend)


def bind_cache(
    q, k_cache, v_cache, places: dict, *, causal=True, window_size=None, softmax_scale=None, softcap=0.0,
    alibi_slopes=None, sinks=None, return_lse=False, backend=None,
) -> Bound:  # fmt: skip
    """The call that these arguments of `attention_with_kvcache` are. places: as above, and what is appended."""
    problem = _check_rows(q, k_cache, v_cache, "k_cache", "v_cache")._replace(layout="cache")
    if places["block_table"] is not None and places["cache_batch_idx"] is not None:
        raise ValueError("cache_batch_idx does not go with block_table, which names the pages of each sequence")
    count, entries = q.shape[0], k_cache.shape[0]
    if places["block_table"] is None and places["cache_batch_idx"] is None and count > entries:
        raise ValueError(f"q has batch={count} and k_cache {entries} entries; name them with cache_batch_idx=")
    _check_places(q, places, count)
    _check_new_rows(problem, places)
    _check_factors(problem, k_cache, places)
    learned = (q, k_cache, v_cache, places["k"], places["v"], alibi_slopes, sinks)
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in learned):
        raise ValueError("attention over a cache has no gradients; call it under torch.no_grad() or detach its inputs")
    options = {"softmax_scale": softmax_scale, "softcap": softcap}
    tensors = {"alibi_slopes": alibi_slopes, "sinks": sinks}
    facts = {"lse": check_flag("return_lse", return_lse)}
    return _bound(problem, q, count, places, causal, window_size, options, tensors, facts, backend)


def _bound(problem, q, count, places, causal, window_size, options, tensors, facts, backend) -> Bound:
    windows = (Window(None, 0),) if check_flag("causal", causal) else ()
    if window_size is not None:
        windows = (*windows, Window(*check_window(window_size)))
    if isinstance(options["softmax_scale"], torch.Tensor):
        tensors, options = tensors | {"softmax_scale": options["softmax_scale"]}, {**options}
        del options["softmax_scale"]
    given = {name: x for name, x in tensors.items() if x is not None}
    seed = given.pop("seed", None)
    numbers = check_terms(problem._replace(batch=count), q.device, given, options)
    if "softmax_scale" not in given and numbers["softmax_scale"] is None:
        numbers["softmax_scale"] = problem.head_dim**-0.5
    lo, hi = diagonal_bounds(windows, 0, 0)
    values = numbers | given
    facts |= {term.fact[0]: term.fact[1](values[term.name]) for term in TERMS if term.fact and term.name in values}
    problem = problem._replace(mask=mask_kind({}, lo, hi), transformed=is_transformed(), **facts)
    terms = Sequences(**places, **values, diagonal_lo=lo, diagonal_hi=hi, seed=seed)
    choices = dispatch.choices_of(problem, dispatch.check_backend(backend, "backend"))
    return Bound(dispatch.first_that_takes(choices, problem), problem, terms, backend)


def check_longest(name: str, value) -> None:
    """TypeError or ValueError unless `value` may be the length of the longest sequence. No kernel needs it."""
    if value is not None and not isinstance(value, torch.Tensor):
        check_int(name, value)


def _check_starts(places: dict) -> int:
    starts = places["cu_seqlens_q"]
    check_tensors(cu_seqlens_q=starts)
    if starts.dim() != 1 or len(starts) == 0:
        raise ValueError(f"cu_seqlens_q has shape {tuple(starts.shape)}; it must be [sequences + 1]")
    return len(starts) - 1


def _check_rows(q, k, v, name_k="k", name_v="v") -> Problem:
    """The Problem of q [batch, num_heads, rows, head_dim], k and v [entries, num_heads_k, rows, head_dim or _v]."""
    check_tensors(**{"q": q, name_k: k, name_v: v})
    for name, x in (("q", q), (name_k, k), (name_v, v)):
        if x.dim() != 4:
            raise ValueError(f"{name} has shape {tuple(x.shape)}; see the docstring for the shapes of this layout")
    batch, num_heads, seqlen_q, head_dim = q.shape
    entries, num_heads_k, rows, head_dim_v = v.shape
    if tuple(k.shape) != (entries, num_heads_k, rows, head_dim):
        raise ValueError(
            f"{name_k} has shape {tuple(k.shape)}, {name_v} {tuple(v.shape)} (heads before rows) and q has "
            f"head_dim={head_dim}: k and v must agree but for head_dim_v, and k must have q's head_dim"
        )
    if head_dim == 0 or head_dim_v == 0:
        raise ValueError(f"head_dim={head_dim}, head_dim_v={head_dim_v}: both must be at least 1")
    if num_heads != num_heads_k and (num_heads_k == 0 or num_heads % num_heads_k):
        raise ValueError(
            f"q has num_heads={num_heads} and {name_k} has num_heads_k={num_heads_k}; num_heads must be a multiple of "
            "num_heads_k"
        )
    if dtype_name(q.dtype) not in FLOATS:
        raise TypeError(f"q has dtype {q.dtype}; supported are {', '.join(FLOATS)}")
    is_narrow = name_k == "k_cache" and k.dtype == torch.int8 and q.dtype != torch.float64
    if k.dtype != v.dtype or (k.dtype != q.dtype and not is_narrow):
        also = ", or be int8 (for queries that are not float64)" if name_k == "k_cache" else ""
        raise TypeError(f"q, {name_k}, {name_v} have dtypes {q.dtype}, {k.dtype}, {v.dtype}; they must agree{also}")
    check_one_device(q, k, v)
    return Problem(
        q.device.type, dtype_name(q.dtype), batch, seqlen_q, rows, num_heads, num_heads_k, head_dim, head_dim_v,
        device_index=q.device.index or 0,
    )  # fmt: skip


def _check_places(q, places: dict, count: int) -> None:
    for name, extra in (
        ("cu_seqlens_q", 1), ("cu_seqlens_k", 1), ("seqused_q", 0), ("seqused_k", 0), ("cache_seqlens", 0),
        ("cache_batch_idx", 0), ("cache_leftpad", 0), ("block_table", None),
    ):  # fmt: skip
        x = places.get(name)
        if x is None or (name == "cache_seqlens" and isinstance(x, int) and not isinstance(x, bool)):
            continue
        check_tensors(**{name: x})
        if x.dtype not in _INDEX:
            raise TypeError(f"{name} has dtype {x.dtype}; it must be int32 or int64 (cast with .to)")
        if extra is None and (x.dim() != 2 or x.shape[0] != count):
            raise ValueError(
                f"{name} has shape {tuple(x.shape)}; it must be [sequences, entries], here [{count}, entries]"
            )
        if extra is not None and tuple(x.shape) != (count + extra,):
            raise ValueError(f"{name} has shape {tuple(x.shape)}; it must be [{count + extra}] for {count} sequences")
    for name, x in places.items():
        if isinstance(x, torch.Tensor) and x.device != q.device:
            raise ValueError(f"{name} is on {x.device}, q on {q.device}; they must be on one device")


def _check_new_rows(problem, places: dict) -> None:
    k, v, cos, sin = (places[name] for name in ("k", "v", "rotary_cos", "rotary_sin"))
    if (k is None) != (v is None) or (cos is None) != (sin is None):
        raise ValueError("k and v, and rotary_cos and rotary_sin, must be given together")
    if k is None:
        if cos is not None:
            raise ValueError("rotary_cos turns what is appended: pass k and v with it")
        return
    check_tensors(k=k, v=v)
    heads, dims = problem.num_heads_k, (problem.head_dim, problem.head_dim_v)
    for name, x, dim in zip("kv", (k, v), dims, strict=True):
        if tuple(x.shape) != (problem.batch, heads, k.shape[2] if k.dim() == 4 else "new keys", dim):
            raise ValueError(
                f"{name} has shape {tuple(x.shape)}; it must be [batch, num_heads_k, new keys, dim], here "
                f"[{problem.batch}, {heads}, new keys, {dim}]"
            )
        if dtype_name(x.dtype) != problem.dtype:
            raise TypeError(f"{name} has dtype {x.dtype}, q {problem.dtype}; they must agree (cast with .to)")
    if cos is None:
        return
    check_tables((cos, sin), problem.head_dim)


def check_tables(rotary, head_dim: int) -> dict[str, torch.Tensor]:
    """The terms of rotary embedding whose tables all sequences share; TypeError or ValueError."""
    if not isinstance(rotary, (tuple, list)) or len(rotary) != 2:
        raise TypeError(f"rotary={one_line(rotary)} must be (cos, sin), two tensors [positions, rotary_dim / 2]")
    tables = dict(zip(("rotary_cos", "rotary_sin"), rotary, strict=True))
    check_tensors(**tables)
    for name, x in tables.items():
        if dtype_name(x.dtype) not in FLOATS:
            raise TypeError(f"{name} has dtype {x.dtype}; supported are {', '.join(FLOATS)}")
    cos, sin = rotary
    if cos.dim() != 2 or cos.shape != sin.shape or cos.dtype != sin.dtype or cos.shape[1] > head_dim // 2:
        raise ValueError(
            f"rotary_cos and rotary_sin are {one_line((cos, sin))}; both must be [positions, rotary_dim / 2] with "
            f"rotary_dim <= head_dim={head_dim}, of one dtype"
        )
    if torch.is_grad_enabled() and (cos.requires_grad or sin.requires_grad):
        raise ValueError("rotary_cos or rotary_sin requires a gradient, which is not computed here; detach them")
    return tables


def _check_factors(problem, k_cache, places: dict) -> None:
    for name in ("k_scale", "v_scale"):
        x = places[name]
        if (x is not None) != (k_cache.dtype == torch.int8):
            raise ValueError(f"{name} must be given for int8 caches, and for no others (k_cache has {k_cache.dtype})")
        if x is None:
            continue
        check_tensors(**{name: x})
        if x.dtype != torch.float32 or x.shape != k_cache.shape[:3]:
            raise ValueError(f"{name} is {one_line(x)}; it must be float32 {tuple(k_cache.shape[:3])}, one a row")
