// The rows of a unit as panels: queries in the lanes, everything that a row needs in arrays of NR; and tiles of keys.
#pragma once
#include "blocking.h"
#include "score.h"

namespace fastattn::FASTATTN_ISA {

// Hands out 64-byte aligned pieces; without memory it only counts.
struct Arena {
  char* memory;
  int64_t used = 0;

  template <class T>
  T* take(int64_t n) {
    T* piece = memory ? (T*)(memory + used) : nullptr;
    used += round_up(n * (int64_t)sizeof(T), 64) + 128;  // apart by more than a line: 4 KiB aliasing
    return piece;
  }
};

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

// Rows of a key or value tile as the register tile wants them: Real, unit column stride.
template <class Real>
struct TileRows {
  const Real* data;
  int64_t stride;
};

// Keys key ... key + keys - 1 of t: in place if they fit, else converted into buffer.
template <class Real>
TileRows<Real> tile_rows(const Tensor& t, int64_t batch, int64_t head, int64_t key, int64_t keys, int64_t columns,
                         Real* buffer, int64_t stride) {
  if (t.dtype == dtype_of<Real> && t.stride[3] == 1) return {(const Real*)at(t, batch, head, key), t.stride[2]};
  for (int64_t j = 0; j < keys; j++)
    load_row(at(t, batch, head, key + j), t.dtype, t.stride[3], columns, buffer + j * stride);
  return {buffer, stride};
}

FASTATTN_INLINE double scale_of(const Problem& p, int64_t head) {
  return p.scales ? load_scalar<double>(at(p.scales, 0, head, 0), p.scales.dtype) : p.softmax_scale;
}

// ALiBi's, in units of log2.
template <class Real>
FASTATTN_INLINE Real slope_of(const Problem& p, int64_t batch, int64_t head) {
  if (!p.alibi_slopes) return 0;
  return load_scalar<Real>(at(p.alibi_slopes, batch, head, 0), p.alibi_slopes.dtype) * (Real)log2e;
}

// Stacked rows first ... first + rows - 1 from `head` into the panel's lanes; tmp: [NR][head_dim].
template <class Real>
void prepare_panel(const Problem& p, int64_t batch, int64_t head, int64_t first, int64_t rows, int NR,
                   Panel<Real>& panel, Real* tmp) {
  Lanes& lanes = panel.lanes;
  lanes = {batch, head, first, rows, visited_range(p, batch, head, first, rows), {0, p.seqlen_k}};
  const double unit = p.softcap > 0.0 ? 1.0 / p.softcap : log2e;
  for (int64_t r = 0; r < NR; r++) {
    Real* row = tmp + r * p.head_dim;
    panel.slopes[r] = panel.positions[r] = 0;
    panel.queries[r] = panel.heads[r] = 0;
    panel.lo[r] = 0, panel.hi[r] = p.seqlen_k;
    if (r >= rows) {
      for (int64_t d = 0; d < p.head_dim; d++) row[d] = 0;
      continue;
    }
    Row s = stacked_row(p, head, first + r);
    load_row(at(p.q, batch, s.head, s.query), p.q.dtype, p.q.stride[3], p.head_dim, row);
    Range range = row_range(p, batch, s.head, s.query);
    panel.lo[r] = range.lo, panel.hi[r] = range.hi;
    panel.queries[r] = s.query, panel.heads[r] = s.head;
    lanes.common = {larger(lanes.common.lo, range.lo), smaller(lanes.common.hi, range.hi)};
    if (p.alibi_slopes) {
      panel.slopes[r] = slope_of<Real>(p, batch, s.head);
      panel.positions[r] = (Real)(s.query + p.seqlen_k - p.seqlen_q);
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
