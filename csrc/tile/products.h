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
// The next of `left` rows for them, all of like size: a sliver would idle the pipes. Tile registers want whole ones.
template <int R>
FASTATTN_INLINE int64_t tile_rows_of(int64_t left) {
  if constexpr (has_tiles) return smaller<int64_t>(left, R);
  const int64_t tiles = tiles_of<R>(left);
  return (left + tiles - 1) / tiles;
}

// Called after each register tile; see rows/lines_ahead.h.
struct NothingAhead {
  void operator()() const {}
};

// scores [keys][NR] = K Q^T, and their maxima; `before` is worked off on the way, and `ahead` is called after each tile.
// steps: elements of a row.
template <class Real, int NV, int R = MR<NV>, class Element, class Weights, class Ahead = NothingAhead>
void scores_product(TileRows<Element> k, int64_t keys, const Element* q, int64_t steps, Real* scores, Real* largest,
                    Weights& before, Ahead&& ahead = {}) {
  constexpr int NR = NV * VL<Real>;
  while (keys) {
    const int64_t rows = tile_rows_of<R>(keys);
    if (rows == R) {
      scores_tile<Real, R, NV>(k.data, k.stride, q, steps, scores, largest, before);
      ahead();
    } else if constexpr (R > 1) {
      scores_product<Real, NV, R - 1>(k, rows, q, steps, scores, largest, before, ahead);
    }
    k.data += rows * k.stride;
    scores += rows * NR;
    keys -= rows;
  }
}

// out [columns][NR] += V^T P^T, or = where it is fresh. steps: rows of v and p.
template <class Real, int NV, int R = MR<NV>, class Element, class Ahead = NothingAhead>
void out_product(TileRows<Element> v, int64_t columns, const Element* p, int64_t steps, bool fresh, Real* out,
                 Ahead&& ahead = {}) {
  constexpr int NR = NV * VL<Real>;
  while (columns) {
    const int64_t rows = tile_rows_of<R>(columns);
    if (rows == R) {
      out_tile<Real, R, NV>(v.data, v.stride, p, steps, fresh, out);
      ahead();
    } else if constexpr (R > 1) {
      out_product<Real, NV, R - 1>(v, rows, p, steps, fresh, out, ahead);
    }
    v.data += rows;
    out += rows * NR;
    columns -= rows;
  }
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
