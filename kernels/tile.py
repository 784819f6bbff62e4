"""What every kernel does to a tile: load it, modify its scores, mask them, drop weights.

Scores are in units of log2: log2(e) is folded into the softmax scale, so that exp2 does. `rows` and `cols` are
positions of queries and keys, shaped so that they broadcast to the tile: [M, 1] and [1, N], or [1, M] and [N, 1] in a
transposed tile. A head_dim that is no power of two is held as two tiles of columns or padded (`config.split_head_dim`).
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
FINITE = tl.constexpr(1.5e38)  # largest bias in log2 units: sums of it with a score stay finite
INT_MAX = tl.constexpr(2**31 - 1)


@triton.jit
def widen(strides, WIDE: tl.constexpr):
    """The last two strides, as int64 where 32 bits cannot hold an offset inside a tile."""
    if WIDE:
        return tl.cast(strides[2], tl.int64), tl.cast(strides[3], tl.int64)
    else:
        return strides[2], strides[3]


@triton.jit
def load_columns(
    ptr, strides, rows_left, ROWS: tl.constexpr, START: tl.constexpr, WIDTH: tl.constexpr, DIM: tl.constexpr,
    CHECK: tl.constexpr,
):  # fmt: skip
    """Columns START ... START + WIDTH - 1 of ROWS rows from `ptr` on; 0 past DIM and, if CHECK, past rows_left rows."""
    rows, cols = tl.arange(0, ROWS)[:, None], START + tl.arange(0, WIDTH)[None, :]
    pointers = ptr + rows * strides[0] + cols * strides[1]
    if CHECK and START + WIDTH > DIM:
        return tl.load(pointers, mask=(rows < rows_left) & (cols < DIM), other=0.0)
    elif CHECK:
        return tl.load(pointers, mask=rows < rows_left, other=0.0)
    elif START + WIDTH > DIM:
        return tl.load(pointers, mask=cols < DIM, other=0.0)
    else:
        return tl.load(pointers)


@triton.jit
def load_both(
    ptr, strides, rows_left, ROWS: tl.constexpr, W0: tl.constexpr, W1: tl.constexpr, DIM: tl.constexpr
):  # fmt: skip
    """The one or two tiles of columns of ROWS rows."""
    x0, x1 = load_columns(ptr, strides, rows_left, ROWS, 0, W0, DIM, True), 0.0
    if W1 > 0:
        x1 = load_columns(ptr, strides, rows_left, ROWS, W0, W1, DIM, True)
    return x0, x1


@triton.jit
def load_chunk(ptr, strides, rows_left, start, ROWS: tl.constexpr, WIDTH: tl.constexpr, DIM: tl.constexpr):
    """As `load_columns`, with a start that only the running kernel knows."""
    rows, cols = tl.arange(0, ROWS)[:, None], start + tl.arange(0, WIDTH)[None, :]
    return tl.load(
        ptr + rows * strides[0] + cols * strides[1], mask=(rows < rows_left) & (cols < DIM), other=0.0
    )  # fmt: skip


@triton.jit
def product_of_chunks(
    a, b, b_strides, b_left, M: tl.constexpr, N: tl.constexpr, W0: tl.constexpr, W1: tl.constexpr, DIM: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """a b^T of M rows from a = (pointer, strides, rows left) and N rows from pointer b on, few columns at a time: for
    tiles that registers do not hold."""
    CHUNK: tl.constexpr = min(32, W0 if W1 == 0 else min(W0, W1))
    acc = tl.zeros([M, N], tl.float32)
    zero = ((b_left >> 2) + 2**24) >> 30  # which the compiler does not know: it would unroll, load all, and spill
    for start in tl.range(0, W0 + W1 + zero, CHUNK):
        part_a = load_chunk(a[0], a[1], a[2], start, M, CHUNK, DIM)
        part_b = load_chunk(b, b_strides, b_left, start, N, CHUNK, DIM)
        acc = tl.dot(part_a, tl.trans(part_b), acc, input_precision=PRECISION)
    return acc


@triton.jit
def store_columns(
    ptr, strides, values, rows_left, ROWS: tl.constexpr, START: tl.constexpr, WIDTH: tl.constexpr, DIM: tl.constexpr
):
    rows, cols = tl.arange(0, ROWS)[:, None], START + tl.arange(0, WIDTH)[None, :]
    pointers = ptr + rows * strides[0] + cols * strides[1]
    tl.store(pointers, values.to(ptr.dtype.element_ty), mask=(rows < rows_left) & (cols < DIM))


@triton.jit
def finite_or(x, clean):
    return tl.where((tl.abs(x.to(tl.float32)) < float("inf")) | (clean == 0), x, 0.0).to(x.dtype)


@triton.jit
def tanh(x):
    """x + x^3 P(x^2) near 0 (Cephes), else from exp2: the difference would cancel near 0."""
    a = tl.abs(x)
    e = tl.exp2(a * (-2.0 * LOG2E))
    far = (1.0 - e) / (1.0 + e)
    z = x * x
    p = -5.70498872745e-3 * z + 2.06390887954e-2
    p = p * z - 5.37397155531e-2
    p = p * z + 1.33314422036e-1
    p = p * z - 3.33332819422e-1
    return tl.where(a < 0.625, x + x * z * p, tl.where(x < 0, -far, far))


@triton.jit
def softcap_scores(s, scale, softcap):
    """(softcap * tanh(scale * s / softcap) in log2 units, its derivative by the scaled s)"""
    t = tanh(s * (scale / softcap))
    return t * softcap * LOG2E, 1.0 - t * t


@triton.jit
def bias_log2(bias):
    """A finite bias stays finite in log2 units: finfo.min pushes a key away, only -inf masks it; +inf and NaN stay."""
    b = bias.to(tl.float32)
    scaled = b * LOG2E
    scaled = tl.where((scaled > FINITE) & (b < float("inf")), FINITE, scaled)
    return tl.where(scaled < -FINITE, -FINITE, scaled)


@triton.jit
def limits_of(k_start, start_strides, k_end, end_strides, diagonal_lo, diagonal_hi, batch, head):
    """What bounds the keys of a head's queries, for `row_bounds`; k_start, k_end may be None."""
    if k_start is not None:
        k_start += batch * start_strides[0] + head * start_strides[1]
    if k_end is not None:
        k_end += batch * end_strides[0] + head * end_strides[1]
    return k_start, start_strides[2], k_end, end_strides[2], diagonal_lo, diagonal_hi


