"""Tiles of rows: loaded, multiplied, stored. A head_dim that is no power of two is held as two tiles of columns or
padded (`config.split_head_dim`)."""

import triton
import triton.language as tl

from .rows import paged
from .state import Factor, Reloaded


@triton.jit
def load_columns(
    rows, left, ROWS: tl.constexpr, START: tl.constexpr, WIDTH: tl.constexpr, DIM: tl.constexpr, CHECK: tl.constexpr
):
    """Columns START ... START + WIDTH - 1 of the first ROWS rows; 0 past DIM and, if CHECK, past `left` rows."""
    local, cols = tl.arange(0, ROWS)[:, None], START + tl.arange(0, WIDTH)[None, :]
    pointers = rows.ptr + local * rows.row_stride + cols * rows.col_stride
    if CHECK and START + WIDTH > DIM:
        return tl.load(pointers, mask=(local < left) & (cols < DIM), other=0.0)
    elif CHECK:
        return tl.load(pointers, mask=local < left, other=0.0)
    elif START + WIDTH > DIM:
        return tl.load(pointers, mask=cols < DIM, other=0.0)
    else:
        return tl.load(pointers)


@triton.jit
def load_factor(rows, left, ROWS: tl.constexpr, W0: tl.constexpr, W1: tl.constexpr, DIM: tl.constexpr,
                RELOAD: tl.constexpr):  # fmt: skip
    """The `Factor` of the first ROWS rows or, with RELOAD, what `product_of_chunks` loads it from."""
    if RELOAD:
        return Reloaded(rows, left)
    else:
        x0, x1 = load_columns(rows, left, ROWS, 0, W0, DIM, True), 0.0
        if W1 > 0:
            x1 = load_columns(rows, left, ROWS, W0, W1, DIM, True)
        return Factor(x0, x1)


@triton.jit
def load_chunk(rows, left, start, ROWS: tl.constexpr, WIDTH: tl.constexpr, DIM: tl.constexpr):
    """As `load_columns`, with a start that only the running kernel knows."""
    local, cols = tl.arange(0, ROWS)[:, None], start + tl.arange(0, WIDTH)[None, :]
    pointers = rows.ptr + local * rows.row_stride + cols * rows.col_stride
    return tl.load(pointers, mask=(local < left) & (cols < DIM), other=0.0)


@triton.jit
def product_of_chunks(
    a, b, b_left, M: tl.constexpr, N: tl.constexpr, W0: tl.constexpr, W1: tl.constexpr, DIM: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """a b^T of M rows of a `Reloaded` and N rows of b, few columns at a time: for tiles that registers do not hold."""
    CHUNK: tl.constexpr = min(32, W0 if W1 == 0 else min(W0, W1))
    acc = tl.zeros([M, N], tl.float32)
    zero = ((b_left >> 2) + 2**24) >> 30  # which the compiler does not know: it would unroll, load all, and spill
    for start in tl.range(0, W0 + W1 + zero, CHUNK):
        part_a = load_chunk(a.rows, a.left, start, M, CHUNK, DIM)
        part_b = load_chunk(b, b_left, start, N, CHUNK, DIM).to(part_a.dtype)
        acc = tl.dot(part_a, tl.trans(part_b), acc, input_precision=PRECISION)
    return acc


@triton.jit
def load_described(rows, descriptor, place, col, left, N: tl.constexpr, WIDTH: tl.constexpr, DIM: tl.constexpr,
                   CHECK: tl.constexpr):  # fmt: skip
    """The first tile of columns of N rows, by the descriptor if there is one, in which they begin at col."""
    if descriptor is not None:
        return descriptor.load([place.batch, place.head_k, tl.cast(col, tl.int32), 0]).reshape([N, WIDTH])
    else:
        return load_columns(rows, left, N, 0, WIDTH, DIM, CHECK)


@triton.jit
def like_factor(x, factor, RELOAD: tl.constexpr):
    """x in the dtype of a `Factor` or `Reloaded`: a cache of int8 is multiplied in the dtype of q."""
    if RELOAD:
        return x.to(factor.rows.ptr.dtype.element_ty)
    else:
        return x.to(factor.x0.dtype)


@triton.jit
def load_scale_of_keys(held, pages, n, left, N: tl.constexpr):
    """What the int8 of N keys from the n-th on are multiplied by, [1, N]."""
    rows = paged(held.scale, n, pages, held.scale_page_stride, N)
    return tl.trans(load_columns(rows, left, N, 0, 1, 1, True)).to(tl.float32)


@triton.jit
def store_columns(
    rows, values, left, ROWS: tl.constexpr, START: tl.constexpr, WIDTH: tl.constexpr, DIM: tl.constexpr
):  # fmt: skip
    local, cols = tl.arange(0, ROWS)[:, None], START + tl.arange(0, WIDTH)[None, :]
    pointers = rows.ptr + local * rows.row_stride + cols * rows.col_stride
    tl.store(pointers, values.to(rows.ptr.dtype.element_ty), mask=(local < left) & (cols < DIM))


@triton.jit
def store_both(
    rows, x0, x1, left, ROWS: tl.constexpr, W0: tl.constexpr, W1: tl.constexpr, DIM: tl.constexpr, factor=None
):
    """The one or two tiles of columns of ROWS rows, times `factor`."""
    if factor is not None:
        x0 *= factor
    store_columns(rows, x0, left, ROWS, 0, W0, DIM)
    if W1 > 0:
        if factor is not None:
            x1 *= factor
        store_columns(rows, x1, left, ROWS, W0, W1, DIM)


@triton.jit
def empty_both(ROWS: tl.constexpr, W0: tl.constexpr, W1: tl.constexpr):
    """Zeros in place of the one or two tiles of columns of ROWS rows."""
    x0, x1 = tl.zeros([ROWS, W0], tl.float32), 0.0
    if W1 > 0:
        x1 = tl.zeros([ROWS, W1], tl.float32)
    return x0, x1


@triton.jit
def finite_or(x, clean):
    """x, and 0 in place of NaN and Inf if `clean`."""
    return tl.where((tl.abs(x.to(tl.float32)) < float("inf")) | (clean == 0), x, 0.0).to(x.dtype)
