// The operation on pairs of bfloat16 in C++ (csrc/tile/pairs.h): what AVX512_BF16 was seen to give for chosen numbers,
// and a product of the register tile, its weights and their sums beside their definition. Prints what is wrong.
#define FASTATTN_ISA emulated
#define FASTATTN_EMULATED
#define FASTATTN_PAIRS
#define FASTATTN_WIDTH 64
#define FASTATTN_NV 2
#define FASTATTN_MR 4
#define FASTATTN_MR_NARROW 2
#define FASTATTN_WIDE_L1 0
#include <cmath>
#include <cstdio>

#include "numbers.h"
#include "tile/pair_gradients.h"

using namespace fastattn::emulated;

namespace {

// sum + low products + high products, in all lanes.
float product(float sum, float a_low, float b_low, float a_high, float b_high) {
  Vec<float> c = splat(sum);
  add_products(c, Pair{half(a_low), half(a_high)}, broadcast(Pair{half(b_low), half(b_high)}));
  for (int i = 1; i < PL; i++) same("lanes", c[i], c[0]);
  return c[0];
}
float rounded_to_half(float x) {
  uint16_t first[PL], second[PL];
  store_rows(round_two(splat(x), splat(-x)), first, second);
  if (x == x) same("second row", whole(second[3]), -whole(first[0]));
  return whole(first[0]);
}

void check_numbers() {
  const float tiny = 0x1p-12f, inf = INFINITY;
  same("rounds after each", product(1, tiny, tiny, tiny, tiny), 1);
  same("the high half first", product(0x1p30f, 0.125f, 1, -0x1p30f, 1), 0.125f);
  same("the low half last", product(0x1p30f, -0x1p30f, 1, 0.125f, 1), 0);
  same("subnormal factor", product(0, 0x1p-130f, 0x1p100f, 0, 0), 0);
  same("subnormal product", product(0, 0x1p-70f, 0x1p-70f, 0, 0), 0);
  same("subnormal sum", product(0x1p-130f, 0, 0, 0, 0), 0);
  same("subnormal sums in turn", product(0, 0x1p-63f, 0x1p-64f, 0x1p-63f, 0x1p-64f), 0);
  same("inf * 0", product(0, inf, 0, 0, 0), NAN);
  same("inf", product(0, inf, 1, 1, 1), inf);
  same("nan", product(0, NAN, 1, 1, 1), NAN);
  same("to even, down", rounded_to_half(1 + 0x1p-8f), 1);
  same("to even, up", rounded_to_half(1 + 3 * 0x1p-8f), 1 + 0x1p-6f);
  same("above the middle", rounded_to_half(1 + 0x1.02p-8f), 1 + 0x1p-7f);
  same("subnormal", rounded_to_half(0x1p-130f), 0);
  same("overflow", rounded_to_half(3.4e38f), inf);
  same("stays nan", rounded_to_half(NAN), NAN);
}

// Tiles of any size: whole numbers, whose sums are exact in any order.
template <int NV>
void check_product(int64_t rows, int64_t steps) {
  constexpr int NR = NV * PL;
  Pair a[32 * 12], b[12 * NR];
  float c[32 * NR];
  auto number = [](int64_t i) { return (float)(i * 7 % 13 - 6); };
  for (int64_t i = 0; i < 32 * 12; i++) a[i] = {half(number(i)), half(number(i + 5))};
  for (int64_t i = 0; i < 12 * NR; i++) b[i] = {half(number(3 * i)), half(number(3 * i + 1))};
  NoAside nothing;
  pair_product<NV>({a, 12}, rows, b, steps, 0.5f, c, nothing);
  for (int64_t r = 0; r < rows; r++)
    for (int64_t lane = 0; lane < NR; lane++) {
      float sum = 0;
      for (int64_t t = 0; t < steps; t++)
        sum += whole(a[r * 12 + t].low) * whole(b[t * NR + lane].low) +
               whole(a[r * 12 + t].high) * whole(b[t * NR + lane].high);
      same("product", c[r * NR + lane], sum / 2);
    }
}

// The weights of 6 keys, of which the last is masked.
template <int NV>
void check_weights() {
  constexpr int NR = NV * PL, keys = 6;
  alignas(64) float scores[keys * NR], shift[NR], sum[NR] = {}, weights[keys][NR];
  for (int i = 0; i < keys * NR; i++) scores[i] = i >= 5 * NR ? -INFINITY : (float)(-i % 11) / 4;
  for (int lane = 0; lane < NR; lane++) shift[lane] = (float)(lane % 3) / 8;
  for (int i = 0; i < keys * NR; i += PL) store(weights[i / NR] + i % NR, exp(load(scores + i) - load(shift + i % NR)));
  PairWeigher<NV> weigher{scores, scores + keys * NR, (Pair*)scores, shift, sum, 0, 1};
  weigher(), weigher();
  weigher.finish();
  for (int lane = 0; lane < NR; lane++) {
    float total = 0;
    for (int j = 0; j < keys; j++) {
      const Pair pair = ((const Pair*)scores)[j / 2 * NR + lane];
      same("weight", whole(j % 2 ? pair.high : pair.low), rounded_to_half(weights[j][lane]));
      total += weights[j][lane];
    }
    same("sum of weights", sum[lane], total);
  }
}

}  // namespace

int main() {
  check_numbers();
  for (int64_t rows : {1, 2, 4, 5, 29})
    for (int64_t steps : {0, 1, 4, 11}) check_product<1>(rows, steps), check_product<2>(rows, steps);
  check_weights<1>(), check_weights<2>();
  return wrong != 0;
}