@triton.jit
def row_bounds(rows, limits, seqlen_q, seqlen_k, HAS_LO: tl.constexpr, HAS_HI: tl.constexpr):
    """(first key, one past the last) that each row sees; (INT_MAX, 0) for none. Rows past the end repeat the last one.

    Whatever k_start and k_end hold, the bounds are in 0 ... seqlen_k.
    """
    k_start, start_stride, k_end, end_stride, diagonal_lo, diagonal_hi = limits
    rows = tl.minimum(rows, seqlen_q - 1)
    first, last = tl.zeros_like(rows), tl.zeros_like(rows) + seqlen_k
    if HAS_LO:
        first = tl.maximum(first, rows + diagonal_lo)
    if HAS_HI:
        last = tl.minimum(last, rows + diagonal_hi + 1)
    if k_start is not None:
        first = tl.maximum(first, tl.load(k_start + rows.to(tl.int64) * start_stride))
    if k_end is not None:
        last = tl.minimum(last, tl.load(k_end + rows.to(tl.int64) * end_stride))
    empty = first >= last
    return tl.where(empty, INT_MAX, first), tl.where(empty, 0, last)


@triton.jit
def scores_of(mask, mask_strides, bias, bias_strides, batch, head, row, WIDE: tl.constexpr):
    """(mask, bias) of a head's queries from `row` on, with the strides of queries and keys; mask, bias may be None."""
    if mask is not None:
        mask += batch * mask_strides[0] + head * mask_strides[1] + row * mask_strides[2]
    if bias is not None:
        bias += batch * bias_strides[0] + head * bias_strides[1] + row * bias_strides[2]
    return mask, widen(mask_strides, WIDE), bias, widen(bias_strides, WIDE)


@triton.jit
def key_range(
    bounds, seqlen_k, BLOCK_N: tl.constexpr, HAS_FIRST: tl.constexpr, BOUNDED: tl.constexpr, EVERYWHERE: tl.constexpr
):
    """(lo, hi, common_lo, common_hi) of a block of queries with these bounds: the keys lo ... hi - 1 are visited; the
    blocks from common_lo to common_hi need no mask. Both begin blocks, or are hi. EVERYWHERE: any key may need one."""
    lo, hi, common_lo, common_hi = 0, seqlen_k, 0, seqlen_k
    if HAS_FIRST:
        lo, common_lo = tl.min(bounds[0]), tl.max(bounds[0])
    if BOUNDED:
        hi, common_hi = tl.max(bounds[1]), tl.min(bounds[1])
    lo = tl.minimum(lo, hi) // BLOCK_N * BLOCK_N
    common_hi = common_hi // BLOCK_N * BLOCK_N
    common_lo = tl.minimum(tl.cdiv(tl.minimum(common_lo, hi), BLOCK_N) * BLOCK_N, common_hi)
    if EVERYWHERE:
        common_hi = common_lo
    if common_lo == common_hi:
        common_lo, common_hi = hi, hi
    return lo, hi, common_lo, common_hi


