// The end of microkernel.h where there is AMX: the register tile of pairs is a tile register, 16 rows by 16 lanes, and 16
// steps are one instruction. B is one of our panels, in place, and so are rows of A; columns of A come in turned blocks
// (`pack_columns`). What fills no register is copied beside zeros: nothing behind a row's end is read.
//
//   tdpbf16ps   By Intel's manual (Software Developer's Manual, volume 2): the even and the odd products of a row are
//               fused multiply-adds from 0 in the order of the steps, the two sums are added, and then the accumulator;
//               all rounded to nearest even, subnormal numbers 0. Its guide of intrinsics adds them in turn. We rely on
//               what both have in common: zeros change nothing, so bits follow from which 16 pairs go together.
#pragma once
#include "pairs.h"

namespace fastattn::FASTATTN_ISA {

enum { tile_sums, tile_a, tile_b };  // the registers

#if defined(FASTATTN_EMULATED)

struct TileRegisters {
  bool configured;  // else the instructions trap, as the CPU does
  Pairs rows[3][pair_steps];
};
inline thread_local TileRegisters tile_registers;

FASTATTN_INLINE Pairs* tile_register(int index) {
  if (!tile_registers.configured) __builtin_trap();
  return tile_registers.rows[index];
}
struct TilesInUse {
  TilesInUse() { tile_registers = {true, {}}; }
  ~TilesInUse() { tile_registers.configured = false; }
};
template <int index>
FASTATTN_INLINE void load_tile(const void* rows, int64_t bytes) {
  Pairs* tile = tile_register(index);
  for (int r = 0; r < pair_steps; r++) memcpy(tile + r, (const char*)rows + r * bytes, sizeof *tile);
}
FASTATTN_INLINE void clear_sums() { memset(tile_register(tile_sums), 0, sizeof tile_registers.rows[tile_sums]); }
FASTATTN_INLINE void store_sums(float* rows) { memcpy(rows, tile_register(tile_sums), sizeof *tile_registers.rows); }
inline void add_tile_products() {
  Pairs *sums = tile_register(tile_sums), *a = tile_register(tile_a), *b = tile_register(tile_b);
  for (int r = 0; r < pair_steps; r++) {
    Vec<float> even{}, odd{};
    for (int t = 0; t < pair_steps; t++) {
      const Pairs of_row = Pairs{} + a[r][t];
      even = without_subnormals(even + low_of(of_row) * low_of(b[t]));
      odd = without_subnormals(odd + high_of(of_row) * high_of(b[t]));
    }
    sums[r] = (Pairs)without_subnormals(without_subnormals((Vec<float>)sums[r]) + without_subnormals(even + odd));
  }
}

#else

// As statements of our own, because GCC 12's intrinsics do not say that they read memory.
struct TileConfiguration {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64};
  uint8_t rows[16] = {16, 16, 16};
};
struct TilesInUse {
  TilesInUse() {
    const TileConfiguration whole;
    asm volatile("ldtilecfg %0" ::"m"(whole));
  }
  ~TilesInUse() { asm volatile("tilerelease" ::); }
};
template <int index>
FASTATTN_INLINE void load_tile(const void* rows, int64_t bytes) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(rows), "r"(bytes), "i"(index) : "memory");
}
FASTATTN_INLINE void clear_sums() { asm volatile("tilezero %%tmm%c0" ::"i"(tile_sums)); }
FASTATTN_INLINE void store_sums(float* rows) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(rows), "r"(64l), "i"(tile_sums) : "memory");
}
FASTATTN_INLINE void add_tile_products() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(tile_sums), "i"(tile_a), "i"(tile_b));
}

#endif

// `rows` rows of `pairs` pairs into a register, with zeros up to its ends.
template <int index>
FASTATTN_INLINE void load_part(const Pair* from, int64_t stride, int64_t rows, int64_t pairs) {
  alignas(64) Pair whole[pair_steps * pair_steps] = {};
  for (int64_t r = 0; r < rows; r++) memcpy(whole + r * pair_steps, from + r * stride, pairs * sizeof *from);
  load_tile<index>(whole, sizeof *from * pair_steps);
}

template <int R, int... I>
FASTATTN_INLINE Tile<float, R, 1> rows_of(const float* sums, std::integer_sequence<int, I...>) {
  return {load(sums + I * PL)...};
}

// `multiply` of pairs. Either a_step is 1, or A is of `pack_columns` and a_row is 1.
template <class Real, int R, int NV, class Aside>
FASTATTN_INLINE Tile<float, R, NV> multiply(const Pair* a, int64_t a_row, int64_t a_step, const Pair* b, int64_t b_step,
                                            int64_t steps, Aside&& aside) {
  static_assert(NV == 1 && R <= pair_steps && PL == pair_steps, "a tile register");
  clear_sums();
  for (int64_t t = 0; t < steps; t += pair_steps) {
    const int64_t n = smaller(pair_steps, steps - t);
    if (a_step != 1)
      load_tile<tile_a>(a + t * a_step, a_step * sizeof *a);
    else if (R == pair_steps && n == pair_steps)
      load_tile<tile_a>(a + t, a_row * sizeof *a);
    else
      load_part<tile_a>(a + t, a_row, R, n);
    if (n == pair_steps)
      load_tile<tile_b>(b + t * b_step, b_step * sizeof *b);
    else
      load_part<tile_b>(b + t * b_step, b_step, n, pair_steps);
    add_tile_products();
    for (int i = 0; i < pair_steps / multiply_unroll; i++) aside();
  }
  alignas(64) float sums[pair_steps * PL];
  store_sums(sums);
  return rows_of<R>(sums, std::make_integer_sequence<int, R>{});
}

}  // namespace fastattn::FASTATTN_ISA
