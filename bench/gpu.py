"""The Triton kernels on a GPU: right or not, and how fast beside torch's and flash-attn's: `make bench-gpu`.

Writes bench-gpu.json and bench-gpu.png, in less than ten minutes; docs/gpu_first_run.md says how to read them. Each
contender is compared with float32, on two whole heads, before it is timed; a wrong one is not timed. Rates count the
(query, key) pairs that the mask leaves; shares are of the matrix product and the copy of the same run.
"""

import argparse
import importlib.util
import json
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

# last: an installed one wins
sys.path += [str(Path(__file__).parents[1] / folder) for folder in ("tests/support", "")]

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right

import fastattn
import gpu_parity
from fastattn.torch_internals import driver_version
from gpu_bounds import static_bound
from gpu_heads import error, expected
from plots import draw_gpu

PASSES = ("forward", "forward+backward")


class Shape(NamedTuple):
    """One attention call. window: None, or how many keys before its own a query sees (with causal)."""

    suite: str
    batch: int
    num_heads: int
    num_heads_k: int
    seqlen_q: int
    seqlen_k: int
    head_dim: int
    dtype: str
    causal: bool = False
    window: int | None = None

    @property
    def pairs(self) -> int:
        """(query, key) pairs that the mask leaves, over batch and heads."""
        rows = range(self.seqlen_k - self.seqlen_q, self.seqlen_k)
        seen = (min(i + 1, self.window + 1) if self.window is not None else i + 1 for i in rows)
        return self.batch * self.num_heads * (sum(seen) if self.causal else self.seqlen_q * self.seqlen_k)

    def flops(self, passes: str) -> int:
        """Two products forward, five backward."""
        return self.pairs * self.head_dim * 2 * (2 if passes == "forward" else 7)

    @property
    def bytes(self) -> int:
        """Of q, k, v and out, read or written once: what bounds decoding."""
        q, k = self.num_heads * self.seqlen_q, self.num_heads_k * self.seqlen_k
        return self.batch * self.head_dim * 2 * (q + k) * getattr(torch, self.dtype).itemsize


