// Masks as loop bounds: which keys a row sees, which a panel of rows visits; and where single keys must be masked.
#pragma once
#include "rows/rows.h"

namespace fastattn::FASTATTN_ISA {

struct Range {
  int64_t lo, hi;
};

// Of `keys` keys, those from diagonal `lo` to diagonal `hi` of query `query`; an empty range is {0, 0}.
FASTATTN_INLINE Range between_diagonals(int64_t query, int64_t lo, int64_t hi, int64_t keys) {
  const Range seen{larger<int64_t>(0, query + lo), smaller(keys, query + hi + 1)};
  return {seen.lo < seen.hi ? seen.lo : 0, seen.lo < seen.hi ? seen.hi : 0};
}

// Query `query` of (batch, head) sees keys lo ... hi - 1; an empty range is {0, 0}.
FASTATTN_INLINE Range row_range(const Operands& p, int64_t batch, int64_t head, int64_t query) {
  auto [lo, hi] = between_diagonals(query, p.diagonal_lo, p.diagonal_hi, p.seqlen_k);
  if (p.k_start) lo = larger<int64_t>(lo, *(const int32_t*)at(p.k_start, batch, head, query));
  if (p.k_end) hi = smaller<int64_t>(hi, *(const int32_t*)at(p.k_end, batch, head, query));
  return lo < hi ? Range{lo, hi} : Range{0, 0};
}

// Row r of the rows that start at `head`, several heads stacked.
struct QueryRow {
  int64_t head, query;
};
FASTATTN_INLINE QueryRow stacked_row(const Operands& p, int64_t head, int64_t r) {
  if (r < p.seqlen_q) return {head, r};  // spares the division
  return {head + r / p.seqlen_q, r % p.seqlen_q};
}

// The union of the rows' ranges, empty ones left out.
FASTATTN_INLINE Range visited_range(const Operands& p, int64_t batch, int64_t head, int64_t row, int64_t rows) {
  const bool one_head = row + rows <= p.seqlen_q || row / p.seqlen_q == (row + rows - 1) / p.seqlen_q;
  if (!p.k_start && !p.k_end && one_head) {  // the ranges move with the rows: the first and the last one suffice
    QueryRow first = stacked_row(p, head, row), last = stacked_row(p, head, row + rows - 1);
    int64_t lo = larger<int64_t>(0, first.query + p.diagonal_lo);
    int64_t hi = smaller(p.seqlen_k, last.query + p.diagonal_hi + 1);
    return lo < hi ? Range{lo, hi} : Range{0, 0};
  }
  Range all{p.seqlen_k, 0};
  for (int64_t r = row; r < row + rows; r++) {
    QueryRow s = stacked_row(p, head, r);
    Range one = row_range(p, batch, s.head, s.query);
    if (one.lo < one.hi) all = {smaller(all.lo, one.lo), larger(all.hi, one.hi)};
  }
  return all.lo < all.hi ? all : Range{0, 0};
}

// The query rows that stand in the lanes of one panel. Lanes past `rows` hold zeros and are never stored.
struct Lanes {
  int64_t batch, head, row, rows;  // stacked rows row ... row + rows - 1 from `head`
  Range visited;                   // keys that some lane sees
  Range common;                    // keys that every lane sees
};

// Masks keys outside the lanes' intervals; first[lane] <= j < last[lane] is seen, j counted from the tile's first key.
// Every lane sees the keys common_lo ... common_hi - 1.
template <class Real, int NV>
void mask_intervals(Real* scores, int64_t keys, const Real* first, const Real* last, int64_t common_lo,
                    int64_t common_hi) {
  constexpr int L = VL<Real>, NR = NV * L;
  const Vec<Real> lowest = splat((Real)-__builtin_inf());
  for (int64_t j = 0; j < keys; j++) {
    if (j == common_lo && common_hi > common_lo) j = common_hi;
    if (j >= keys) break;
    for (int v = 0; v < NV; v++) {
      Real* s = scores + j * NR + v * L;
      Vec<Real> x = load(first + v * L) > (Real)j ? lowest : load(s);
      store(s, load(last + v * L) > (Real)j ? x : lowest);
    }
  }
}

}  // namespace fastattn::FASTATTN_ISA
