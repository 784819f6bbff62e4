// The operations of csrc/tile/pairs.h on an Arm CPU with BF16, bit for bit what arm.h says, on numbers of every kind.
#define FASTATTN_ISA neon
#define FASTATTN_PAIRS
#define FASTATTN_WIDTH 16
#define FASTATTN_NV 2
#define FASTATTN_MR 8
#define FASTATTN_MR_NARROW 12
#include <cstdio>

#include "arm.h"
#include "numbers.h"
#include "tile/microkernel.h"

using namespace fastattn::neon;

static uint32_t random_word() {  // splitmix64
  static uint64_t state = 0;
  uint64_t x = state += 0x9e3779b97f4a7c15u;
  x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9u;
  x = (x ^ x >> 27) * 0x94d049bb133111ebu;
  return (uint32_t)(x >> 32);
}

// float32, of which the upper half is a bfloat16: any bits, what is special, or near 1 so that sums cancel.
static uint32_t number() {
  constexpr uint32_t special[] = {0,          0x00000001, 0x00010000, 0x007fffff, 0x00800000, 0x3f7fffff, 0x7f7fffff,
                                  0x7f800000, 0x7f800001, 0x7fc10000, 0x3f800000, 0x3f808000, 0x3f818000, 0x1f800000};
  const uint32_t bits = random_word(), sign = bits & 0x80000000;
  switch (random_word() % 8) {
    case 0: return bits;
    case 1: return sign | special[random_word() % (sizeof special / 4)];
    default: return sign | (bits & 0x7fffff) | (120 + random_word() % 14) << 23;
  }
}

static int compared = 0, failed = 0;
static void compare(const char* what, uint32_t is, uint32_t wanted) {
  compared++;
  if (is != wanted && failed++ < 10) std::printf("%s: %08x and not %08x\n", what, is, wanted);
}

static uint16_t rounded(float x) {  // to nearest even, one NaN for each NaN
  const uint32_t bits = arm::bit_cast<uint32_t>(x);
  return x != x ? (uint16_t)(bits >> 16 | 64) : (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

static Pair pair() { return {(uint16_t)(number() >> 16), (uint16_t)(number() >> 16)}; }

static void check_operations(int64_t round) {
  Pair a[PL], b[PL];
  float sum[PL], more[PL];
  for (int lane = 0; lane < PL; lane++) {
    a[lane] = pair(), b[lane] = pair();
    sum[lane] = arm::bit_cast<float>(number()), more[lane] = arm::bit_cast<float>(number());
  }
  const Pair& one = a[round % PL];
  Vec<float> of_memory = load(sum), of_register = load(sum);
  add_products(of_memory, one, load_pairs(b));
  add_products(of_register, broadcast(one), load_pairs(b));
  uint16_t first[PL], second[PL];
  Pair pairs[PL];
  const Rounded r = round_two(load(sum), load(more));
  store_rows(r, first, second);
  store_pairs(pairs, pairs_of(r));
  for (int lane = 0; lane < PL; lane++) {
    const float wanted = arm::dot(sum[lane], arm::bit_cast<uint32_t>(one), arm::bit_cast<uint32_t>(b[lane]));
    compare("a pair in memory", arm::bit_cast<uint32_t>(of_memory[lane]), arm::bit_cast<uint32_t>(wanted));
    compare("a pair in a register", arm::bit_cast<uint32_t>(of_register[lane]), arm::bit_cast<uint32_t>(wanted));
    compare("rounded, first", first[lane], rounded(sum[lane]));
    compare("rounded, second", second[lane], rounded(more[lane]));
    compare("pairs, low", pairs[lane].low, first[lane]);
    compare("pairs, high", pairs[lane].high, second[lane]);
  }
}

// n pairs behind which nothing may be read.
static Pair* filled(Guarded& memory, int64_t n) {
  Pair* first = memory.last<Pair>(n);
  for (int64_t i = 0; i < n; i++) first[i] = pair();
  return first;
}

// A register tile, with the rows of A apart or side by side: every element is a chain of dot products in order.
template <int R, int NV>
static void check_tile(int64_t steps, bool columns) {
  constexpr int NR = NV * PL;
  const int64_t a_row = columns ? 1 : steps, a_step = columns ? R : 1;
  static Guarded of_a, of_b;
  const Pair *a = filled(of_a, R * steps), *b = filled(of_b, steps * NR);
  float c[R * NR];
  const auto tile = columns ? multiply<float, R, NV>(a, 1, a_step, b, NR, steps, [] {})
                            : multiply<float, R, NV>(a, a_row, 1, b, NR, steps, [] {});
  store_tile(tile, c, std::make_integer_sequence<int, R * NV>{});
  for (int i = 0; i < R * NR; i++) {
    float wanted = 0;
    for (int64_t t = 0; t < steps; t++)
      wanted = arm::dot(wanted, arm::bit_cast<uint32_t>(a[i / NR * a_row + t * a_step]),
                        arm::bit_cast<uint32_t>(b[t * NR + i % NR]));
    compare(columns ? "a tile of columns" : "a tile of rows", arm::bit_cast<uint32_t>(c[i]),
            arm::bit_cast<uint32_t>(wanted));
  }
}
template <int NV, int... R>
static void check_tiles(std::integer_sequence<int, R...>) {
  for (int64_t steps : {0, 1, 2, 3, 5, 8, 64})
    for (bool columns : {false, true}) (check_tile<R + 1, NV>(steps, columns), ...);
}

int main() {
  constexpr int rounds = 30000;
  for (int i = 0; i < rounds; i++) check_operations(i);
  for (int i = 0; i < 3; i++) {
    check_tiles<1>(std::make_integer_sequence<int, FASTATTN_MR_NARROW>{});
    check_tiles<2>(std::make_integer_sequence<int, FASTATTN_MR>{});
  }
  std::printf("%d comparisons, %d failed\n", compared, failed);
  return failed != 0;
}
