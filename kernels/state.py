"""What kernels hand from function to function: every NamedTuple of theirs, field by field, forward and backward alike.

Triton keeps the fields through calls and loops. Constexprs stay constexprs in one that is bound with an annotation
(`DIMS: tl.constexpr = Dims(...)`), or as a parameter; bound without it they become tensors. Triton has no `_replace`.
"""

from typing import NamedTuple


class Dims(NamedTuple):
    """Widths of a head, constexprs: head_dim of q and k and the one or two tiles of columns that hold it
    (`config.split_head_dim`; 0: there is one), and the same of v."""

    HEAD_DIM: int
    D0: int
    D1: int
    HEAD_DIM_V: int
    E0: int
    E1: int


class Tile(NamedTuple):
    """Sizes of a tile of scores, constexprs.

    BLOCK_M, BLOCK_N  queries, keys
    RELOAD            registers do not hold the factors of the scores: load both in each step, few columns at a time
    PRECISION         input_precision of products of float32
    """

    BLOCK_M: int
    BLOCK_N: int
    RELOAD: bool
    PRECISION: str


class Flags(NamedTuple):
    """What a call does to its scores, constexprs made by `scores.flags_of`.

    HAS_LO, HAS_HI  whether there is a diagonal bound on that side
    HAS_FIRST       a query's first key may not be 0
    BOUNDED         a query may not see all keys, by its bounds
    EVERYWHERE      any tile may hide a key: there is a mask or a bias
    HIDES           some tile may hide a key: any of these, or a block mask
    SOFTCAP, ALIBI, DROPOUT  whether these are on
    SCALE_APART     multiply a product by the scale and then by log2(e): not by both at once, so that the gradient of
                    the scale has the rounding of the forward pass, and its sign may be any
    MODIFIED        scores are in units of log2 before the softmax, which otherwise multiplies by scale and log2(e)
    """

    HAS_LO: bool
    HAS_HI: bool
    HAS_FIRST: bool
    BOUNDED: bool
    EVERYWHERE: bool
    HIDES: bool
    SOFTCAP: bool
    ALIBI: bool
    DROPOUT: bool
    SCALE_APART: bool
    MODIFIED: bool


class Lengths(NamedTuple):
    """How many queries and keys a sequence has (`rows.lengths_of`)."""

    queries: object
    keys: object


class Rows(NamedTuple):
    """Rows of one tensor in memory (`rows.rows_of`).

    ptr                     to the first one; or to each one, [M, 1], and row_stride is 0
    row_stride, col_stride  elements from one to the next, wide enough for any offset inside a tile
    """

    ptr: object
    row_stride: object
    col_stride: object


class Factor(NamedTuple):
    """A factor of the scores that stays while the other one passes: its one or two tiles of columns."""

    x0: object
    x1: object


class Reloaded(NamedTuple):
    """In place of a `Factor` with Tile.RELOAD: its rows, and how many there are."""

    rows: Rows
    left: object


class Pages(NamedTuple):
    """Where keys lie that are not one after another: pointer to the numbers of a sequence's pages, elements from one to
    the next, how many these are; how many pages there are, keys in a page."""

    table: object
    step: object
    length: object
    count: object
    size: object


class Held(NamedTuple):
    """How a cache holds k, or v: elements from page to page; one number a key that its int8 are multiplied by, as rows
    of one column, or None; elements of these from page to page."""

    page_stride: object
    scale: object
    scale_page_stride: object


class Cache(NamedTuple):
    """`Pages`, or None where keys lie one after another; how k and v are held."""

    pages: object
    k: Held
    v: Held


class Keys(NamedTuple):
    """Keys and values of a head from the first one on; tensor descriptors of both, or None; a `Cache`, or None."""

    k: Rows
    k_descriptor: object
    v: Rows
    v_descriptor: object
    cache: object


class Bounds(NamedTuple):
    """Of each query: the first key that it sees, and one past the last; (INT_MAX, 0) for none."""

    first: object
    last: object


class Limits(NamedTuple):
    """What bounds the keys of a head's queries: pointers to its first entry, or None, with strides; diagonals."""

    k_start: object
    start_stride: object
    k_end: object
    end_stride: object
    diagonal_lo: object
    diagonal_hi: object


