// Tile registers in C++ (csrc/tile/pair_tiles.h): what Intel's manual says of tdpbf16ps for chosen numbers, and register
// tiles of every size, bit for bit, whose operands end where nothing may be read or with what must not be. Prints what is wrong.
#define FASTATTN_ISA emulated_amx
#define FASTATTN_EMULATED
#include <cmath>

#include "amx_panels.h"
#include "numbers.h"
#include "rows/pair_rows.h"
#include "tile/microkernel.h"

using namespace fastattn;
using namespace fastattn::emulated_amx;

namespace {

constexpr int64_t n = pair_steps, most_steps = 3 * n + 5;

// Numbers of eight bits whose sums are rounded.
uint16_t number() {
  static uint32_t state = 1;
  state = state * 1664525 + 1013904223;
  return (uint16_t)((state >> 16 & 0x80ff) | (0x3e80 + (state >> 12 & 0x0300)));
}

// Adds the products of up to n pairs, as one instruction does.
float added(float sum, const Pair* a, int64_t a_step, const Pair* b, int64_t b_step, int64_t steps) {
  float even = 0, odd = 0;
  for (int64_t t = 0; t < steps; t++) {
    even = std::fma(whole(a[t * a_step].low), whole(b[t * b_step].low), even);
    odd = std::fma(whole(a[t * a_step].high), whole(b[t * b_step].high), odd);
  }
  return sum + (even + odd);
}

void check_numbers() {
  const float tiny = 0x1p-12f, inf = INFINITY;
  struct {
    const char* what;
    float a[4], b[4], sum;  // low, high, low, high
  } cases[] = {{"even and odd apart", {0x1p30f, 0.125f, -0x1p30f, 0.125f}, {1, 1, 1, 1}, 0.25f},
               {"the steps in turn", {0x1p30f, 0, 1, 0}, {1, 0, tiny, 0}, 0x1p30f},
               {"subnormal factor", {0x1p-130f, 0, 0, 0}, {0x1p100f, 0, 0, 0}, 0},
               {"subnormal product", {0x1p-70f, 0, 0, 0}, {0x1p-70f, 0, 0, 0}, 0},
               {"inf * 0", {inf, 0, 0, 0}, {0, 0, 0, 0}, NAN},
               {"inf", {inf, 1, 0, 0}, {1, 1, 0, 0}, inf}};
  for (const auto& x : cases) {
    Pair a[2], b[2 * n];
    for (int t = 0; t < 2; t++) {
      a[t] = {half(x.a[2 * t]), half(x.a[2 * t + 1])};
      for (int lane = 0; lane < n; lane++) b[t * n + lane] = {half(x.b[2 * t]), half(x.b[2 * t + 1])};
    }
    const auto tile = multiply<float, 1, 1>(a, 2, 1, b, n, 2, [] {});
    for (int lane = 0; lane < n; lane++) same(x.what, tile.c[0][lane], x.sum);
  }
}

// Rows of A with NaN between them; the same as columns, packed from rows of bfloat16, with numbers beside.
template <int R>
void check_tile(int64_t steps) {
  static Guarded of_a, of_b;
  const int64_t stride = steps + 3;
  Pair *a = of_a.last<Pair>(R * stride - 3), *b = of_b.last<Pair>(steps * n);
  for (int64_t i = 0; i < R * stride - 3; i++)
    a[i] = i % stride < steps ? Pair{number(), number()} : Pair{0x7fc0, 0x7fc0};
  for (int64_t i = 0; i < steps * n; i++) b[i] = {number(), number()};

  static uint16_t rows[2 * most_steps][n];  // of V
  static Pair packed_rows[most_steps + n][2 * n];
  for (int64_t t = 0; t < steps; t++)
    for (int64_t r = 0; r < n; r++) {
      const Pair pair = r < R ? a[r * stride + t] : Pair{0x7fc0, 0x7fc0};
      rows[2 * t][r] = pair.low, rows[2 * t + 1][r] = pair.high;
    }
  Tensor v{};
  v.data = (char*)rows, v.dtype = DType::bfloat16, v.stride[2] = n, v.stride[3] = 1;
  pack_columns(v, 0, 0, 0, 2 * steps, n, packed_rows[0], 2 * n);

  float of_rows[n * n], of_columns[n * n];
  constexpr std::make_integer_sequence<int, R> all;
  store_tile(multiply<float, R, 1>(a, stride, 1, b, n, steps, [] {}), of_rows, all);
  store_tile(multiply<float, R, 1>(packed_rows[0], 1, 2 * n, b, n, steps, [] {}), of_columns, all);
  for (int i = 0; i < R * n; i++) {
    float sum = 0;
    for (int64_t t = 0; t < steps; t += n)
      sum = added(sum, a + i / n * stride + t, 1, b + t * n + i % n, n, smaller(n, steps - t));
    same("a tile of rows", of_rows[i], sum);
    same("a tile of columns", of_columns[i], sum);
  }
}
template <int... R>
void check_tiles(std::integer_sequence<int, R...>) {
  for (int64_t steps : {(int64_t)1, n - 1, n, n + 1, 2 * n, most_steps}) (check_tile<R + 1>(steps), ...);
}

}  // namespace

int main() {
  TilesInUse tiles;
  check_numbers();
  check_tiles(std::make_integer_sequence<int, n>{});
  return wrong != 0;
}
