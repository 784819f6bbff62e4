// Sinks: one more logit of each head (natural log) in the softmax denominator.
#pragma once
#include "rows/rows.h"
#include "tile/softmax.h"

namespace fastattn::FASTATTN_ISA {

// -inf: none.
FASTATTN_INLINE double sink_of(const Operands& p, int64_t batch, int64_t head) {
  return p.sinks ? load_number<double>(p.sinks, batch, head) : -__builtin_inf();
}

// delta times the weight of the sink in a row; log_denominator: of its softmax denominator. Its negative is what the
// row adds to the gradient of the sink.
FASTATTN_INLINE double delta_of_sink(double sink, double delta, double log_denominator) {
  return sink == -__builtin_inf() ? 0 : delta * __builtin_exp2((sink - log_denominator) * log2e);
}

}  // namespace fastattn::FASTATTN_ISA
