// The two products of the forward pass on the register tile: of Real, or of pairs of bfloat16 (Element).
#pragma once
#include "pair_products.h"

namespace fastattn::FASTATTN_ISA {

// Behind q of pairs, [steps][NR], stands a row of what the lanes' scores are to be multiplied by.
template <class Real, int R, int NV, class Element, class Weights>
__attribute__((noinline)) void scores_tile(const Element* k, int64_t k_stride, const Element* q, int64_t steps, Real* s,
                                           Real* largest, Weights& before) {
  constexpr int L = VL<Real>;
  Weights aside = before;
  auto tile = multiply<Real, R, NV>(k, k_stride, 1, q, NV * L, steps, aside);
  before.go_on_from(aside);
  if constexpr (std::is_same_v<Element, Pair>)
    scale_tile(tile, (const float*)(q + steps * NV * L), std::make_integer_sequence<int, R * NV>{});
  store_tile(tile, s, std::make_integer_sequence<int, R * NV>{});
  max_tile(tile, largest, std::make_integer_sequence<int, NV>{});
}

// out += V^T P^T for R columns, or = where out is fresh. The tile starts from zero: shorter sums are more accurate than
// one long one.
template <class Real, int R, int NV, class Element>
__attribute__((noinline)) void out_tile(const Element* v, int64_t v_stride, const Element* p, int64_t steps, bool fresh,
                                        Real* out) {
  constexpr int L = VL<Real>;
  auto tile = multiply<Real, R, NV>(v, 1, v_stride, p, NV * L, steps, [] {});
  constexpr std::make_integer_sequence<int, R * NV> all;
  if (fresh)
    store_tile(tile, out, all);
  else
    add_tile(tile, out, all);
}

// Register tiles of up to R rows that `rows` rows take.
template <int R>
FASTATTN_INLINE int64_t tiles_of(int64_t rows) {
  return (rows + R - 1) / R;
}
// Calls tile(row, integral_constant R) for register tiles of up to R rows that cover `rows`.
template <int R, class Tile>
FASTATTN_INLINE void one_tile(int64_t row, int64_t rows, const Tile& tile) {
  if (rows == R)
    tile(row, std::integral_constant<int, R>{});
  else if constexpr (R > 1)
    one_tile<R - 1>(row, rows, tile);
}
template <int R, class Tile>
FASTATTN_INLINE void each_tile(int64_t rows, const Tile& tile) {
  if constexpr (has_tiles) {  // tile registers want whole ones
    for (int64_t row = 0; row < rows; row += R) one_tile<R>(row, smaller<int64_t>(rows - row, R), tile);
  } else if (rows) {  // all of like size, the larger ones first: a sliver would idle the pipes
    const int64_t tiles = tiles_of<R>(rows), most = (rows + tiles - 1) / tiles;
    const int64_t of_most = (rows - (most - 1) * tiles) * most;
    for (int64_t row = 0, n; row < rows; row += n) one_tile<R>(row, n = row < of_most ? most : most - 1, tile);
  }
}

// Called after each register tile; see rows/lines_ahead.h.
struct NothingAhead {
  void operator()() const {}
};

// scores [keys][NR] = K Q^T, and their maxima; `before` is worked off on the way, and `ahead` is called after each tile.
// steps: elements of a row.
template <class Real, int NV, class Element, class Weights, class Ahead = NothingAhead>
void scores_product(TileRows<Element> k, int64_t keys, const Element* q, int64_t steps, Real* scores, Real* largest,
                    Weights& before, Ahead&& ahead = {}) {
  each_tile<MR<NV>>(keys, [&](int64_t key, auto R) {
    scores_tile<Real, decltype(R)::value, NV>(k.data + key * k.stride, k.stride, q, steps, scores + key * NV * VL<Real>,
                                              largest, before);
    ahead();
  });
}

// out [columns][NR] += V^T P^T, or = where it is fresh. steps: rows of v and p.
template <class Real, int NV, class Element, class Ahead = NothingAhead>
void out_product(TileRows<Element> v, int64_t columns, const Element* p, int64_t steps, bool fresh, Real* out,
                 Ahead&& ahead = {}) {
  each_tile<MR<NV>>(columns, [&](int64_t column, auto R) {
    out_tile<Real, decltype(R)::value, NV>(v.data + column, v.stride, p, steps, fresh, out + column * NV * VL<Real>);
    ahead();
  });
}

// out += V^T P^T where a masked key contributes nothing, not 0 * NaN; seen: the scores before the softmax.
template <class Real, int NV>
void select_out(TileRows<Real> v, const Real* p, const Real* seen, int64_t keys, int64_t head_dim_v, Real* out) {
  constexpr int L = VL<Real>, NR = NV * L;
  for (int64_t d = 0; d < head_dim_v; d++)
    for (int i = 0; i < NR; i += L) {
      Vec<Real> sum{};
      for (int64_t j = 0; j < keys; j++) {
        Vec<Real> with = sum + load(p + j * NR + i) * v.data[j * v.stride + d];
        sum = load(seen + j * NR + i) == (Real)-__builtin_inf() ? sum : with;
      }
      store(out + d * NR + i, load(out + d * NR + i) + sum);
    }
}

}  // namespace fastattn::FASTATTN_ISA
