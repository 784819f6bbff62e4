// The factor of the scores, a number or learned; q is multiplied by it before the product.
#pragma once
#include "rows/rotary.h"

namespace fastattn::FASTATTN_ISA {

FASTATTN_INLINE double scale_of(const Operands& p, int64_t head) {
  return p.scales ? load_number<double>(p.scales, 0, head) : p.softmax_scale;
}

// What a query adds to the gradient of a learned scale: q . dq, dq [head_dim] being without the scale. A query that sees
// no key may be NaN; its dq is 0.
template <class Real>
double scale_gradient(const Operands& p, int64_t batch, int64_t head, int64_t query, const Real* dq) {
  double sum = 0;
  for (int64_t d = 0; d < p.head_dim; d++)
    sum += dq[d] == 0 ? 0 : load_number<double>(p.q, batch, head, query, d) * dq[d];
  return sum;
}

}  // namespace fastattn::FASTATTN_ISA
