// The tangents of out and lse of one unit: a block of query rows against the keys that it sees, tile by tile as in
// prefill.h, with the tangents of scores and weights beside them.
//
//   loop 1  key tiles: K, V and their tangents tK, tV
//   loop 2    panels: S^T = K Q^T; modifications, masks, online softmax: P^T
//             tS^T = tK Q^T + K tQ^T, then its modifications: W^T = P^T * tS^T
//             out^T += V^T P^T, tout^T += V^T W^T + tV^T P^T, mean += column sums of W^T
//
// In the end, all divided by the softmax denominator: tlse = mean, tout -= mean * out. Of a row's tS, what they have in
// common cancels there, and would leave its rounding behind: they count from a center near their mean. Nothing that a
// forward pass has left is read. Products whose tangent is absent are left out.
#pragma once
#include "prefill.h"
#include "tile/gradient_products.h"

namespace fastattn::FASTATTN_ISA {

// The blocking of the forward pass without key splits: who asks for a derivative has more than a few rows.
template <class Real>
Blocking make_tangent_blocking(const Operands& p) {
  Blocking b = make_blocking<Real>(p);
  b.num_splits = 1, b.split_keys = round_up(larger<int64_t>(p.seqlen_k, 1), b.n_block);
  if (!p.blocks && p.head_dim + p.head_dim_v > 256)
    b.rows = (int)smaller<int64_t>(b.rows, round_up(unit_rows / 2, b.lanes));
  return b;
}

template <class Real>
struct TangentPanel : ForwardPanel<Real> {
  Real *tout, *mean;  // behind out, so that one step rescales them all: [head_dim_v][NR], [NR]
  Real* tq;           // [head_dim][NR], scaled as q is
  Real* tslopes;      // [NR]
  Real* center;       // [NR]
};

// The memory of one thread while it computes a unit.
template <class Real>
struct TangentScratch {
  TangentPanel<Real>* panels;
  Real *scores, *seen, *tscores, *slope;        // [n_block][NR]; seen: the scores before the softmax
  Real *largest, *ignored, *tile_sum, *moment;  // [NR]
  ModifierMemory<Real> modifier;
  Real *rows, *trows;     // [NR][head_dim or head_dim_v], rows on their way to or from lanes
  Real *k, *v, *tk, *tv;  // [n_block][stride], converted tiles
  int64_t k_stride, v_stride, bytes;
};

template <class Real>
TangentScratch<Real> tangent_layout(const Operands& p, const Blocking& b, char* memory) {
  Arena arena{memory};
  TangentScratch<Real> s;
  const int64_t NR = b.lanes, keys = b.n_block, panels = b.rows / b.lanes;
  s.panels = arena.take<TangentPanel<Real>>(panels);
  for (int64_t i = 0; i < panels; i++) {
    TangentPanel<Real> panel{};
    (Panel<Real>&)panel = take_panel<Real>(arena, p.head_dim, NR);
    panel.run = {arena.take<Real>(NR), arena.take<Real>(NR), arena.take<Real>(NR)};
    panel.out = arena.take<Real>((2 * p.head_dim_v + 1) * NR);
    panel.tout = panel.out + p.head_dim_v * NR, panel.mean = panel.tout + p.head_dim_v * NR;
    panel.tq = arena.take<Real>(p.head_dim * NR), panel.tslopes = arena.take<Real>(NR);
    panel.center = arena.take<Real>(NR);
    if (memory) s.panels[i] = panel;
  }
  for (Real** tile : {&s.scores, &s.seen, &s.tscores, &s.slope}) *tile = arena.take<Real>(keys * NR);
  for (Real** row : {&s.largest, &s.ignored, &s.tile_sum, &s.moment}) *row = arena.take<Real>(NR);
  s.modifier = take_modifier<Real>(arena, keys, NR);
  for (Real** rows : {&s.rows, &s.trows}) *rows = arena.take<Real>(NR * larger(p.head_dim, p.head_dim_v));
  s.k_stride = round_up(p.head_dim, 16) + 16, s.v_stride = round_up(p.head_dim_v, 16) + 16;  // never a power of two
  for (Real** tile : {&s.k, &s.tk}) *tile = arena.take<Real>(keys * s.k_stride);
  for (Real** tile : {&s.v, &s.tv}) *tile = arena.take<Real>(keys * s.v_stride);
  s.bytes = arena.used;
  return s;
}

template <class Real>
int64_t tangent_scratch_bytes(const Operands& p, const Blocking& b) {
  return tangent_layout<Real>(p, b, nullptr).bytes;
}

// sums[lane]: over the keys, of W = P * (factor * tS - center), 0 where no key is seen, whatever stands there.
// `stores`: W comes in the place of tS.
template <bool stores, class Real, int NV>
void sum_tangents(const Real* weights, const Real* seen, Real factor, const Real* center, int64_t keys, Real* tscores,
                  Real* sums) {
  constexpr int L = VL<Real>, NR = NV * L;
  const Vec<Real> lowest = splat((Real)-__builtin_inf());
  for (int v = 0; v < NV; v++) {
    const Vec<Real> from = load(center + v * L);
    Vec<Real> sum{};
    for (int64_t i = v * L; i < keys * NR; i += NR) {
      const Vec<Real> weighted = load(weights + i) * (load(tscores + i) * factor - from);
      const Vec<Real> w = load(seen + i) == lowest ? Vec<Real>{} : weighted;
      if constexpr (stores) store(tscores + i, w);
      sum += w;
    }
    store(sums + v * L, sum);
  }
}

template <class Real, int NV>
class TangentUnit {
  static constexpr int L = VL<Real>, NR = NV * L;

