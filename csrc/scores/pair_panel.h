// A panel whose queries are pairs of bfloat16.
#pragma once
#include "panel.h"
#include "rows/pair_rows.h"

namespace fastattn::FASTATTN_ISA {

// A panel before its first product of pairs: its rows of q as they are in memory, and behind them the factors of their
// scores. rows: room for [NR][head_dim]; what the panel has as Real is gone.
template <int NV>
void start_pairs(const Operands& p, Panel<float>& panel, float* rows) {
  constexpr int NR = NV * PL;
  const Lanes& lanes = panel.lanes;
  const int64_t pairs = pairs_in(p.head_dim);
  Pair *copies = (Pair*)rows, *q = (Pair*)panel.q;
  float* factors = panel.q + pairs * NR;
  for (int64_t r = 0; r < NR; r++)
    factors[r] =
        r < lanes.rows ? (float)(scale_of(p, stacked_row(p, lanes.head, lanes.row + r).head) * product_unit(p)) : 0;
  const QueryRow top = stacked_row(p, lanes.head, lanes.row);
  if (top.query + lanes.rows <= p.seqlen_q)
    return pairs_to_lanes(p.q, lanes.batch, top.head, top.query, lanes.rows, p.head_dim, NR, copies, q);
  memset((void*)copies, 0, NR * pairs * sizeof(Pair));
  for (int64_t r = 0; r < lanes.rows; r++) {
    const QueryRow s = stacked_row(p, lanes.head, lanes.row + r);
    copy_pair_rows(p.q, lanes.batch, s.head, s.query, 1, p.head_dim, copies + r * pairs, pairs);
  }
  transpose_pairs({copies, pairs}, NR, pairs, q);
}

// Leaves what is not finite out of [count][columns] pairs: 0.
inline void drop_unfinite(Pair* pairs, int64_t stride, int64_t count, int64_t columns) {
  auto finite = [](uint16_t x) { return (x & 0x7f80) == 0x7f80 ? (uint16_t)0 : x; };
  for (int64_t j = 0; j < count; j++)
    for (Pair* x = pairs + j * stride; x < pairs + j * stride + columns; x++) *x = {finite(x->low), finite(x->high)};
}

// out += V^T P^T of the elements of v that `drop_unfinite` left out, where a lane sees the key: its bits are the others'.
// seen: the scores before the softmax, of which -inf is masked.
template <int NV>
void add_unfinite(const Operands& p, const Lanes& lanes, Range keys, const Pair* weights, const float* seen,
                  float* out) {
  constexpr int NR = NV * PL;
  for (int64_t j = 0; j < keys.hi - keys.lo; j++)
    for (int64_t d = 0; d < p.head_dim_v; d++) {
      const float x = load_number<float>(p.v, lanes.batch, p.head_k(lanes.head), keys.lo + j, d);
      if (x * 0 == 0) continue;
      for (int lane = 0; lane < NR; lane++) {
        const Pair w = weights[j / 2 * NR + lane];
        if (seen[j * NR + lane] != -__builtin_inff())
          out[d * NR + lane] += to_float(j % 2 ? w.high : w.low, DType::bfloat16) * x;
      }
    }
}

}  // namespace fastattn::FASTATTN_ISA
