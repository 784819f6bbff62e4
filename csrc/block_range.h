// Masks as loop bounds: which keys a row sees, which a panel of rows visits, and where it needs an element mask.
#pragma once
#include "pack.h"

namespace fastattn::FASTATTN_ISA {

template <class T>
FASTATTN_INLINE T smaller(T a, T b) {
  return a < b ? a : b;
}
template <class T>
FASTATTN_INLINE T larger(T a, T b) {
  return a < b ? b : a;
}
FASTATTN_INLINE int64_t round_up(int64_t x, int64_t step) { return (x + step - 1) / step * step; }

struct Range {
  int64_t lo, hi;
};

// Query `query` of (batch, head) sees keys lo ... hi - 1; an empty range is {0, 0}.
FASTATTN_INLINE Range row_range(const Problem& p, int64_t batch, int64_t head, int64_t query) {
  int64_t lo = larger<int64_t>(0, query + p.diagonal_lo), hi = smaller(p.seqlen_k, query + p.diagonal_hi + 1);
  if (p.k_start) lo = larger<int64_t>(lo, *(const int32_t*)at(p.k_start, batch, head, query));
  if (p.k_end) hi = smaller<int64_t>(hi, *(const int32_t*)at(p.k_end, batch, head, query));
  return lo < hi ? Range{lo, hi} : Range{0, 0};
}

// Row r of the rows that start at `head`, several heads stacked.
struct Row {
  int64_t head, query;
};
FASTATTN_INLINE Row stacked_row(const Problem& p, int64_t head, int64_t r) {
  if (r < p.seqlen_q) return {head, r};  // spares the division
  return {head + r / p.seqlen_q, r % p.seqlen_q};
}

// The union of the rows' ranges, empty ones left out.
FASTATTN_INLINE Range visited_range(const Problem& p, int64_t batch, int64_t head, int64_t row, int64_t rows) {
  if (!p.k_start && !p.k_end && row / p.seqlen_q == (row + rows - 1) / p.seqlen_q) {  // monotone: the ends suffice
    Row first = stacked_row(p, head, row), last = stacked_row(p, head, row + rows - 1);
    int64_t lo = larger<int64_t>(0, first.query + p.diagonal_lo);
    int64_t hi = smaller(p.seqlen_k, last.query + p.diagonal_hi + 1);
    return lo < hi ? Range{lo, hi} : Range{0, 0};
  }
  Range all{p.seqlen_k, 0};
  for (int64_t r = row; r < row + rows; r++) {
    Row s = stacked_row(p, head, r);
    Range one = row_range(p, batch, s.head, s.query);
    if (one.lo < one.hi) all = {smaller(all.lo, one.lo), larger(all.hi, one.hi)};
  }
  return all.lo < all.hi ? all : Range{0, 0};
}

// Keys lo ... hi - 1 and, unless their whole block is seen, the bitmap of the block.
struct KeyTile {
  int64_t lo, hi;
  const uint8_t* bitmap = nullptr;
};

// Calls visit(KeyTile) for tiles of up to n_block keys within lo ... hi - 1: the one question that a mask has to answer.
// With blocks: tiles of those in `list`.
template <class Call>
FASTATTN_INLINE void each_key_tile(const BlockLists* blocks, int64_t list, int64_t lo, int64_t hi, int64_t n_block,
                                   const Call& visit) {
  if (!blocks) {
    for (int64_t key = lo / n_block * n_block; key < hi; key += n_block)
      visit(KeyTile{larger(key, lo), smaller(key + n_block, hi)});
    return;
  }
  for (int64_t i = blocks->first[list]; i < blocks->first[list + 1]; i++) {
    const Visit& block = blocks->visits[i];
    const int64_t from = block.block * blocks->block_k, to = smaller(from + blocks->block_k, hi);
    for (int64_t key = from; key < to; key += n_block) {
      const KeyTile tile{larger(key, lo), smaller(key + n_block, to), blocks->bitmap(block)};
      if (tile.lo < tile.hi) visit(tile);
    }
  }
}

}  // namespace fastattn::FASTATTN_ISA