@triton.jit
def visible(cols, first, last, HAS_FIRST: tl.constexpr):
    """Which keys the bounds of the rows leave; first, last shaped as rows. Without HAS_FIRST, first is 0."""
    if HAS_FIRST:  # one comparison for two, which is false for all of (INT_MAX, 0) as well
        return (cols - first).to(tl.uint32) < (last - first).to(tl.uint32)
    else:
        return cols < last


@triton.jit
def load_scores(ptr, strides, rows, cols, rows_left, cols_left):
    """A tile of bias or mask from `ptr` on; 0 outside the tensor."""
    inside = (rows < rows_left) & (cols < cols_left)
    return tl.load(ptr + rows * strides[0] + cols * strides[1], mask=inside, other=0)


@triton.jit
def bits(bitmap, rows, N: tl.constexpr):
    """The first N bits of each row (bit j % 8 of byte j // 8 is j), as a bool [M, N]: a byte is loaded once.

    rows: [M, 1]. bitmap: (pointer, bytes of a row, bits to read of a row); what is not read is True."""
    ptr, stride, limit = bitmap
    octets = tl.arange(0, N // 8)[None, :]
    byte = tl.load(ptr + rows * stride + octets, mask=rows * 0 + octets * 8 < limit, other=255).to(tl.int32)
    return tl.reshape((byte[:, :, None] >> tl.arange(0, 8)[None, None, :]) & 1, [rows.shape[0], N]) != 0


@triton.jit
def bit(bitmap, rows, col):
    """Bit `col` of each row, as `bits`."""
    ptr, stride, limit = bitmap
    byte = tl.load(ptr + rows * stride + col // 8, mask=rows * 0 + col < limit, other=255)
    return ((byte.to(tl.int32) >> (col % 8)) & 1) != 0


@triton.jit
def load_scale(softmax_scale, stride, heads, LEARNED_SCALE: tl.constexpr):
    if LEARNED_SCALE:
        return tl.load(softmax_scale + heads * stride).to(tl.float32)
    else:
        return softmax_scale


@triton.jit
def load_slope(alibi_slopes, strides, batch, heads):
    """In log2 units; 0 without slopes."""
    if alibi_slopes is None:
        return 0.0
    else:
        return tl.load(alibi_slopes + batch * strides[0] + heads * strides[1]).to(tl.float32) * LOG2E


@triton.jit
def dropout_keep(rows, col, heads, batch, threshold, seed, M: tl.constexpr, N: tl.constexpr):
    """bool [M, N] of the keys from `col` on: whether the weight is kept. The bits of fastattn/dropout.py; col is a
    multiple of 4, and one evaluation serves four neighbouring keys. rows [M, 1]; heads: one, or [M, 1]."""
    zeros = tl.zeros([M, N // 4], tl.uint32)
    c0 = (col // 4 + tl.arange(0, N // 4)[None, :]).to(tl.uint32) + zeros
    c1, c2, c3 = rows.to(tl.uint32) + zeros, tl.cast(heads, tl.uint32) + zeros, batch.to(tl.uint32) + zeros
    w0, w1, w2, w3 = tl.philox(seed, c0, c1, c2, c3)
    words = tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), [M, N])
    return words >= threshold.to(tl.uint32)


@triton.jit
def normalizer(m, total, sink):
    """(factor of the accumulated output, top, log2 of the sum of 2^(score - top)) for the running maximum m and sum.

    lse = (top + log2_total) / log2(e). A row without a key has an infinite sum, so that every weight of it is 0 in the
    backward pass. sink: one more logit in log2 units; -inf for none.
    """
    reference = tl.where(m == float("-inf"), 0.0, m)
    no_sink = sink == float("-inf")
    top = tl.where((total == 0.0) | (reference < sink), sink, reference)
    top = tl.where(no_sink, reference, top)
    shrink = tl.where(total == 0.0, 0.0, tl.exp2(reference - top))
    total = total * shrink + tl.where(no_sink, 0.0, tl.exp2(sink - top))
    factor = tl.where(total == 0.0, 0.0, shrink / total)
    return factor, top, tl.where(total == 0.0, float("inf"), tl.log2(total))


@triton.jit
def natural_lse(top, log2_total):
    return tl.where(log2_total == float("inf"), float("-inf"), (top + log2_total) * LN2)
