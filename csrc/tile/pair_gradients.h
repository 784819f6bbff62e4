// The products and the weights of the backward pass on pairs of bfloat16.
#pragma once
#include "gradient_products.h"

namespace fastattn::FASTATTN_ISA {

// scores -> exp(scores - top - log_sum) in place, done aside of a product. As `Weigher`.
template <int NV>
struct PairExp {
  static constexpr int NR = NV * PL;
  float *scores, *end;         // what is left to do, vector after vector
  const float *top, *log_sum;  // [NR]
  int lane;                    // where the next vector stands in its row
  int per_visit;               // vectors

  PairExp(float* scores, int64_t keys, const Softmax<float>& softmax, int64_t steps)
      : scores(scores), end(scores + keys * NR), top(softmax.top), log_sum(softmax.log_sum), lane(0) {
    const int64_t visits = larger<int64_t>(1, (keys + MR<NV> - 1) / MR<NV> * (steps / multiply_unroll));
    per_visit = (int)((keys * NV + visits - 1) / visits);
  }
  void go_on_from(const PairExp& other) { scores = other.scores, lane = other.lane; }
  __attribute__((always_inline)) inline void vector() {
    store(scores, exp(load(scores) - load(top + lane) - load(log_sum + lane)));
    scores += PL;
    lane = lane + PL == NR ? 0 : lane + PL;
  }
  __attribute__((always_inline)) inline void operator()() {
    if constexpr (Weigher<float, NV>::overlaps)
      for (int i = 0; i < per_visit && scores < end; i++) vector();
  }
  void finish() {
    while (scores < end) vector();
  }
};

struct NoAside {
  void go_on_from(const NoAside&) {}
  __attribute__((always_inline)) inline void operator()() {}
};

// C = factor A B or C += factor A B, as `row_tile`. Steps are pairs, beside each other in A.
template <bool adds, int R, int NV, class Aside>
__attribute__((noinline)) void pair_tile(const Pair* a, int64_t a_row, const Pair* b, int64_t steps, float factor,
                                         float* c, Aside& before) {
  Aside aside = before;
  auto tile = multiply<float, R, NV>(a, a_row, 1, b, NV * PL, steps, aside);
  before.go_on_from(aside);
  constexpr std::make_integer_sequence<int, R * NV> all;
  multiply_tile(tile, factor, all);
  if constexpr (adds)
    add_tile(tile, c, all);
  else
    store_tile(tile, c, all);
}

// C [rows][NR] = factor A B for any number of rows; `ahead` is called after each tile.
template <int NV, class Aside, class Ahead = NothingAhead>
void pair_product(TileRows<Pair> a, int64_t rows, const Pair* b, int64_t steps, float factor, float* c, Aside& aside,
                  Ahead&& ahead = {}) {
  each_tile<MR<NV>>(rows, [&](int64_t j, auto size) {
    pair_tile<false, size, NV>(a.data + j * a.stride, a.stride, b, steps, factor, c + j * NV * PL, aside);
    ahead();
  });
}

// One vector of P and dS.
struct Weighed {
  Vec<float> p, ds;
};

// From P as exp gave it and dP, as `weigh`. kept: null, or the lanes that dropout leaves.
FASTATTN_INLINE Weighed weigh_vector(Vec<float> p, Vec<float> dp, const float* kept, const float* log_sum,
                                     const float* delta) {
  p = load(log_sum) == __builtin_inff() ? Vec<float>{} : p;  // no key seen, or no row at all
  Vec<float> used = p;
  if (kept) {
    const auto keep = (VecOf<float>::bits)load(kept);
    dp = (Vec<float>)((VecOf<float>::bits)dp & keep);
    used = (Vec<float>)((VecOf<float>::bits)p & keep);
  }
  return {used, p == 0.0f ? Vec<float>{} : p * (dp - load(delta))};
}

// Where P and dS of a panel go as bfloat16: rows of keys at `stride`, queries beside each other; dS also as pairs of
// keys, [keys / 2][NR].
struct RoundedWeights {
  uint16_t *p, *ds;
  int64_t stride;
  Pair* ds_pairs;
};

// weighed(j, v): vector v of key j.
template <int NV, class Weigh>
void round_weights(int64_t keys, const RoundedWeights& to, const Weigh& weighed) {
  for (int64_t j = 0; j < keys; j += 2)
    for (int v = 0; v < NV; v++) {
      const Weighed first = weighed(j, v), second = j + 1 < keys ? weighed(j + 1, v) : Weighed{};
      const int64_t place = j * to.stride + v * PL;
      store_rows(round_two(first.p, second.p), to.p + place, to.p + place + to.stride);
      const Rounded ds = round_two(first.ds, second.ds);
      store_rows(ds, to.ds + place, to.ds + place + to.stride);
      store_pairs(to.ds_pairs + (j / 2 * NV + v) * PL, pairs_of(ds));
    }
}

}  // namespace fastattn::FASTATTN_ISA
