// The gradients of what was added to the scores or to the softmax, from dS and delta, while the backward pass of a unit
// visits panels and tiles. Each unit leaves its numbers in places of its own (`Gradients`); the driver adds them up.
#pragma once
#include "bias.h"
#include "kernels.h"
#include "panel.h"
#include "sinks.h"
#include "tile/gradient_products.h"

namespace fastattn::FASTATTN_ISA {

// What a panel adds up over the tiles, [NR] each.
template <class Real>
struct LaneSums {
  Real* slope;  // dS times the derivative by ALiBi's slope
};

template <class Real, int NV>
class ScoreGradients {
  static constexpr int L = VL<Real>, NR = NV * L;
  const Operands& p;
  const Gradients& g;
  const KeyUnit& u;
  const int64_t num_splits, k_lo, k_hi;  // of the unit
  Real* const key_sum;                   // [keys of the range][vector], of dS
  Real* const diagonal_sum;              // [keys of the range + query rows][NR], of dS
  Real* const rows;                      // [NR][n_block]
  int64_t head = 0;                      // the query head of this turn

  // The place in diagonal_sum of the unit's first key and the panel that starts at `query`.
  int64_t first_diagonal(int64_t query) const { return round_up(p.seqlen_q, NR) - NR - query; }

 public:
  ScoreGradients(const Operands& p, const Gradients& g, const KeyUnit& u, int64_t num_splits, Range keys, Real* key_sum,
                 Real* diagonal_sum, Real* rows)
      : p(p),
        g(g),
        u(u),
        num_splits(num_splits),
        k_lo(keys.lo),
        k_hi(keys.hi),
        key_sum(key_sum),
        diagonal_sum(diagonal_sum),
        rows(rows) {}

  void start_head(int64_t query_head, int64_t padded_keys) {
    head = query_head;
    for (int64_t i = 0; g.key_sums && i < padded_keys * L; i += L) store(key_sum + i, Vec<Real>{});
    const int64_t diagonals = padded_keys + round_up(p.seqlen_q, NR);
    for (int64_t i = 0; g.diagonal_sums && i < diagonals * NR; i += L) store(diagonal_sum + i, Vec<Real>{});
  }

  // Whether every query is asked for its sums, also one that sees no key of the unit.
  bool wants_all_queries() const { return u.split == 0 && (g.query_sums || g.sink_sums); }

  // Whether `add` reads dS for sums of its own.
  bool wants_scores() const { return g.slope_sums || g.key_sums || g.diagonal_sums || g.dense_bias(); }

  // What follows from a row alone. The row's dS sum to dlse + delta * weight of the sink, which is exact.
  void add_rows_alone(const Softmax<Real>& softmax, int64_t query, int64_t count) {
    const double sink = sink_of(p, u.batch, head);
    for (int64_t r = 0; r < count; r++) {
      const bool sees = softmax.log_sum[r] != (Real)__builtin_inf();
      const double dlse = sees && g.dlse ? *(const Real*)at(g.dlse, u.batch, head, query + r) : 0;
      const double by_sink = delta_of_sink(sink, softmax.delta[r], (double)softmax.top[r] + softmax.log_sum[r]);
      const int64_t row = (u.batch * p.num_heads + head) * p.seqlen_q + query + r;
      if (g.query_sums) g.query_sums[row] = dlse + by_sink;
      if (g.sink_sums) g.sink_sums[row] = -by_sink;
    }
  }

  // dS of a panel and the keys that it sees, rows at `stride`. slope: null, or the derivative of the softcap; dS comes
  // out as the gradient of the product.
  void add(const Panel<Real>& panel, const LaneSums<Real>& sums, Range seen, Real* ds, int64_t stride,
           const Real* slope) {
    const int64_t n = seen.hi - seen.lo;
    if (g.slope_sums) add_slope_sums<Real, NV>(ds, stride, n, panel.positions, seen.lo, sums.slope);
    if (g.key_sums) add_key_sums<Real, NV>(ds, stride, n, key_sum + (seen.lo - k_lo) * L);
    // The sums of panels one NR apart stand NR keys apart, so that a place is a diagonal.
    if (g.diagonal_sums)
      add_lane_sums<Real, NV>(ds, stride, n, diagonal_sum + (first_diagonal(panel.lanes.row) + seen.lo - k_lo) * NR);
    if (g.dense_bias()) add_dense(panel.lanes, seen, ds, stride);
    if (slope) scale_rows<Real, NV>(ds, stride, slope, n);
  }

  // panel_sums(query): the LaneSums of the panel of that query.
  template <class PanelSums>
  void finish_head(const PanelSums& panel_sums) {
    const int64_t row = u.batch * p.num_heads + head;
    if (g.slope_sums) {
      double total = 0;
      for (int64_t query = 0; query < p.seqlen_q; query++) total += panel_sums(query).slope[query % NR];
      g.slope_sums[row * num_splits + u.split] = total;
    }
    for (int64_t key = k_lo; g.key_sums && key < k_hi; key++) {
      double total = 0;
      for (int lane = 0; lane < L; lane++) total += key_sum[(key - k_lo) * L + lane];
      g.key_sums[row * p.seqlen_k + key] = total;
    }
    if (g.diagonal_sums) finish_diagonals(g.diagonal_sums + (row * num_splits + u.split) * p.num_diagonals());
  }

 private:
  void add_dense(const Lanes& lanes, Range seen, const Real* ds, int64_t stride) {
    if (!g.laid_bias) return add_dense_bias(g.dbias, lanes, NR, head, ds, stride, seen, rows);
    Real* sums = (Real*)g.laid_bias + laid_place(p, g.dbias.stride[1] ? head : 0, lanes.row, seen.lo, NR);
    add_lane_sums<Real, NV>(ds, stride, seen.hi - seen.lo, sums);
  }

  void finish_diagonals(double* to) const {
    const int64_t last = p.num_diagonals(), places = first_diagonal(0) + k_hi - k_lo;
    for (int64_t i = 0; i < last; i++) to[i] = 0;
    for (int64_t place = 0; place < places; place++) {
      const int64_t first = first_diagonal(0) - place - k_lo + p.seqlen_k - 1;  // of lane 0
      const int64_t from = larger<int64_t>(0, -first), end = smaller<int64_t>(NR, last - first);
      for (int64_t lane = from; lane < end; lane++) to[first + lane] += diagonal_sum[place * NR + lane];
    }
  }
};

}  // namespace fastattn::FASTATTN_ISA
