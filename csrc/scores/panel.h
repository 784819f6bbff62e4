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
  panel.q = arena.take<Real>(larger<int64_t>(head_dim, 2) * NR);  // or pairs and a row of factors
  panel.slopes = arena.take<Real>(NR), panel.positions = arena.take<Real>(NR);
  panel.norms = arena.take<Real>(NR);
  panel.lo = arena.take<int64_t>(NR), panel.hi = arena.take<int64_t>(NR);
  panel.queries = arena.take<typename VecOf<Real>::word>(NR);
  panel.heads = arena.take<typename VecOf<Real>::word>(NR);
  return panel;
}

// The keys of rows of one head between two diagonals, in vectors; false: the rows are others.
template <class Real>
bool see_diagonals(const Operands& p, int64_t first, int64_t rows, Panel<Real>& panel) {
  if (p.k_start || p.k_end || first + rows > p.seqlen_q) return false;
  const int64_t keys = p.seqlen_k, diagonal_lo = p.diagonal_lo, diagonal_hi = p.diagonal_hi;
  int64_t *const lows = panel.lo, *const highs = panel.hi;
  Range common{0, keys};
  for (int64_t r = 0; r < rows; r++) {
    const Range seen = between_diagonals(first + r, diagonal_lo, diagonal_hi, keys);
    lows[r] = seen.lo, highs[r] = seen.hi;
    common = {larger(common.lo, seen.lo), smaller(common.hi, seen.hi)};
  }
  panel.lanes.common = common;
  return true;
}

// What the lanes of the panel know of stacked rows first ... first + rows - 1 from `head`.
template <class Real>
void place_lanes(const Operands& p, int64_t batch, int64_t head, int64_t first, int64_t rows, int NR,
                 Panel<Real>& panel) {
  Lanes& lanes = panel.lanes;
  lanes = {batch, head, first, rows, visited_range(p, batch, head, first, rows), {0, p.seqlen_k}};
  for (int64_t r = 0; r < NR; r++) panel.slopes[r] = panel.positions[r] = 0;
  for (int64_t r = 0; r < NR; r++) panel.queries[r] = panel.heads[r] = 0;
  for (int64_t r = 0; r < NR; r++) panel.lo[r] = 0, panel.hi[r] = p.seqlen_k;
  if (!p.alibi_slopes && !p.drops() && (p.sees_all() || see_diagonals(p, first, rows, panel))) return;
  for (int64_t r = 0; r < rows; r++) {
    const QueryRow s = stacked_row(p, head, first + r);
    const Range range = row_range(p, batch, s.head, s.query);
    panel.lo[r] = range.lo, panel.hi[r] = range.hi;
    panel.queries[r] = s.query + p.dropout_start.query, panel.heads[r] = s.head + p.dropout_start.head;
    lanes.common = {larger(lanes.common.lo, range.lo), smaller(lanes.common.hi, range.hi)};
    if (p.alibi_slopes) {
      panel.slopes[r] = slope_of<Real>(p, batch, s.head);
      panel.positions[r] = (Real)(s.query + p.query_start);
    }
  }
}

// The rows of q of a panel that knows its lanes into them; tmp: room for [NR][head_dim], where they stay, scaled, if ALiBi
// looks ahead.
template <class Real>
void load_lanes(const Operands& p, int NR, Panel<Real>& panel, Real* tmp) {
  const int64_t batch = panel.lanes.batch, head = panel.lanes.head, first = panel.lanes.row, rows = panel.lanes.rows;
  const double unit = product_unit(p);
  const QueryRow top = stacked_row(p, head, first);
  if (rows == NR && top.query + NR <= p.seqlen_q && lies_as<Real>(p.q) && !p.rotary && !p.alibi_slopes) {
    const TileRows<Real> q = rows_in_place<Real>(p.q, batch, top.head, top.query);
    const Times<Real> scaled{(Real)(scale_of(p, top.head) * unit)};
    return transpose(q.data, q.stride, (int64_t)NR, p.head_dim, panel.q, (int64_t)NR, scaled);
  }
  for (int64_t r = 0; r < rows; r++) {
    const QueryRow s = stacked_row(p, head, first + r);
    load_query(p, batch, s.head, s.query, tmp + r * p.head_dim);
  }
  // all at once: row by row, the stores of load_query would still be on their way
  for (int64_t r = 0; r < rows; r++) {
    const Real scale = (Real)(scale_of(p, stacked_row(p, head, first + r).head) * unit);
    for (int64_t d = 0; d < p.head_dim; d++) tmp[r * p.head_dim + d] *= scale;
  }
  for (int64_t i = rows * p.head_dim; i < NR * p.head_dim; i++) tmp[i] = 0;
  transpose(tmp, p.head_dim, (int64_t)NR, p.head_dim, panel.q, (int64_t)NR);
}

}  // namespace fastattn::FASTATTN_ISA
