// ALiBi: scores -= slope * |position of the query - position of the key|, and the gradient of the slopes.
#pragma once
#include "rows/rows.h"
#include "tile/softmax.h"

namespace fastattn::FASTATTN_ISA {

// 0: no ALiBi.
template <class Real>
FASTATTN_INLINE Real slope_of(const Operands& p, int64_t batch, int64_t head) {
  return p.alibi_slopes ? load_number<Real>(p.alibi_slopes, batch, head) : 0;
}

// scores[j][lane] -= slopes[lane] * |position[lane] - key - j|
template <class Real, int NV>
void add_alibi(Real* scores, int64_t keys, const Real* slopes, const Real* positions, int64_t key) {
  constexpr int L = VL<Real>, NR = NV * L;
  for (int v = 0; v < NV; v++) {
    Vec<Real> slope = load(slopes + v * L), position = load(positions + v * L);
    for (int64_t j = 0; j < keys; j++) {
      Real* s = scores + j * NR + v * L;
      store(s, load(s) - slope * vabs(position - (Real)(key + j)));
    }
  }
}

// The same for one query, keys in the lanes; n: whole vectors.
template <class Real>
void add_alibi_row(Real* scores, int64_t n, Real slope, Real position, int64_t key) {
  Vec<Real> lane;
  for (int i = 0; i < VL<Real>; i++) lane[i] = (Real)i;
  for (int64_t j = 0; j < n; j += VL<Real>)
    store(scores + j, load(scores + j) - slope * vabs(position - (lane + (Real)(key + j))));
}

// sums[lane] -= dS * |position[lane] - key - j|, what add_alibi does to the scores.
template <class Real, int NV>
void add_slope_sums(const Real* ds, int64_t stride, int64_t keys, const Real* positions, int64_t key, Real* sums) {
  constexpr int L = VL<Real>;
  for (int v = 0; v < NV; v++) {
    const Vec<Real> position = load(positions + v * L);
    Vec<Real> sum{};
    for (int64_t j = 0; j < keys; j++) sum += load(ds + j * stride + v * L) * vabs(position - (Real)(key + j));
    store(sums + v * L, load(sums + v * L) - sum);
  }
}

}  // namespace fastattn::FASTATTN_ISA
