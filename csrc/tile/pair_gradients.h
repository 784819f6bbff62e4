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
  __attribute__((always_inline)) inline void finish_before(const float* place) {
    while (scores < place) vector();
  }
  void finish() { finish_before(end); }
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

// What P and dS of a panel are made of beside dP: P as exp gave it and, or null, the lanes that dropout leaves, [keys][NR].
template <int NV>
struct PanelWeights {
  const float *p, *kept;
  const Softmax<float>& softmax;

  // Vector v of key j, as `weigh`.
  __attribute__((always_inline)) inline Weighed weighed(int64_t j, int v, Vec<float> dp) const {
    const int64_t place = (j * NV + v) * PL;
    Vec<float> weight = load(p + place);
    weight =
        load(softmax.log_sum + v * PL) == __builtin_inff() ? Vec<float>{} : weight;  // no key seen, or no row at all
    Vec<float> used = weight;
    if (kept) {
      const auto keep = (VecOf<float>::bits)load(kept + place);
      dp = (Vec<float>)((VecOf<float>::bits)dp & keep);
      used = (Vec<float>)((VecOf<float>::bits)weight & keep);
    }
    return {used, weight == 0.0f ? Vec<float>{} : weight * (dp - load(softmax.delta + v * PL))};
  }
};

// Where P and dS of a panel go as bfloat16: rows of keys at `stride`, queries beside each other; dS also as pairs of
// keys, [keys / 2][NR].
template <int NV>
struct RoundedWeights {
  uint16_t *p, *ds;
  int64_t stride;
  Pair* ds_pairs;

  // Vector v of keys j, which is even, and j + 1.
  __attribute__((always_inline)) inline void put(int64_t j, int v, const Weighed& first, const Weighed& second) const {
    const int64_t place = j * stride + v * PL;
    store_rows(round_two(first.p, second.p), p + place, p + place + stride);
    const Rounded both = round_two(first.ds, second.ds);
    store_rows(both, ds + place, ds + place + stride);
    store_pairs(ds_pairs + (j / 2 * NV + v) * PL, pairs_of(both));
  }
};

// Vector I % NV of rows I / NV * 2 of a tile of dP, and of the row after it, from `key` on.
template <int R, int NV, int... I>
FASTATTN_INLINE void round_tile(const Tile<float, R, NV>& dp, int64_t key, const PanelWeights<NV>& of,
                                const RoundedWeights<NV>& to, std::integer_sequence<int, I...>) {
  auto round_pair = [&](auto i) __attribute__((always_inline)) {
    constexpr int v = i % NV, r = i / NV * 2, next = r + 1 < R ? r + 1 : r;
    const Weighed second = r + 1 < R ? of.weighed(key + next, v, dp.c[next * NV + v]) : Weighed{};
    to.put(key + r, v, of.weighed(key + r, v, dp.c[r * NV + v]), second);
  };
  (round_pair(std::integral_constant<int, I>{}), ...);
}

// A tile of dP, which goes into dS at once: the products of the next tile begin while this one is weighed and rounded.
template <int R, int NV>
__attribute__((noinline)) void weighed_tile(const Pair* a, int64_t a_row, const Pair* b, int64_t steps, float factor,
                                            int64_t key, PairExp<NV>& before, const PanelWeights<NV>& of,
                                            const RoundedWeights<NV>& to) {
  PairExp<NV> aside = before;
  auto tile = multiply<float, R, NV>(a, a_row, 1, b, NV * PL, steps, aside);
  aside.finish_before(of.p + (key + R) * NV * PL);
  before.go_on_from(aside);
  multiply_tile(tile, factor, std::make_integer_sequence<int, R * NV>{});
  round_tile(tile, key, of, to, std::make_integer_sequence<int, (R + 1) / 2 * NV>{});
}

// P and dS of `keys` keys, rounded, with dP = factor A B, which is not stored. Tiles have whole pairs of keys, but for the
// last key; `ahead` is called after each.
template <int NV, class Ahead>
void weighed_product(TileRows<Pair> a, int64_t keys, const Pair* b, int64_t steps, float factor, PairExp<NV>& exps,
                     const PanelWeights<NV>& of, const RoundedWeights<NV>& to, Ahead&& ahead) {
  constexpr int R = MR<NV>;
  each_tile<R / 2>((keys + 1) / 2, [&](int64_t pair, auto pairs) {
    one_tile<R>(2 * pair, smaller<int64_t>(2 * pairs, keys - 2 * pair), [&](int64_t j, auto size) {
      weighed_tile<size, NV>(a.data + j * a.stride, a.stride, b, steps, factor, j, exps, of, to);
    });
    ahead();
  });
}

// P and dS that are there as float, [keys][NR], rounded.
template <int NV>
void round_weights(int64_t keys, const float* p, const float* ds, const RoundedWeights<NV>& to) {
  for (int64_t j = 0; j < keys; j += 2)
    for (int v = 0; v < NV; v++) {
      auto weighed = [&](int64_t i) {
        return i < keys ? Weighed{load(p + (i * NV + v) * PL), load(ds + (i * NV + v) * PL)} : Weighed{};
      };
      to.put(j, v, weighed(j), weighed(j + 1));
    }
}

}  // namespace fastattn::FASTATTN_ISA