  struct LoadedTile {
    KeyTile keys;
    TileRows<Real> k, v, tk, tv;
  };

  const Operands& p;
  const Tangents& t;
  const Blocking& b;
  const Unit& u;
  TangentScratch<Real> s;
  const bool careful;
  const int64_t D, Dv;
  // Whether q's panels have a tangent, which a learned scale gives them too; tS has terms beside its products; tS may
  // be other than 0; a row's mean may be.
  const bool has_tq, adds, moves, has_mean;
  Operands biased;  // p with the tangent of the bias in the place of the bias
  int64_t rows;
  int panels;
  Modifier<Real, NV> modifier;
  bool any_masked = false;

 public:
  // careful: NaN or Inf in v and its tangent must not leak from behind a mask.
  TangentUnit(const Operands& p, const Tangents& t, const Blocking& b, const Unit& u, char* memory, bool careful)
      : p(p),
        t(t),
        b(b),
        u(u),
        s(tangent_layout<Real>(p, b, memory)),
        careful(careful),
        D(p.head_dim),
        Dv(p.head_dim_v),
        has_tq(t.q || t.scales),
        adds(t.bias || t.alibi_slopes),
        moves(has_tq || t.k || adds),
        has_mean(moves || t.sinks),
        biased(p),
        modifier(p, s.modifier, b.heads_per_unit == 1) {
    biased.bias = t.bias;
    rows = smaller<int64_t>(b.rows, b.heads_per_unit * p.seqlen_q - u.row);
    panels = (int)((rows + NR - 1) / NR);
    for (int i = 0; i < panels; i++) {
      TangentPanel<Real>& panel = s.panels[i];
      start_panel<Real, NV>(p, u, i * NR, smaller<int64_t>(NR, rows - i * NR), panel, s.rows, s.k);
      clear_if_fresh(panel, (2 * Dv + 1) * NR);
      for (int r = 0; r < NR; r++) panel.center[r] = 0;
      if (moves) pack_tangents(panel);
    }
  }

  // As ForwardUnit::run.
  bool run() {
    const int64_t list = p.blocks ? p.blocks->index(u.batch, u.head, u.row / b.rows) : 0;
    each_key_tile(p.blocks, list, u.k_lo, u.k_hi, b.n_block, [&](const KeyTile& keys) {
      const LoadedTile tile = load_tile(keys);
      for (int i = 0; i < panels; i++) visit(s.panels[i], tile);
    });
    if (any_masked && !careful)
      for (int i = 0; i < panels; i++)
        if (!all_finite(s.panels[i].out, 2 * Dv * NR)) return false;
    return true;
  }

  void finish() {
    for (int i = 0; i < panels; i++) {
      const TangentPanel<Real>& panel = s.panels[i];
      transpose(panel.out, (int64_t)NR, Dv, (int64_t)NR, s.rows, Dv);
      transpose(panel.tout, (int64_t)NR, Dv, (int64_t)NR, s.trows, Dv);
      for (int64_t r = 0; r < panel.lanes.rows; r++) finish_row(panel, r);
    }
  }

 private:
  // The tangent of the scaled rows: scale * tq + tscale * q, in the unit of the product.
  void pack_tangents(TangentPanel<Real>& panel) {
    const double unit = product_unit(p);
    for (int64_t r = 0; r < NR; r++) {
      Real *row = s.rows + r * D, *trow = s.trows + r * D;
      panel.tslopes[r] = 0;
      for (int64_t d = 0; d < D; d++) trow[d] = 0;
      if (r >= panel.lanes.rows) continue;
      const QueryRow q = stacked_row(p, panel.lanes.head, panel.lanes.row + r);
      if (t.alibi_slopes) panel.tslopes[r] = load_number<Real>(t.alibi_slopes, u.batch, q.head);
      if (t.q) {
        const Real scale = (Real)(scale_of(p, q.head) * unit);
        load_row(t.q, u.batch, q.head, q.query, D, trow);
        for (int64_t d = 0; d < D; d++) trow[d] *= scale;
      }
      if (t.scales) {
        const Real tscale = (Real)(load_number<double>(t.scales, 0, q.head) * unit);
        load_row(p.q, u.batch, q.head, q.query, D, row);
        for (int64_t d = 0; d < D; d++) trow[d] += tscale * row[d];
      }
    }
    if (has_tq) transpose(s.trows, D, (int64_t)NR, D, panel.tq, (int64_t)NR);
  }

