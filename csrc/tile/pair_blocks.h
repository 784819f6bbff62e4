// The end of microkernel.h where there is BFMMLA: the register tile of pairs as blocks of 2 rows by 2 lanes, two steps in
// one instruction, which has twice the products of BFDOT. Operands and result lie as for BFDOT. By the architecture, a
// block's two steps are two BFDOT in turn: the bits are the same.
#pragma once
#include "pairs.h"

namespace fastattn::FASTATTN_ISA {

// Rows 2 i and 2 i + 1 in lanes 2 j and 2 j + 1: [row][lane].
template <int R, int NV>
struct Blocks {
  static constexpr int rows = (R + 1) / 2, lanes = 2 * NV;
  Vec<float> c[rows * lanes];
};

// [row][lane] += [row][step] . [lane][step]
FASTATTN_INLINE void add_block(Vec<float>& block, Pairs a, Pairs b) {
  asm(FASTATTN_BF16 "bfmmla %0.4s, %1.8h, %2.8h" : "+w"(block) : "w"(a), "w"(b));
}

FASTATTN_INLINE Pairs zip_low(Pairs x, Pairs y) { return (Pairs)vzip1q_u32((uint32x4_t)x, (uint32x4_t)y); }
FASTATTN_INLINE Pairs zip_high(Pairs x, Pairs y) { return (Pairs)vzip2q_u32((uint32x4_t)x, (uint32x4_t)y); }

// Words are loaded as what they are not, because GCC 12 takes integers to vectors by way of the stack.
template <class Word>
FASTATTN_INLINE Word load_as(const Pair* p) {
  Word word;
  memcpy(&word, p, sizeof word);
  return word;
}

// Rows 2 I and 2 I + 1 of two steps, [row][step]; zeros where an odd R has no row. stride: a row, or a step where the rows
// lie side by side (columns).
template <bool columns, int R, int I>
FASTATTN_INLINE Pairs load_block(const Pair* a, int64_t stride) {
  constexpr bool both = 2 * I + 1 < R;
  if constexpr (columns) {
    using Rows = std::conditional_t<both, double, float>;
    typedef Rows Vector __attribute__((vector_size(16)));
    const Pair* first = a + 2 * I;
    return zip_low((Pairs)Vector{load_as<Rows>(first)}, (Pairs)Vector{load_as<Rows>(first + stride)});
  } else {
    const Pair* first = a + 2 * I * stride;
    return (Pairs)float64x2_t{load_as<double>(first), both ? load_as<double>(first + stride) : 0.0};
  }
}

template <int R, int NV, int... J>
FASTATTN_INLINE void block_row(Vec<float>* blocks, Pairs a, const Pairs* b, std::integer_sequence<int, J...>) {
  (add_block(blocks[J], a, b[J]), ...);
}

template <bool columns, int R, int NV, int... I, int... V>
FASTATTN_INLINE void block_steps(Blocks<R, NV>& blocks, const Pair* a, int64_t stride, const Pair* b, int64_t b_step,
                                 std::integer_sequence<int, I...>, std::integer_sequence<int, V...>) {
  constexpr std::make_integer_sequence<int, 2 * NV> lanes;
  const Pairs first[NV] = {load_pairs(b + V * PL)...}, second[NV] = {load_pairs(b + b_step + V * PL)...};
  Pairs bv[2 * NV];
  ((bv[2 * V] = zip_low(first[V], second[V]), bv[2 * V + 1] = zip_high(first[V], second[V])), ...);
  (block_row<R, NV>(blocks.c + I * 2 * NV, load_block<columns, R, I>(a, stride), bv, lanes), ...);
}
template <bool columns, int R, int NV>
FASTATTN_INLINE void add_steps(Blocks<R, NV>& blocks, const Pair* a, int64_t stride, const Pair* b, int64_t b_step,
                               int64_t steps) {
  for (int64_t t = 0; t + 2 <= steps; t += 2)
    block_steps<columns>(blocks, a + t * (columns ? stride : 1), stride, b + t * b_step, b_step,
                         std::make_integer_sequence<int, Blocks<R, NV>::rows>{}, std::make_integer_sequence<int, NV>{});
}

// Row and vector of a tile out of two neighbouring blocks.
template <int R, int NV, int... I>
FASTATTN_INLINE Tile<float, R, NV> rows_of(const Blocks<R, NV>& blocks, std::integer_sequence<int, I...>) {
  auto vector = [&](auto i) {
    constexpr int row = i / NV, block = row / 2 * 2 * NV + i % NV * 2;
    const float64x2_t x = (float64x2_t)blocks.c[block], y = (float64x2_t)blocks.c[block + 1];
    return (Vec<float>)(row % 2 ? vzip2q_f64(x, y) : vzip1q_f64(x, y));
  };
  return {vector(std::integral_constant<int, I>{})...};
}

// `multiply` of pairs, where nothing is worked off aside (softmax.h). Either a_row or a_step is 1.
template <class Real, int R, int NV, class Aside>
FASTATTN_INLINE Tile<float, R, NV> multiply(const Pair* a, int64_t a_row, int64_t a_step, const Pair* b, int64_t b_step,
                                            int64_t steps, Aside&&) {
  constexpr std::make_integer_sequence<int, R * NV> all;
  Blocks<R, NV> blocks{};
  if (a_step == 1)
    add_steps<false>(blocks, a, a_row, b, b_step, steps);
  else
    add_steps<true>(blocks, a, a_step, b, b_step, steps);
  Tile<float, R, NV> tile = rows_of(blocks, all);
  if (steps % 2) {
    const int64_t last = steps - 1;
    multiply_step(tile, a + last * a_step, a_row, b + last * b_step, all, std::make_integer_sequence<int, NV>{});
  }
  return tile;
}

}  // namespace fastattn::FASTATTN_ISA
