"""Models of timm with fastattn.apply: equal to torch's attention, and so are the gradients of their relative biases."""

import pytest
import torch

import fastattn
import torchvision_ops

timm = torchvision_ops.importorskip("timm")

from timm.layers import set_fused_attn  # noqa: E402

SIZES = {
    "vit_tiny_patch16_224": {"img_size": 32, "depth": 2, "embed_dim": 32, "num_heads": 2},
    "deit3_small_patch16_224": {"img_size": 32, "depth": 2, "embed_dim": 32, "num_heads": 2},
    "eva02_tiny_patch14_224": {"img_size": 28, "depth": 2, "embed_dim": 48, "num_heads": 2},
    "beit_base_patch16_224": {"img_size": 32, "depth": 2, "embed_dim": 32, "num_heads": 2},
    "maxvit_rmlp_pico_rw_256": {"img_size": 64},
    "vit_relpos_small_patch16_224": {"img_size": 32, "depth": 2, "embed_dim": 32, "num_heads": 2},
    "swin_tiny_patch4_window7_224": {"img_size": 32, "window_size": 4, "embed_dim": 16, "depths": (2, 2),
                                     "num_heads": (2, 2)},
}  # fmt: skip
WITH_BIAS = [name for name in SIZES if name.startswith(("beit", "maxvit", "vit_relpos", "swin"))]


@pytest.fixture(autouse=True)
def fused():
    """timm calls torch's function in Swin only where it is told to twice."""
    set_fused_attn(True, experimental=True)
    yield
    set_fused_attn(True)


def build(name):
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=7, **SIZES[name])
    for parameter_name, parameter in model.named_parameters():
        if "rel" in parameter_name and "bias" in parameter_name:  # they start at 0
            torch.nn.init.normal_(parameter)
    size = SIZES[name]["img_size"]
    return model, torch.randn(2, 3, size, size)


@pytest.mark.parametrize("name", SIZES)
def test_logits_equal_torch(name):
    model, images = build(name)
    model.eval()
    with torch.no_grad():
        expected = model(images)
        with fastattn.apply(model, on_unsupported="error") as handle:
            out = model(images)
    handle.assert_all_replaced()
    torch.testing.assert_close(out, expected, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("name", WITH_BIAS)
def test_gradients_of_relative_biases_equal_torch(name):
    model, images = build(name)
    model.train()
    gradients = []
    for replaced in (False, True):
        model.zero_grad()
        torch.manual_seed(1)
        if replaced:
            with fastattn.apply(model, on_unsupported="error") as handle:
                model(images).square().sum().backward()
            handle.assert_all_replaced()
        else:
            model(images).square().sum().backward()
        gradients.append({key: x.grad.clone() for key, x in model.named_parameters() if x.grad is not None})
    assert any("rel" in key and x.abs().max() > 0 for key, x in gradients[0].items())
    for key, expected in gradients[0].items():
        torch.testing.assert_close(
            gradients[1][key], expected, atol=1e-6 + 1e-4 * float(expected.abs().max()), rtol=1e-3
        )
