// The two products of the forward pass on the register tile.
#pragma once
#include "softmax.h"

namespace fastattn::FASTATTN_ISA {

template <class Real, int R, int NV>
__attribute__((noinline)) void scores_tile(const Real* k, int64_t k_stride, const Real* q, int64_t head_dim, Real* s,
                                           Real* largest, Weigher<Real, NV>& before) {
  constexpr int L = VL<Real>;
  Weigher<Real, NV> aside = before;
  auto tile = multiply<Real, R, NV>(k, k_stride, 1, q, NV * L, head_dim, aside);
  before.scores = aside.scores;
  before.lane = aside.lane;
  store_tile(tile, s, std::make_integer_sequence<int, R * NV>{});
  max_tile(tile, largest, std::make_integer_sequence<int, NV>{});
}

// out += V^T P^T for R columns, or = where out is fresh. The tile starts from zero: shorter sums are more accurate than
// one long one.
template <class Real, int R, int NV>
__attribute__((noinline)) void out_tile(const Real* v, int64_t v_stride, const Real* p, int64_t keys, bool fresh,
                                        Real* out) {
  constexpr int L = VL<Real>;
  auto tile = multiply<Real, R, NV>(v, 1, v_stride, p, NV * L, keys, [] {});
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
// The next of `left` rows for them, all of like size: a sliver would idle the pipes.
template <int R>
FASTATTN_INLINE int64_t tile_rows_of(int64_t left) {
  const int64_t tiles = tiles_of<R>(left);
  return (left + tiles - 1) / tiles;
}

// Called after each register tile; see rows/lines_ahead.h.
struct NothingAhead {
  void operator()() const {}
};

// scores [keys][NR] = K Q^T, and their maxima; `before` is worked off on the way, and `ahead` is called after each tile.
template <class Real, int NV, class Ahead = NothingAhead, int R = MR<NV>>
void scores_product(TileRows<Real> k, int64_t keys, const Real* q, int64_t head_dim, Real* scores, Real* largest,
                    Weigher<Real, NV>& before, Ahead&& ahead = {}) {
  constexpr int NR = NV * VL<Real>;
  while (keys) {
    const int64_t rows = tile_rows_of<R>(keys);
    if (rows == R) {
      scores_tile<Real, R, NV>(k.data, k.stride, q, head_dim, scores, largest, before);
      ahead();
    } else if constexpr (R > 1) {
      scores_product<Real, NV, Ahead&, R - 1>({k.data, k.stride}, rows, q, head_dim, scores, largest, before, ahead);
    }
    k.data += rows * k.stride;
    scores += rows * NR;
    keys -= rows;
  }
}

// out [columns][NR] += V^T P^T, or = where it is fresh.
template <class Real, int NV, class Ahead = NothingAhead, int R = MR<NV>>
void out_product(TileRows<Real> v, int64_t columns, const Real* p, int64_t keys, bool fresh, Real* out,
                 Ahead&& ahead = {}) {
  constexpr int NR = NV * VL<Real>;
  while (columns) {
    const int64_t rows = tile_rows_of<R>(columns);
    if (rows == R) {
      out_tile<Real, R, NV>(v.data, v.stride, p, keys, fresh, out);
      ahead();
    } else if constexpr (R > 1) {
      out_product<Real, NV, Ahead&, R - 1>(v, rows, p, keys, fresh, out, ahead);
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