def shapes(full: bool = False) -> tuple[Shape, ...]:
    """16384 tokens and 2048 channels, as flash-attn's authors measure; decoding, and 64 tokens of a prompt against what
    is before them; a sliding window. The telling ones come first. full: more lengths, and float16."""

    def dense(seqlen, head_dim, dtype="bfloat16"):
        heads = 2048 // head_dim
        shape = Shape("dense", 16384 // seqlen, heads, heads, seqlen, seqlen, head_dim, dtype)
        return [shape._replace(causal=True), shape]

    made = [*dense(8192, 128), *dense(8192, 64)]
    made += [Shape("decode", batch, 32, 8, 1, seqlen, 128, "bfloat16") for batch in (1, 64) for seqlen in (8192, 1024)]
    made += [Shape("decode", 1, 32, 8, 64, 8192, 128, "bfloat16", causal=True)]
    made += [*dense(2048, 128), made[0]._replace(suite="sparse", window=1023)]
    if full:
        made += [made[0]._replace(suite="sparse", window=255), *dense(512, 128), *dense(2048, 64), *dense(512, 64)]
        made += [
            x for seqlen in (8192, 2048, 512) for head_dim in (128, 64) for x in dense(seqlen, head_dim, "float16")
        ]
    return tuple(made)


# --- contenders: (shape, q, k, v) -> a call, or a reason (str) why there is none ------------------------------------


def ours(shape: Shape, q, k, v) -> Callable | str:
    window = None if shape.window is None else (shape.window, None)
    backend = "triton" if q.is_cuda else None
    return lambda: fastattn.attention(q, k, v, causal=shape.causal, window_size=window, backend=backend)


def sdpa(backend: SDPBackend) -> Callable:
    def prepare(shape: Shape, q, k, v) -> Callable | str:
        if shape.window is not None:
            return "no window"
        options = {"is_causal": shape.causal, "enable_gqa": shape.num_heads != shape.num_heads_k}
        if shape.causal and shape.seqlen_q != shape.seqlen_k:  # is_causal counts from the first key
            options |= {"is_causal": False, "attn_mask": causal_lower_right(shape.seqlen_q, shape.seqlen_k)}

        def call():
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(q, k, v, **options)

        try:
            call()
        except RuntimeError as error:  # not on this device, or not for this shape
            return str(error).splitlines()[0]
        return call

    return prepare


def flex(shape: Shape, q, k, v) -> Callable | str:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    before = shape.seqlen_k - shape.seqlen_q

    def causal(b, h, i, j):
        seen = i + before >= j
        return seen if shape.window is None else seen & (i + before - j <= shape.window)

    torch._dynamo.reset()  # or the recompile limit turns later shapes into errors
    block_mask = None
    if shape.causal:
        block_mask = create_block_mask(causal, None, None, shape.seqlen_q, shape.seqlen_k, device=q.device)
    compiled = torch.compile(flex_attention, dynamic=False)
    gqa = shape.num_heads != shape.num_heads_k
    return lambda: compiled(q, k, v, block_mask=block_mask, enable_gqa=gqa)


def flash_attn(shape: Shape, q, k, v) -> Callable | str:
    if importlib.util.find_spec("flash_attn") is None:
        return "flash-attn is not installed"
    from flash_attn import flash_attn_func

    window = (-1, -1) if shape.window is None else (shape.window, 0)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return lambda: flash_attn_func(q, k, v, causal=shape.causal, window_size=window).transpose(1, 2)


def flash_attn_3(shape: Shape, q, k, v) -> Callable | str:
    if importlib.util.find_spec("flash_attn_interface") is None:
        return "flash-attn 3 is not installed"
    from flash_attn_interface import flash_attn_func

    window = (-1, -1) if shape.window is None else (shape.window, 0)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))

    def call():
        out = flash_attn_func(q, k, v, causal=shape.causal, window_size=window)
        return (out[0] if isinstance(out, tuple) else out).transpose(1, 2)  # some versions return lse as well

    return call


CONTENDERS = {
    "fastattn": ours,
    "sdpa flash": sdpa(SDPBackend.FLASH_ATTENTION),
    "sdpa cudnn": sdpa(SDPBackend.CUDNN_ATTENTION),
    "flex": flex,
    "flash-attn": flash_attn,
    "flash-attn 3": flash_attn_3,
}
OURS = "fastattn"


# --- measuring -------------------------------------------------------------------------------------------------------


def seconds(call: Callable, device: str) -> float:
    """Median time of one call: on a GPU with a cold L2 cache, as Triton's own benchmarks."""
    if device == "cuda":
        from triton.testing import do_bench

        return do_bench(call, return_mode="median") / 1e3
    from torch.utils.benchmark import Timer

    return Timer("call()", globals={"call": call}).blocked_autorange(min_run_time=0.05).median


def peaks(device: str, size: int = 8192) -> dict[str, float]:
    """TFLOP/s of a bfloat16 matrix product and GB/s of a copy, as this device reaches them."""
    a, b = (torch.randn(size, size, dtype=torch.bfloat16, device=device) for _ in range(2))
    target = torch.empty_like(a)
    return {
        "matmul_tflops": 2 * size**3 / seconds(lambda: torch.mm(a, b, out=target), device) / 1e12,
        "copy_gbps": 2 * a.numel() * a.element_size() / seconds(lambda: target.copy_(a), device) / 1e9,
    }


