// The forward pass of one unit: a block of query rows against the keys that it sees, tile by tile.
//
//   loop 1  key tiles of n_block keys: converted to Real if need be, shared by all panels
//   loop 2    panels of NR query rows: one vector lane a row
//   loop 3      register tiles of MR keys: scores^T = K Q^T          (multiply)
//               score modifications, masks, online softmax           (score.h, softmax.h)
//   loop 4      register tiles of MR columns: out^T += V^T P^T       (multiply)
#pragma once
#include "blocking.h"
#include "microkernel.h"
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
  Real *q, *out;        // [head_dim][NR], [head_dim_v][NR]
  Running<Real> run;
  Real *slopes, *positions;
  Lanes lanes;
};

template <class Real>
struct Scratch {
  Panel<Real> panels[unit_rows];
  Real *scores[2], *largest, *tile_sum, *bias, *key_bias, *rows, *first, *last, *k, *v[2], *seen;
  int64_t k_stride, v_stride, bytes;
};

template <class Real>
Scratch<Real> layout(const Problem& p, const Blocking& b, char* memory) {
  Arena arena{memory};
  Scratch<Real> s{};
  const int64_t NR = b.lanes, keys = b.n_block;
  for (int i = 0; i * b.lanes < b.rows; i++) {
    Panel<Real>& panel = s.panels[i];
    panel.q = arena.take<Real>(p.head_dim * NR);
    panel.out = arena.take<Real>(p.head_dim_v * NR);
    panel.run = {arena.take<Real>(NR), arena.take<Real>(NR), arena.take<Real>(NR)};
    panel.slopes = arena.take<Real>(NR);
    panel.positions = arena.take<Real>(NR);
  }
  for (Real*& scores : s.scores) scores = arena.take<Real>(keys * NR);
  s.largest = arena.take<Real>(NR);
  s.tile_sum = arena.take<Real>(NR);
  s.seen = arena.take<Real>(keys * NR);
  s.bias = arena.take<Real>(keys * NR);
  s.key_bias = arena.take<Real>(2 * keys);
  s.rows = arena.take<Real>(larger((NR + 1) * keys, NR * larger(p.head_dim, p.head_dim_v)));
  s.first = arena.take<Real>(NR);
  s.last = arena.take<Real>(NR);
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
template <class Real>
constexpr DType dtype_of = sizeof(Real) == 8 ? DType::float64 : DType::float32;

template <class Real>
TileRows<Real> tile_rows(const Tensor& t, int64_t batch, int64_t head, int64_t key, int64_t keys, int64_t columns,
                         Real* buffer, int64_t stride) {
  if (t.dtype == dtype_of<Real> && t.stride[3] == 1) return {(const Real*)at(t, batch, head, key), t.stride[2]};
  for (int64_t j = 0; j < keys; j++)
    load_row(at(t, batch, head, key + j), t.dtype, t.stride[3], columns, buffer + j * stride);
  return {buffer, stride};
}

template <class Real>
bool all_finite(TileRows<Real> rows, int64_t keys, int64_t columns) {
  Real poison = 0;
  for (int64_t j = 0; j < keys; j++)
    for (int64_t d = 0; d < columns; d++) poison += rows.data[j * rows.stride + d] * (Real)0;
  return poison == 0;
}

template <class Real, int R, int NV>
__attribute__((noinline)) void scores_tile(const Real* k, int64_t k_stride, const Real* q, int64_t head_dim, Real* s,
                                           Real* largest, Weigher<Real, NV>& before) {
  constexpr int L = VL<Real>;
  Weigher<Real, NV> aside = before;
  auto tile = multiply<Real, R, NV>(k, k_stride, 1, q, NV * L, head_dim, aside);
  before.scores = aside.scores;
  before.lane = aside.lane;
  store_tile(tile, s, std::make_integer_sequence<int, R * NV>{});
  max_tile(tile, largest, std::make_integer_sequence<int, NV>{});
}

// out += V^T P^T for R columns. The tile starts from zero: shorter sums are more accurate than one long one.
template <class Real, int R, int NV>
__attribute__((noinline)) void out_tile(const Real* v, int64_t v_stride, const Real* p, int64_t keys, Real* out) {
  constexpr int L = VL<Real>;
  auto tile = multiply<Real, R, NV>(v, 1, v_stride, p, NV * L, keys, [] {});
  add_tile(tile, out, std::make_integer_sequence<int, R * NV>{});
}

// The next of `left` rows for register tiles of up to R: never a sliver beside a full tile, which would idle the pipes.
template <int R>
FASTATTN_INLINE int64_t tile_rows_of(int64_t left) {
  return left <= R ? left : left < R + R / 2 ? (left + 1) / 2 : R;
}

// scores [keys][NR] = K Q^T, and their maxima; `before` is worked off on the way.
template <class Real, int NV, int R = MR<NV>>
void scores_product(TileRows<Real> k, int64_t keys, const Real* q, int64_t head_dim, Real* scores, Real* largest,
                    Weigher<Real, NV>& before) {
  constexpr int NR = NV * VL<Real>;
  while (keys) {
    const int64_t rows = tile_rows_of<R>(keys);
    if (rows == R)
      scores_tile<Real, R, NV>(k.data, k.stride, q, head_dim, scores, largest, before);
    else if constexpr (R > 1)
      scores_product<Real, NV, R - 1>({k.data, k.stride}, rows, q, head_dim, scores, largest, before);
    k.data += rows * k.stride;
    scores += rows * NR;
    keys -= rows;
  }
}

// out [columns][NR] += V^T P^T
template <class Real, int NV, int R = MR<NV>>
void out_product(TileRows<Real> v, int64_t columns, const Real* p, int64_t keys, Real* out) {
  constexpr int NR = NV * VL<Real>;
  while (columns) {
    const int64_t rows = tile_rows_of<R>(columns);
    if (rows == R)
      out_tile<Real, R, NV>(v.data, v.stride, p, keys, out);
    else if constexpr (R > 1)
      out_product<Real, NV, R - 1>(v, rows, p, keys, out);
    v.data += rows;
    out += rows * NR;
    columns -= rows;
  }
}

// out += V^T P^T where a masked key contributes nothing, not 0 * NaN; seen: the scores before the softmax.
template <class Real, int NV>
void select_out(TileRows<Real> v, const Real* p, const Real* seen, int64_t keys, int64_t head_dim_v, Real* out) {
  constexpr int L = VL<Real>, NR = NV * L;
  for (int64_t d = 0; d < head_dim_v; d++)
    for (int i = 0; i < NR; i += L) {
      Vec<Real> sum{};
      for (int64_t j = 0; j < keys; j++) {
        Vec<Real> with = sum + load(p + j * NR + i) * v.data[j * v.stride + d];
        sum = load(seen + j * NR + i) == (Real)-__builtin_inf() ? sum : with;
      }
      store(out + d * NR + i, load(out + d * NR + i) + sum);
    }
}

template <class Real>
void prepare_panel(const Problem& p, const Unit& u, int64_t r0, int64_t rows, int NR, Panel<Real>& panel, Real* tmp) {
  Lanes& lanes = panel.lanes;
  lanes = {u.batch, u.head, u.row + r0, rows, visited_range(p, u.batch, u.head, u.row + r0, rows), {0, p.seqlen_k}};
  const Real scale = (Real)(p.softcap > 0.0 ? p.softmax_scale / p.softcap : p.softmax_scale * log2e);
  for (int64_t r = 0; r < NR; r++) {
    Real* row = tmp + r * p.head_dim;
    panel.run.max[r] = (Real)-__builtin_inf();
    panel.run.shift[r] = panel.run.sum[r] = panel.slopes[r] = panel.positions[r] = 0;
    if (r >= rows) {
      for (int64_t d = 0; d < p.head_dim; d++) row[d] = 0;
      continue;
    }
    Row s = stacked_row(p, u.head, lanes.row + r);
    load_row(at(p.q, u.batch, s.head, s.query), p.q.dtype, p.q.stride[3], p.head_dim, row);
    for (int64_t d = 0; d < p.head_dim; d++) row[d] *= scale;
    Range range = row_range(p, u.batch, s.head, s.query);
    lanes.common = {larger(lanes.common.lo, range.lo), smaller(lanes.common.hi, range.hi)};
    if (p.alibi_slopes) {
      panel.slopes[r] = load_scalar<Real>(at(p.alibi_slopes, u.batch, s.head, 0), p.alibi_slopes.dtype) * (Real)log2e;
      panel.positions[r] = (Real)(s.query + p.seqlen_k - p.seqlen_q);
    }
  }
  transpose(tmp, p.head_dim, (int64_t)NR, p.head_dim, panel.q, (int64_t)NR);
  for (int64_t i = 0; i < p.head_dim_v * NR; i++) panel.out[i] = 0;
}

// The panel's rows into out and lse.
template <class Real>
void finish_rows(const Problem& p, const Lanes& lanes, const Real* out, int64_t row_stride, int64_t column_stride,
                 const Real* max, const Real* sum, Real* row) {
  for (int64_t r = 0; r < lanes.rows; r++) {
    Row s = stacked_row(p, lanes.head, lanes.row + r);
    double sink = p.sinks ? load_scalar<double>(at(p.sinks, lanes.batch, s.head, 0), p.sinks.dtype) : -__builtin_inf();
    Normalizer n = normalizer(max[r], sum[r], sink);
    for (int64_t d = 0; d < p.head_dim_v; d++) row[d] = out[r * row_stride + d * column_stride] * (Real)n.factor;
    store_row(row, p.head_dim_v, at(p.out, lanes.batch, s.head, s.query), p.out.dtype, p.out.stride[3]);
    if (p.lse) *(Real*)at(p.lse, lanes.batch, s.head, s.query) = (Real)n.lse;
  }
}

// A panel's scores of one tile on their way to its output: they are weighed while the next panel's are computed.
template <class Real, int NV>
struct Pending {
  Panel<Real>* panel = nullptr;
  Weigher<Real, NV> weigher;
  Real* scores;
  int64_t keys;
  TileRows<Real> v;
  bool select;  // v is not finite and some key is masked
};

template <class Real, int NV>
void accumulate(Pending<Real, NV>& item, int64_t head_dim_v, const Real* seen) {
  constexpr int NR = NV * VL<Real>;
  if (!item.panel) return;
  item.weigher.finish();
  for (int i = 0; i < NR; i++) item.panel->run.sum[i] += item.weigher.sum[i];
  Real* out = item.panel->out;
  if (item.select) return select_out<Real, NV>(item.v, item.scores, seen, item.keys, head_dim_v, out);
  out_product<Real, NV>(item.v, head_dim_v, item.scores, item.keys, out);
}

template <class Real, int NV>
void run_unit_lanes(const Problem& p, const Blocking& b, const Unit& u, const Partial& partial, char* memory) {
  constexpr int L = VL<Real>, NR = NV * L, R = MR<NV>;
  Scratch<Real> s = layout<Real>(p, b, memory);
  const int64_t head_k = u.head / (p.num_heads / p.num_heads_k), D = p.head_dim, Dv = p.head_dim_v;
  const int64_t rows = smaller<int64_t>(b.rows, b.heads_per_unit * p.seqlen_q - u.row);
  const int panels = (int)((rows + NR - 1) / NR);
  for (int i = 0; i < panels; i++)
    prepare_panel(p, u, (int64_t)i * NR, smaller<int64_t>(NR, rows - i * NR), NR, s.panels[i], s.rows);

  auto same_for_all_rows = [&](const Tensor& t) {
    return !t || (t.stride[2] == 0 && (t.stride[1] == 0 || b.heads_per_unit == 1));
  };
  const bool any_bias = p.bias || p.mask;
  const bool key_bias = any_bias && same_for_all_rows(p.bias) && same_for_all_rows(p.mask);

  Pending<Real, NV> pending{};
  int item = 0, tile_index = 0;
  for (int64_t tile = u.k_lo / b.n_block * b.n_block; tile < u.k_hi; tile += b.n_block, tile_index++) {
    const int64_t t0 = larger(tile, u.k_lo), t1 = smaller(tile + b.n_block, u.k_hi);
    TileRows<Real> k = tile_rows(p.k, u.batch, head_k, t0, t1 - t0, D, s.k, s.k_stride);
    TileRows<Real> v = tile_rows(p.v, u.batch, head_k, t0, t1 - t0, Dv, s.v[tile_index % 2], s.v_stride);
    int finite = -1;  // of v; looked at only where something is masked
    if (key_bias) {
      const Lanes one{u.batch, u.head, u.row, 1, {}, {}};
      load_bias(p, one, t0, t1 - t0, 1, s.rows, s.key_bias);
    }
    for (int i = 0; i < panels; i++) {
      Panel<Real>& panel = s.panels[i];
      const Lanes& lanes = panel.lanes;
      const int64_t k0 = larger(t0, lanes.visited.lo), k1 = smaller(t1, lanes.visited.hi), keys = k1 - k0;
      if (keys <= 0) continue;
      Real* scores = s.scores[item++ % 2];
      Weigher<Real, NV>& before = pending.weigher;
      before.per_visit = (int)((4 * R * NV + D - 1) / D);
      for (int r = 0; r < NR; r++) s.largest[r] = (Real)-__builtin_inf();
      scores_product<Real, NV>({k.data + (k0 - t0) * k.stride, k.stride}, keys, panel.q, D, scores, s.largest, before);
      accumulate(pending, Dv, s.seen);

      bool masked = false;
      if (p.softcap > 0.0) softcap_scores<Real, NV>(scores, keys, (Real)p.softcap);
      if (p.alibi_slopes) add_alibi<Real, NV>(scores, keys, panel.slopes, panel.positions, k0);
      if (key_bias)
        masked |= add_key_bias<Real, NV>(scores, keys, s.key_bias + (k0 - t0));
      else if (any_bias) {
        load_bias(p, lanes, k0, keys, NR, s.rows, s.bias);
        masked |= add_bias<Real, NV>(scores, keys, s.bias);
      }
      if (k0 < lanes.common.lo || k1 > lanes.common.hi) {
        for (int64_t r = 0; r < NR; r++) {
          Range range{k0, k1};
          if (r < lanes.rows) {
            Row q = stacked_row(p, lanes.head, lanes.row + r);
            range = row_range(p, lanes.batch, q.head, q.query);
          }
          s.first[r] = (Real)smaller(larger<int64_t>(range.lo - k0, 0), keys);
          s.last[r] = (Real)smaller(larger<int64_t>(range.hi - k0, 0), keys);
        }
        mask_intervals<Real, NV>(scores, keys, s.first, s.last, lanes.common.lo - k0, lanes.common.hi - k0);
        masked = true;
      }
      if (masked && finite < 0) finite = all_finite(v, t1 - t0, Dv);

      pending = {&panel, {scores, scores + keys * NR, panel.run.shift, s.tile_sum, 0, 0}, scores, keys,
                 {v.data + (k0 - t0) * v.stride, v.stride}, masked && !finite};
      if (masked || any_bias || p.softcap > 0.0 || p.alibi_slopes) find_max<Real, NV>(scores, keys, s.largest);
      update_max<Real, NV>(s.largest, panel.run, panel.out, Dv);
      for (int r = 0; r < NR; r++) s.tile_sum[r] = 0;
      if (pending.select) memcpy(s.seen, scores, keys * NR * sizeof(Real));
    }
  }
  accumulate(pending, Dv, s.seen);

  for (int i = 0; i < panels; i++) {
    Panel<Real>& panel = s.panels[i];
    transpose(panel.out, (int64_t)NR, Dv, (int64_t)NR, s.rows, Dv);
    if (b.num_splits == 1) {
      finish_rows(p, panel.lanes, s.rows, Dv, (int64_t)1, panel.run.max, panel.run.sum, s.rows);
      continue;
    }
    for (int64_t r = 0; r < panel.lanes.rows; r++) {
      const int64_t row = (int64_t)i * NR + r;
      memcpy((Real*)partial.out + row * Dv, s.rows + r * Dv, Dv * sizeof(Real));
      ((Real*)partial.max)[row] = panel.run.max[r];
      ((Real*)partial.sum)[row] = panel.run.sum[r];
    }
  }
}

template <class Real>
void run_unit(const Problem& p, const Blocking& b, const Unit& u, const Partial& partial, char* memory) {
  if (b.lanes == VL<Real>)
    run_unit_lanes<Real, 1>(p, b, u, partial, memory);
  else
    run_unit_lanes<Real, max_vectors>(p, b, u, partial, memory);
}

// Partial results of a row block, split after split: out [splits][rows][Dv], max and sum [splits][rows].
template <class Real>
void combine(const Problem& p, const Blocking& b, const Unit& u, const Partial& first, char* memory) {
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
      const Real weight = (Real)__builtin_exp2((double)own - reference);
      total += sum[s * b.rows] * weight;
      for (int64_t d = 0; d < Dv; d++) row[d] += out[s * b.rows * Dv + d] * weight;
    }
    const Lanes one{u.batch, u.head, u.row + r, 1, {}, {}};
    finish_rows(p, one, row, Dv, (int64_t)1, &top, &total, row);
  }
}

}  // namespace fastattn::FASTATTN_ISA
