"""The Attention conformance cases of ONNX (opsets 23 to 25), with fastattn.attention as the operator.

onnx computes the expected values with its own numpy reference while it collects the cases.
"""

import math

import pytest
import torch

import fastattn
from fastattn import Mask
from fastattn.backends import cpu

pytest.importorskip("onnx", minversion="1.23")
# onnx collects the cases of every operator, some of which divide by zero.
pytestmark = pytest.mark.filterwarnings(r"ignore::RuntimeWarning:onnx\.")

BACKENDS = ["reference"] + (["cpu"] if cpu.unavailable() is None else [])
INPUTS = ("Q", "K", "V", "attn_mask", "past_key", "past_value", "nonpad_kv_seqlen")
# Error of the expected values themselves: onnx computes in the dtype of the inputs.
TOLERANCES = {
    torch.float32: {"rtol": 1e-5, "atol": 1e-6},
    torch.float16: {"rtol": 4e-3, "atol": 2e-3},
    torch.bfloat16: {"rtol": 3e-2, "atol": 2e-2},
}


@pytest.fixture(scope="module")
def cases():
    """name -> (attributes, named inputs, named outputs), without the twins that expand the operator."""
    from onnx import helper
    from onnx.backend.test.case.node import collect_testcases

    found = {}
    for case in collect_testcases("Attention"):
        if case.name.endswith("_expanded"):
            continue
        (node,) = case.model.graph.node
        ((inputs, outputs),) = case.data_sets
        found[case.name] = (
            {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute},
            dict(
                zip([i for i, name in zip(INPUTS, node.input, strict=False) if name], map(tensor, inputs), strict=True)
            ),
            dict(zip([name for name in node.output if name], map(tensor, outputs), strict=True)),
        )
    return found


def tensor(array) -> torch.Tensor:
    if array.dtype.name == "bfloat16":  # ml_dtypes, which torch does not know
        return torch.from_numpy(array.astype("float32")).bfloat16()
    return torch.from_numpy(array.copy())


def attention_mask(inputs, attributes, seqlen_q, seqlen_k) -> dict:
    """mask=, causal=, window_size= and bias= of fastattn.attention for ONNX's mask, cache and window."""
    left, right = attributes.get("left_window_size", -1), attributes.get("right_window_size", -1)
    left, right = (None if side < 0 else side for side in (left, right))
    if attributes.get("is_causal"):
        right = 0 if right is None else min(right, 0)
    arguments = {}
    nonpad = inputs.get("nonpad_kv_seqlen")
    past = inputs["past_key"].shape[2] if "past_key" in inputs else 0
    if nonpad is not None:  # query i stands at key nonpad[b] - seqlen_q + i
        position = nonpad[:, None] - seqlen_q + torch.arange(seqlen_q)
        k_start = None if left is None else (position - left)[:, None]
        k_end = nonpad[:, None] if right is None else torch.minimum(position + right + 1, nonpad[:, None])
        arguments["mask"] = Mask.intervals(k_start, k_end[:, None])
    elif (left, right) == (None, None):
        pass
    elif past == seqlen_k - seqlen_q:  # the last query stands at the last key
        arguments.update({"causal": True} if (left, right) == (None, 0) else {"window_size": (left, right)})
    elif past == 0:
        arguments["mask"] = Mask.window(left, right, "top_left")
    else:
        position = past + torch.arange(seqlen_q)[None, None]
        k_start = None if left is None else position - left
        arguments["mask"] = Mask.intervals(k_start, None if right is None else position + right + 1)

    given = inputs.get("attn_mask")
    if given is None:
        return arguments
    hidden = False if given.dtype == torch.bool else -math.inf
    given = torch.nn.functional.pad(given, (0, seqlen_k - given.shape[-1]), value=hidden)
    if given.dtype != torch.bool:
        return {**arguments, "bias": given}
    if "mask" in arguments:  # a bool tensor takes the place of the Mask
        given = given & arguments["mask"].to_dense(seqlen_q, seqlen_k)
    return {**arguments, "mask": given}


def visible(arguments, seqlen_q, seqlen_k) -> torch.Tensor:
    """What the arguments let each query see, for the outputs that are not fastattn's."""
    mask = arguments.get("mask", Mask())
    mask = mask.to_dense(seqlen_q, seqlen_k) if isinstance(mask, Mask) else mask
    window = Mask.causal() if arguments.get("causal") else Mask.window(*arguments.get("window_size", (None, None)))
    return mask & window.to_dense(seqlen_q, seqlen_k)


def qk_matmul_output(q, k, lse, arguments, mode, scale, softcap) -> torch.Tensor:
    """ONNX's fourth output: the scores after scale and softcap (modes 0, 1), bias and mask (2) or softmax (3)."""
    group_size = q.shape[1] // k.shape[1]
    scores = q.float() @ k.float().repeat_interleave(group_size, 1).mT * scale
    scores = softcap * torch.tanh(scores / softcap) if softcap else scores
    if mode >= 2:
        scores = scores + arguments.get("bias", torch.zeros(())).float()
        scores = scores.masked_fill(~visible(arguments, q.shape[2], k.shape[2]), -math.inf)
    if mode == 3:
        scores = torch.exp(scores - lse.masked_fill(lse == -math.inf, 0.0)[..., None])
    return scores.to(q.dtype)