def tensors(shape: Shape, device: str, passes: str) -> list[torch.Tensor]:
    generator = torch.Generator(device).manual_seed(0)
    heads, seqlens = (shape.num_heads, *[shape.num_heads_k] * 2), (shape.seqlen_q, *[shape.seqlen_k] * 2)
    make = dict(dtype=getattr(torch, shape.dtype), device=device, generator=generator)
    return [
        torch.randn(shape.batch, h, s, shape.head_dim, **make).requires_grad_(passes != "forward")
        for h, s in zip(heads, seqlens, strict=True)
    ]


def measure(shape: Shape, passes: str, device: str, peak: dict[str, float], arch: str = "") -> Iterator[dict]:
    """One line for each contender: why it was refused, or its figures. Ours has the static bound of its code for `arch`
    beside its share of the matrix product, and where it fails the traceback: a bug, of which the report tells."""
    q, k, v = tensors(shape, device, passes)
    dout = torch.randn(q.shape, dtype=q.dtype, device=device, generator=torch.Generator(device).manual_seed(1))
    right: list = []
    for name, prepare in CONTENDERS.items():
        line = {**shape._asdict(), "passes": passes, "contender": name}
        try:
            call = prepare(shape, q, k, v)
            figures = {"refused": call}
            if not isinstance(call, str):
                right = right or expected(shape, passes, q, k, v, dout)
                figures = _figures(shape, passes, device, peak, _of_passes(call, passes, (q, k, v), dout), right)
        except Exception as failure:
            figures = {"refused": f"{type(failure).__name__}: {failure}".splitlines()[0]}
            figures |= {"traceback": traceback.format_exc()} if name == OURS else {}
        if name == OURS and (bound := static_bound(arch, shape, passes)) is not None:
            figures["static_bound"] = bound
        yield line | figures


def _of_passes(call: Callable, passes: str, qkv: tuple, dout: torch.Tensor) -> Callable:
    """What is compared and timed: RESULTS of a direction."""
    if passes == "forward":
        return lambda: (call(),)

    def both():
        out = call()
        return out, *torch.autograd.grad(out, qkv, dout)

    return both


def _figures(shape: Shape, passes: str, device: str, peak: dict[str, float], call: Callable, right: list) -> dict:
    distance, name = error(shape, call(), right)
    if not distance <= gpu_parity.ALLOWED[shape.dtype]:
        return {"refused": f"{name} is wrong by {distance:.3g} of its size", "error": distance}
    time = seconds(call, device)
    tflops, gbps = shape.flops(passes) / time / 1e12, shape.bytes / time / 1e9
    return {
        "error": distance,
        "ms": time * 1e3,
        "tflops": tflops,
        "share_of_matmul": tflops / peak["matmul_tflops"],
        "gbps": gbps,
        "share_of_copy": gbps / peak["copy_gbps"],
    }


def facts(device: str) -> dict:
    """What the figures belong to."""
    found = {"torch": torch.__version__, "fastattn": fastattn.__version__, "device": "cpu"}
    if device == "cuda":
        import triton

        properties = torch.cuda.get_device_properties(0)
        found |= {"device": properties.name, "triton": triton.__version__, "cuda": torch.version.cuda}
        found |= {"hip": torch.version.hip, "multiprocessors": properties.multi_processor_count}
        found |= {"arch": arch_of(properties), "driver": driver_version(), "memory": properties.total_memory}
    return found


def arch_of(properties) -> str:
    """As golden.json names it."""
    if torch.version.hip:
        return properties.gcnArchName.split(":")[0]
    return f"sm_{properties.major}{properties.minor}"


def show(console: Console, shape: Shape, passes: str, lines: list[dict]) -> None:
    table = Table(title=title_of(shape, passes), title_justify="left")
    for column in ("", "ms", "TFLOP/s", "of matmul", "bound", "GB/s", "of copy", "error"):
        table.add_column(column, justify="left" if not column else "right")
    for line in lines:
        if "refused" in line:
            table.add_row(line["contender"], line["refused"])
            continue
        bound = f"{line['static_bound']:.0%}" if "static_bound" in line else ""
        table.add_row(
            line["contender"], f"{line['ms']:.3f}", f"{line['tflops']:.1f}", f"{line['share_of_matmul']:.0%}", bound,
            f"{line['gbps']:.0f}", f"{line['share_of_copy']:.0%}", f"{line['error']:.1e}",
        )  # fmt: skip
    console.print(table)


