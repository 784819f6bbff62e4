// Products of one row with rows that lie anywhere, columns in the lanes: many dot products, and a weighted sum.
// Rows are padded to whole vectors; a list of rows to whole vectors and chains.
#pragma once
#include "microkernel.h"

namespace fastattn::FASTATTN_ISA {

template <class Real>
constexpr std::make_integer_sequence<int, VL<Real>> lane_numbers;

// Pairs of blocks of B lanes, of a and b side by side, become one block by `op`.
template <int B, class Real, class Op, int... I>
FASTATTN_INLINE Vec<Real> fold(Vec<Real> a, Vec<Real> b, Op op, std::integer_sequence<int, I...>) {
#if defined(__clang__)
  return op(__builtin_shufflevector(a, b, (I / B * 2 * B + I % B)...),
            __builtin_shufflevector(a, b, (I / B * 2 * B + B + I % B)...));
#else
  using Lanes = typename VecOf<Real>::bits;
  return op(__builtin_shuffle(a, b, Lanes{(I / B * 2 * B + I % B)...}),
            __builtin_shuffle(a, b, Lanes{(I / B * 2 * B + B + I % B)...}));
#endif
}

// `op` over all lanes of v, which every lane of the result has.
template <class Real, int B = VL<Real> / 2, class Op>
FASTATTN_INLINE Vec<Real> across(Vec<Real> v, Op op) {
  v = fold<B, Real>(v, v, op, lane_numbers<Real>);
  if constexpr (B > 1)
    return across<Real, B / 2>(v, op);
  else
    return v;
}
template <class Real>
FASTATTN_INLINE Real sum_across(Vec<Real> v) {
  return across<Real>(v, [](Vec<Real> a, Vec<Real> b) { return a + b; })[0];
}
template <class Real>
FASTATTN_INLINE Real max_across(Vec<Real> v) {
  return across<Real>(v, [](Vec<Real> a, Vec<Real> b) { return vmax(a, b); })[0];
}

// Lanes of 128 bits, across which shuffles are slow.
template <class Real>
constexpr int near = 16 / sizeof(Real);

// op of the lower and the upper halves of each 128 bits of a and b, in blocks of B lanes: those of a and b in turn.
template <int B, class Real, int... I>
FASTATTN_INLINE Vec<Real> add_halves(Vec<Real> a, Vec<Real> b, std::integer_sequence<int, I...>) {
  constexpr int P = near<Real>, L = VL<Real>;
#define FASTATTN_HALF(half) (I / B % 2 * L + I / P * P + I % P / (2 * B) * B + I % B + half * P / 2)...
#if defined(__clang__)
  return __builtin_shufflevector(a, b, FASTATTN_HALF(0)) + __builtin_shufflevector(a, b, FASTATTN_HALF(1));
#else
  using Lanes = typename VecOf<Real>::bits;
  return __builtin_shuffle(a, b, Lanes{FASTATTN_HALF(0)}) + __builtin_shuffle(a, b, Lanes{FASTATTN_HALF(1)});
#endif
#undef FASTATTN_HALF
}

// Lane i: the sum over the lanes of tile.c[First + i], for i < Count; within 128 bits first.
template <class Real, int First = 0, int Count = VL<Real>, int N>
FASTATTN_INLINE Vec<Real> sums_of(const Tile<Real, N, 1>& tile) {
  if constexpr (Count == 1) {
    return tile.c[First];
  } else {
    const Vec<Real> a = sums_of<Real, First, Count / 2>(tile), b = sums_of<Real, First + Count / 2, Count / 2>(tile);
    if constexpr (Count <= near<Real>)
      return add_halves<Count / 2, Real>(a, b, lane_numbers<Real>);
    else
      return fold<near<Real>, Real>(a, b, [](Vec<Real> x, Vec<Real> y) { return x + y; }, lane_numbers<Real>);
  }
}

template <class Real, int... J>
FASTATTN_INLINE Vec<Real> dot_vector(const Real* x, const Real* const* rows, int64_t columns,
                                     std::integer_sequence<int, J...> all) {
  Tile<Real, VL<Real>, 1> tile{};
  for (int64_t d = 0; d < columns; d += VL<Real>) {
    const Vec<Real> xs = load(x + d);
    ((tile.c[J] += xs * load(rows[J] + d)), ...);
    pin<Real, VL<Real>, 1>(tile, all);
  }
  return sums_of<Real>(tile);
}

// result[j] = x . rows[j]; n and columns are multiples of the vector length.
template <class Real>
void dots(const Real* x, const Real* const* rows, int64_t n, int64_t columns, Real* result) {
  for (int64_t j = 0; j < n; j += VL<Real>) store(result + j, dot_vector(x, rows + j, columns, lane_numbers<Real>));
}
template <class Real>
Real dot(const Real* x, const Real* y, int64_t columns) {
  Vec<Real> sum{};
  for (int64_t d = 0; d < columns; d += VL<Real>) sum += load(x + d) * load(y + d);
  return sum_across<Real>(sum);
}

constexpr int most_chains = 4;

template <int C, int Chains, class Real, int... I>
FASTATTN_INLINE void add_columns(const Real* weights, const Real* const* rows, int64_t n, Real factor, Real* x,
                                 int64_t column, std::integer_sequence<int, I...> all) {
  constexpr int L = VL<Real>;
  Tile<Real, C * Chains, 1> tile{};
  for (int64_t j = 0; j < n; j += Chains) {
    ((tile.c[I] += weights[j + I / C] * load(rows[j + I / C] + column + I % C * L)), ...);
    pin<Real, C * Chains, 1>(tile, all);
  }
#pragma GCC unroll 4
  for (int i = 0; i < C; i++) {
    Vec<Real> sum = tile.c[i];
#pragma GCC unroll 4
    for (int c = 1; c < Chains; c++) sum += tile.c[c * C + i];
    Real* target = x + column + i * L;
    store(target, load(target) * factor + sum);
  }
}

// x = x * factor + sum over j of weights[j] * rows[j], from zero and in several chains, added at the end. n is a
// multiple of most_chains, columns one of the vector length.
template <class Real>
void add_rows(const Real* weights, const Real* const* rows, int64_t n, int64_t columns, Real factor, Real* x) {
  constexpr int L = VL<Real>;
  int64_t d = 0;
  for (; d + 4 * L <= columns; d += 4 * L)
    add_columns<4, 2>(weights, rows, n, factor, x, d, std::make_integer_sequence<int, 8>{});
  for (; d + 2 * L <= columns; d += 2 * L)
    add_columns<2, 4>(weights, rows, n, factor, x, d, std::make_integer_sequence<int, 8>{});
  for (; d < columns; d += L) add_columns<1, 4>(weights, rows, n, factor, x, d, std::make_integer_sequence<int, 4>{});
}

}  // namespace fastattn::FASTATTN_ISA
