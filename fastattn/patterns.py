"""Named sparse patterns, each a function that returns a `BlockMask`.

`seqlen_k` defaults to seqlen_q. Causality and windows are bottom-right aligned, as everywhere here: query i stands at
position i + seqlen_k - seqlen_q. Patterns compose with `&`, `|`, `~`, and `BlockMask.cat` gives each head its own:
`BlockMask.cat([sliding_window(4096, left=left, right=0) for left in (127, 255, 511, 1023)])`.

None of them makes an n x n tensor. Patterns that consist of blocks (`random_blocks`, `bigbird`, `deepspeed_*`) are
made of blocks of `block_size`; `BlockMask.reblock` stores any pattern in blocks of another size.
"""

from collections.abc import Sequence

import torch

from .checks import check_int, one_line
from .masks.block_checks import BlockSize, check_integers
from .masks.block_mask import BlockMask
from .masks.graphs import in_graphs, of_axes, of_documents, of_lengths
from .masks.intervals import Mask
from .masks.neighborhoods import neighbors, per_axis, visited_blocks


@in_graphs(of_lengths)
def causal(seqlen_q: int, seqlen_k: int | None = None, *, block_size: BlockSize = 128) -> BlockMask:
    """Each query sees the keys up to its own position."""
    return BlockMask.from_mask(Mask.causal(), seqlen_q=seqlen_q, seqlen_k=seqlen_k, block_size=block_size)


@in_graphs(of_lengths)
def sliding_window(
    seqlen_q: int, seqlen_k: int | None = None, *, left: int | None, right: int | None, block_size: BlockSize = 128
) -> BlockMask:
    """Each query sees `left` keys before its position and `right` after it, both inclusive; None is unbounded."""
    mask = Mask.window(left, right)
    return BlockMask.from_mask(mask, seqlen_q=seqlen_q, seqlen_k=seqlen_k, block_size=block_size)


@in_graphs(of_lengths)
def dilated_window(
    seqlen_q: int, seqlen_k: int | None = None, *, left: int, right: int, dilation: int, block_size: BlockSize = 128
) -> BlockMask:
    """`left` keys before the query's position and `right` after it, `dilation` apart (Longformer, arXiv 2004.05150)."""
    left, right = (
        check_int(name, value) * check_int("dilation", dilation, 1)
        for name, value in (("left", left), ("right", right))
    )
    reach = sliding_window(seqlen_q, seqlen_k, left=left, right=right, block_size=block_size)
    return reach if dilation == 1 else _at_distances(reach, lambda distance: distance % dilation == 0)


@in_graphs(of_lengths)
def strided(seqlen_q: int, seqlen_k: int | None = None, *, stride: int, block_size: BlockSize = 128) -> BlockMask:
    """The last `stride` keys and each key a multiple of `stride` back (Sparse Transformer, arXiv 1904.10509)."""
    check_int("stride", stride, 1)
    past = causal(seqlen_q, seqlen_k, block_size=block_size)
    return _at_distances(past, lambda distance: (distance < stride) | (distance % stride == 0))


@in_graphs(of_lengths)
def prefix_lm(
    prefix_lengths: torch.Tensor, seqlen_q: int, seqlen_k: int | None = None, *, block_size: BlockSize = 128
) -> BlockMask:
    """Every query sees the first prefix_lengths[b] keys and those up to its own position. int [batch]."""
    mask = Mask.prefix_lm(prefix_lengths, seqlen_q, seqlen_k)
    return BlockMask.from_mask(mask, seqlen_q=seqlen_q, seqlen_k=seqlen_k, block_size=block_size)


@in_graphs(of_documents)
def documents(ids_q: torch.Tensor, ids_k: torch.Tensor | None = None, *, block_size: BlockSize = 128) -> BlockMask:
    """Packed documents: a query sees the keys with its own id. int [batch, seqlen], not decreasing."""
    mask = Mask.documents(ids_q, ids_k)
    seqlen_k = None if ids_k is None else ids_k.shape[1]
    return BlockMask.from_mask(mask, seqlen_q=ids_q.shape[1], seqlen_k=seqlen_k, block_size=block_size)


