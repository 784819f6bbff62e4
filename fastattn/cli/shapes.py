"""Shapes and dtypes on the command line, and tensors of them."""

import argparse

import torch

METAVAR = "B,H,HK,SQ,SK,D"
DTYPES = "float32", "bfloat16", "float16", "float64"


def shape(text: str) -> tuple[int, ...]:
    """The six sizes of METAVAR: batch, query heads, key heads, queries, keys, head_dim; argparse's error otherwise."""
    sizes = tuple(int(size) for size in text.split(",") if size.strip().isdigit())
    if len(sizes) != 6 or text.count(",") != 5:
        raise argparse.ArgumentTypeError(f"{text!r} must be six numbers {METAVAR}, as in 1,32,8,4096,4096,128")
    return sizes


def zeros(sizes: tuple[int, ...], dtype: str, device: str, requires_grad: bool) -> list[torch.Tensor]:
    """q, k, v of these sizes, zeros."""
    b, h, hk, sq, sk, d = sizes
    options = {"dtype": getattr(torch, dtype), "device": device, "requires_grad": requires_grad}
    return [torch.zeros(b, heads, seqlen, d, **options) for heads, seqlen in ((h, sq), (hk, sk), (hk, sk))]
