"""Benchmark of the Triton kernels on a GPU beside torch's and flash-attn's: `make bench-gpu`. Writes bench-gpu.json.

Each contender is compared with float32 on a block of queries before it is timed; a wrong one is not timed. Rates count
the (query, key) pairs that the mask leaves; shares are of the matrix product and the copy of the same run.
"""

import argparse
import importlib.util
import json
import sys
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

import fastattn

PASSES = ("forward", "forward+backward")
CHECKED = 64
"""Queries that are compared, the last ones of the first head: the reference is O(n^2)."""


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


def shapes() -> tuple[Shape, ...]:
    """16384 tokens and 2048 channels, as flash-attn's authors measure; decoding; a sliding window."""
    made = []
    for dtype in ("bfloat16", "float16"):
        for head_dim in (64, 128):
            for seqlen in (512, 2048, 8192):
                dense = Shape(
                    "dense", 16384 // seqlen, 2048 // head_dim, 2048 // head_dim, seqlen, seqlen, head_dim, dtype
                )
                made += [dense, dense._replace(causal=True)]
    made += [made[-1]._replace(suite="sparse", window=window) for window in (255, 1023)]
    made += [Shape("decode", batch, 32, 8, 1, seqlen, 128, "bfloat16") for batch in (1, 64) for seqlen in (1024, 8192)]
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

    def causal(b, h, i, j):
        seen = i >= j
        return seen if shape.window is None else seen & (i - j <= shape.window)

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


CONTENDERS = {
    "fastattn": ours,
    "sdpa flash": sdpa(SDPBackend.FLASH_ATTENTION),
    "sdpa cudnn": sdpa(SDPBackend.CUDNN_ATTENTION),
    "flex": flex,
    "flash-attn": flash_attn,
}


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


def error(shape: Shape, out: torch.Tensor, q, k, v) -> float:
    """Largest distance of the last queries of the first head from the reference in float32."""
    rows = min(CHECKED, shape.seqlen_q)
    group = shape.num_heads // shape.num_heads_k
    q, k, v = (x.detach()[:1, :1].float() for x in (q[:, ::group], k, v))
    window = None if shape.window is None else (shape.window, None)
    expected = fastattn.attention(q[:, :, -rows:], k, v, causal=shape.causal, window_size=window, backend="reference")
    return (out.detach()[:1, :1, -rows:].float() - expected).abs().max().item()


def measure(shape: Shape, passes: str, device: str, peak: dict[str, float]) -> Iterator[dict]:
    """One line for each contender: why it was refused, or its figures."""
    q, k, v = tensors(shape, device, passes)
    for name, prepare in CONTENDERS.items():
        line = {**shape._asdict(), "passes": passes, "contender": name}
        try:
            call = prepare(shape, q, k, v)
            figures = (
                {"refused": call} if isinstance(call, str) else _figures(shape, passes, device, peak, call, q, k, v)
            )
        except Exception as failure:  # a peer that cannot do this is a line of the table; ours is a bug
            if name == "fastattn":
                raise
            figures = {"refused": str(failure).splitlines()[0]}
        yield line | figures


def _figures(shape: Shape, passes: str, device: str, peak: dict[str, float], call: Callable, q, k, v) -> dict:
    distance = error(shape, call(), q, k, v)
    if not distance <= 8 * torch.finfo(q.dtype).eps:
        return {"refused": f"wrong by {distance:.3g}", "error": distance}
    timed, dout = call, torch.randn_like(q)
    if passes != "forward":

        def timed():
            return torch.autograd.grad(call(), (q, k, v), dout)

    time = seconds(timed, device)
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
    return found


def show(console: Console, shape: Shape, passes: str, lines: list[dict]) -> None:
    mask = "" if not shape.causal else "causal" if shape.window is None else f"window {shape.window}"
    heads = f"H{shape.num_heads}/{shape.num_heads_k}"
    title = f"{shape.suite} {passes} B{shape.batch} {heads} S{shape.seqlen_q}x{shape.seqlen_k} D{shape.head_dim}"
    table = Table(title=f"{title} {shape.dtype} {mask}", title_justify="left")
    for column in ("", "ms", "TFLOP/s", "of matmul", "GB/s", "of copy", "error"):
        table.add_column(column, justify="left" if not column else "right")
    for line in lines:
        if "refused" in line:
            table.add_row(line["contender"], line["refused"])
            continue
        table.add_row(
            line["contender"], f"{line['ms']:.3f}", f"{line['tflops']:.1f}", f"{line['share_of_matmul']:.0%}",
            f"{line['gbps']:.0f}", f"{line['share_of_copy']:.0%}", f"{line['error']:.1e}",
        )  # fmt: skip
    console.print(table)


def main(argv: list[str] | None = None, of: tuple[Shape, ...] | None = None, matmul: int = 8192) -> int:
    """Measure what the command line asks for; 0, or 1 if a result of ours was wrong."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--suite", choices=("dense", "sparse", "decode"), help="only these shapes")
    parser.add_argument("--passes", choices=PASSES, help="only this direction")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--out", type=Path, default=Path("bench-gpu.json"))
    options = parser.parse_args(argv)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch sees no GPU")
    console, peak = Console(), peaks(options.device, matmul)
    lines: list[dict] = []
    for shape in shapes() if of is None else of:
        for passes in PASSES if shape.suite != "decode" else PASSES[:1]:
            if options.suite in (None, shape.suite) and options.passes in (None, passes):
                lines += (measured := list(measure(shape, passes, options.device, peak)))
                show(console, shape, passes, measured)
    options.out.write_text(json.dumps({**facts(options.device), **peak, "rows": lines}, indent=1) + "\n")
    return int(any(line["contender"] == "fastattn" and "refused" in line for line in lines))


if __name__ == "__main__":
    sys.exit(main())