@in_graphs(of_lengths)
def streaming(
    seqlen_q: int, seqlen_k: int | None = None, *, num_sinks: int, window: int, block_size: BlockSize = 128
) -> BlockMask:
    """The first `num_sinks` keys and the last `window` up to the query's position (StreamingLLM, arXiv 2309.17453)."""
    first = Mask.causal() & Mask.intervals(k_end=torch.tensor([[[check_int("num_sinks", num_sinks)]]]))
    first = BlockMask.from_mask(first, seqlen_q=seqlen_q, seqlen_k=seqlen_k, block_size=block_size)
    last = check_int("window", window, 1) - 1
    return first | sliding_window(seqlen_q, seqlen_k, left=last, right=0, block_size=block_size)


a_shape = streaming  # the name of the pattern in MInference, arXiv 2407.02490


@in_graphs(of_lengths)
def vertical_slash(
    seqlen_q: int,
    seqlen_k: int | None = None,
    *,
    columns: torch.Tensor,
    distances: torch.Tensor,
    block_size: BlockSize = 128,
) -> BlockMask:
    """Causal: some keys, for every query, and the keys some distances back (MInference, arXiv 2407.02490).

    columns, distances: int [n] for all heads, or [num_heads, n]; numbers of keys, and of positions back (0: itself).
    """
    seqlen_k = seqlen_q if seqlen_k is None else seqlen_k
    past = causal(seqlen_q, seqlen_k, block_size=block_size)

    def one(columns, distances):
        chosen, back = _token_set(seqlen_k, columns, "columns"), _token_set(seqlen_k, distances, "distances")
        verticals = BlockMask.from_tokens(torch.ones(seqlen_q, dtype=torch.bool), chosen, block_size=block_size)
        return (verticals & Mask.causal()) | _at_distances(past, lambda distance: back[distance.clamp(min=0)])

    if columns.dim() == distances.dim() == 1:
        return one(columns, distances)
    columns, distances = torch.atleast_2d(columns), torch.atleast_2d(distances)
    num_heads = max(len(columns), len(distances))
    return BlockMask.cat(
        [one(*pair) for pair in zip(columns.expand(num_heads, -1), distances.expand(num_heads, -1), strict=True)]
    )


@in_graphs(of_lengths)
def global_tokens(seqlen: int, tokens: int | Sequence[int] | torch.Tensor, *, block_size: BlockSize = 128) -> BlockMask:
    """Tokens that see everything and that everything sees: the first `tokens` ones, or those with these indices."""
    chosen = _token_set(seqlen, tokens, "tokens")
    everything = torch.ones_like(chosen)
    see = BlockMask.from_tokens(chosen, everything, block_size=block_size)
    return see | BlockMask.from_tokens(everything, chosen, block_size=block_size)


@in_graphs(of_lengths)
def longformer(
    seqlen: int,
    *,
    window: int,
    tokens: int | Sequence[int] | torch.Tensor = 1,
    dilation: int = 1,
    block_size: BlockSize = 128,
) -> BlockMask:
    """`window` keys to either side, `dilation` apart, and global `tokens` (Longformer, arXiv 2004.05150).

    window is one-sided: half of attention_window in transformers.
    """
    local = dilated_window(seqlen, left=window, right=window, dilation=dilation, block_size=block_size)
    return local | global_tokens(seqlen, tokens, block_size=block_size)


@in_graphs(of_lengths)
def random_blocks(
    seqlen: int, *, num_blocks: int, num_heads: int = 1, seed: int = 0, causal: bool = False, block_size: int = 64
) -> BlockMask:
    """Each block of queries sees `num_blocks` different random blocks of keys, its own for each head.

    causal: of the blocks up to its own, and there only the keys up to a query's position. Where fewer are left, all.
    """
    count = _num_blocks(seqlen, block_size)
    row = torch.arange(count)
    drawn = _draw(row + 1 if causal else torch.full_like(row, count), num_blocks, num_heads, seed)
    return _block_columns(drawn, seqlen, causal, block_size)


