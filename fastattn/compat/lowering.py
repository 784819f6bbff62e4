"""The form of a score_mod as arguments of `fastattn.attention`, where it has them."""

import torch

from ..masks.block_mask import BlockMask
from ..masks.intervals import Mask, Window
from ..relative import toeplitz
from .score_mods import Form, Node, evaluated, has_gradient

_aten = torch.ops.aten


def combined(masks: list) -> Mask | BlockMask | None:
    """The keys that all masks allow; None: all."""
    masks = sorted((x for x in masks if x is not None), key=lambda x: isinstance(x, Mask))  # block masks first
    found = None
    for mask in masks:
        found = mask if found is None else found & mask
    return found


def lowered(form: Form, sizes: tuple[int, int, int, int], device, scale: float, block_size) -> dict | None:
    """softmax_scale, softcap, bias, alibi_slopes of `fastattn.attention`, and "masks", a list; None if there are none.

    sizes       batch, num_heads, seqlen_q, seqlen_k, all above 0
    block_size  of the block masks among "masks"
    """
    masks, diagonals, reach = [], [], (-sizes[3] + 1, sizes[2] - 1)
    for node, wanted in form.masks:
        mask, (lo, hi) = _mask(node, wanted, sizes, device, block_size)
        masks.append(mask)
        reach = max(reach[0], lo), min(reach[1], hi)
    terms = {"masks": masks, "softcap": form.softcap, "softmax_scale": _scale(form.factors, sizes, device, scale)}
    for sign, node in form.biases:
        bias = _broadcast_bias(node, sizes, device)
        if bias is not None:
            bias = bias if sign == 1 else -bias
            if "bias" in terms:
                both = torch.broadcast_shapes(terms["bias"].shape, bias.shape)
                if 1 not in both[2:]:
                    return None  # their sum would be a new tensor of all pairs
                bias = terms["bias"] + bias
            terms["bias"] = bias
            continue
        slopes = None if "alibi_slopes" in terms else _slopes(node, sizes, device, reach)
        slopes = -slopes if slopes is not None and sign == -1 else slopes
        if slopes is not None and bool((slopes >= 0.0).all()):
            terms["alibi_slopes"] = slopes
        elif node.drift == 0:
            vector = _diagonals(node, sizes, device)
            diagonals.append(vector if sign == 1 else -vector)
        else:
            return None
    if diagonals:
        if "bias" in terms:
            return None
        terms["bias"] = toeplitz(sum(diagonals))
    return terms


def _scale(factors: list, sizes, device, scale: float) -> float | torch.Tensor:
    for factor in factors:
        if isinstance(factor, Node):
            factor = evaluated(factor, {"h": torch.arange(sizes[1], device=device)})
            factor = factor.float() if factor.dtype in (torch.float16, torch.bfloat16) else factor
            factor = factor.reshape(()) if factor.numel() == 1 else factor
        scale = scale * factor
    return scale


def _all_indices(sizes, device) -> dict:
    views = (-1, 1, 1, 1), (-1, 1, 1), (-1, 1), (-1,)
    indices = zip("b h q kv".split(), sizes, views, strict=True)
    return {name: torch.arange(size, device=device).view(view) for name, size, view in indices}


def _along_diagonals(sizes, device) -> dict:
    """A pair of positions for each difference q - kv, from the smallest on."""
    apart = torch.arange(-sizes[3] + 1, sizes[2], device=device)
    return {"q": apart.clamp(min=0), "kv": (-apart).clamp(min=0)}


def _mask(node: Node, wanted: bool, sizes, device, block_size) -> tuple[Mask | BlockMask | None, tuple[int, int]]:
    """(mask, (smallest, largest) q - kv that it may show)"""
    batch, num_heads, seqlen_q, seqlen_k = sizes
    everything = -seqlen_k + 1, seqlen_q - 1
    if node.drift == 0 and node.deps <= {"q", "kv"}:
        seen = evaluated(node, _along_diagonals(sizes, device)) == wanted
        places = seen.expand(seqlen_q + seqlen_k - 1).nonzero()[:, 0]
        if len(places) and int(places[-1] - places[0]) == len(places) - 1:
            lo, hi = int(places[0]) - seqlen_k + 1, int(places[-1]) - seqlen_k + 1
            left, right = None if hi == everything[1] else hi, None if lo == everything[0] else -lo
            if left is None and right is None:
                return None, everything
            if min(left or 0, right or 0) >= 0:
                return Mask((Window(left, right, "top_left"),)), (lo, hi)
    mask = BlockMask.from_mask_mod(
        lambda b, h, q, kv: evaluated(node, {"b": b, "h": h, "q": q, "kv": kv}) == wanted,
        batch=batch if "b" in node.deps else 1, num_heads=num_heads if "h" in node.deps else 1,
        seqlen_q=seqlen_q, seqlen_k=seqlen_k, block_size=block_size, device=device,
    )  # fmt: skip
    return mask, everything


