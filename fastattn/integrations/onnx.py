"""Calls of fastattn as the Attention operator of ONNX (opset 23).

    from fastattn.integrations import onnx as fastattn_onnx

    program = torch.export.export(model, inputs)
    torch.onnx.export(fastattn_onnx.lower(program), inputs, "model.onnx")

ONNX has no words for sinks, dropout, lse, block masks and lists of edges: those raise. Diagonal bounds other than
torch's is_causal become a mask, and ALiBi a bias, both of shape [..., seqlen_q, seqlen_k]. Rotary embedding turns q and
k before the operator.
"""

import math

import torch
from torch.fx.experimental.symbolic_shapes import statically_known_true

from ..dispatch import UnsupportedError
from ..masks.intervals import Window, dense, diagonal_bounds
from ..operators import dense as operators
from ..scores import Place
from ..scores.alibi import alibi_bias
from ..scores.rotary import before, taken_from

try:
    from torch.onnx.ops import attention as onnx_attention
except ImportError as error:
    raise ImportError(f"torch {torch.__version__} has no torch.onnx.ops.attention; it came with torch 2.8") from error

_INSTEAD = {
    "sinks": "compute them as one more key, or leave them out",
    "dropout_p": "export the model in eval mode",
    "return_lse": "ONNX's operator returns no log-sum-exp",
    "block_mask": "pass mask=block_mask.to_dense()",
    "relative": "pass the bias of distances as a tensor",
    "backend": "a backend of fastattn does not exist in ONNX",
}


def lower(program: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    """`program` with each call of fastattn replaced by torch.onnx.ops.attention, which torch.onnx.export writes as
    ONNX's Attention.

    A query that sees no key gives 0 in fastattn; what it gives in ONNX is up to the runtime (NaN in most).

    Raises UnsupportedError that names the argument ONNX cannot express.
    """
    for node in program.graph.nodes:
        _check(node)
    return program.run_decompositions({torch.ops.fastattn.attention.default: _attention})


def _check(node: torch.fx.Node) -> None:
    name = str(node.target)
    if not name.startswith("fastattn."):
        return
    if node.target is not torch.ops.fastattn.attention.default:
        raise UnsupportedError(
            f"{name} cannot be written as ONNX's Attention; lower the program as torch.export.export returns it, "
            "and keep attention_csr out of it"
        )
    options = operators.LAYOUT.named(node.args[3:], dict(node.kwargs))
    options = {name: x for name, x in options.items() if x is not None and x is not False}
    for name, instead in _INSTEAD.items():
        if name in options and options[name] != 0.0:
            raise UnsupportedError(f"{name} cannot be written as ONNX's Attention: {instead}")
    others = ("causal", "windows", "mask", "k_start", "k_end", "bias", "alibi_slopes")
    if options.get("softcap") and (found := [name for name in others if name in options]):
        raise UnsupportedError(
            f"softcap together with {found[0]} cannot be written as ONNX's Attention: its versions differ in whether "
            "the cap comes before the mask"
        )


def _attention(q, k, v, *values, **options):
    """What `fastattn.attention` is in ONNX."""
    angles, options = taken_from(operators.LAYOUT.named(values, options))
    if angles is not None:
        q, k = before(q, k, angles[:2], angles[2])
    get, lengths = options.get, (q.shape[2], k.shape[2])
    scale = get("scale")
    if (learned := get("softmax_scale")) is not None:
        q, scale = q * learned.to(q.dtype).reshape(-1, 1, 1), 1.0
    elif scale is not None and scale <= 0.0:  # ONNX takes its root
        q, scale = q * scale, 1.0
    windows = (*operators.windows_of(get("windows")), *([Window(None, 0)] if get("causal") else []))
    is_causal = bool(windows) and all(_is_top_left(window, *lengths) for window in windows)
    mask, bias = get("mask"), get("bias")
    if is_causal and mask is bias is get("alibi_slopes") is get("k_start") is get("k_end") is None:
        windows = ()
    else:
        is_causal = False
    if windows or get("k_start") is not None or get("k_end") is not None:
        bounds = diagonal_bounds(windows, *lengths)
        inside = dense(*bounds, get("k_start"), get("k_end"), *lengths, q.device)
        mask = inside if mask is None else mask & inside
    if (slopes := get("alibi_slopes")) is not None:
        alibi = alibi_bias(slopes.to(torch.float32), Place(lengths[1] - lengths[0], *lengths)).to(q.dtype)
        bias = alibi if bias is None else bias.to(q.dtype) + alibi
    if bias is not None:
        bias = bias.to(q.dtype)
        mask = bias if mask is None else torch.where(mask, bias, -math.inf)
    if mask is not None:
        mask = mask.expand(torch.broadcast_shapes(mask.shape, lengths))
    out, *_ = onnx_attention(q, k, v, mask, is_causal=is_causal, scale=scale, softcap=get("softcap", 0.0))
    return out, out.new_empty(0)


def _is_top_left(window: Window, seqlen_q, seqlen_k) -> bool:
    """Whether a window is torch's is_causal."""
    aligned = window.alignment == "top_left" or statically_known_true(seqlen_q == seqlen_k)
    return window.left is None and window.right == 0 and aligned
