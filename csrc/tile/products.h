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

// out += V^T P^T for R columns. The tile starts from zero: shorter sums are more accurate than one long one.
template <class Real, int R, int NV>
__attribute__((noinline)) void out_tile(const Real* v, int64_t v_stride, const Real* p, int64_t keys, Real* out) {
  constexpr int L = VL<Real>;
  auto tile = multiply<Real, R, NV>(v, 1, v_stride, p, NV * L, keys, [] {});
  add_tile(tile, out, std::make_integer_sequence<int, R * NV>{});
}

// The next of `left` rows for register tiles of up to R: never a sliver beside a full tile, which would idle the pipes.
template <int R>
FASTATTN_INLINE int64_t tile_rows_of(int64_t left) {
  return left <= R ? left : left < R + R / 2 ? (left + 1) / 2 : R;
}

// scores [keys][NR] = K Q^T, and their maxima; `before` is worked off on the way.
template <class Real, int NV, int R = MR<NV>>
void scores_product(TileRows<Real> k, int64_t keys, const Real* q, int64_t head_dim, Real* scores, Real* largest,
                    Weigher<Real, NV>& before) {
  constexpr int NR = NV * VL<Real>;
  while (keys) {
    const int64_t rows = tile_rows_of<R>(keys);
    if (rows == R)
      scores_tile<Real, R, NV>(k.data, k.stride, q, head_dim, scores, largest, before);
    else if constexpr (R > 1)
      scores_product<Real, NV, R - 1>({k.data, k.stride}, rows, q, head_dim, scores, largest, before);
    k.data += rows * k.stride;
    scores += rows * NR;
    keys -= rows;
  }
}

// out [columns][NR] += V^T P^T
template <class Real, int NV, int R = MR<NV>>
void out_product(TileRows<Real> v, int64_t columns, const Real* p, int64_t keys, Real* out) {
  constexpr int NR = NV * VL<Real>;
  while (columns) {
    const int64_t rows = tile_rows_of<R>(columns);
    if (rows == R)
      out_tile<Real, R, NV>(v.data, v.stride, p, keys, out);
    else if constexpr (R > 1)
      out_product<Real, NV, R - 1>(v, rows, p, keys, out);
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
