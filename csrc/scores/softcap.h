// Softcap: scores s become softcap * tanh(s / softcap).
#pragma once
#include "operands.h"
#include "tile/softmax.h"

namespace fastattn::FASTATTN_ISA {

// What scores are multiplied by as they leave the product; `softcap_scores` undoes it.
FASTATTN_INLINE double product_unit(const Operands& p) { return p.softcap > 0.0 ? 1.0 / p.softcap : 1.0; }

// slope: null, or [keys][NR] for the derivative.
template <class Real, int NV>
void softcap_scores(Real* scores, int64_t keys, Real softcap, Real* slope) {
  constexpr int L = VL<Real>, NR = NV * L;
  for (int64_t i = 0; i < keys * NR; i += L) {
    const Vec<Real> t = tanh(load(scores + i));
    store(scores + i, t * softcap);
    if (slope) store(slope + i, 1 - t * t);
  }
}

// dS, rows at `stride`, times the derivative [keys][NR]; 0 stays 0, whatever the derivative is.
template <class Real, int NV>
void scale_rows(Real* x, int64_t stride, const Real* factor, int64_t keys) {
  constexpr int L = VL<Real>;
  for (int64_t j = 0; j < keys; j++)
    for (int v = 0; v < NV; v++) {
      const Vec<Real> old = load(x + j * stride + v * L);
      store(x + j * stride + v * L, old == 0 ? old : old * load(factor + (j * NV + v) * L));
    }
}

}  // namespace fastattn::FASTATTN_ISA
