// The register tile that every product runs on: C[R rows][NV vectors] = sum over t of A[r][t] * B[t][lanes].
// A is read in place, one scalar at a time and with any strides; B is one of our own panels, contiguous and aligned.
// Both products of attention have this shape with the queries in the lanes: scores^T = K Q^T (rows are keys, t runs over
// head_dim) and out^T = V^T P^T (rows are head_dim_v, t runs over keys); so do the five of the backward pass.
#pragma once
#include <utility>

#include "pairs.h"

namespace fastattn::FASTATTN_ISA {

// The register tile: MR rows by NV vectors, as many independent accumulators as hide the latency of a multiply-add and
// fit the registers beside their operands; one vector wide where all query rows fit into it.
constexpr int max_vectors = FASTATTN_NV;
template <int NV>
constexpr int MR = NV == FASTATTN_NV ? FASTATTN_MR : FASTATTN_MR_NARROW;

// Rows of a key or value tile as the register tile wants them: Real, unit column stride.
template <class Real>
struct TileRows {
  const Real* data;
  int64_t stride;
};

template <class Real, int R, int NV>
struct Tile {
  Vec<Real> c[R * NV];
};

// Every index is a constant before the first optimization pass, else GCC 12 keeps the accumulators in memory.
template <class Real, int R, int NV, int... I, int... J>
FASTATTN_INLINE void multiply_step(Tile<Real, R, NV>& tile, const Real* a, int64_t a_row, const Real* b,
                                   std::integer_sequence<int, I...>, std::integer_sequence<int, J...>) {
  Vec<Real> bv[NV] = {load(b + J * VL<Real>)...};
  (keep(bv[J]), ...);
  ((tile.c[I] += a[(I / NV) * a_row] * bv[I % NV]), ...);
}

// The same of pairs: each step adds two products to every element.
template <int R, int NV, int... I, int... J>
FASTATTN_INLINE void multiply_step(Tile<float, R, NV>& tile, const Pair* a, int64_t a_row, const Pair* b,
                                   std::integer_sequence<int, I...>, std::integer_sequence<int, J...>) {
  const Pairs bv[NV] = {load_pairs(b + J * PL)...};
  if constexpr (NV == 1) {
    (add_products(tile.c[I], a[I * a_row], bv[0]), ...);
  } else {
    auto add_element = [&](auto i, const auto& av) { add_products(tile.c[i], av, bv[i % NV]); };
    decltype(broadcast(*a)) av;  // of the row, for all of its vectors
    ((I % NV == 0 ? (void)(av = broadcast(a[I / NV * a_row])) : (void)0,
      add_element(std::integral_constant<int, I>{}, av)),
     ...);
  }
}

// An empty instruction that wants each accumulator in a register, or GCC 12 moves them about between the steps.
template <class Real, int R, int NV, int... I>
FASTATTN_INLINE void pin(Tile<Real, R, NV>& tile, std::integer_sequence<int, I...>) {
  (keep(tile.c[I]), ...);
}

constexpr int multiply_unroll = 4;  // steps between two visits of the work aside

// a_row, a_step: strides of A over r and t; b_step: elements between the rows of B. Every few steps `aside` may do a
// little of some other work (see softmax.h): its additions and latencies hide behind the multiply-adds.
// Element: Real, or Pair, whose rows and steps count in pairs.
template <class Real, int R, int NV, class Element, class Aside>
FASTATTN_INLINE Tile<Real, R, NV> multiply(const Element* a, int64_t a_row, int64_t a_step, const Element* b,
                                           int64_t b_step, int64_t steps, Aside&& aside) {
  constexpr std::make_integer_sequence<int, R * NV> all;
  constexpr std::make_integer_sequence<int, NV> vectors;
  constexpr int unroll = multiply_unroll;
  Tile<Real, R, NV> tile{};
  int64_t t = 0;
  for (; t + unroll <= steps; t += unroll) {
#pragma GCC unroll 4
    for (int i = 0; i < unroll; i++)
      multiply_step(tile, a + (t + i) * a_step, a_row, b + (t + i) * b_step, all, vectors);
    pin(tile, all);
    aside();
    pin(tile, all);
  }
  for (; t < steps; t++) multiply_step(tile, a + t * a_step, a_row, b + t * b_step, all, vectors);
  return tile;
}

// Where a tile goes: rows of NV vectors, one after the other.
template <class Real, int R, int NV, int... I>
FASTATTN_INLINE void store_tile(const Tile<Real, R, NV>& tile, Real* c, std::integer_sequence<int, I...>) {
  (store(c + I * VL<Real>, tile.c[I]), ...);
}
template <class Real, int R, int NV, int... I>
FASTATTN_INLINE void add_tile(const Tile<Real, R, NV>& tile, Real* c, std::integer_sequence<int, I...>) {
  (store(c + I * VL<Real>, load(c + I * VL<Real>) + tile.c[I]), ...);
}

// largest[lane] = max(largest[lane], the tile's rows), NaN left out.
template <class Real, int R, int NV, int... I>
FASTATTN_INLINE void max_column(const Tile<Real, R, NV>& tile, int v, Real* largest, std::integer_sequence<int, I...>) {
  Vec<Real> m = load(largest);
  ((m = vmax(tile.c[I * NV + v], m)), ...);
  store(largest, m);
}
template <class Real, int R, int NV, int... V>
FASTATTN_INLINE void max_tile(const Tile<Real, R, NV>& tile, Real* largest, std::integer_sequence<int, V...>) {
  (max_column(tile, V, largest + V * VL<Real>, std::make_integer_sequence<int, R>{}), ...);
}

}  // namespace fastattn::FASTATTN_ISA

#if defined(FASTATTN_BF16)
#include "pair_blocks.h"
#elif defined(FASTATTN_TILES)
#include "pair_tiles.h"
#endif
