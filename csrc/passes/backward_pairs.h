// The products of the backward pass on pairs of bfloat16: what `KeyRange` does with Real, and when, is done here with
// words of two. S, dP from rows in place; P and dS rounded to bfloat16, so that as rows [key][query] they are pairs of
// queries for dK and dV, and interleaved pairs of keys for dQ.
#pragma once
#include "backward_layout.h"
#include "key_sums.h"
#include "rows/lines_ahead.h"
#include "scores/dropout.h"
#include "tile/pair_gradients.h"

namespace fastattn::FASTATTN_ISA {

template <int NV>
class PairRange : TilesInUse {
  static constexpr int NR = NV * PL, R = MR<NV>;
  const Operands& p;
  const Gradients& g;
  const BackwardBlocking& b;
  const KeyUnit& u;
  const BackwardScratch<float>& s;
  Modifier<float, NV>& modifier;
  ScoreGradients<float, NV>& sums;
  LinesAhead& ahead;
  int64_t head = 0, lo = 0, keys = 0;  // of the tile
  TileRows<Pair> k{}, v{};

 public:
  PairRange(const Operands& p, const Gradients& g, const BackwardBlocking& b, const KeyUnit& u,
            const BackwardScratch<float>& s, Modifier<float, NV>& modifier, ScoreGradients<float, NV>& sums,
            LinesAhead& ahead)
      : p(p), g(g), b(b), u(u), s(s), modifier(modifier), sums(sums), ahead(ahead) {}

  void load_tile(int64_t query_head, int64_t first, int64_t count) {
    const PairScratch& x = s.pairs;
    head = query_head, lo = first, keys = count;
    k = pair_rows(p.k, u.batch, u.head_k, lo, keys, p.head_dim, x.k, x.k_stride, crowds(p.k));
    v = pair_rows(p.v, u.batch, u.head_k, lo, keys, p.head_dim_v, x.v, x.v_stride, crowds(p.v));
    pack_columns(p.k, u.batch, u.head_k, lo, keys, p.head_dim, x.k_pairs, x.k_pairs_stride);
  }

  // The panel's rows of q and dout, in the places of those of Real.
  void pack(GradientPanel<float>& panel) {
    pack_rows(p.q, p.head_dim, panel, panel.q, s.q_rows);
    pack_rows(g.dout, p.head_dim_v, panel, panel.dout, s.dout_rows);
  }

  // P and dS of one panel against the tile, rounded, and its dQ; whether some keys may be masked.
  bool visit_panel(const GradientPanel<float>& panel, int64_t column) {
    const Range seen = panel.seen;
    const PairScratch& x = s.pairs;
    const int64_t n = seen.hi - seen.lo, skipped = n ? seen.lo - lo : keys, stride = 2 * x.tile_stride;
    uint16_t *weights = (uint16_t*)s.p + column, *ds = (uint16_t*)s.ds + column;
    auto clear = [&](int64_t from, int64_t to) {
      for (int64_t j = from; j < to; j++)
        memset(weights + j * stride, 0, NR * sizeof *ds), memset(ds + j * stride, 0, NR * sizeof *ds);
    };
    clear(0, skipped), clear(skipped + n, keys);
    if (!n) return false;

    const Softmax<float>& softmax = panel.softmax;
    const float factor = (float)(scale_of(p, head) * product_unit(p));
    NoAside nothing;
    pair_product<NV>({k.data + skipped * k.stride, k.stride}, n, (const Pair*)panel.q, pairs_in(p.head_dim), factor,
                     s.scores, nothing, ahead);
    float* slope = p.softcap > 0.0 ? s.slope : nullptr;
    const bool masked = modifier.apply(panel, seen.lo, seen.hi, skipped, s.scores, slope);
    if (p.drops())
      each_kept<float, NV>(p, panel, seen.lo, n,
                           [&](int64_t j, int v, auto kept) { store(s.kept + (j * NV + v) * PL, (Vec<float>)kept); });
    PairExp<NV> exps(s.scores, n, softmax, pairs_in(p.head_dim_v));
    const TileRows<Pair> seen_v{v.data + skipped * v.stride, v.stride};
    const PanelWeights<NV> of{s.scores, p.drops() ? s.kept : nullptr, softmax};
    const RoundedWeights<NV> to{weights + skipped * stride, ds + skipped * stride, stride, x.ds_pairs};
    const Pair* dout = (const Pair*)panel.dout;
    if (slope || sums.wants_scores()) {
      pair_product<NV>(seen_v, n, dout, pairs_in(p.head_dim_v), (float)p.keep_factor, s.dp, exps, ahead);
      exps.finish();
      for (int64_t i = 0; i < n * NV; i++) {
        const Weighed one = of.weighed(i / NV, (int)(i % NV), load(s.dp + i * PL));
        store(s.scores + i * PL, one.p), store(s.dp + i * PL, one.ds);
      }
      sums.add(panel, panel.sums, seen, s.dp, NR, slope);
      round_weights(n, s.scores, s.dp, to);
    } else {
      weighed_product(seen_v, n, dout, pairs_in(p.head_dim_v), (float)p.keep_factor, exps, of, to, ahead);
    }
    if (!g.needs_dq()) return masked;
    const Pair* of_keys = x.k_pairs + skipped / 2 * x.k_pairs_stride;
    each_tile<R>(p.head_dim, [&](int64_t d, auto tile) {
      column_tile<float, tile, NV>(of_keys + d, x.k_pairs_stride, x.ds_pairs, NR, pairs_in(n), panel.dq + d * NR);
      ahead();
    });
    return masked;
  }

