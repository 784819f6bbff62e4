"""The peers behind two functions each: `refuse(work)` and `prepare(work, q, k, v, kwargs)`.

`refuse` gives the reason why a peer cannot do the work, or None. `prepare` does what a user would do once and outside
the hot loop (compile, build masks and sessions, change layouts) for `torch.get_num_threads()` threads, and returns a
function of no arguments that runs the forward pass: its result is out [batch, num_heads, seqlen_q, head_dim_v], with a
graph if the work trains.
"""

import importlib.util
import math
import os
from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F

from cases import Case
from fastattn import BlockMask
from fastattn.masks import UNBOUNDED, diagonal_bounds
from fastattn.scores import Place
from fastattn.scores.alibi import alibi_bias
from fastattn.scores.softcap import softcap_scores
from oracle import interval
from sparsity import PATTERNS
from work import Work

SEED = 3
"""Of torch's generator, where a peer's dropout has to be repeatable."""

MASK_SHARE = 0.25
"""Of the machine's memory that the dense form of a sparse mask may take."""


class SDPA:
    """torch.nn.functional.scaled_dot_product_attention, with is_causal where that says it all.

    Other masks reach it as the bool tensor that a user would write, or merged with the bias into one float tensor.
    """

    name = "sdpa"

    @staticmethod
    def refuse(work: Work) -> str | None:
        if work.pattern and (size := _dense_mask_bytes(work)) > MASK_SHARE * _memory():
            return f"the dense mask takes {size / 2**30:.1f} GiB"
        names = [name for name in ("softcap", "sinks", "learned_scale") if getattr(work.case, name)]
        return f"no {' and '.join(names)}" if names else None

    @staticmethod
    def prepare(work: Work, q, k, v, kwargs: dict) -> Callable[[], torch.Tensor]:
        case = work.case
        square = q.shape[2] == k.shape[2]
        causal_only = not (case.window_size or case.bias or case.alibi)
        # torch's is_causal is aligned top-left, ours bottom-right: the same thing only when square
        is_causal = causal_only and (
            (case.causal and square and not case.mask) or (case.mask == "top_left" and (square or not case.causal))
        )
        attn_mask = None if is_causal else _visible(case, kwargs, q, k)
        if case.bias or case.alibi:
            bias = _bias(case, kwargs, q, k)
            attn_mask = bias if attn_mask is None else bias.masked_fill(~attn_mask, -math.inf)
        options = dict(attn_mask=attn_mask, is_causal=is_causal, scale=case.softmax_scale, dropout_p=case.dropout_p)
        options["enable_gqa"] = q.shape[1] != k.shape[1]
        return lambda: F.scaled_dot_product_attention(q, k, v, **options)


class Eager:
    """Softmax of a product, as it stands in a model that calls no fused function."""

    name = "eager"

    @staticmethod
    def refuse(work: Work) -> str | None:
        return None

    @staticmethod
    def prepare(work: Work, q, k, v, kwargs: dict) -> Callable[[], torch.Tensor]:
        case, group_size = work.case, q.shape[1] // k.shape[1]
        scale = kwargs["softmax_scale"].to(q.dtype).view(-1, 1, 1) if case.learned_scale else case.softmax_scale
        scale = q.shape[3] ** -0.5 if scale is None else scale
        visible, bias = _visible(case, kwargs, q, k), _bias(case, kwargs, q, k)
        hidden = None if visible is None else ~visible

        def run():
            keys, values = (x if group_size == 1 else x.repeat_interleave(group_size, 1) for x in (k, v))
            scores = softcap_scores((q * scale) @ keys.transpose(-1, -2), case.softcap)
            scores = scores if bias is None else scores + bias
            scores = scores if hidden is None else scores.masked_fill(hidden, -math.inf)
            if case.sinks:
                sink = kwargs["sinks"].to(scores.dtype).view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
                p = torch.cat([scores, sink], -1).softmax(-1)[..., :-1]
            else:
                p = scores.softmax(-1)
            return F.dropout(p, case.dropout_p) @ values

        return run


