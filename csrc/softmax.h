// Online softmax over a tile of scores^T [keys][NR], queries in the lanes: no horizontal operation anywhere.
// Scores are in units of log2 (log2(e) is folded into the softmax scale). Source: arXiv 1805.02867; the lazy maximum is
// FlashAttention-4's: a row's reference point moves only when its maximum has grown by more than `headroom`.
#pragma once
#include "simd.h"

namespace fastattn::FASTATTN_ISA {

constexpr float headroom = 8.0f;  // weights stay below 2^8, far from overflow
constexpr double ln2 = 0.693147180559945309417, log2e = 1.44269504088896340736;

// The running softmax of a panel's rows, one lane each.
template <class Real>
struct Running {
  Real *max, *shift, *sum;  // [NR]: reference point (-inf: no key seen yet), what is subtracted (0 then), sum of weights
};

// largest[lane] = the maximum over the keys, NaN left out; -inf if there is none.
template <class Real, int NV>
void find_max(const Real* scores, int64_t keys, Real* largest) {
  constexpr int L = VL<Real>, NR = NV * L;
  for (int v = 0; v < NV; v++) {
    Vec<Real> m = splat((Real)-__builtin_inf());
    for (int64_t j = 0; j < keys; j++) m = vmax(load(scores + j * NR + v * L), m);
    store(largest + v * L, m);
  }
}

// Moves max to the tile's largest score in the lanes where it has grown, and rescales sum and out [out_rows][NR] there.
// Each lane decides for itself, so a row's bits do not depend on its neighbours.
template <class Real, int NV>
void update_max(const Real* largest, Running<Real> run, Real* out, int64_t out_rows) {
  constexpr int L = VL<Real>, NR = NV * L;
  using V = Vec<Real>;
  for (int v = 0; v < NV; v++) {
    const V tile = load(largest + v * L), old = load(run.max + v * L);
    const auto grown = tile > old + (Real)headroom;
    if (!any<Real>(grown)) continue;
    const V now = grown ? tile : old;
    store(run.max + v * L, now);
    store(run.shift + v * L, now == (Real)-__builtin_inf() ? V{} : now);
    const V factor = grown ? exp2(old - now) : splat((Real)1);
    store(run.sum + v * L, load(run.sum + v * L) * factor);
    for (int64_t d = 0; d < out_rows; d++) store(out + d * NR + v * L, load(out + d * NR + v * L) * factor);
  }
}

// scores -> weights 2^(scores - shift) in place, and their sums over the keys of the tile.
template <class Real, int NV>
struct Weigher {
  // Whether the work is done aside of multiply-adds: it needs spare registers, and an out-of-order window that reaches
  // past a whole exp2, which 512-bit vectors give because they make fewer instructions.
  static constexpr bool overlaps = FASTATTN_WIDTH == 64;

  Real *scores, *end;  // [keys][NR], what is left to do, vector after vector
  const Real* shift;   // [NR]
  Real* sum;           // [NR], of this tile
  int lane;            // where the next vector stands in its row
  int per_visit;       // vectors

  __attribute__((always_inline)) inline void vector() {
    const Vec<Real> p = exp2(load(scores) - load(shift + lane));
    store(scores, p);
    store(sum + lane, load(sum + lane) + p);
    scores += VL<Real>;
    lane = NV == 1 ? 0 : lane + VL<Real> == NV * VL<Real> ? 0 : lane + VL<Real>;
  }
  __attribute__((always_inline)) inline void operator()() {
    if constexpr (overlaps)
      for (int i = 0; i < per_visit && scores < end; i++) vector();
  }
  void finish() {
    constexpr int L = VL<Real>;
    while (lane) vector();
    Vec<Real> total[NV];
    for (int v = 0; v < NV; v++) total[v] = load(sum + v * L);
    for (; scores < end; scores += NV * L)
      for (int v = 0; v < NV; v++) {
        const Vec<Real> p = exp2(load(scores + v * L) - load(shift + v * L));
        store(scores + v * L, p);
        total[v] += p;
      }
    for (int v = 0; v < NV; v++) store(sum + v * L, total[v]);
  }
};

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