def _broadcast_bias(node: Node, sizes, device) -> torch.Tensor | None:
    """The bias as a tensor that was there already, or that has not both lengths; None otherwise."""
    if not {"q", "kv"} <= node.deps:
        bias = evaluated(node, _all_indices(sizes, device))
        return _as_bias(bias.view((1,) * (4 - bias.dim()) + bias.shape))
    if node.func is not _aten.index.Tensor:
        return None
    table, places = node.args
    names = [next(iter(x.deps)) if x.func is None and len(x.deps) == 1 else None for x in places]
    if names not in (["q", "kv"], ["h", "q", "kv"], ["b", "q", "kv"], ["b", "h", "q", "kv"]):
        return None
    table, limits = table.value, dict(zip(("b", "h", "q", "kv"), sizes, strict=True))
    if any(size < limits[name] for size, name in zip(table.shape, names, strict=True)):
        return None  # the look-up says what is out of range
    table = table[tuple(slice(0, limits[name]) for name in names)]
    if "h" not in names:
        table = table.unsqueeze(-3)
    return _as_bias(table if table.dim() == 4 else table[(None,) * (4 - table.dim())])


def _diagonals(node: Node, sizes, device) -> torch.Tensor:
    """A bias that follows from q - kv, a vector [batch|1, num_heads|1, distances] of `relative.toeplitz`: it counts
    kv - q."""
    places = _along_diagonals(sizes, device)
    heads = {
        "b": torch.arange(sizes[0], device=device).view(-1, 1, 1),
        "h": torch.arange(sizes[1], device=device)[:, None],
    }
    vector = evaluated(node, places | heads)
    vector = vector if vector.is_floating_point() else vector.float()
    vector = vector.view((1,) * (3 - vector.dim()) + vector.shape)
    return vector.expand(*vector.shape[:2], sizes[2] + sizes[3] - 1).flip(-1)


def _as_bias(bias: torch.Tensor) -> torch.Tensor | None:
    return bias if bias.is_floating_point() else bias.float() if bias.numel() < 1 << 20 else None


def _slopes(node: Node, sizes, device, reach: tuple[int, int]) -> torch.Tensor | None:
    """s [num_heads] or [batch, num_heads] where the node is -s |q + seqlen_k - seqlen_q - kv| for all q - kv in reach;
    None otherwise. The slope and the distance must be two factors, so that gradients are right as well."""
    slope, distance = None, node
    while distance.func in (_aten.mul.Tensor, _aten.neg.default, _aten.div.Tensor):
        if distance.func is _aten.neg.default:
            distance = distance.args[0]
            slope = _times(slope, -1.0)
            continue
        a, b = distance.args
        if _is_of_heads(a) and distance.func is _aten.mul.Tensor:
            a, b = b, a
        if not _is_of_heads(b) or not isinstance(a, Node):
            break
        value = evaluated(b, _all_indices(sizes, device)) if isinstance(b, Node) else b
        slope = _times(slope, value if distance.func is _aten.mul.Tensor else 1.0 / value)
        distance = a
    if distance.drift != 0 or not distance.deps <= {"q", "kv"} or has_gradient(distance):
        return None
    apart = torch.arange(-sizes[3] + 1, sizes[2], device=device)
    inside = (apart >= reach[0]) & (apart <= reach[1])
    found = evaluated(distance, _along_diagonals(sizes, device)).double()[inside]
    steps = (apart + sizes[3] - sizes[2]).abs().double()[inside]
    if not len(steps) or not steps.any():
        return None
    factor = found[steps.argmax()] / steps.max()
    if not torch.allclose(found, factor * steps, rtol=1e-6, atol=0.0):
        return None
    slope = torch.ones((), device=device) if slope is None else torch.as_tensor(slope, device=device)
    slope = -float(factor) * (slope if slope.is_floating_point() else slope.float())
    slope = slope.view((1,) * (4 - slope.dim()) + slope.shape)[..., 0, 0]
    return slope.expand(-1, sizes[1])[0] if slope.shape[0] == 1 else slope.expand(-1, sizes[1])


def _is_of_heads(x) -> bool:
    return isinstance(x, (int, float)) or (isinstance(x, Node) and x.deps <= {"b", "h"})


def _times(slope, value):
    return value if slope is None else slope * value