class Flex:
    """torch.nn.attention.flex_attention, compiled for the case's exact shape, masks as a BlockMask."""

    name = "flex"

    @staticmethod
    def refuse(work: Work) -> str | None:
        case = work.case
        if work.trains and (refusal := _flex_refuses_gradients()):
            return refusal
        if case.dropout_p or case.learned_scale:
            return "no dropout" if case.dropout_p else "no learned scale"
        if case.dtype == "float64":
            return "no float64"
        return "no sinks" if case.sinks else None

    @staticmethod
    def prepare(work: Work, q, k, v, kwargs: dict) -> Callable[[], torch.Tensor]:
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        case = work.case
        torch._dynamo.reset()  # or the recompile limit turns later cases into errors
        mask_mod = _mask_mod(case, kwargs, q, k)
        shape = *q.shape[:3], k.shape[2]
        if not isinstance(kwargs.get("mask"), torch.Tensor) and not case.mask:
            shape = None, None, *shape[2:]  # the same for every head: one block list
        options = dict(
            scale=case.softmax_scale, enable_gqa=q.shape[1] != k.shape[1], score_mod=_score_mod(case, kwargs, q, k)
        )
        options["block_mask"] = create_block_mask(mask_mod, *shape, device="cpu") if mask_mod else None
        if work.pattern:
            options["block_mask"] = work.block_mask.to_flex(PATTERNS[work.pattern].mask_mod)
        compiled = torch.compile(flex_attention, fullgraph=True, dynamic=False)
        return lambda: compiled(q, k, v, **options)


class OnnxRuntime:
    """onnxruntime's com.microsoft.MultiHeadAttention: a model of that one node, with IO binding.

    Its layout is [batch, seqlen, num_heads * head_dim]; inputs are brought into it beforehand. Its threads stop
    spinning when a run ends, so that they do not take cores from the next contender.
    """

    name = "onnxruntime"

    @staticmethod
    def refuse(work: Work) -> str | None:
        case = work.case
        if work.trains:
            return "inference only"
        missing = [name for name in ("onnxruntime", "onnx") if importlib.util.find_spec(name) is None]
        if missing:
            return f"{' and '.join(missing)} not installed"
        if case.dropout_p or case.learned_scale:
            return "no dropout" if case.dropout_p else "no learned scale"
        if case.dtype != "float32":
            return "float32 only"
        if case.num_heads_k or case.head_dim_v:
            return "equal heads and head sizes only"
        if case.mask or case.bias or case.window_size or case.alibi or case.softcap or case.sinks:
            return "dense and causal only"
        return "causal only where square" if case.causal and case.seqlen_k not in (None, case.seqlen_q) else None

    @staticmethod
    def prepare(work: Work, q, k, v, kwargs: dict) -> Callable[[], torch.Tensor]:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.inter_op_num_threads = 1
        options.add_session_config_entry("session.force_spinning_stop", "1")
        session = onnxruntime.InferenceSession(_attention_model(work.case), options, providers=["CPUExecutionProvider"])
        batch, num_heads, seqlen_q, head_dim = q.shape
        binding = session.io_binding()
        for name, x in (("query", q), ("key", k), ("value", v)):
            packed = x.transpose(1, 2).reshape(batch, x.shape[2], num_heads * head_dim).contiguous().numpy()
            binding.bind_ortvalue_input(name, onnxruntime.OrtValue.ortvalue_from_numpy(packed))
        out = torch.empty(batch, seqlen_q, num_heads * head_dim)
        binding.bind_ortvalue_output("out", onnxruntime.OrtValue.ortvalue_from_numpy(out.numpy()))
        out = out.view(batch, seqlen_q, num_heads, head_dim).transpose(1, 2)

        def run():
            session.run_with_iobinding(binding)
            return out

        return run


PEERS = {
    suite: {peer.name: peer for peer in peers}
    for suite, peers in {"forward": (SDPA, Flex, OnnxRuntime), "backward": (SDPA, Eager, Flex)}.items()
}
"""By suite and name."""


def dropout_of_peers(work: Work) -> torch.Tensor | None:
    """The weights that a torch function keeps right after torch.manual_seed(SEED): bool [B, H, Sq, Sk]; None: all."""
    case = work.case
    if not case.dropout_p:
        return None
    shape = case.batch, case.num_heads, case.seqlen_q, case.seqlen_k or case.seqlen_q
    torch.manual_seed(SEED)
    return F.dropout(torch.ones(shape, dtype=getattr(torch, case.dtype)), case.dropout_p) != 0