  // dV += P dout and dK += dS q, over the panels of a block, or = where those are fresh. What has been left out of the rows
  // comes in as a factor.
  void add_to_keys(const GradientPanel<float>* panel, int64_t count, int64_t rows, int64_t block, int64_t tile,
                   const KeySums<float, NV>& dk, const KeySums<float, NV>& dv) {
    const float scale = (float)scale_of(p, head), keep_factor = (float)p.keep_factor;
    if (g.dv) add_product(panel, count, rows, s.p, s.dout_rows, p.head_dim_v, block, tile, keep_factor, dv);
    if (g.dk) add_product(panel, count, rows, s.ds, s.q_rows, p.head_dim, block, tile, scale, dk);
  }

 private:
  void add_product(const GradientPanel<float>* panel, int64_t count, int64_t rows, const float* weights,
                   const float* copies, int64_t columns, int64_t block, int64_t tile, float factor,
                   const KeySums<float, NV>& gradient) {
    const int64_t column = column_panels(columns, NR), stride = s.pairs.tile_stride;
    NoAside nothing;
    for (int64_t c = 0; c < column; c++) {
      const Pair* from = (const Pair*)copies + (block * column + c) * b.block_rows / 2 * NR;
      float* to = gradient.place(u, lo, tile, c);
      each_tile<R>(keys, [&](int64_t j, auto size) {
        const Range seeing = panels_that_see(panel, count, lo + j, lo + j + size);
        const int64_t first = start_of_pairs(seeing.lo * NR, 0) / 2,
                      steps = pairs_in(smaller(seeing.hi * NR, rows)) - first;
        const Pair* w = (const Pair*)weights + j * stride + first;
        auto add = gradient.fresh ? pair_tile<false, size, NV, NoAside> : pair_tile<true, size, NV, NoAside>;
        add(w, stride, from + first * NR, steps, factor, to + j * NR, nothing);
        ahead();
      });
    }
  }

  // Rows of q or dout as they are in memory: to lanes, pairs of columns; and to the column panels, pairs of queries.
  void pack_rows(const Tensor& t, int64_t columns, GradientPanel<float>& panel, float* lanes, float* copies) {
    const int64_t head = panel.lanes.head, query = panel.lanes.row, rows = panel.lanes.rows;
    const int64_t panels = column_panels(columns, NR);
    pairs_to_lanes(t, u.batch, head, query, rows, columns, NR, (Pair*)s.rows, (Pair*)lanes);
    const int64_t block = query / b.block_rows, r = query % b.block_rows;
    for (int64_t c = 0; c < panels; c++) {
      Pair* to = (Pair*)copies + ((block * panels + c) * b.block_rows + r) / 2 * NR;
      const int64_t width = smaller<int64_t>(NR, columns - c * NR);
      if (width < NR) memset((void*)to, 0, pairs_in(rows) * NR * sizeof(Pair));
      interleave_rows(t, u.batch, head, query, rows, c * NR, width, to, NR);
    }
  }
};

}  // namespace fastattn::FASTATTN_ISA
