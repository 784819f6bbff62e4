// Online softmax over a tile of scores^T [keys][NR], queries in the lanes: no horizontal operation anywhere.
// Scores are logits as they are: log2(e) comes in behind the subtraction of the maximum (`exp`), so that a score's
// rounding does not grow with its size. Source: arXiv 1805.02867; the lazy maximum is FlashAttention-4's: a row's
// reference point moves only when its maximum has grown by more than `headroom`.
#pragma once
#include "microkernel.h"

namespace fastattn::FASTATTN_ISA {

// Weights stay below 2^8, far from overflow; where they are rounded to bfloat16, the largest is 1, which is exact.
template <bool rounds>
constexpr float headroom = rounds ? 0.0f : (float)(8 * ln2);

// The running softmax of a panel's rows, one lane each; all [NR].
template <class Real>
struct Running {
  Real* max;    // reference point, -inf before the first key is seen
  Real* shift;  // what is subtracted from the scores: max, or 0 before the first key
  Real* sum;    // of the weights
};

// largest[lane] = the maximum over the keys, NaN left out; -inf if there is none.
template <class Real, int NV>
void find_max(const Real* scores, int64_t keys, Real* largest) {
  constexpr int L = VL<Real>, NR = NV * L, chains = 4;
  for (int v = 0; v < NV; v++) {
    Vec<Real> m[chains];
    for (Vec<Real>& chain : m) chain = splat((Real)-__builtin_inf());
    for (int64_t j = 0; j < keys; j += chains)
      for (int c = 0; c < chains && j + c < keys; c++) m[c] = vmax(load(scores + (j + c) * NR + v * L), m[c]);
    store(largest + v * L, vmax(vmax(m[0], m[1]), vmax(m[2], m[3])));
  }
}

// Whether some lane's maximum has grown enough to move its reference point; false for an upper bound is final.
template <class Real, int NV, bool rounds>
bool outgrown(const Real* largest, const Real* max) {
  constexpr int L = VL<Real>;
  auto grown = load(largest) > load(max) + (Real)headroom<rounds>;
  for (int v = 1; v < NV; v++) grown |= load(largest + v * L) > load(max + v * L) + (Real)headroom<rounds>;
  return any<Real>(grown);
}

// Moves max to the tile's largest score in the lanes where it has grown, and rescales sum and out [out_rows][NR] there.
// Each lane decides for itself, so a row's bits do not depend on its neighbours.
template <class Real, int NV, bool rounds>
void update_max(const Real* largest, Running<Real> run, Real* out, int64_t out_rows) {
  constexpr int L = VL<Real>, NR = NV * L;
  using V = Vec<Real>;
  for (int v = 0; v < NV; v++) {
    const V tile = load(largest + v * L), old = load(run.max + v * L);
    const auto grown = tile > old + (Real)headroom<rounds>;
    if (!any<Real>(grown)) continue;
    const V now = grown ? tile : old;
    store(run.max + v * L, now);
    store(run.shift + v * L, now == (Real)-__builtin_inf() ? V{} : now);
    const V factor = grown ? exp(old - now) : splat((Real)1);
    store(run.sum + v * L, load(run.sum + v * L) * factor);
    for (int64_t d = 0; d < out_rows; d++) store(out + d * NR + v * L, load(out + d * NR + v * L) * factor);
  }
}

// The step of the online softmax before a tile's weights. largest: an upper bound of its scores, or, where they have been
// modified since it was taken (moved: they may have risen; masked), what is found again.
template <class Real, int NV, bool rounds = false>
void follow_max(const Real* scores, int64_t keys, bool moved, bool masked, Real* largest, Running<Real> run, Real* out,
                int64_t out_rows) {
  if (!moved && !outgrown<Real, NV, rounds>(largest, run.max)) return;
  if (moved || masked) find_max<Real, NV>(scores, keys, largest);
  update_max<Real, NV, rounds>(largest, run, out, out_rows);
}

// scores -> weights exp(scores - shift) in place, and their sums over the keys of the tile.
template <class Real, int NV>
struct Weigher {
  // Whether the work is done aside of multiply-adds: it needs spare registers, and an out-of-order window that reaches
  // past a whole exp, which 512-bit vectors give because they make fewer instructions.
  static constexpr bool overlaps = FASTATTN_WIDTH == 64;

  Real *scores, *end;  // [keys][NR], what is left to do, vector after vector
  const Real* shift;   // [NR]
  Real* sum;           // [NR], of this tile
  int lane;            // where the next vector stands in its row
  int per_visit;       // vectors

  // Spreads what is left over the visits that a product of `keys` rows and `head_dim` steps will make.
  void spread(int64_t keys, int64_t head_dim) {
    const int64_t visits = larger<int64_t>(1, (keys + MR<NV> - 1) / MR<NV> * (head_dim / multiply_unroll));
    per_visit = (int)((end - scores + visits * VL<Real> - 1) / (visits * VL<Real>));
  }
  void go_on_from(const Weigher& other) { scores = other.scores, lane = other.lane; }
  __attribute__((always_inline)) inline void vector() {
    const Vec<Real> p = exp(load(scores) - load(shift + lane));
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
    Vec<Real> total[NV], shifts[NV];
    for (int v = 0; v < NV; v++) total[v] = load(sum + v * L), shifts[v] = load(shift + v * L);
    for (Real* row = scores; row < end; row += NV * L)  // a local pointer: the stores could change a member
      for (int v = 0; v < NV; v++) {
        const Vec<Real> p = exp(load(row + v * L) - shifts[v]);
        store(row + v * L, p);
        total[v] += p;
      }
    scores = end;
    for (int v = 0; v < NV; v++) store(sum + v * L, total[v]);
  }
};

// What a row's maximum and sum mean in the end.
struct Normalizer {
  double factor;      // of its accumulated output
  double top, total;  // lse = top + log(total)

  // No key seen: a sum of infinity makes every weight 0 in the backward pass.
  double log_total() const { return total == 0.0 ? __builtin_inf() : __builtin_log2(total) * ln2; }
  double lse(double log_total) const { return total == 0.0 ? -__builtin_inf() : top + log_total; }
};

// sink: one more logit in the denominator; -inf: none.
FASTATTN_INLINE Normalizer normalizer(double max, double sum, double sink) {
  const double lowest = -__builtin_inf(), reference = max == lowest || sum == 0.0 ? 0.0 : max;
  if (sink == lowest) return {sum == 0.0 ? 0.0 : 1.0 / sum, reference, sum};  // sum 0: no key seen
  const double top = sum == 0.0 || reference < sink ? sink : reference;
  const double scale = sum == 0.0 ? 0.0 : __builtin_exp2((reference - top) * log2e);
  const double total = sum * scale + __builtin_exp2((sink - top) * log2e);
  return {scale / total, top, total};
}

}  // namespace fastattn::FASTATTN_ISA