def title_of(shape: Shape, passes: str) -> str:
    mask = "" if not shape.causal else "causal" if shape.window is None else f"window {shape.window}"
    heads = f"H{shape.num_heads}/{shape.num_heads_k}"
    title = f"{shape.suite} {passes} B{shape.batch} {heads} S{shape.seqlen_q}x{shape.seqlen_k} D{shape.head_dim}"
    return f"{title} {shape.dtype} {mask}"


def show_parity(console: Console, rows: list[dict]) -> None:
    wrong = [row for row in rows if not row["right"]]
    console.print(f"parity: {len(rows) - len(wrong)} of {len(rows)} results are right")
    for row in wrong:
        figures = row.get("failed") or f"off by {row['error']:.3g}, allowed {row['allowed']:.3g}"
        console.print(f"  {row['case']} {row['result']}: {figures}", markup=False)


class Report:
    """What has been found so far, on disk after each step: a run that is interrupted leaves what it has."""

    def __init__(self, out: Path, found: dict):
        self.out, self.found = out, {**found, "parity": [], "rows": [], "left_out": [], "warnings": []}

    def add(self, name: str, items: list) -> None:
        self.found[name] += items
        self.write()

    def write(self) -> None:
        self.out.write_text(json.dumps(self.found, indent=1) + "\n")

    @property
    def is_right(self) -> bool:
        ours = [row for row in self.found["rows"] if row["contender"] == OURS]
        return all(row["right"] for row in self.found["parity"]) and not any("refused" in row for row in ours)


def main(argv: list[str] | None = None, of: tuple[Shape, ...] | None = None, matmul: int = 8192) -> int:
    """Measure what the command line asks for; 0, or 1 if a result of ours was wrong."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--suite", choices=("dense", "sparse", "decode"), help="only these shapes, without parity")
    parser.add_argument("--passes", choices=PASSES, help="only this direction")
    parser.add_argument("--full", action="store_true", help="more shapes, float16 too, however long it takes")
    parser.add_argument("--seconds", type=float, default=480.0, help="no further shape begins after so many")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--out", type=Path, default=Path("bench-gpu.json"), help="and a picture of the same name")
    options = parser.parse_args(argv)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch sees no GPU")
    end = time.monotonic() + (float("inf") if options.full else options.seconds)
    console, found = Console(), facts(options.device)
    report = Report(options.out, found)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", RuntimeWarning)  # of the self-check
        if options.suite is None:
            report.add("parity", gpu_parity.results(options.device))
            show_parity(console, report.found["parity"])
        report.found |= (peak := peaks(options.device, matmul))
        wanted = [
            (shape, passes)
            for shape in (shapes(options.full) if of is None else of)
            for passes in (PASSES if shape.suite != "decode" else PASSES[:1])
            if options.suite in (None, shape.suite) and options.passes in (None, passes)
        ]
        for shape, passes in wanted:
            if time.monotonic() > end:
                report.add("left_out", [title_of(shape, passes)])
                continue
            lines = list(measure(shape, passes, options.device, peak, found.get("arch", "")))
            report.add("rows", lines)
            show(console, shape, passes, lines)
    report.add("warnings", sorted({f"{x.category.__name__}: {x.message}" for x in caught}))
    for text in report.found["warnings"]:
        console.print(text, markup=False)
    picture = options.out.with_suffix(".png")
    drawn = [picture] if draw_gpu(picture, report.found) else []
    console.print(f"written: {', '.join(map(str, [options.out, *drawn]))}", markup=False)
    return int(not report.is_right)


if __name__ == "__main__":
    sys.exit(main())