def run(inputs, attributes, backend) -> dict[str, torch.Tensor]:
    """The Attention operator: its outputs by name."""
    q, k, v = inputs["Q"], inputs["K"], inputs["V"]
    rank = q.dim()
    if rank == 3:  # [batch, seqlen, num_heads * head_dim]
        q = q.unflatten(2, (attributes["q_num_heads"], -1)).transpose(1, 2)
        k, v = (x.unflatten(2, (attributes["kv_num_heads"], -1)).transpose(1, 2) for x in (k, v))
    if "past_key" in inputs:
        k, v = torch.cat([inputs["past_key"], k], 2), torch.cat([inputs["past_value"], v], 2)
    arguments = attention_mask(inputs, attributes, q.shape[2], k.shape[2])
    scale, softcap = attributes.get("scale", q.shape[-1] ** -0.5), attributes.get("softcap", 0.0)
    out, lse = fastattn.attention(
        q, k, v, softmax_scale=scale, softcap=softcap, **arguments, return_lse=True, backend=backend
    )
    mode = attributes.get("qk_matmul_output_mode", 0)
    return {
        "Y": out.transpose(1, 2).flatten(2) if rank == 3 else out,
        "present_key": k,
        "present_value": v,
        "qk_matmul_output": qk_matmul_output(q, k, lse, arguments, mode, scale, softcap),
    }


def check(cases, name, backend):
    attributes, inputs, expected = cases[name]
    actual = run(inputs, attributes, backend)
    for output, value in expected.items():
        assert actual[output].dtype == value.dtype and actual[output].shape == value.shape
        torch.testing.assert_close(
            actual[output], value, **TOLERANCES[value.dtype], msg=lambda text, output=output: f"{output}: {text}"
        )


# The names are spelled out so that nothing is collected from onnx before a test runs.
NAMES = """
4d
4d_fp16
4d_gqa
4d_diff_heads_sizes
4d_scaled
4d_gqa_scaled
4d_diff_heads_sizes_scaled
4d_causal
4d_gqa_causal
4d_diff_heads_sizes_causal
4d_attn_mask
4d_attn_mask_3d
4d_attn_mask_3d_causal
4d_attn_mask_4d
4d_attn_mask_4d_causal
4d_attn_mask_bool
4d_attn_mask_bool_4d
4d_gqa_attn_mask
4d_diff_heads_sizes_attn_mask
4d_with_past_and_present
4d_gqa_with_past_and_present
4d_gqa_with_past_and_present_fp16
4d_diff_heads_with_past_and_present
4d_diff_heads_with_past_and_present_mask3d
4d_diff_heads_with_past_and_present_mask4d
4d_softcap
4d_gqa_softcap
4d_diff_heads_sizes_softcap
4d_with_qk_matmul
4d_with_qk_matmul_bias
4d_with_qk_matmul_softcap
4d_with_qk_matmul_softmax
4d_with_past_and_present_qk_matmul_bias
4d_with_past_and_present_qk_matmul_bias_3d_mask
4d_with_past_and_present_qk_matmul_bias_4d_mask
4d_with_past_and_present_qk_matmul_bias_3d_mask_causal
4d_with_past_and_present_qk_matmul_bias_4d_mask_causal
4d_with_past_and_present_qk_matmul
3d
3d_gqa
3d_diff_heads_sizes
3d_scaled
3d_gqa_scaled
3d_diff_heads_sizes_scaled
3d_causal
3d_gqa_causal
3d_diff_heads_sizes_causal
3d_attn_mask
3d_gqa_attn_mask
3d_diff_heads_sizes_attn_mask
3d_softcap
3d_gqa_softcap
3d_diff_heads_sizes_softcap
3d_with_past_and_present
3d_gqa_with_past_and_present
3d_diff_heads_with_past_and_present
3d_with_past_and_present_qk_matmul
3d_with_past_and_present_qk_matmul_bias
3d_with_past_and_present_qk_matmul_softcap
3d_with_past_and_present_qk_matmul_softmax
3d_transpose_verification
4d_diff_heads_mask4d_padded_kv
4d_causal_bf16
4d_causal_fp16
4d_padded_kv_bf16
4d_causal_padded_kv_bf16
4d_attn_mask_causal_bf16
3d_causal_bf16
4d_softcap_neginf_mask
4d_softcap_neginf_mask_poison
4d_gqa_causal_nonpad_decode
4d_gqa_causal_nonpad_decode_fp16
4d_causal_nonpad_continued_prefill
4d_causal_with_past_and_present
causal_boolmask_nan_robustness
23_boolmask_fullymasked_row_nan_robustness
4d_causal_nonpad_negative_offset_structural_empty
23_fullymasked_qk_matmul_output_mode3_zero
24_fullymasked_qk_matmul_output_mode3_zero
24_qk_matmul_output_mode3_softmax_precision
4d_causal_nonpad_attn_mask_composition
4d_causal_nonpad_batch_prefill
local_window
bidirectional_window
local_window_default
local_window_rank1_boolean_mask
local_window_with_past
local_window_ext_cache_rank3_head_mask
local_window_ext_cache_rank4_batch_mask
local_window_ext_cache_rank2_mask
local_window_ext_cache_float16_mask
3d_local_window
local_window_gqa_rank4_mask
"""


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", NAMES.split())
def test_conformance(cases, name, backend):
    check(cases, "test_attention_" + name, backend)


def test_no_case_is_left_out(cases):
    """The 93 of onnx 1.23, and what a later onnx may add."""
    names = {"test_attention_" + name for name in NAMES.split()}
    assert len(names) == 93 and names <= cases.keys()
    for name in sorted(cases.keys() - names):
        check(cases, name, None)
