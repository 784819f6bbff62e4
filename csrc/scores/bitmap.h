// A BlockMask: which tiles of keys are visited, and the pairs that the bitmap of a block masks.
#pragma once
#include "mask.h"

namespace fastattn::FASTATTN_ISA {

// Keys lo ... hi - 1 and, unless their whole block is seen, the bitmap of the block.
struct KeyTile {
  int64_t lo, hi;
  const uint8_t* bitmap = nullptr;
};

// Calls visit(KeyTile) for tiles of up to n_block keys within lo ... hi - 1: the one question that a mask has to answer.
// With blocks: tiles of those in `list`.
template <class Visitor>
FASTATTN_INLINE void each_key_tile(const BlockLists* blocks, int64_t list, int64_t lo, int64_t hi, int64_t n_block,
                                   const Visitor& visit) {
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

// Bits from ... from + count - 1 of a row of `bytes` bytes, count <= 32.
FASTATTN_INLINE uint32_t bits_of(const uint8_t* row, int64_t bytes, int64_t from) {
  uint64_t word = 0;
  const int64_t byte = from / 8;
  if (byte + 8 <= bytes)
    memcpy(&word, row + byte, 8);
  else
    for (int64_t i = byte; i < bytes; i++) word |= (uint64_t)row[i] << (i - byte) * 8;
  return (uint32_t)(word >> from % 8);
}

// The first to the last of `count` bits from `from` that are 1 in one of `rows` rows of row_bits bits; {0, 0} if none is.
FASTATTN_INLINE Range set_bits(const uint8_t* bits, int64_t row_bits, int64_t from, int64_t count, int64_t rows) {
  Range set{0, 0};
  for (int64_t j = 0; j < count; j += 32) {
    uint32_t word = 0;
    for (int64_t r = 0; r < rows; r++) word |= bits_of(bits + r * row_bits / 8, row_bits / 8, from + j);
    if (count - j < 32) word &= ((uint32_t)1 << (count - j)) - 1;
    if (!word) continue;
    if (!set.hi) set.lo = j + __builtin_ctz(word);
    set.hi = j + 32 - __builtin_clz(word);
  }
  return set;
}

// Masks the pairs whose bit is 0. bits: those of the panel's first row, in rows of row_bits; the keys start at bit `from`.
template <class Real, int NV>
void mask_bits(Real* scores, int64_t keys, const uint8_t* bits, int64_t row_bits, int64_t from, int64_t rows) {
  mask_by_words<Real, NV>(scores, keys, rows, [&](int64_t r, int64_t j, int64_t) {
    return bits_of(bits + r * row_bits / 8, row_bits / 8, from + j);
  });
}

// Whether a row sees a key.
FASTATTN_INLINE bool block_sees(const BlockLists& blocks, int64_t batch, QueryRow row, int64_t key) {
  const int64_t list = blocks.index(batch, row.head, row.query / blocks.block_q);
  const Visit *visit = blocks.visits + blocks.first[list], *end = blocks.visits + blocks.first[list + 1];
  while (visit < end && visit->block < key / blocks.block_k) visit++;
  if (visit == end || visit->block != key / blocks.block_k) return false;
  const uint8_t* bits = blocks.bitmap(*visit);
  const int64_t bit = row.query % blocks.block_q * blocks.block_k + key % blocks.block_k;
  return !bits || bits[bit / 8] >> bit % 8 & 1;
}

}  // namespace fastattn::FASTATTN_ISA
