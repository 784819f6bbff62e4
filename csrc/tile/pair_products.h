// What the forward pass on pairs of bfloat16 does with a tile of scores: weights rounded to pairs of keys.
#pragma once
#include "softmax.h"

namespace fastattn::FASTATTN_ISA {

// scores -> exp(scores - shift) as pairs of keys, in place: row j of [keys / 2][NR] holds keys 2 j and 2 j + 1. The sums
// are those of weights that are not rounded. keys is even. As `Weigher`.
template <int NV>
struct PairWeigher {
  static constexpr int L = PL, NR = NV * L;
  float *scores, *end;  // rows that are left to do, two at a time
  Pair* pairs;          // where their pairs go
  const float* shift;   // [NR]
  float* sum;           // [NR], of this tile
  int lane;             // where the next vectors stand in their rows
  int per_visit;        // vectors of pairs

  void spread(int64_t keys, int64_t steps) {
    const int64_t visits = larger<int64_t>(1, (keys + MR<NV> - 1) / MR<NV> * (steps / multiply_unroll));
    per_visit = (int)(((end - scores) / (2 * L) + visits - 1) / visits);
  }
  void go_on_from(const PairWeigher& other) { scores = other.scores, pairs = other.pairs, lane = other.lane; }
  __attribute__((always_inline)) inline void vectors() {
    const Vec<float> reference = load(shift + lane);
    const Vec<float> low = exp(load(scores + lane) - reference), high = exp(load(scores + NR + lane) - reference);
    store(sum + lane, load(sum + lane) + low + high);
    store_pairs(pairs + lane, pairs_of(round_two(low, high)));
    lane += L;
    if (lane == NR) lane = 0, scores += 2 * NR, pairs += NR;
  }
  __attribute__((always_inline)) inline void operator()() {
    if constexpr (Weigher<float, NV>::overlaps)
      for (int i = 0; i < per_visit && scores < end; i++) vectors();
  }
  void finish() {
    while (scores < end) vectors();
  }
};

// A tile times a number.
template <int R, int NV, int... I>
FASTATTN_INLINE void multiply_tile(Tile<float, R, NV>& tile, float factor, std::integer_sequence<int, I...>) {
  ((tile.c[I] *= factor), ...);
}

// Each lane of a tile times its factor.
template <int R, int NV, int... I>
FASTATTN_INLINE void scale_tile(Tile<float, R, NV>& tile, const float* factors, std::integer_sequence<int, I...>) {
  ((tile.c[I] *= load(factors + I % NV * PL)), ...);
}

}  // namespace fastattn::FASTATTN_ISA
