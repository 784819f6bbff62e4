// What the backward pass fetches ahead, beside its products.
#pragma once
#include "backward_layout.h"
#include "rows/lines_ahead.h"
#include "tile/products.h"

namespace fastattn::FASTATTN_ISA {

// Register tiles of the products of `panels` panels with the keys that each sees.
template <class Real, int NV>
int64_t tiles_beside(const Operands& p, const GradientPanel<Real>* panel, int64_t panels, int64_t keys) {
  constexpr int NR = NV * VL<Real>, R = MR<NV>;
  int64_t tiles = (column_panels(p.head_dim, NR) + column_panels(p.head_dim_v, NR)) * tiles_of<R>(keys);
  for (int64_t i = 0; i < panels; i++) {
    const Range seen = panel[i].lanes.visited;
    tiles += 2 * tiles_of<R>(larger<int64_t>(0, smaller(keys, seen.hi - seen.lo))) + tiles_of<R>(p.head_dim);
  }
  return tiles;
}

// A head of one visit leaves no time to wait for what the next one reads and writes.
template <class Real, int NV>
LinesAhead next_head_ahead(const Operands& p, const Gradients& g, const BackwardBlocking& b, const KeyUnit& u,
                           const GradientPanel<Real>* panels) {
  LinesAhead ahead;
  const bool same_head = u.batches > 1 && u.heads_k == 1;  // of the next batch entry
  const int64_t next = u.batch * p.num_heads + u.head_k + (same_head ? p.num_heads : 1);
  const int64_t batch = next / p.num_heads, of = next % p.num_heads, D = p.head_dim, Dv = p.head_dim_v;
  if (batch >= p.batch) return ahead;
  for (const Tensor* t : {&p.q, &g.dq}) ahead.add(*t, batch, of, 0, p.seqlen_q, D);
  for (const Tensor* t : {&p.out, &g.dout}) ahead.add(*t, batch, of, 0, p.seqlen_q, Dv);
  for (const Tensor* t : {&p.k, &g.dk}) ahead.add(*t, batch, of, 0, p.seqlen_k, D);
  for (const Tensor* t : {&p.v, &g.dv}) ahead.add(*t, batch, of, 0, p.seqlen_k, Dv);
  const int64_t count = column_panels(p.seqlen_q - b.last_queries, NV * VL<Real>);
  ahead.spread(tiles_beside<Real, NV>(p, panels, count, p.seqlen_k));
  return ahead;
}

// Of several visits, which no list names, beside that of keys with the block of queries `query` ...: what the next block
// will be prepared from, and where gradients that are complete then will go.
template <class Real, int NV>
LinesAhead block_ahead(const Operands& p, const Gradients& g, const BackwardBlocking& b, const KeyUnit& u,
                       const BackwardScratch<Real>& s, int64_t head, int64_t query, Range keys, bool last_keys) {
  constexpr int NR = NV * VL<Real>;
  LinesAhead ahead;
  const int64_t rows = smaller<int64_t>(b.block_rows, p.seqlen_q - query), next = query + rows,
                next_rows = smaller<int64_t>(b.block_rows, p.seqlen_q - next), count = keys.hi - keys.lo;
  if (next_rows && !s.prepared[next / b.block_rows]) {
    ahead.add(p.q, u.batch, head, next, next_rows, p.head_dim);
    for (const Tensor* t : {&p.out, &g.dout}) ahead.add(*t, u.batch, head, next, next_rows, p.head_dim_v);
  }
  if (last_keys) ahead.add(g.dq, u.batch, head, query, rows, p.head_dim);
  if (!next_rows) {
    ahead.add(g.dk, u.batch, u.head_k, keys.lo, count, p.head_dim);
    ahead.add(g.dv, u.batch, u.head_k, keys.lo, count, p.head_dim_v);
  }
  ahead.spread(tiles_beside<Real, NV>(p, s.panels + query / NR, column_panels(rows, NR), count));
  return ahead;
}

}  // namespace fastattn::FASTATTN_ISA