class KeyRange(NamedTuple):
    """Keys of a block of queries: lo ... hi - 1 are visited, the blocks from common_lo to common_hi need no mask. Both
    begin blocks, or are hi."""

    lo: object
    hi: object
    common_lo: object
    common_hi: object


class Bitmap(NamedTuple):
    """Bits of a block mask: pointer to the first row, bytes of a row, bits to read of a row; the others are True."""

    ptr: object
    stride: object
    limit: object


class Listed(NamedTuple):
    """The lists of a line of a block mask: how many partial and full blocks, and pointers to their numbers."""

    count: object
    indices: object
    bitmap_ids: object
    full_count: object
    full_indices: object


class Visits(NamedTuple):
    """Which tiles a line of a block mask visits (`lists.open_lists`).

    listed            its lists
    unmasked, masked  how many full blocks need no mask; how many other blocks it visits
    whole, blocks     how many blocks there are along it, and how many of them are whole
    bitmaps, count    bitmaps of the first row of the tile; how many bitmaps there are
    """

    listed: Listed
    unmasked: object
    masked: object
    whole: object
    blocks: object
    bitmaps: object
    count: object


class Window(NamedTuple):
    """The queries and keys of a tile of scores, shaped to broadcast to it: [M, 1] and [1, N], or transposed.

    rows                    positions of the queries
    local_rows, local_cols  places in the tile
    rows_left, cols_left    how many of them there are
    col                     position of the first key
    """

    rows: object
    local_rows: object
    local_cols: object
    rows_left: object
    cols_left: object
    col: object


class Place(NamedTuple):
    """Where a tile of scores belongs: batch, head of the keys, head of the queries (one, or [M, 1])."""

    batch: object
    head_k: object
    heads: object


class Terms(NamedTuple):
    """What modifies and hides the scores of a head (`scores.terms_of`).

    mask, bias         rows from the tile's first query on (backward: from the head's); ptr is None without
    scale, softcap     numbers
    slope              of ALiBi, in units of log2
    threshold, seed    of dropout; keep_factor: 1 / (1 - dropout_p)
    """

    mask: Rows
    bias: Rows
    scale: object
    softcap: object
    slope: object
    threshold: object
    keep_factor: object
    seed: object


class Queries(NamedTuple):
    """A tile of queries of the forward pass, and what stays beside it while keys pass.

    factor   q, a `Factor` or `Reloaded`
    place    where it belongs
    rows     positions, [M, 1]; local_rows: places in the tile; left: how many there are
    bounds   keys that each one sees
    """

    factor: object
    place: Place
    rows: object
    local_rows: object
    left: object
    bounds: Bounds


class Softmax(NamedTuple):
    """The online softmax of a tile of queries: accumulated output in one or two tiles of columns, sum of the weights,
    running maximum in units of log2."""

    acc0: object
    acc1: object
    total: object
    maximum: object


class Statistics(NamedTuple):
    """Of each query: lse in units of log2 as top + log2_total (`softmax.normalizer`), and delta."""

    top: object
    log2_total: object
    delta: object


class ScoreGradients(NamedTuple):
    """Of a tile: weights after dropout but for its factor, gradient of the scores, of the scaled products."""

    kept: object
    scores: object
    product: object


class HeadQueries(NamedTuple):
    """The queries of a head from the first one on, in the backward pass of keys: q, dout, pointers to the parts of
    lse and to delta, bounds."""

    q: Rows
    dout: Rows
    lse_parts: object
    delta: object
    limits: Limits


class KeyGradients(NamedTuple):
    """Of a tile of keys: gradients of k and v, each in one or two tiles of columns."""

    dk0: object
    dv0: object
    dk1: object
    dv1: object


class RowSums(NamedTuple):
    """Sums over the keys of a query: the gradient of its scores, and its parts of those of slope and scale."""

    total: object
    slope: object
    scale: object


class QuerySums(NamedTuple):
    """Of a tile of queries: gradient of q in one or two tiles of columns, and the sums of each row."""

    dq0: object
    dq1: object
    rows: RowSums
