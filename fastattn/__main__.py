"""`python -m fastattn warmup`: compile the Triton kernels of given shapes before the first call needs them."""

import argparse
import itertools
import os
import sys

import torch

from . import attention
from .backends import triton as gpu

DEVICE = "cpu" if gpu.INTERPRETED else "cuda"


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m fastattn", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    warmup = commands.add_parser("warmup", help="compile the kernels of these shapes, and tune them if asked")
    warmup.add_argument(
        "shapes", nargs="+", type=_shape, metavar="B,H,HK,SQ,SK,D",
        help="batch, query heads, key heads, queries, keys, head_dim; lengths matter for --tune and for decoding alone",
    )  # fmt: skip
    warmup.add_argument("--dtype", nargs="+", default=["bfloat16"], choices=["bfloat16", "float16", "float32"])
    warmup.add_argument("--causal", nargs="+", type=int, default=[0, 1], choices=[0, 1], help="default: both")
    warmup.add_argument("--backward", action="store_true", help="the gradients of q, k and v too")
    warmup.add_argument("--tune", action="store_true", help="time candidates, write tuned/<device>.json")
    options = parser.parse_args(arguments)
    if reason := gpu.unavailable():
        print(f"python -m fastattn warmup: {reason}", file=sys.stderr)
        return 1
    if options.tune:
        os.environ["FASTATTN_AUTOTUNE"] = "1"
    try:
        _warm_up(options)
    except (ValueError, NotImplementedError) as refusal:  # heads that do not divide, a head_dim that no kernel takes
        print(f"python -m fastattn warmup: {refusal}", file=sys.stderr)
        return 1
    return 0


def _shape(text: str) -> tuple[int, ...]:
    sizes = tuple(int(size) for size in text.split(",") if size.strip().isdigit())
    if len(sizes) != 6 or text.count(",") != 5:
        raise argparse.ArgumentTypeError(f"{text!r} must be six numbers B,H,HK,SQ,SK,D, as in 1,32,8,4096,4096,128")
    return sizes


def _warm_up(options) -> None:
    try:
        from tqdm import tqdm
    except ImportError:
        raise SystemExit("warmup shows its progress with tqdm, which is not installed: pip install tqdm") from None

    calls = list(itertools.product(options.shapes, options.dtype, options.causal))
    for shape, dtype, causal in (bar := tqdm(calls, unit="call", file=sys.stderr)):
        bar.set_description(f"{','.join(map(str, shape))} {dtype}" + (" causal" if causal else ""))
        _call(shape, getattr(torch, dtype), bool(causal), options.backward)


def _call(shape: tuple[int, ...], dtype: torch.dtype, causal: bool, backward: bool) -> None:
    b, h, hk, sq, sk, d = shape
    q, k, v = (
        torch.zeros(b, heads, seqlen, d, dtype=dtype, device=DEVICE, requires_grad=backward)
        for heads, seqlen in ((h, sq), (hk, sk), (hk, sk))
    )
    out = attention(q, k, v, causal=causal, backend="triton")
    if backward:
        torch.autograd.grad(out, (q, k, v), torch.zeros_like(out))


if __name__ == "__main__":
    sys.exit(main())
