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
  Real *q, *out;  // [head_dim][NR], [head_dim_v][NR]
  Running<Real> run;
  Real *slopes, *positions;  // [NR], of ALiBi
  int64_t *lo, *hi;          // [NR], the keys that a lane sees
};

// The memory of one thread while it computes a unit.
template <class Real>
struct Scratch {
  Panel<Real>* panels;
  Real *scores[2], *seen;    // [n_block][NR]; scores before the softmax where they must be kept
  Real *largest, *tile_sum;  // [NR]
  Real *bias, *key_bias;     // [n_block][NR], [n_block]
  Real *first, *last;        // [NR], the keys that a lane sees, counted from the tile's first
  Real* rows;                // rows on their way to or from lanes
  Real *k, *v[2];            // [n_block][stride], converted tiles; v outlives its tile by one panel
  int64_t k_stride, v_stride, bytes;
};

template <class Real>
Scratch<Real> layout(const Problem& p, const Blocking& b, char* memory) {
  Arena arena{memory};
  Scratch<Real> s;
  const int64_t NR = b.lanes, keys = b.n_block, panels = b.rows / b.lanes;
  s.panels = arena.take<Panel<Real>>(panels);
  for (int64_t i = 0; i < panels; i++) {
    Panel<Real> panel;
    panel.q = arena.take<Real>(p.head_dim * NR);
    panel.out = arena.take<Real>(p.head_dim_v * NR);
    panel.run = {arena.take<Real>(NR), arena.take<Real>(NR), arena.take<Real>(NR)};
    panel.slopes = arena.take<Real>(NR), panel.positions = arena.take<Real>(NR);
    panel.lo = arena.take<int64_t>(NR), panel.hi = arena.take<int64_t>(NR);
    if (memory) s.panels[i] = panel;
  }
  for (Real*& scores : s.scores) scores = arena.take<Real>(keys * NR);
  s.seen = arena.take<Real>(keys * NR);
  s.largest = arena.take<Real>(NR), s.tile_sum = arena.take<Real>(NR);
  s.bias = arena.take<Real>(keys * NR), s.key_bias = arena.take<Real>(keys);
  s.first = arena.take<Real>(NR), s.last = arena.take<Real>(NR);
  s.rows = arena.take<Real>(larger((NR + 1) * keys, NR * larger(p.head_dim, p.head_dim_v)));
  s.k_stride = round_up(p.head_dim, 16) + 16;  // never a power of two, which would thrash the L1
  s.v_stride = round_up(p.head_dim_v, 16) + 16;
  s.k = arena.take<Real>(keys * s.k_stride);
  for (Real*& v : s.v) v = arena.take<Real>(keys * s.v_stride);
  s.bytes = arena.used;
  return s;
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

// Rows r0 ... r0 + rows - 1 of the unit into the panel's lanes, nothing seen yet; tmp: [NR][head_dim].
template <class Real>
void prepare_panel(const Problem& p, const Unit& u, int64_t r0, int64_t rows, int NR, Panel<Real>& panel, Real* tmp) {
  Lanes& lanes = panel.lanes;
  lanes = {u.batch, u.head, u.row + r0, rows, visited_range(p, u.batch, u.head, u.row + r0, rows), {0, p.seqlen_k}};
  const Real scale = (Real)(p.softcap > 0.0 ? p.softmax_scale / p.softcap : p.softmax_scale * log2e);
  for (int64_t r = 0; r < NR; r++) {
    Real* row = tmp + r * p.head_dim;
    panel.run.max[r] = (Real)-__builtin_inf();
    panel.run.shift[r] = panel.run.sum[r] = panel.slopes[r] = panel.positions[r] = 0;
    panel.lo[r] = 0, panel.hi[r] = p.seqlen_k;
    if (r >= rows) {
      for (int64_t d = 0; d < p.head_dim; d++) row[d] = 0;
      continue;
    }
    Row s = stacked_row(p, u.head, lanes.row + r);
    load_row(at(p.q, u.batch, s.head, s.query), p.q.dtype, p.q.stride[3], p.head_dim, row);
    Range range = row_range(p, u.batch, s.head, s.query);
    panel.lo[r] = range.lo, panel.hi[r] = range.hi;
    lanes.common = {larger(lanes.common.lo, range.lo), smaller(lanes.common.hi, range.hi)};
    if (p.alibi_slopes) {
      panel.slopes[r] = load_scalar<Real>(at(p.alibi_slopes, u.batch, s.head, 0), p.alibi_slopes.dtype) * (Real)log2e;
      panel.positions[r] = (Real)(s.query + p.seqlen_k - p.seqlen_q);
    }
  }
  // all at once: row by row, the stores of load_row would still be on their way
  for (int64_t i = 0; i < NR * p.head_dim; i++) tmp[i] *= scale;
  transpose(tmp, p.head_dim, (int64_t)NR, p.head_dim, panel.q, (int64_t)NR);
  for (int64_t i = 0; i < p.head_dim_v * NR; i++) panel.out[i] = 0;
}

}  // namespace fastattn::FASTATTN_ISA
