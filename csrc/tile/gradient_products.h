// The products and the weights of the backward pass. All products run on `multiply`; C is always rows of NR.
#pragma once
#include "products.h"

namespace fastattn::FASTATTN_ISA {

// C = A B or C += A B: the rows of A at a_row, its steps beside each other. Scores and dP; dK and dV, which add.
template <bool adds, class Real, int R, int NV>
__attribute__((noinline)) void row_tile(const Real* a, int64_t a_row, const Real* b, int64_t steps, Real* c) {
  auto tile = multiply<Real, R, NV>(a, a_row, 1, b, NV * VL<Real>, steps, [] {});
  constexpr std::make_integer_sequence<int, R * NV> all;
  if constexpr (adds)
    add_tile(tile, c, all);
  else
    store_tile(tile, c, all);
}

// C = A B, as `row_tile`; the rows of C at c_row.
template <class Real, int R, int NV, int... I>
FASTATTN_INLINE void store_apart(const Tile<Real, R, NV>& tile, Real* c, int64_t c_row,
                                 std::integer_sequence<int, I...>) {
  (store(c + I / NV * c_row + I % NV * VL<Real>, tile.c[I]), ...);
}
template <class Real, int R, int NV>
__attribute__((noinline)) void apart_tile(const Real* a, int64_t a_row, const Real* b, int64_t steps, Real* c,
                                          int64_t c_row) {
  auto tile = multiply<Real, R, NV>(a, a_row, 1, b, NV * VL<Real>, steps, [] {});
  store_apart(tile, c, c_row, std::make_integer_sequence<int, R * NV>{});
}

// C += A B: the rows of A beside each other, its steps at a_step. dQ. Of Real or of pairs (Element).
template <class Real, int R, int NV, class Element>
__attribute__((noinline)) void column_tile(const Element* a, int64_t a_step, const Element* b, int64_t b_step,
                                           int64_t steps, Real* c) {
  auto tile = multiply<Real, R, NV>(a, 1, a_step, b, b_step, steps, [] {});
  add_tile(tile, c, std::make_integer_sequence<int, R * NV>{});
}

// The same products where a weight of 0 leaves NaN and Inf behind it. a: the weights of one row; b [steps][NR].
template <class Real, int NV>
void select_row(const Real* a, const Real* b, int64_t steps, Real* c) {
  constexpr int L = VL<Real>;
  for (int v = 0; v < NV; v++) {
    Vec<Real> sum{};
    for (int64_t t = 0; t < steps; t++)
      if (a[t] != 0) sum += a[t] * load(b + (t * NV + v) * L);
    store(c + v * L, load(c + v * L) + sum);
  }
}
// b: the weights [steps][b_step]; a: one column.
template <class Real, int NV>
void select_column(const Real* a, int64_t a_step, const Real* b, int64_t b_step, int64_t steps, Real* c) {
  constexpr int L = VL<Real>;
  for (int v = 0; v < NV; v++) {
    Vec<Real> sum{};
    for (int64_t t = 0; t < steps; t++) {
      const Vec<Real> weight = load(b + t * b_step + v * L), with = sum + a[t * a_step] * weight;
      sum = weight == 0 ? sum : with;
    }
    store(c + v * L, load(c + v * L) + sum);
  }
}

// What a panel's lanes know of the forward pass: [NR] each.
template <class Real>
struct Softmax {
  Real *top, *log_sum;  // log of the denominator in two parts; log_sum = inf: no key seen, every weight is 0
  Real* delta;          // rowsum(dout * out) - dlse
};

// P = exp(scores - top - log_sum) and dS = P (dP - delta), from scores and dP [keys][NR] to rows at `stride`.
// Where P is 0, dS is 0 whatever dP is: NaN in a masked value stays there.
// kept: the lanes that dropout leaves, [keys][NR]; dP, and in the end P, are 0 in the others.
template <bool drops, class Real, int NV>
void weigh(const Real* scores, const Real* dp, const Real* kept, int64_t keys, const Softmax<Real>& softmax, Real* p,
           Real* ds, int64_t stride) {
  typedef typename VecOf<Real>::bits Bits;
  constexpr int L = VL<Real>, NR = NV * L;
  for (int v = 0; v < NV; v++) {
    const Vec<Real> top = load(softmax.top + v * L), log_sum = load(softmax.log_sum + v * L);
    const Vec<Real> delta = load(softmax.delta + v * L);
    const auto blind = log_sum == (Real)__builtin_inf();  // no key seen, or no row at all
    for (int64_t j = 0; j < keys; j++) {
      const Vec<Real> seen = exp(load(scores + j * NR + v * L) - top - log_sum);
      const Vec<Real> weight = blind ? Vec<Real>{} : seen;
      Vec<Real> of_weight = load(dp + j * NR + v * L), used = weight;
      if constexpr (drops) {
        const Bits keep = (Bits)load(kept + j * NR + v * L);
        of_weight = (Vec<Real>)((Bits)of_weight & keep);
        used = (Vec<Real>)((Bits)weight & keep);
      }
      const Vec<Real> d = weight * (of_weight - delta);
      store(p + j * stride + v * L, used);
      store(ds + j * stride + v * L, weight == 0 ? Vec<Real>{} : d);
    }
  }
}

template <class Real, int NV>
void clear_rows(Real* x, int64_t stride, int64_t rows) {
  constexpr int L = VL<Real>;
  for (int64_t j = 0; j < rows; j++)
    for (int v = 0; v < NV; v++) store(x + j * stride + v * L, Vec<Real>{});
}

}  // namespace fastattn::FASTATTN_ISA
