"""`python -m fastattn warmup`: compile the Triton kernels of given shapes before the first call needs them."""

import itertools
import os
import sys

import torch

from ..api import attention
from ..backends import triton as gpu
from . import shapes

DEVICE = "cpu" if gpu.INTERPRETED else "cuda"

TUNE = (
    "time candidates, write the best to <device>-triton-<version>.json in FASTATTN_TUNED, or fastattn/tuned in the "
    "user's cache folder"
)


def add_arguments(parser) -> None:
    """See fastattn/cli/__init__.py."""
    parser.add_argument(
        "shapes", nargs="+", type=shapes.shape, metavar=shapes.METAVAR,
        help="batch, query heads, key heads, queries, keys, head_dim; lengths matter for --tune and for decoding alone",
    )  # fmt: skip
    parser.add_argument("--dtype", nargs="+", default=["bfloat16"], choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--causal", nargs="+", type=int, default=[0, 1], choices=[0, 1], help="default: both")
    parser.add_argument("--backward", action="store_true", help="the gradients of q, k and v too")
    parser.add_argument("--tune", action="store_true", help=TUNE)


def run(options) -> int:
    """See fastattn/cli/__init__.py."""
    if reason := gpu.unavailable():
        raise NotImplementedError(reason)
    if options.tune:
        os.environ["FASTATTN_AUTOTUNE"] = "1"
    try:
        from tqdm import tqdm
    except ImportError:
        raise SystemExit("warmup shows its progress with tqdm, which is not installed: pip install tqdm") from None

    torch.manual_seed(0)
    calls = list(itertools.product(options.shapes, options.dtype, options.causal))
    for sizes, dtype, causal in (bar := tqdm(calls, unit="call", file=sys.stderr)):
        bar.set_description(f"{','.join(map(str, sizes))} {dtype}" + (" causal" if causal else ""))
        q, k, v = shapes.zeros(sizes, dtype, DEVICE, options.backward)
        for x in (q, k, v):  # of zeros, every tile would give what the right ones give
            x.detach().normal_()
        out = attention(q, k, v, causal=bool(causal), backend="triton")
        if options.backward:
            torch.autograd.grad(out, (q, k, v), torch.empty_like(out).normal_())
    return 0
