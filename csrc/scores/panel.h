// The query rows of a unit as panels: queries in the lanes, everything that the score modifications want to know of a
// query in arrays of NR.
#pragma once
#include "alibi.h"
#include "intervals.h"
#include "rows/transpose.h"
#include "scale.h"
#include "softcap.h"
#include "tile/arena.h"

namespace fastattn::FASTATTN_ISA {

template <class Real>
struct Panel {
  Lanes lanes;
  Real* q;                                      // [head_dim][NR], scaled
  Real *slopes, *positions;                     // [NR], of ALiBi
  Real* norms;                                  // [NR], of q, rounded up; for skip.h
  int64_t *lo, *hi;                             // [NR], the keys that a lane sees
  typename VecOf<Real>::word *queries, *heads;  // [NR], of dropout
};

template <class Real>
Panel<Real> take_panel(Arena& arena, int64_t head_dim, int64_t NR) {
  Panel<Real> panel{};
  panel.q = arena.take<Real>(head_dim * NR);
  panel.slopes = arena.take<Real>(NR), panel.positions = arena.take<Real>(NR);
  panel.norms = arena.take<Real>(NR);
  panel.lo = arena.take<int64_t>(NR), panel.hi = arena.take<int64_t>(NR);
  panel.queries = arena.take<typename VecOf<Real>::word>(NR);
  panel.heads = arena.take<typename VecOf<Real>::word>(NR);
  return panel;
}

// Stacked rows first ... first + rows - 1 from `head` into the panel's lanes; tmp: [NR][head_dim].
template <class Real>
void prepare_panel(const Operands& p, int64_t batch, int64_t head, int64_t first, int64_t rows, int NR,
                   Panel<Real>& panel, Real* tmp) {
  Lanes& lanes = panel.lanes;
  lanes = {batch, head, first, rows, visited_range(p, batch, head, first, rows), {0, p.seqlen_k}};
  const double unit = product_unit(p);
  for (int64_t r = 0; r < NR; r++) {
    Real* row = tmp + r * p.head_dim;
    panel.slopes[r] = panel.positions[r] = 0;
    panel.queries[r] = panel.heads[r] = 0;
    panel.lo[r] = 0, panel.hi[r] = p.seqlen_k;
    if (r >= rows) {
      for (int64_t d = 0; d < p.head_dim; d++) row[d] = 0;
      continue;
    }
    QueryRow s = stacked_row(p, head, first + r);
    load_query(p, batch, s.head, s.query, row);
    Range range = row_range(p, batch, s.head, s.query);
    panel.lo[r] = range.lo, panel.hi[r] = range.hi;
    panel.queries[r] = s.query + p.dropout_start.query, panel.heads[r] = s.head + p.dropout_start.head;
    lanes.common = {larger(lanes.common.lo, range.lo), smaller(lanes.common.hi, range.hi)};
    if (p.alibi_slopes) {
      panel.slopes[r] = slope_of<Real>(p, batch, s.head);
      panel.positions[r] = (Real)(s.query + p.query_start);
    }
  }
  // all at once: row by row, the stores of load_row would still be on their way
  for (int64_t r = 0; r < rows; r++) {
    const Real scale = (Real)(scale_of(p, stacked_row(p, head, first + r).head) * unit);
    for (int64_t d = 0; d < p.head_dim; d++) tmp[r * p.head_dim + d] *= scale;
  }
  transpose(tmp, p.head_dim, (int64_t)NR, p.head_dim, panel.q, (int64_t)NR);
}

}  // namespace fastattn::FASTATTN_ISA