  LoadedTile load_tile(const KeyTile& tile) {
    const int64_t head_k = p.head_k(u.head), keys = tile.hi - tile.lo;
    modifier.load_tile(u.batch, u.head, u.row, tile);
    auto rows_of = [&](const Tensor& x, int64_t columns, Real* buffer, int64_t stride) {
      return x ? tile_rows(x, u.batch, head_k, tile.lo, keys, columns, buffer, stride) : TileRows<Real>{};
    };
    return {tile, rows_of(p.k, D, s.k, s.k_stride), rows_of(p.v, Dv, s.v, s.v_stride),
            rows_of(t.k, D, s.tk, s.k_stride), rows_of(t.v, Dv, s.tv, s.v_stride)};
  }

  // One panel against one tile.
  void visit(TangentPanel<Real>& panel, const LoadedTile& tile) {
    const auto [k0, k1] = modifier.seen_by(panel.lanes, tile.keys.lo, tile.keys.hi);
    const int64_t keys = k1 - k0, skipped = k0 - tile.keys.lo;
    if (!keys) return;
    auto seen_rows = [&](TileRows<Real> x) { return TileRows<Real>{x.data + skipped * x.stride, x.stride}; };
    const TileRows<Real> k = seen_rows(tile.k), v = seen_rows(tile.v), tk = seen_rows(tile.tk), tv = seen_rows(tile.tv);
    for (int r = 0; r < NR; r++) s.largest[r] = (Real)-__builtin_inf();
    Weigher<Real, NV> none{};
    scores_product<Real, NV>(k, keys, panel.q, D, s.scores, s.largest, none);
    Real* slope = p.softcap > 0.0 ? s.slope : nullptr;
    const bool masked = modifier.apply(panel, k0, k1, skipped, s.scores, slope);
    follow_max<Real, NV>(s.scores, keys, modifier.raises(), masked, s.largest, panel.run, panel.out, 2 * Dv + 1);
    any_masked |= masked;

    for (int r = 0; r < NR; r++) s.tile_sum[r] = 0;
    if (moves || careful) memcpy(s.seen, s.scores, keys * NR * sizeof(Real));
    Weigher<Real, NV> weigher{s.scores, s.scores + keys * NR, panel.run.shift, s.tile_sum, 0, 0};
    if (moves) multiply_tangents(panel, k, tk, keys, weigher);
    weigher.finish();
    if (moves) {
      if (slope) scale_rows<Real, NV>(s.tscores, NR, slope, keys);
      Real factor = (Real)(1 / product_unit(p));
      if (adds) add_terms(panel, k0, keys, factor), factor = 1;
      weigh_tangents(panel, factor, keys);
    }
    for (int r = 0; r < NR; r++) panel.run.sum[r] += s.tile_sum[r];
    if (p.drops()) drop_both(panel, k0, keys);
    const bool select = masked && careful;
    if (has_mean) accumulate(v, s.scores, keys, select, panel.out);
    if (moves) accumulate(v, s.tscores, keys, select, panel.tout);
    if (t.v) accumulate(tv, s.scores, keys, select, panel.tout);
  }

  // tS as the products give it, not modified; the weights of the scores are computed on the way.
  void multiply_tangents(const TangentPanel<Real>& panel, TileRows<Real> k, TileRows<Real> tk, int64_t keys,
                         Weigher<Real, NV>& weigher) {
    weigher.spread(keys, D);
    if (t.k)
      scores_product<Real, NV>(tk, keys, panel.q, D, s.tscores, s.ignored, weigher);
    else if (has_tq)
      scores_product<Real, NV>(k, keys, panel.tq, D, s.tscores, s.ignored, weigher);
    else
      clear_rows<Real, NV>(s.tscores, NR, keys);
    if (t.k && has_tq)
      each_tile<MR<NV>>(keys, [&](int64_t j, auto tile) {
        row_tile<true, Real, tile, NV>(k.data + j * k.stride, k.stride, panel.tq, D, s.tscores + j * NR);
      });
  }

