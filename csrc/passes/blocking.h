// How a problem is cut into units, panels, tiles and splits: from its shape alone.
#pragma once
#include "kernels.h"
#include "scores/intervals.h"

namespace fastattn::FASTATTN_ISA {

constexpr int64_t unit_rows = 128, key_block = 128, few_units = 32, min_split_keys = 512;

// Wide panels want an L1 that holds their scores beside the tile's operands. Narrow ones cost twice the loads, which
// a CPU with one multiply-add a cycle has to spare.
FASTATTN_INLINE int panel_vectors(int64_t rows, int64_t lanes) {
  return rows <= lanes || l1_data_bytes() < FASTATTN_WIDE_L1 ? 1 : max_vectors;
}

// The lanes of a panel for `rows` rows in blocks of block_q, which no panel straddles; block_q: a multiple of 16.
template <class Real>
FASTATTN_INLINE int panel_lanes(int64_t rows, const BlockLists* blocks) {
  const int vectors = panel_vectors(blocks ? smaller(rows, blocks->block_q) : rows, VL<Real>);
  return blocks && blocks->block_q % (vectors * VL<Real>) ? VL<Real> : vectors * VL<Real>;
}

// Keys of a tile: whole register tiles of a panel of `lanes`.
template <class Real>
FASTATTN_INLINE int64_t tile_keys(int64_t lanes) {
  return round_up(key_block * 4 / sizeof(Real), lanes == VL<Real> ? MR<1> : MR<max_vectors>);
}

// The same in a list of blocks: the largest equal part of block_k keys that does not exceed `largest`; even for pairs.
FASTATTN_INLINE int64_t tile_of_block(int64_t block_k, int64_t largest, bool pairs) {
  int64_t parts = (block_k + largest - 1) / largest;
  while (block_k % (pairs ? 2 * parts : parts)) parts++;
  return block_k / parts;
}

template <class Real>
Blocking make_blocking(const Operands& p) {
  Blocking b{};
  const int64_t group_size = p.num_heads_k ? p.group_size() : 1;
  b.heads_per_unit = (int)(p.seqlen_q < unit_rows && !p.blocks ? group_size : 1);
  const int64_t stacked = p.seqlen_q * b.heads_per_unit;
  b.lanes = panel_lanes<Real>(stacked, p.blocks);
  const int64_t rows = p.head_dim + p.head_dim_v > 512 ? unit_rows / 2 : unit_rows;  // the panels should stay in L2
  b.rows = (int)smaller(round_up(rows, b.lanes), round_up(larger<int64_t>(stacked, 1), b.lanes));
  b.n_block = (int)tile_keys<Real>(b.lanes);
  if (p.blocks) {
    b.rows = (int)p.blocks->block_q;
    b.n_block = (int)tile_of_block(p.blocks->block_k, b.n_block, p.in_pairs);
    b.num_splits = 1, b.split_keys = round_up(larger<int64_t>(p.seqlen_k, 1), b.n_block);
    return b;
  }

  // Few row blocks (decoding, few heads): cut the keys as well, so that every core has work.
  const int64_t units = p.num_heads / b.heads_per_unit * ((stacked + b.rows - 1) / b.rows);
  int64_t splits = units && units < few_units ? few_units / units : 1;
  splits = larger<int64_t>(1, smaller(splits, p.seqlen_k / min_split_keys));
  b.split_keys = larger<int64_t>(b.n_block, round_up((p.seqlen_k + splits - 1) / splits, b.n_block));
  b.num_splits = (int)larger<int64_t>(1, (p.seqlen_k + b.split_keys - 1) / b.split_keys);
  return b;
}

}  // namespace fastattn::FASTATTN_ISA
