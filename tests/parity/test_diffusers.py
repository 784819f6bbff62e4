"""fastattn as a backend of diffusers: on one model, as a context, by the environment; equal to torch's attention."""

import os
import subprocess
import sys

import pytest
import torch

import fastattn
import torchvision_ops

diffusers = torchvision_ops.importorskip("diffusers")

from diffusers.models.attention_dispatch import attention_backend, dispatch_attention_fn  # noqa: E402

from fastattn.integrations import diffusers as integration  # noqa: E402

integration.register()
diffusers.utils.logging.set_verbosity_error()


def flux():
    torch.manual_seed(0)
    model = diffusers.FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=[4, 4, 8],
    )  # fmt: skip
    inputs = {
        "hidden_states": torch.randn(1, 16, 4), "encoder_hidden_states": torch.randn(1, 8, 32),
        "pooled_projections": torch.randn(1, 32), "img_ids": torch.randn(16, 3), "txt_ids": torch.zeros(8, 3),
        "timestep": torch.tensor([1.0]),
    }  # fmt: skip
    return model.eval(), inputs


def wan():
    torch.manual_seed(0)
    model = diffusers.WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=16,
        freq_dim=256, ffn_dim=32, num_layers=2, cross_attn_norm=True, qk_norm="rms_norm_across_heads",
        rope_max_seq_len=32,
    )  # fmt: skip
    inputs = {
        "hidden_states": torch.randn(1, 4, 2, 8, 8), "encoder_hidden_states": torch.randn(1, 6, 16),
        "timestep": torch.tensor([1]),
    }  # fmt: skip
    return model.eval(), inputs


def unet():
    torch.manual_seed(0)
    model = diffusers.UNet2DConditionModel(
        block_out_channels=(32, 64), layers_per_block=1, sample_size=8, in_channels=4, out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=32, attention_head_dim=8, norm_num_groups=8,
    )  # fmt: skip
    mask = torch.tensor([[1] * 6, [1, 1, 1, 1, 0, 0]])
    inputs = {
        "sample": torch.randn(2, 4, 8, 8), "timestep": torch.tensor(1), "encoder_hidden_states": torch.randn(2, 6, 32),
        "encoder_attention_mask": mask,
    }  # fmt: skip
    return model.eval(), inputs


def vae():
    torch.manual_seed(0)
    model = diffusers.AutoencoderKL(block_out_channels=(32,), norm_num_groups=8, sample_size=16)
    return model.eval(), {"sample": torch.randn(1, 3, 16, 16)}


def run(model, inputs):
    with torch.no_grad(), fastattn.record() as calls:
        return model(**inputs).sample, len(calls)


@pytest.mark.parametrize("make", [flux, wan])
def test_a_backend_of_one_model(make):
    (model, inputs), (other, _) = make(), make()
    expected, none = run(model, inputs)
    model.set_attention_backend("fastattn")
    out, calls = run(model, inputs)
    assert none == 0 and calls == (2 if make is flux else 4)
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)
    assert run(other, inputs)[1] == 0  # it does not leak
    with torch.autocast("cpu", torch.bfloat16):
        out, calls_of_autocast = run(model, inputs)
    assert calls_of_autocast == calls
    torch.testing.assert_close(out.float(), expected, atol=5e-2, rtol=5e-2)
    model.reset_attention_backend()
    assert run(model, inputs)[1] == 0
    with attention_backend("fastattn"):
        assert run(other, inputs)[1] == calls
    assert run(other, inputs)[1] == 0
    model.set_attention_backend("fastattn")
    model.set_attention_backend("native")
    assert run(model, inputs)[1] == 0


def test_gradients():
    model, inputs = flux()
    gradients = []
    for backend in ("native", "fastattn"):
        model.set_attention_backend(backend)
        model.zero_grad()
        model(**inputs).sample.square().sum().backward()
        gradients.append(torch.cat([x.grad.flatten() for x in model.parameters() if x.grad is not None]))
    torch.testing.assert_close(gradients[1], gradients[0], atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("make", [unet, vae])
def test_processors_that_take_no_backend(make):
    """They call torch's function themselves: the backend is refused, and `apply` reaches them, masks too."""
    model, inputs = make()
    with pytest.raises(ValueError, match="no attention processor takes a backend: AttnProcessor2_0.*fastattn.apply"):
        model.set_attention_backend("fastattn")
    expected, none = run(model, inputs)
    with fastattn.apply(model, on_unsupported="error") as handle:
        out, calls = run(model, inputs)
    handle.assert_all_replaced()
    assert none == 0 and calls >= 2
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_what_is_set_in_part_warns():
    model, _ = flux()
    model.extra = diffusers.models.attention_processor.Attention(16, heads=2, dim_head=8)
    with pytest.warns(UserWarning, match="some attention processors take no backend: AttnProcessor2_0"):
        model.set_attention_backend("fastattn")


def test_masks_and_options():
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, n, 4, 8, generator=generator) for n in (5, 7, 7))
    few = key[:, :, :2], value[:, :, :2]
    keep = torch.rand(2, 7, generator=generator) < 0.7
    for options in (
        {},
        {"attn_mask": keep},
        {"attn_mask": torch.randn(2, 7, generator=generator)},
        {"attn_mask": keep[:, None, None]},
        {"attn_mask": keep[:, None, None].expand(2, 4, 5, 7)},
        {"attn_mask": torch.randn(2, 4, 5, 7, generator=generator)},
        {"is_causal": True},
        {"scale": 0.3},
    ):
        expected = dispatch_attention_fn(query, key, value, backend="native", **options)
        out = dispatch_attention_fn(query, key, value, backend="fastattn", **options)
        torch.testing.assert_close(out, expected)
    grouped = {"backend": "fastattn", "enable_gqa": True}
    expected = dispatch_attention_fn(query, *few, backend="native", enable_gqa=True)
    torch.testing.assert_close(dispatch_attention_fn(query, *few, **grouped), expected)
    more = {"return_lse": True}
    out, lse = dispatch_attention_fn(query, key, value, backend="fastattn", attention_kwargs=more)
    scores = torch.einsum("bihd,bjhd->bihj", query, key) / 8**0.5
    torch.testing.assert_close(lse, scores.logsumexp(-1))
    with pytest.raises(NotImplementedError, match="return_lse=True with attn_mask"):
        dispatch_attention_fn(query, key, value, keep, backend="fastattn", attention_kwargs=more)
    with pytest.raises(NotImplementedError, match="_parallel_config"):
        dispatch_attention_fn(query, key, value, backend="fastattn", parallel_config=object())


def test_the_environment_variable():
    code = """
import torchvision_ops, torch, fastattn
torchvision_ops.declare()
from fastattn.integrations import diffusers
diffusers.register()
from diffusers.models.attention_dispatch import dispatch_attention_fn
dispatch_attention_fn(*torch.randn(3, 1, 5, 2, 8))
assert fastattn.last_call().problem.seqlen_q == 5
"""
    environment = {**os.environ, "DIFFUSERS_ATTN_BACKEND": "fastattn", "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True, timeout=120)