  // tS * factor, which brings it to natural units, and the tangents of bias and slopes.
  void add_terms(const TangentPanel<Real>& panel, int64_t key, int64_t keys, Real factor) {
    Real* bias = s.slope;  // the softcap's is of no more use
    if (t.bias)
      load_bias(biased, panel.lanes, key, keys, NR, s.modifier.rows, bias);
    else
      clear_rows<Real, NV>(bias, NR, keys);
    for (int64_t i = 0; i < keys * NR; i += L) store(s.tscores + i, load(s.tscores + i) * factor + load(bias + i));
    if (t.alibi_slopes) add_alibi<Real, NV>(s.tscores, keys, panel.tslopes, panel.positions, key);
  }

  // W in the place of tS. Where a tile weighs something beside all before it, the center moves to the mean, and what
  // has been summed up with it; each lane decides for itself. run.sum is without the tile's weights, tile_sum, still.
  void weigh_tangents(const TangentPanel<Real>& panel, Real factor, int64_t keys) {
    auto outweighs = [&](int v) { return load(s.tile_sum + v * L) * (Real)4 > load(panel.run.sum + v * L); };
    auto some = outweighs(0);
    for (int v = 1; v < NV; v++) some |= outweighs(v);
    if (any<Real>(some)) {
      sum_tangents<false, Real, NV>(s.scores, s.seen, factor, panel.center, keys, s.tscores, s.moment);
      for (int v = 0; v < NV; v++) {
        const Vec<Real> sum = load(panel.run.sum + v * L), mean = load(panel.mean + v * L);
        const Vec<Real> step = (mean + load(s.moment + v * L)) / (sum + load(s.tile_sum + v * L));
        const Vec<Real> moved = outweighs(v) && step * (Real)0 == (Real)0 ? step : Vec<Real>{};
        store(panel.center + v * L, load(panel.center + v * L) + moved);
        store(panel.mean + v * L, mean - moved * sum);
        for (int64_t i = v * L; i < Dv * NR; i += NR)
          store(panel.tout + i, load(panel.tout + i) - moved * load(panel.out + i));
      }
    }
    sum_tangents<true, Real, NV>(s.scores, s.seen, factor, panel.center, keys, s.tscores, s.moment);
    for (int r = 0; r < NR; r++) panel.mean[r] += s.moment[r];
  }

  void drop_both(const TangentPanel<Real>& panel, int64_t key, int64_t keys) {
    each_kept<Real, NV>(p, panel, key, keys, [&](int64_t j, int v, auto kept) {
      for (Real* tile : {s.scores, s.tscores}) {
        Real* w = tile + (j * NV + v) * L;
        store(w, kept ? load(w) : Vec<Real>{});
      }
    });
  }

  void accumulate(TileRows<Real> v, const Real* weights, int64_t keys, bool select, Real* out) {
    if (select)
      select_out<Real, NV>(v, weights, s.seen, keys, Dv, out);
    else
      out_product<Real, NV>(v, Dv, weights, keys, false, out);
  }

  // Row r of a panel, out and its tangent in s.rows and s.trows, not yet normalized.
  void finish_row(const TangentPanel<Real>& panel, int64_t r) {
    const QueryRow row = stacked_row(p, panel.lanes.head, panel.lanes.row + r);
    const double sink = sink_of(p, u.batch, row.head);
    const Normalizer n = normalizer(panel.run.max[r], panel.run.sum[r], sink);
    const double tsink = t.sinks ? load_number<double>(t.sinks, u.batch, row.head) : 0, center = panel.center[r];
    const double log_total = n.top + n.log_total(), mean = panel.mean[r] * n.factor;
    const Real shift = (Real)(mean + delta_of_sink(sink, tsink - center, log_total));
    const Real* out = s.rows + r * Dv;
    Real* tout = s.trows + r * Dv;
    for (int64_t d = 0; d < Dv; d++) tout[d] -= shift * out[d];
    store_row(tout, (Real)(n.factor * p.keep_factor), Dv, t.out, u.batch, row.head, row.query);
    const double of_keys =
        mean + center * (panel.run.sum[r] * n.factor);  // whose weights may be tiny beside the sink's
    if (t.lse)
      *(Real*)at(t.lse, u.batch, row.head, row.query) = (Real)(of_keys + delta_of_sink(sink, tsink, log_total));
  }
};

template <class Real, int NV>
void run_tangent_lanes(const Operands& p, const Tangents& t, const Blocking& b, const Unit& u, char* memory) {
  TangentUnit<Real, NV> unit(p, t, b, u, memory, false);
  if (unit.run()) return unit.finish();
  TangentUnit<Real, NV> again(p, t, b, u, memory, true);  // rare, and keeps the check out of the loop
  again.run();
  again.finish();
}

template <class Real>
void run_tangent_unit(const Operands& p, const Tangents& t, const Blocking& b, const Unit& u, char* memory) {
  if (b.lanes == VL<Real>)
    run_tangent_lanes<Real, 1>(p, t, b, u, memory);
  else
    run_tangent_lanes<Real, max_vectors>(p, t, b, u, memory);
}

}  // namespace fastattn::FASTATTN_ISA