@in_graphs(of_lengths)
def bigbird(
    seqlen: int,
    *,
    num_window_blocks: int = 3,
    global_blocks: Sequence[int] = (0, -1),
    num_random_blocks: int = 3,
    num_heads: int = 1,
    seed: int = 0,
    causal: bool = False,
    block_size: int = 64,
) -> BlockMask:
    """A window, global blocks, and random blocks that are neither, drawn for each head (BigBird, arXiv 2007.14062).

    num_window_blocks is odd and counts the own block; negative `global_blocks` count from the end. causal: every query
    sees keys up to its own position, and random blocks lie before the window.
    """
    count, half = _num_blocks(seqlen, block_size), check_int("num_window_blocks", num_window_blocks, 1) // 2
    if num_window_blocks % 2 == 0:
        raise ValueError(f"num_window_blocks={num_window_blocks} must be odd: the own block and as many on either side")
    token_block = torch.arange(seqlen) // block_size
    window = Mask.intervals(
        (token_block - half)[None, None] * block_size, (token_block + half + 1)[None, None] * block_size
    )
    chosen = _block_set(count, global_blocks)
    mask = BlockMask.from_mask(window, seqlen_q=seqlen, block_size=block_size)
    mask = mask | global_tokens(seqlen, chosen[token_block].nonzero()[:, 0], block_size=block_size)

    free, row = (~chosen).nonzero()[:, 0], torch.arange(count)
    first, last = torch.searchsorted(free, row - half), torch.searchsorted(free, row + half + 1)
    drawn = _draw(first if causal else first + len(free) - last, num_random_blocks, num_heads, seed)
    place = torch.where(drawn < first[:, None], drawn, drawn + (last - first)[:, None])
    drawn = torch.where(drawn < 0, drawn, free[place.clamp(0, max(len(free) - 1, 0))] if len(free) else drawn)
    mask = mask | _block_columns(drawn, seqlen, causal, block_size)
    return mask & Mask.causal() if causal else mask


@in_graphs(of_lengths)
def deepspeed_fixed(
    seqlen: int,
    *,
    num_local_blocks: int = 4,
    num_global_blocks: int = 1,
    num_heads: int = 1,
    num_different_global_patterns: int = 1,
    causal: bool = False,
    horizontal_global: bool = False,
    block_size: int = 16,
) -> BlockMask:
    """Windows that do not overlap, and in each of them blocks that all queries see: DeepSpeed's FixedSparsityConfig.

    The global blocks are the last num_global_blocks of a window, in head h those h % num_different_global_patterns
    times as many before. horizontal_global: they see everything, too. causal: up to a query's own position.
    Source: DeepSpeed's sparse attention, after the Sparse Transformer's fixed heads, arXiv 1904.10509.
    """
    count, patterns = (
        _num_blocks(seqlen, block_size),
        check_int("num_different_global_patterns", num_different_global_patterns, 1),
    )
    check_int("num_local_blocks", num_local_blocks, 1)
    check_int("num_global_blocks", num_global_blocks, 1)
    if num_local_blocks % num_global_blocks or patterns > num_local_blocks // num_global_blocks:
        raise ValueError(
            f"num_local_blocks={num_local_blocks} must be a multiple of num_global_blocks={num_global_blocks}, and "
            f"num_different_global_patterns={patterns} at most their quotient"
        )
    window = torch.arange(seqlen) // (num_local_blocks * block_size)
    whole = count // num_local_blocks * num_local_blocks

    def one(pattern):
        offset = num_local_blocks - (1 + pattern) * num_global_blocks
        starts = list(range(offset, whole, num_local_blocks))
        if whole < count:
            starts.append(max(min(whole + offset, count - num_global_blocks), 0))
        blocks = [block for start in starts for block in range(start, min(start + num_global_blocks, count))]
        return _local_and_global(seqlen, window, blocks, causal, horizontal_global, block_size)

    masks = [one(pattern) for pattern in range(patterns)]
    return masks[0] if patterns == 1 else BlockMask.cat([masks[head % patterns] for head in range(num_heads)])


