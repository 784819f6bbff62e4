// The end of a row of the forward pass: its output divided by the sum of its weights, its lse; where
// its keys are split, from the results of the splits.
#pragma once
#include "kernels.h"
#include "rows/transpose.h"
#include "scores/intervals.h"
#include "scores/sinks.h"

namespace fastattn::FASTATTN_ISA {

// lse of stacked row `row` to where it is wanted; what its accumulated output is to be multiplied by.
template <class Real>
Real finish_softmax(const Operands& p, int64_t batch, const QueryRow& row, Real max, Real sum) {
  const Normalizer n = normalizer(max, sum, sink_of(p, batch, row.head));
  if (p.lse || p.lse_parts) {
    const double log_total = n.log_total();
    if (p.lse) *(Real*)at(p.lse, batch, row.head, row.query) = (Real)n.lse(log_total);
    if (p.lse_parts) {
      const Real top = (Real)n.top;  // which a sink's logit does not fit
      *(Real*)at(p.lse_parts, batch, row.head, row.query, 0) = top;
      *(Real*)at(p.lse_parts, batch, row.head, row.query, 1) = (Real)(log_total + (n.top - top));
    }
  }
  return (Real)(n.factor * p.keep_factor);
}

template <class Real>
void store_out(const Operands& p, int64_t batch, const QueryRow& row, const Real* out, Real factor) {
  for (const Tensor* t : {&p.out, &p.out_exact})
    if (*t) store_row(out, factor, p.head_dim_v, *t, batch, row.head, row.query);
}

// Rows [rows][head_dim_v], not yet normalized, into out and lse.
template <class Real>
void finish_rows(const Operands& p, const Lanes& lanes, const Real* out, const Real* max, const Real* sum) {
  for (int64_t r = 0; r < lanes.rows; r++) {
    const QueryRow row = stacked_row(p, lanes.head, lanes.row + r);
    store_out(p, lanes.batch, row, out + r * p.head_dim_v, finish_softmax(p, lanes.batch, row, max[r], sum[r]));
  }
}

// The same from lanes, out [head_dim_v][NR]; rows: room for [NR][head_dim_v].
template <class Real, int NR>
void finish_lanes(const Operands& p, const Lanes& lanes, const Real* out, const Real* max, const Real* sum,
                  Real* rows) {
  Real factors[NR];
  if (p.sinks || p.lse || p.lse_parts) {
    for (int64_t r = 0; r < lanes.rows; r++)
      factors[r] = finish_softmax(p, lanes.batch, stacked_row(p, lanes.head, lanes.row + r), max[r], sum[r]);
  } else {  // no row writes a number of its own: in vectors
    const double keep_factor = p.keep_factor, no_sink = -__builtin_inf();
    for (int64_t r = 0; r < NR; r++) factors[r] = (Real)(normalizer(max[r], sum[r], no_sink).factor * keep_factor);
  }
  const QueryRow first = stacked_row(p, lanes.head, lanes.row);
  if (lies_as<Real>(p.out) && !p.out_exact && first.query + lanes.rows <= p.seqlen_q) {  // side by side
    Real* to = (Real*)at(p.out, lanes.batch, first.head, first.query);
    return transpose(out, (int64_t)NR, p.head_dim_v, lanes.rows, to, p.out.stride[2], TimesEach<Real>{factors});
  }
  transpose(out, (int64_t)NR, p.head_dim_v, (int64_t)NR, rows, p.head_dim_v);
  for (int64_t r = 0; r < lanes.rows; r++)
    store_out(p, lanes.batch, stacked_row(p, lanes.head, lanes.row + r), rows + r * p.head_dim_v, factors[r]);
}

// Partial results of a row block, split after split: out [splits][rows][Dv], max and sum [splits][rows].
template <class Real>
void combine(const Operands& p, const Blocking& b, const Unit& u, const Partial& first, char* memory) {
  const int64_t Dv = p.head_dim_v, rows = smaller<int64_t>(b.rows, b.heads_per_unit * p.seqlen_q - u.row);
  const Real lowest = (Real)-__builtin_inf();
  Real* row = (Real*)memory;
  for (int64_t r = 0; r < rows; r++) {
    const Real *out = (const Real*)first.out + r * Dv, *max = (const Real*)first.max + r;
    const Real* sum = (const Real*)first.sum + r;
    Real top = lowest, total = 0;
    for (int s = 0; s < b.num_splits; s++) top = larger(top, max[s * b.rows]);
    for (int64_t d = 0; d < Dv; d++) row[d] = 0;
    for (int s = 0; s < b.num_splits; s++) {
      if (sum[s * b.rows] == 0) continue;  // no key seen
      const Real own = max[s * b.rows] == lowest ? 0 : max[s * b.rows], reference = top == lowest ? 0 : top;
      const Real weight = (Real)__builtin_exp2(((double)own - reference) * log2e);
      total += sum[s * b.rows] * weight;
      for (int64_t d = 0; d < Dv; d++) row[d] += out[s * b.rows * Dv + d] * weight;
    }
    const Lanes one{u.batch, u.head, u.row + r, 1, {}, {}};
    finish_rows(p, one, row, &top, &total);
  }
}

}  // namespace fastattn::FASTATTN_ISA
