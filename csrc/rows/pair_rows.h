// Rows of bfloat16 as pairs: of neighbouring columns, as rows lie, or of neighbouring rows.
#pragma once
#include "rows.h"
#include "tile/pairs.h"
#include "transpose.h"

namespace fastattn::FASTATTN_ISA {

FASTATTN_INLINE int64_t pairs_in(int64_t columns) { return (columns + 1) / 2; }
// Rows or columns that `pack_columns` fills.
FASTATTN_INLINE int64_t packed(int64_t n) { return round_up(n, pair_steps); }

// Rows row ... row + count - 1 copied to `to`, `stride` pairs apart; the last pair of an odd row ends with 0.
FASTATTN_INLINE void copy_pair_rows(const Tensor& t, int64_t batch, int64_t head, int64_t row, int64_t count,
                                    int64_t columns, Pair* to, int64_t stride) {
  copy_rows(t, batch, head, row, count, columns, (char*)to, stride * sizeof(Pair));
  if (columns % 2)
    for (int64_t j = 0; j < count; j++) memset(&to[j * stride + columns / 2].high, 0, 2);  // may be read as Real
}

// The same rows in place if they are whole pairs side by side, else (or if asked) copied.
inline TileRows<Pair> pair_rows(const Tensor& t, int64_t batch, int64_t head, int64_t row, int64_t count,
                                int64_t columns, Pair* buffer, int64_t stride, bool copies) {
  const bool lies = t.stride[3] == 1 && t.stride[2] % 2 == 0 && columns % 2 == 0 && runs_on(t, row, count);
  if (!copies && lies) return {(const Pair*)at(t, batch, head, row), t.stride[2] / 2};
  copy_pair_rows(t, batch, head, row, count, columns, buffer, stride);
  return {buffer, stride};
}

// to[j * stride + d] = column `column` + d of rows row + 2 j and row + 2 j + 1, of which the last may be none: 0.
inline void interleave_rows(const Tensor& t, int64_t batch, int64_t head, int64_t row, int64_t count, int64_t column,
                            int64_t columns, Pair* to, int64_t stride) {
  const int64_t step = t.stride[3];
  for (int64_t j = 0; j < count; j += 2, to += stride) {
    const uint16_t* low = (const uint16_t*)at(t, batch, head, row + j, column);
    const bool whole = j + 1 < count;
    const uint16_t* high = whole ? (const uint16_t*)at(t, batch, head, row + j + 1, column) : low;
    int64_t d = 0;
    if (step == 1 && whole)
      for (; d + PL <= columns; d += PL) store_pairs(to + d, (Pairs)(widen(low + d) | widen(high + d) << 16));
    for (; d < columns; d++) to[d] = {low[d * step], whole ? high[d * step] : (uint16_t)0};
  }
}

// Rows row ... row + count - 1 as pairs of rows that are columns of a product: [pairs][stride]. For tile registers each
// block of 16 x 16 is turned, [column][pair], with zeros where there is no row; no block is left out of the last pairs.
inline void pack_columns(const Tensor& t, int64_t batch, int64_t head, int64_t row, int64_t count, int64_t columns,
                         Pair* to, int64_t stride) {
  if constexpr (!has_tiles) return interleave_rows(t, batch, head, row, count, 0, columns, to, stride);
  constexpr int64_t n = pair_steps;
  for (int64_t j = 0; j < count; j += 2 * n)
    for (int64_t d = 0; d < columns; d += n) {
      Pair block[n * n] = {};
      interleave_rows(t, batch, head, row + j, smaller(2 * n, count - j), d, smaller(n, columns - d), block, n);
      transpose((const float*)block, n, n, n, (float*)(to + j / 2 * stride + d), stride);
    }
}

// rows [NR], `stride` pairs apart, to lanes [pairs][NR].
FASTATTN_INLINE void transpose_pairs(TileRows<Pair> rows, int64_t NR, int64_t pairs, Pair* lanes) {
  transpose((const float*)rows.data, rows.stride, NR, pairs, (float*)lanes, NR);
}
// The same of rows row ... row + count - 1, at most NR, with zeros behind them; buffer: room for [NR][pairs].
inline void pairs_to_lanes(const Tensor& t, int64_t batch, int64_t head, int64_t row, int64_t count, int64_t columns,
                           int64_t NR, Pair* buffer, Pair* lanes) {
  const int64_t pairs = pairs_in(columns);
  const bool in_place = count == NR && (uintptr_t)at(t, batch, head, row) % alignof(float) == 0;  // read as words
  if (count < NR) memset((void*)(buffer + count * pairs), 0, (NR - count) * pairs * sizeof(Pair));
  transpose_pairs(pair_rows(t, batch, head, row, count, columns, buffer, pairs, !in_place), NR, pairs, lanes);
}

}  // namespace fastattn::FASTATTN_ISA
