// Online softmax over a tile of scores^T [keys][NR], queries in the lanes: no horizontal operation anywhere.
// Scores are in units of log2 (log2(e) is folded into the softmax scale). Source: arXiv 1805.02867; the lazy maximum is
// FlashAttention-4's: a row's reference point moves only when its maximum has grown by more than `headroom`.
#pragma once
#include "simd.h"

namespace fastattn::FASTATTN_ISA {

constexpr float headroom = 8.0f;  // weights stay below 2^8, far from overflow
constexpr double ln2 = 0.693147180559945309417, log2e = 1.44269504088896340736;

// Moves max (initially -inf: no key seen) to the tile's maximum in the lanes where it has grown, and rescales sum and
// out [out_rows][NR] there. Each lane decides for itself, so a row's bits do not depend on its neighbours.
template <class Real, int NV>
FASTATTN_INLINE void update_max(const Real* scores, int64_t keys, Real* max, Real* sum, Real* out, int64_t out_rows) {
  constexpr int L = VL<Real>, NR = NV * L;
  using V = Vec<Real>;
  const V lowest = splat((Real)-__builtin_inf());
  V tile[NV];
  for (int v = 0; v < NV; v++) tile[v] = lowest;
  for (int64_t j = 0; j < keys; j++)
    for (int v = 0; v < NV; v++) tile[v] = vmax(load(scores + j * NR + v * L), tile[v]);
  for (int v = 0; v < NV; v++) {
    V old = load(max + v * L);
    auto grown = tile[v] > old + (Real)headroom;
    if (!any<Real>(grown)) continue;
    V now = grown ? tile[v] : old;
    store(max + v * L, now);
    V factor = grown ? exp2(old - now) : splat((Real)1);
    store(sum + v * L, load(sum + v * L) * factor);
    for (int64_t d = 0; d < out_rows; d++) store(out + d * NR + v * L, load(out + d * NR + v * L) * factor);
  }
}

// scores -> 2^(scores - max) in place; sum += the column sums.
template <class Real, int NV>
FASTATTN_INLINE void weigh(Real* scores, int64_t keys, const Real* max, Real* sum) {
  constexpr int L = VL<Real>, NR = NV * L;
  using V = Vec<Real>;
  V shift[NV], total[NV];
  for (int v = 0; v < NV; v++) {
    V m = load(max + v * L);
    shift[v] = m == (Real)-__builtin_inf() ? V{} : m;
    total[v] = V{};
  }
  for (int64_t j = 0; j < keys; j++)
    for (int v = 0; v < NV; v++) {
      V p = exp2(load(scores + j * NR + v * L) - shift[v]);
      store(scores + j * NR + v * L, p);
      total[v] += p;
    }
  for (int v = 0; v < NV; v++) store(sum + v * L, load(sum + v * L) + total[v]);
}

// What a row's maximum and sum mean in the end: the factor of its accumulated output, and its lse (natural log).
struct Normalizer {
  double factor, lse;
};

// sink: one more logit (natural log) in the denominator; -inf: none.
FASTATTN_INLINE Normalizer normalizer(double max, double sum, double sink) {
  const double infinity = __builtin_inf();
  double reference = max == -infinity ? 0.0 : max, sink2 = sink * log2e;
  if (sink2 != -infinity) {
    double top = sum == 0.0 || reference < sink2 ? sink2 : reference;
    double scale = sum == 0.0 ? 0.0 : __builtin_exp2(reference - top);
    double total = sum * scale + __builtin_exp2(sink2 - top);
    return {scale / total, (top + __builtin_log2(total)) * ln2};
  }
  if (sum == 0.0) return {0.0, -infinity};  // no key seen
  return {1.0 / sum, (reference + __builtin_log2(sum)) * ln2};
}

}  // namespace fastattn::FASTATTN_ISA