@in_graphs(of_lengths)
def deepspeed_variable(
    seqlen: int,
    *,
    local_window_blocks: Sequence[int] = (4,),
    global_blocks: Sequence[int] = (0,),
    num_random_blocks: int = 0,
    num_heads: int = 1,
    seed: int = 0,
    causal: bool = False,
    horizontal_global: bool = False,
    block_size: int = 16,
) -> BlockMask:
    """Windows of the given sizes (the last one repeats), blocks that all queries see, random blocks for each head.

    horizontal_global: the global blocks see everything, too. causal: up to a query's own position; random blocks are
    drawn from there. Source: DeepSpeed's VariableSparsityConfig.
    """
    count, sizes = (
        _num_blocks(seqlen, block_size),
        [check_int("local_window_blocks", n, 1) for n in local_window_blocks],
    )
    if not sizes:
        raise ValueError("local_window_blocks is empty; at least one size is needed")
    sizes += [sizes[-1]] * max(-(-(count - sum(sizes)) // sizes[-1]), 0)
    ends = torch.tensor(sizes).cumsum(0)
    window = torch.searchsorted(ends, torch.arange(seqlen) // block_size, right=True)
    mask = _local_and_global(seqlen, window, global_blocks, causal, horizontal_global, block_size)
    if check_int("num_random_blocks", num_random_blocks) == 0:
        return mask
    return mask | random_blocks(
        seqlen, num_blocks=num_random_blocks, num_heads=num_heads, seed=seed, causal=causal, block_size=block_size
    )


@in_graphs(of_axes)
def neighborhood(
    shape: Sequence[int],
    *,
    kernel_size: int | Sequence[int],
    dilation: int | Sequence[int] = 1,
    causal: bool | Sequence[bool] = False,
    stride: int | Sequence[int] = 1,
    num_prefix_tokens: int = 0,
    block_size: BlockSize = 128,
) -> BlockMask:
    """Each token of a line, an image or a video sees the kernel_size tokens around it along each axis.

    shape: (length,), (height, width) or (frames, height, width), tokens in row-major order. The other arguments are
    one value for all axes or one each. A neighbourhood is shifted at the borders, not cut, so it always has
    kernel_size tokens, dilation apart; kernel_size * dilation is at most the length of the axis. causal: the
    kernel_size tokens up to its own, cut at the border. stride, up to kernel_size: so many tokens share the window of
    the middle one (causal: of the last one). num_prefix_tokens: tokens before the first (a class token, registers)
    that see and are seen by all.
    Source: neighborhood attention, arXiv 2204.07143; dilated, arXiv 2209.15001; stride, arXiv 2504.16922.
    """
    shape = tuple(check_int("shape", size, 1) for size in shape)
    if len(shape) not in (1, 2, 3):
        raise ValueError(f"shape={shape} must have 1, 2 or 3 axes")
    options = {"kernel_size": kernel_size, "dilation": dilation, "causal": causal, "stride": stride}
    options = [per_axis(name, value, len(shape)) for name, value in options.items()]
    axes = [neighbors(*axis) for axis in zip(shape, *options, strict=True)]
    dilations = options[1]
    prefix, count = check_int("num_prefix_tokens", num_prefix_tokens), torch.Size(shape).numel()

    def coordinates(token):
        places = []
        for size in reversed(shape):
            places.append(token % size)
            token = token // size
        return places[::-1]

    def sees(b, h, query, key):
        seen = torch.ones((), dtype=torch.bool)
        pairs = zip(coordinates((query - prefix).clamp(min=0)), coordinates((key - prefix).clamp(min=0)), strict=True)
        for (q, k), (first, last), step in zip(pairs, axes, dilations, strict=True):
            seen = seen & (k >= first[q]) & (k <= last[q])
            seen = seen if step == 1 else seen & (k % step == q % step)
        return seen & (query >= prefix) & (key >= prefix)

    mask = visited_blocks(shape, axes, dilations, coordinates(torch.arange(count)), prefix, block_size).where(sees)
    return mask | global_tokens(prefix + count, prefix, block_size=block_size) if prefix else mask


# --- inside ----------------------------------------------------------------------------------------------------------


def _at_distances(mask: BlockMask, fn) -> BlockMask:
    """The pairs of `mask` with fn(position of the query - key)."""
    offset = mask.seq_lengths[1] - mask.seq_lengths[0]
    return mask.where(lambda b, h, query, key: fn(query + offset - key), by_distance=True)


def _token_set(seqlen: int, tokens, name: str) -> torch.Tensor:
    """bool [seqlen] of the first `tokens` tokens, or of those with the indices `tokens`."""
    if isinstance(tokens, int):
        return torch.arange(seqlen) < check_int(name, tokens)
    tokens = torch.as_tensor(tokens, dtype=None if isinstance(tokens, torch.Tensor) else torch.int64)
    check_integers(name, tokens, 1, seqlen)
    chosen = torch.zeros(seqlen, dtype=torch.bool)
    chosen[tokens.long()] = True
    return chosen


def _num_blocks(seqlen: int, block_size) -> int:
    if not isinstance(block_size, int):
        raise TypeError(f"block_size={one_line(block_size)} must be an int: this pattern consists of square blocks")
    return -(-check_int("seqlen", seqlen) // block_size)


def _block_set(count: int, blocks: Sequence[int]) -> torch.Tensor:
    """bool [count] of the blocks with these numbers; negative ones count from the end."""
    chosen = torch.zeros(count, dtype=torch.bool)
    for block in blocks:
        if not -count <= block < count:
            raise ValueError(f"global_blocks has {block}; it must be in {-count} ... {count - 1}")
        chosen[block] = True
    return chosen


def _local_and_global(seqlen, window, global_blocks, causal, horizontal, block_size) -> BlockMask:
    """Tokens of one window see each other; all see the global blocks, which see all if `horizontal`."""
    if causal and horizontal:
        raise ValueError("horizontal_global=True needs causal=False: a causal global block cannot see everything")
    mask = documents(window[None], block_size=block_size)
    chosen = _block_set(_num_blocks(seqlen, block_size), global_blocks)[torch.arange(seqlen) // block_size]
    everything = torch.ones_like(chosen)
    mask = mask | BlockMask.from_tokens(everything, chosen, block_size=block_size)
    if horizontal:
        mask = mask | BlockMask.from_tokens(chosen, everything, block_size=block_size)
    return mask & Mask.causal() if causal else mask


def _draw(counts: torch.Tensor, wanted: int, num_heads: int, seed: int) -> torch.Tensor:
    """int64 [num_heads, rows, wanted]: `wanted` different random numbers below counts[row], -1 where there are fewer.

    Floyd's algorithm, all rows at once (Bentley and Floyd, CACM 30(9), 1987).
    """
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.full((check_int("num_heads", num_heads), len(counts), check_int("num_random_blocks", wanted)), -1)
    for i in range(wanted):
        last = counts - wanted + i
        uniform = torch.rand(num_heads, len(counts), generator=generator, dtype=torch.float64)
        number = (uniform * (last + 1)).long().clamp(max=last)
        number = torch.where((drawn == number[..., None]).any(-1), last, number)
        drawn[..., i] = torch.where(last >= 0, number, -1)
    return drawn


def _block_columns(columns: torch.Tensor, seqlen: int, causal: bool, block_size: int) -> BlockMask:
    """Block row r of head h sees the block columns columns[h, r], -1 is none."""
    masks = []
    for head in columns:
        row, place = (head >= 0).nonzero(as_tuple=True)
        masks.append(BlockMask.from_coo(row, head[row, place], seqlen_q=seqlen, block_size=block_size, of_blocks=True))
    mask = BlockMask.cat(masks)
    return mask & Mask.causal() if causal else mask
