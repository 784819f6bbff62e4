// The additive bias and the bool mask of each pair; and the gradient of the bias.
#pragma once
#include "mask.h"
#include "rows/transpose.h"
#include "tile/softmax.h"

namespace fastattn::FASTATTN_ISA {

// scores[j][lane] += bias[j], -inf selects; whether anything is masked.
template <class Real, int NV>
bool add_key_bias(Real* scores, int64_t keys, const Real* bias) {
  constexpr int L = VL<Real>, NR = NV * L;
  const Real lowest = (Real)-__builtin_inf();
  bool masked = false;
  for (int64_t j = 0; j < keys; j++) {
    const bool gone = bias[j] == lowest;
    masked |= gone;
    for (int v = 0; v < NV; v++) {
      Real* s = scores + j * NR + v * L;
      store(s, gone ? splat(lowest) : load(s) + bias[j]);
    }
  }
  return masked;
}

// The same with a bias for each score, rows of [NR] at `stride`.
template <class Real, int NV>
bool add_bias(Real* scores, int64_t keys, const Real* bias, int64_t stride) {
  constexpr int L = VL<Real>, NR = NV * L;
  const Vec<Real> lowest = splat((Real)-__builtin_inf());
  auto masked = lowest > lowest;
  for (int64_t j = 0; j < keys; j++)
    for (int v = 0; v < NV; v++) {
      Real* s = scores + j * NR + v * L;
      Vec<Real> b = load(bias + j * stride + v * L);
      auto gone = b == lowest;
      masked |= gone;
      store(s, gone ? lowest : load(s) + b);
    }
  return any<Real>(masked);
}

// The bias of `key` and the panel's first lane, if those of the others follow it in memory, as along diagonals; or null.
template <class Real>
const Real* bias_in_lanes(const Operands& p, const Lanes& lanes, int64_t key, int NR) {
  if (p.bias.dtype != dtype_of<Real> || p.bias.stride[2] != 1 || lanes.rows != NR) return nullptr;
  const QueryRow q = stacked_row(p, lanes.head, lanes.row);
  return q.query + NR <= p.seqlen_q ? (const Real*)at(p.bias, lanes.batch, q.head, q.query, key) : nullptr;
}

// The bias of the lanes for `keys` keys from `key`, transposed to [keys][NR].
template <class Real>
void load_bias(const Operands& p, const Lanes& lanes, int64_t key, int64_t keys, int NR, Real* rows, Real* bias) {
  const QueryRow q = stacked_row(p, lanes.head, lanes.row);
  const bool whole = lanes.rows == NR && q.query + NR <= p.seqlen_q;  // rows of one head, a lane each
  if (whole && lies_as<Real>(p.bias)) {
    const TileRows<Real> tile = rows_in_place<Real>(p.bias, lanes.batch, q.head, q.query, key);
    return transpose(tile.data, tile.stride, (int64_t)NR, keys, bias, (int64_t)NR);
  }
  for (int64_t r = 0; r < NR; r++) {
    Real* row = rows + r * keys;
    if (r >= lanes.rows) {
      for (int64_t j = 0; j < keys; j++) row[j] = 0;
      continue;
    }
    const QueryRow s = stacked_row(p, lanes.head, lanes.row + r);
    load_row(at(p.bias, lanes.batch, s.head, s.query, key), p.bias.dtype, p.bias.stride[3], keys, row);
  }
  transpose(rows, keys, (int64_t)NR, keys, bias, (int64_t)NR);
}

// Bias and mask of a query in one row, -inf where the mask is False; mask_row: [keys].
template <class Real>
void load_key_bias(const Operands& p, int64_t batch, QueryRow q, int64_t key, int64_t keys, Real* mask_row,
                   Real* bias) {
  const Real lowest = (Real)-__builtin_inf();
  auto load = [&](const Tensor& t, Real* to) {
    load_row(at(t, batch, q.head, q.query, key), t.dtype, t.stride[3], keys, to);
  };
  load(p.bias ? p.bias : p.mask, bias);
  if (!p.bias || !p.mask) return;
  load(p.mask, mask_row);
  for (int64_t j = 0; j < keys; j++) bias[j] = mask_row[j] == lowest ? lowest : bias[j];
}

template <class Real, int NV>
void lay_panels(const Operands& p, Real* panel, Real* scratch) {
  constexpr int NR = NV * VL<Real>;
  for (int64_t head = 0; head < p.num_heads; head++)
    for (int64_t row = 0; row < p.seqlen_q; row += NR, panel += p.seqlen_k * NR) {
      const Lanes lanes{0, head, row, smaller<int64_t>(NR, p.seqlen_q - row), {}, {}};
      if (p.bias)
        load_bias(p, lanes, 0, p.seqlen_k, NR, scratch, panel);
      else
        for (int64_t i = 0; i < p.seqlen_k * NR; i++) panel[i] = 0;
      if (p.mask) mask_rows<Real, NV>(p, lanes, 0, p.seqlen_k, panel);
    }
}

template <class Real>
void lay_bias(const Operands& p, int lanes, char* to, char* scratch) {
  if (lanes == VL<Real>)
    lay_panels<Real, 1>(p, (Real*)to, (Real*)scratch);
  else
    lay_panels<Real, max_vectors>(p, (Real*)to, (Real*)scratch);
}

// Where the lanes of a panel stand for `key` in a laid bias, and in the sums of its gradient.
FASTATTN_INLINE int64_t laid_place(const Operands& p, int64_t head, int64_t row, int64_t key, int64_t NR) {
  const int64_t panels = (p.seqlen_q + NR - 1) / NR;
  return ((head * panels + row / NR) * p.seqlen_k + key) * NR;
}

// sums[key][vector] += rows at `stride`, [keys][NR].
template <class Real, int NV>
void add_key_sums(const Real* ds, int64_t stride, int64_t keys, Real* sums) {
  constexpr int L = VL<Real>;
  for (int64_t j = 0; j < keys; j++) {
    Vec<Real> sum = load(ds + j * stride);
    for (int v = 1; v < NV; v++) sum += load(ds + j * stride + v * L);
    store(sums + j * L, load(sums + j * L) + sum);
  }
}

// sums[key][lane] += rows at `stride`, [keys][NR].
template <class Real, int NV>
void add_lane_sums(const Real* ds, int64_t stride, int64_t keys, Real* sums) {
  constexpr int L = VL<Real>, NR = NV * L;
  for (int64_t j = 0; j < keys; j++)
    for (int i = 0; i < NR; i += L) store(sums + j * NR + i, load(sums + j * NR + i) + load(ds + j * stride + i));
}

// dbias [query][key] += dS of the lanes, rows of keys at `stride`; rows: [NR][keys].
template <class Real>
void add_dense_bias(const Tensor& dbias, const Lanes& lanes, int64_t NR, int64_t head, const Real* ds, int64_t stride,
                    Range seen, Real* rows) {
  const int64_t n = seen.hi - seen.lo;
  transpose(ds, stride, n, NR, rows, n);
  for (int64_t r = 0; r < lanes.rows; r++) {
    Real* to = (Real*)at(dbias, lanes.batch, head, lanes.row + r, seen.lo);
    const Real* row = rows + r * n;
    for (int64_t j = 0; j < n; j++) to[j] += row[j];
  }
}

template <class Real>
void add_laid_bias(const Operands& p, const Gradients& g, int lanes, char* scratch) {
  const int64_t heads = g.dbias.stride[1] ? p.num_heads : 1;
  for (int64_t head = 0; head < heads; head++)
    for (int64_t row = 0; row < p.seqlen_q; row += lanes) {
      const Lanes of_panel{0, head, row, smaller<int64_t>(lanes, p.seqlen_q - row), {}, {}};
      const Real* sums = (const Real*)g.laid_bias + laid_place(p, head, row, 0, lanes);
      add_dense_bias(g.dbias, of_panel, lanes, head, sums, (int64_t)lanes, {0, p.seqlen_k}, (Real*)scratch);
    }
}

}  // namespace fastattn::FASTATTN_ISA