@cache
def _flex_refuses_gradients() -> str | None:
    from torch.nn.attention.flex_attention import flex_attention

    q = torch.ones(1, 1, 16, 16, requires_grad=True)
    try:  # compiled, the same refusal comes as an error of the compiler
        flex_attention(q, q, q)
    except NotImplementedError as error:
        return str(error).split(".")[0]
    return None


def _dense_mask_bytes(work: Work) -> int:
    """As bool, and as the float32 that SDPA makes of it."""
    seqlen_q, seqlen_k = work.block_mask.seq_lengths
    return 5 * work.block_mask.shape[1] * seqlen_q * seqlen_k


def _memory() -> int:
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _bias(case: Case, kwargs: dict, q, k) -> torch.Tensor | None:
    """Bias and ALiBi as one tensor in q's dtype; None if there are none."""
    bias = kwargs.get("bias")
    if not case.alibi:
        return bias
    alibi = alibi_bias(kwargs["alibi_slopes"], Place(k.shape[2] - q.shape[2], q.shape[2], k.shape[2]))
    return (alibi if bias is None else bias + alibi).to(q.dtype)


def _visible(case: Case, kwargs: dict, q, k) -> torch.Tensor | None:
    """The whole mask as a bool tensor; None if there is none."""
    mask, tensor = interval(case, kwargs), kwargs.get("mask")
    if isinstance(tensor, BlockMask):
        return tensor.to_dense()
    tensor = tensor if isinstance(tensor, torch.Tensor) else None
    if not mask.windows and mask.k_start is None and mask.k_end is None:
        return tensor
    visible = mask.to_dense(q.shape[2], k.shape[2])
    return visible if tensor is None else visible & tensor


def _mask_mod(case: Case, kwargs: dict, q, k):
    """The mask as FlexAttention's mask_mod, of index arithmetic wherever it can be."""
    from torch.nn.attention.flex_attention import and_masks

    mask, tensor, mods = interval(case, kwargs), kwargs.get("mask"), []
    lo, hi = diagonal_bounds(mask.windows, q.shape[2], k.shape[2])
    if hi < UNBOUNDED:
        mods.append(lambda b, h, i, j: j <= i + hi)
    if lo > -UNBOUNDED:
        mods.append(lambda b, h, i, j: j >= i + lo)
    if mask.k_start is not None:
        start = mask.k_start.expand(q.shape[:3]).contiguous()
        mods.append(lambda b, h, i, j: j >= start[b, h, i])
    if mask.k_end is not None:
        end = mask.k_end.expand(q.shape[:3]).contiguous()
        mods.append(lambda b, h, i, j: j < end[b, h, i])
    if isinstance(tensor, torch.Tensor):
        expanded = tensor.expand(*q.shape[:3], k.shape[2])
        mods.append(lambda b, h, i, j: expanded[b, h, i, j])
    return and_masks(*mods) if mods else None


def _score_mod(case: Case, kwargs: dict, q, k):
    """Softcap, bias and ALiBi as FlexAttention's score_mod; None if there are none."""
    if not (case.softcap or case.bias or case.alibi):
        return None
    softcap, offset = case.softcap, k.shape[2] - q.shape[2]
    bias = kwargs["bias"].expand(*q.shape[:3], k.shape[2]) if case.bias else None
    slopes = kwargs["alibi_slopes"].expand(q.shape[:2]).contiguous() if case.alibi else None

    def score_mod(score, b, h, i, j):
        if softcap:
            score = softcap * torch.tanh(score / softcap)
        if bias is not None:
            score = score + bias[b, h, i, j]
        if slopes is not None:
            score = score - slopes[b, h] * (i + offset - j).abs()
        return score

    return score_mod


def _attention_model(case: Case) -> bytes:
    from onnx import TensorProto, helper

    def value(name):
        return helper.make_tensor_value_info(name, TensorProto.FLOAT, None)

    names = ["query", "key", "value"]
    attributes = {"num_heads": case.num_heads, "unidirectional": int(case.causal)}
    if case.softmax_scale is not None:
        attributes["scale"] = case.softmax_scale
    node = helper.make_node("MultiHeadAttention", names, ["out"], domain="com.microsoft", **attributes)
    graph = helper.make_graph([node], "attention", [value(name) for name in names], [value("out")])
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=8).SerializeToString()
