// dq on its way from the lanes of a panel, or from the parts that the splits of a head leave, to the tensor.
#pragma once
#include "rows/transpose.h"
#include "scores/scale.h"

namespace fastattn::FASTATTN_ISA {

// A panel's dq [head_dim][NR] to the tensor, and q . dq, of which the scale's gradient is the sum; rows: [NR][head_dim].
template <class Real>
void store_dq(const Operands& p, const Gradients& g, int64_t batch, int64_t head, int64_t query, int64_t count,
              int64_t NR, const Real* dq, Real* rows) {
  const Real scale = (Real)scale_of(p, head);
  if (!g.scale_sums && !p.rotary && lies_as<Real>(g.dq)) {
    const TileRows<Real> to = rows_in_place<Real>(g.dq, batch, head, query);
    return transpose(dq, NR, p.head_dim, count, (Real*)to.data, to.stride, Times<Real>{scale});
  }
  transpose(dq, NR, p.head_dim, NR, rows, p.head_dim);
  for (int64_t r = 0; r < count; r++) {
    Real* row = rows + r * p.head_dim;
    if (p.rotary) turn_row<true>(p.rotary, batch, p.query_start + query + r, row, p.head_dim, row);
    if (g.scale_sums)
      g.scale_sums[(batch * p.num_heads + head) * p.seqlen_q + query + r] =
          scale_gradient(p, batch, head, query + r, row);
    if (g.dq) store_row(row, scale, p.head_dim, g.dq, batch, head, query + r);
  }
}

template <class Real>
void combine_dq(const Operands& p, const Gradients& g, const BackwardBlocking& b, int64_t batch, int64_t head,
                int64_t row, const char* partial, char* memory) {
  const int64_t NR = b.lanes, n = p.head_dim * NR;
  Real *sum = (Real*)memory, *rows = sum + n;
  for (int64_t query = row; query < smaller(row + b.block_rows, p.seqlen_q); query += NR) {
    const Real* part = (const Real*)partial + query * p.head_dim;
    for (int64_t i = 0; i < n; i++) sum[i] = part[i];
    for (int split = 1; split < b.num_splits; split++)
      for (int64_t i = 0; i < n; i++) sum[i] += part[split * b.partial_size + i];
    store_dq(p, g, batch, head, query, smaller(NR, p.seqlen_q - query), NR, sum, rows);
  }
}

}  // namespace fastattn::FASTATTN_ISA
