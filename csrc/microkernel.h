// The register tile that every product runs on: C[R rows][NV vectors] = sum over t of A[r][t] * B[t][lanes].
// A is read in place, one scalar at a time and with any strides; B is one of our own panels, contiguous and aligned.
// Both products of attention have this shape with the queries in the lanes: scores^T = K Q^T (rows are keys, t runs over
// head_dim) and out^T = V^T P^T (rows are head_dim_v, t runs over keys); so do the five of the backward pass.
#pragma once
#include <utility>

#include "simd.h"

namespace fastattn::FASTATTN_ISA {

template <class Real, int R, int NV>
struct Tile {
  Vec<Real> c[R * NV];
};

// Every index is a constant before the first optimization pass, else GCC 12 keeps the accumulators in memory.
template <class Real, int R, int NV, int... I, int... J>
FASTATTN_INLINE void multiply_step(Tile<Real, R, NV>& tile, const Real* a, int64_t a_row, const Real* b,
                                   std::integer_sequence<int, I...>, std::integer_sequence<int, J...>) {
  const Vec<Real> bv[NV] = {load(b + J * VL<Real>)...};
  ((tile.c[I] += a[(I / NV) * a_row] * bv[I % NV]), ...);
}

// a_row, a_step: strides of A over r and t; b_step: elements between the rows of B.
template <class Real, int R, int NV>
FASTATTN_INLINE Tile<Real, R, NV> multiply(const Real* a, int64_t a_row, int64_t a_step, const Real* b, int64_t b_step,
                                           int64_t steps) {
  Tile<Real, R, NV> tile{};
#pragma GCC unroll 4
  for (int64_t t = 0; t < steps; t++)
    multiply_step(tile, a + t * a_step, a_row, b + t * b_step, std::make_integer_sequence<int, R * NV>{},
                  std::make_integer_sequence<int, NV>{});
  return tile;
}

}  // namespace fastattn::FASTATTN_ISA
