// The backward pass of one unit: a range of keys of one key head, against the query heads that share it.
//
//   loop 1  query heads: Q, dout, out packed when first seen, as panels (queries in the lanes) and rows
//   loop 2    key tiles of n_block keys, copied to Real
//   loop 3      blocks of query panels
//   loop 4        panels: S^T = K Q^T, dP^T = V dout^T; modifications, masks; P^T, dS^T; dQ^T += K^T dS^T
//               dV += P^T dout, dK += dS^T Q, over all panels of the block at once
//
// P^T and dS^T stand as [key][query of the block], so that one tile of them is lanes for dQ and scalars for dK and dV.
#pragma once
#include "backward_ahead.h"
#include "backward_pairs.h"
#include "few_queries.h"
#include "query_gradients.h"
#include "scores/skip.h"

namespace fastattn::FASTATTN_ISA {

// pairs: products are of pairs of bfloat16; pairs of keys start at even keys, pairs of queries at even rows of a block.
template <class Real, int NV, bool pairs = false>
class KeyRange {
  static constexpr int L = VL<Real>, NR = NV * L, R = MR<NV>;

  const Operands& p;
  const Gradients& g;
  const BackwardBlocking& b;
  const KeyUnit& u;
  BackwardScratch<Real> s;
  Modifier<Real, NV> modifier;
  const bool careful;
  bool any_masked = false, finite = true, skips = false;
  const int64_t D, Dv, k_lo, k_hi;  // keys of the unit
  ScoreGradients<Real, NV> score_gradients;
  const FewQueries<Real, NV> few;
  int64_t head = 0;          // the query head of this turn
  int64_t lo = 0, keys = 0;  // the tile of this turn
  TileRows<Real> k{}, v{};   // its rows
  Real key_norm = 0;         // its largest
  struct Nothing {
    template <class... Args>
    Nothing(Args&&...) {}
  };
  std::conditional_t<pairs, PairRange<NV>, Nothing> in_pairs;
  int64_t skipped_pairs = 0;
  const bool one_visit;  // one tile and one block of one head are all that the unit has
  KeySums<Real, NV> dk, dv;
  bool any_came = false;  // of those sums
  LinesAhead ahead;

 public:
  // careful: NaN or Inf must not leak from behind a mask.
  KeyRange(const Operands& p, const Gradients& g, const BackwardBlocking& b, const KeyUnit& u, char* memory,
           bool careful)
      : p(p),
        g(g),
        b(b),
        u(u),
        s(backward_layout<Real>(p, b, memory)),
        modifier(p, s.modifier, true),
        careful(careful),
        D(p.head_dim),
        Dv(p.head_dim_v),
        k_lo(u.split * b.split_keys),
        k_hi(smaller(p.seqlen_k, k_lo + b.split_keys)),
        score_gradients(p, g, u, b.num_splits, {k_lo, k_hi}, s.key_sum, s.diagonals, s.modifier.rows),
        few(p, b, s.few),
        in_pairs(p, g, b, u, s, modifier, score_gradients, ahead),
        one_visit(p.seqlen_k <= b.n_block && p.seqlen_q <= b.block_rows && p.group_size() == 1 && !p.blocks),
        dk(g.dk, s.dk, D, b.n_block, (bool)p.rotary, one_visit && !careful, pairs),
        dv(g.dv, s.dv, Dv, b.n_block, false, one_visit && !careful, pairs) {}

  // partial: null, or the unit's dq of its first query head, those of the others `stride` bytes apart. False: there is
  // NaN or Inf in some gradient, maybe from behind a mask.
  bool run(char* partial, int64_t stride) {
    const int64_t range = round_up(k_hi - k_lo, b.n_block), group_size = p.group_size();
    dk.start({k_lo, k_hi}), dv.start({k_lo, k_hi});
    for (int64_t i = 0; i < group_size && p.seqlen_q; i++) {  // no query: no bias of a query to load
      head = u.head_k * group_size + i;
      score_gradients.start_head(head, range);
      place_panels(partial ? (Real*)(partial + i * stride) : nullptr);
      if (one_visit && exceeds_caches(p)) ahead = next_head_ahead<Real, NV>(p, g, b, u, s.panels);
      for (lo = k_lo; lo < k_hi; lo += b.n_block) visit_tile();
      prepare_the_rest();
      finish_dq(!partial);
      score_gradients.finish_head([&](int64_t query) { return s.panels[query / NR].sums; });
    }
    finish_keys(dk), finish_keys(dv);
    if (finite || !any_masked || careful) {
      if (skipped_pairs) __atomic_fetch_add(p.skipped_pairs, skipped_pairs, __ATOMIC_RELAXED);
      return true;
    }
    return false;
  }

 private:
  static void clear(Real* x, int64_t n) {
    for (int64_t i = 0; i < n; i += L) store(x + i, Vec<Real>{});
  }

  void place_panels(Real* partial) {
    skips = skips_in_head(p, slope_of<Real>(p, u.batch, head));
    for (int64_t query = 0; query < p.seqlen_q; query += NR) {
      GradientPanel<Real>& panel = s.panels[query / NR];
      const int64_t rows = smaller<int64_t>(NR, p.seqlen_q - query);
      panel.lanes = {u.batch, head, query, rows, visited_range(p, u.batch, head, query, rows), {}};
      if (partial) panel.dq = partial + query * D;
      clear(panel.dq, D * NR);
      clear(panel.sums.slope, NR);
      s.prepared[query / b.block_rows] = false;
    }
  }

  // A block is prepared when some key of the unit is seen from it: few are, if the mask is a narrow window.
  void prepare_block(int64_t query) {
    if (s.prepared[query / b.block_rows]) return;
    s.prepared[query / b.block_rows] = true;
    for (const int64_t end = smaller(query + b.block_rows, p.seqlen_q); query < end; query += NR) prepare(query);
  }

  void prepare_the_rest() {
    if (score_gradients.wants_all_queries())
      for (int64_t query = 0; query < p.seqlen_q; query += b.block_rows) prepare_block(query);
  }

  // Rows query ... of the head into the panel and the row copies.
  void prepare(int64_t query) {
    GradientPanel<Real>& panel = s.panels[query / NR];
    const int64_t rows = smaller<int64_t>(NR, p.seqlen_q - query);
    place_lanes(p, u.batch, head, query, rows, NR, panel);
    const Real* parts = (const Real*)at(p.lse_parts, u.batch, head, query);
    for (int64_t r = 0; r < NR; r++) panel.softmax.top[r] = 0, panel.softmax.log_sum[r] = (Real)__builtin_inf();
    for (int64_t r = 0; r < rows; r++, parts += p.lse_parts.stride[2])
      panel.softmax.top[r] = parts[0], panel.softmax.log_sum[r] = parts[p.lse_parts.stride[3]];
    if (!pairs || skips) load_reals(panel, query, rows);
    if (skips) prepare_skipping(panel);
    if constexpr (pairs) {
      in_pairs.pack(panel);
      find_delta(panel, query, rows);
    }
    if (score_gradients.wants_all_queries()) score_gradients.add_rows_alone(panel.softmax, query, rows);
  }

  // Those rows as Real. q is scaled for dk, and dout by what dropout gives the weights that it leaves, for dv and dP.
  void load_reals(GradientPanel<Real>& panel, int64_t query, int64_t rows) {
    const Real scale = (Real)scale_of(p, head), keep_factor = (Real)p.keep_factor;
    load_lanes(p, NR, panel, s.rows);
    if (!pairs)
      copy_rows<Real, NV>(b, query_rows(p, u.batch, head, query, rows, s.rows, D), rows, D, scale, query, s.q_rows);
    const TileRows<Real> dout = tile_rows(g.dout, u.batch, head, query, rows, Dv, s.rows, Dv);
    if (!pairs) copy_rows<Real, NV>(b, dout, rows, Dv, keep_factor, query, s.dout_rows);
    to_lanes(dout, rows, panel.dout);
    if (few.are(panel.lanes)) few.pack_q(panel.q), few.pack_dout(panel.dout);
    if (!pairs) find_delta(panel, query, rows);
    if (!p.drops()) return;
    for (int64_t i = 0; i < Dv * NR; i++) panel.dout[i] *= keep_factor;
    if (few.are(panel.lanes)) few.pack_dout(panel.dout);
  }

  // Rows of dout or out into lanes; those that are no rows are 0.
  void to_lanes(TileRows<Real> x, int64_t rows, Real* lanes) const {
    if (rows < NR) clear(lanes, Dv * NR);
    transpose(x.data, x.stride, rows, Dv, lanes, (int64_t)NR);
  }

  // A row whose q or dout is not finite gets a norm that is not. Where softcap divides, q may be larger than in the panel.
  void prepare_skipping(const GradientPanel<Real>& panel) {
    find_norms<Real, NV>(p, panel);
    for (int v = 0; v < NV; v++) {
      const Vec<Real> norm = load(panel.norms + v * L);
      Vec<Real> poison = norm * (Real)larger(p.softcap, 1.0) * (Real)0;
      for (int64_t i = v * L; i < Dv * NR; i += NR) poison += load(panel.dout + i) * (Real)0;
      store(panel.norms + v * L, norm + poison);
    }
    for (int r = 0; r < NR; r++) {
      const bool blind = panel.softmax.log_sum[r] == (Real)__builtin_inf();
      panel.reference[r] = blind ? (Real)unseen : panel.softmax.top[r] + panel.softmax.log_sum[r];
    }
  }

  // Column d of a panel's dout, of its vector v.
  static Vec<Real> dout_lanes(const GradientPanel<Real>& panel, int64_t d, int v) {
    if constexpr (pairs) {
      const Pairs both = load_pairs((const Pair*)panel.dout + d / 2 * NR + v * L);
      return (Vec<Real>)(d % 2 ? both & 0xffff0000u : both << 16);
    } else {
      return load(panel.dout + d * NR + v * L);
    }
  }

  // In the order of the product dP = V dout^T: where a row sees one key and out is its value, dS is exactly 0.
  void find_delta(const GradientPanel<Real>& panel, int64_t query, int64_t rows) {
    const TileRows<Real> out = tile_rows(p.out, u.batch, head, query, rows, Dv, s.rows, Dv);
    to_lanes(out, rows, s.out);
    Vec<Real> sums[NV] = {};
    for (int64_t i = 0; i < Dv; i++) {
      const int64_t d = pairs && (i ^ 1) < Dv ? i ^ 1 : i;  // the second of a pair first
      for (int v = 0; v < NV; v++) sums[v] += dout_lanes(panel, d, v) * load(s.out + d * NR + v * L);
    }
    for (int v = 0; v < NV; v++) store(panel.softmax.delta + v * L, sums[v]);
    if (few.are(panel.lanes)) {
      few.dp(out, rows, s.dp);
      for (int64_t r = 0; r < rows; r++) panel.softmax.delta[r] = s.dp[r * NR + r];
    }
    if (g.dlse)
      for (int64_t r = 0; r < rows; r++) panel.softmax.delta[r] -= *(const Real*)at(g.dlse, u.batch, head, query + r);
  }

  void visit_tile() {
    Range visits{0, (p.seqlen_q + b.block_rows - 1) / b.block_rows};  // blocks of queries, or list entries
    if (p.blocks) {
      const int64_t list = p.blocks->index(u.batch, head, lo / p.blocks->block_k);
      visits = {p.blocks->first[list], p.blocks->first[list + 1]};
    }
    if (visits.lo == visits.hi) return;
    keys = smaller<int64_t>(b.n_block, k_hi - lo);
    if constexpr (pairs) in_pairs.load_tile(head, lo, keys);
    if (!pairs || skips) {
      k = key_rows(p, u.batch, u.head_k, lo, keys, s.k, s.k_stride, crowds(p.k));
      v = tile_rows(p.v, u.batch, u.head_k, lo, keys, Dv, s.v, s.v_stride, crowds(p.v));
    }
    if (skips) key_norm = largest_norm(k, keys, D);
    modifier.load_tile(u.batch, head, 0, {lo, lo + keys});
    for (int64_t i = visits.lo; i < visits.hi && !p.must_end(); i++) {
      const Visit visit = p.blocks ? p.blocks->visits[i] : Visit{(int32_t)i, -1};
      if (p.blocks) modifier.use_bitmap(p.blocks->bitmap(visit), lo);
      visit_block(visit.block * b.block_rows);
    }
  }

  void visit_block(int64_t query) {
    const int64_t rows = smaller<int64_t>(b.block_rows, p.seqlen_q - query), count = (rows + NR - 1) / NR;
    GradientPanel<Real>* panel = s.panels + query / NR;
    bool any = false;
    for (int64_t i = 0; i < count; i++) {
      Range& seen = panel[i].seen = modifier.seen_by(panel[i].lanes, lo, lo + keys);
      if (pairs && seen.hi) seen = {start_of_pairs(seen.lo, lo), smaller(end_of_pairs(seen.hi, lo), lo + keys)};
      any |= panel[i].seen.hi != 0;
      any_masked |= panel[i].seen.hi - panel[i].seen.lo < keys;
    }
    if (!any) return;
    prepare_block(query);
    if (!one_visit && !p.blocks && exceeds_caches(p))
      ahead = block_ahead<Real, NV>(p, g, b, u, s, head, query, {lo, lo + keys}, lo + keys == k_hi);
    if (skips && !any_counts(panel, count)) return;
    const int64_t block = query / b.block_rows, tile = (lo - k_lo) / b.n_block;
    any_came = true;
    for (int64_t i = 0; i < count; i++) {
      const Range seen = panel[i].seen;
      if (!one_visit && seen.hi)
        modifier.fetch_after(ahead, s.panels, column_panels(p.seqlen_q, NR), query / NR + i, {lo, lo + keys}, b.n_block,
                             2 * tiles_of<R>(seen.hi - seen.lo) + (g.needs_dq() ? tiles_of<R>(D) : 0), g.dbias_rows());
      if constexpr (pairs)
        any_masked |= in_pairs.visit_panel(panel[i], i * NR);
      else
        few.are(panel[i].lanes) ? visit_panel<true>(panel[i], i * NR) : visit_panel<false>(panel[i], i * NR);
    }
    if constexpr (pairs) {
      in_pairs.add_to_keys(panel, count, rows, block, tile, dk, dv);
    } else {
      if (g.dv) add_to_keys(panel, count, rows, s.p, s.dout_rows, Dv, block, tile, dv);
      if (g.dk) add_to_keys(panel, count, rows, s.ds, s.q_rows, D, block, tile, dk);
    }
  }

  // Takes what a panel gets only zeros from out of what it sees; whether anything is left. What may be masked only goes
  // where any_masked is no news: the gradients' NaN follow from it.
  bool any_counts(GradientPanel<Real>* panel, int64_t panels) {
    bool any = false;
    for (int64_t i = 0; i < panels; i++) {
      Range& seen = panel[i].seen;
      if (seen.hi && (any_masked || !modifier.may_mask(panel[i], seen.lo, seen.hi)) &&
          negligible<Real, NV>(p, panel[i], panel[i].reference, key_norm, seen.lo, seen.hi)) {
        skipped_pairs += panel[i].lanes.rows * (seen.hi - seen.lo);
        seen = {0, 0};
      }
      any |= seen.hi != 0;
    }
    return any;
  }

  // P^T and dS^T of one panel against the tile, and its dQ.
  template <bool are_few>
  void visit_panel(const GradientPanel<Real>& panel, int64_t column) {
    const Range seen = panel.seen;
    const int64_t n = seen.hi - seen.lo, skipped = n ? seen.lo - lo : keys, stride = s.tile_stride;
    Real *weights = s.p + column, *ds = s.ds + column;
    clear_rows<Real, NV>(weights, stride, skipped), clear_rows<Real, NV>(ds, stride, skipped);
    if (!n) return;
    const int64_t end = skipped + n;
    clear_rows<Real, NV>(weights + end * stride, stride, keys - end);
    clear_rows<Real, NV>(ds + end * stride, stride, keys - end);
    weights += skipped * stride, ds += skipped * stride;

    const Real *first_k = k.data + skipped * k.stride, *first_v = v.data + skipped * v.stride;
    auto multiply_rows = [&](TileRows<Real> x, const Real* lanes, int64_t columns,
                             Real* to) __attribute__((always_inline)) {
      each_tile<R>(n, [&](int64_t j, auto tile) {
        row_tile<false, Real, tile, NV>(x.data + j * x.stride, x.stride, lanes, columns, to + j * NR);
        ahead();
      });
    };
    if constexpr (are_few)
      few.scores({first_k, k.stride}, n, s.scores);
    else
      multiply_rows({first_k, k.stride}, panel.q, D, s.scores);
    Real* slope = p.softcap > 0.0 ? s.slope : nullptr;
    any_masked |= modifier.apply(panel, seen.lo, seen.hi, skipped, s.scores, slope);
    if constexpr (are_few)
      few.dp({first_v, v.stride}, n, s.dp);
    else
      multiply_rows({first_v, v.stride}, panel.dout, Dv, s.dp);
    if (p.drops()) {
      each_kept<Real, NV>(p, panel, seen.lo, n,
                          [&](int64_t j, int v, auto kept) { store(s.kept + (j * NV + v) * L, (Vec<Real>)kept); });
      weigh<true, Real, NV>(s.scores, s.dp, s.kept, n, panel.softmax, weights, ds, stride);
    } else {
      weigh<false, Real, NV>(s.scores, s.dp, nullptr, n, panel.softmax, weights, ds, stride);
    }
    score_gradients.add(panel, panel.sums, seen, ds, stride, slope);
    if (!g.needs_dq()) return;
    if (careful)
      for (int64_t d = 0; d < D; d++) select_column<Real, NV>(first_k + d, k.stride, ds, stride, n, panel.dq + d * NR);
    else if constexpr (are_few)
      few.add_dq({first_k, k.stride}, ds, stride, n, panel.dq);
    else
      each_tile<R>(D, [&](int64_t d, auto tile) {
        column_tile<Real, tile, NV>(first_k + d, k.stride, ds, stride, n, panel.dq + d * NR);
        ahead();
      });
  }

  // sums [key][columns] += weights [key][query] rows [query][columns], for the tile and the block; = if they are fresh.
  void add_to_keys(const GradientPanel<Real>* panel, int64_t panels, int64_t rows, const Real* weights,
                   const Real* copies, int64_t columns, int64_t block, int64_t tile, const KeySums<Real, NV>& sums) {
    const int64_t column = column_panels(columns, NR), to_row = sums.stride();
    for (int64_t c = 0; c < column; c++) {
      const Real* from = copies + (block * column + c) * b.block_rows * NR;
      Real* to = sums.place(u, lo, tile, c);
      each_tile<R>(keys, [&](int64_t j, auto size) {
        const Range seeing = panels_that_see(panel, panels, lo + j, lo + j + size);
        const int64_t first = seeing.lo * NR, steps = smaller(seeing.hi * NR, rows) - first;
        const Real *w = weights + j * s.tile_stride + first, *x = from + first * NR;
        if (sums.fresh)
          apart_tile<Real, size, NV>(w, s.tile_stride, x, steps, to + j * to_row, to_row);
        else if (careful)
          for (int r = 0; r < size; r++) select_row<Real, NV>(w + r * s.tile_stride, x, steps, to + (j + r) * NR);
        else
          row_tile<true, Real, size, NV>(w, s.tile_stride, x, steps, to + j * NR);
        ahead();
      });
    }
  }

  void finish_dq(bool stores) {
    for (int64_t query = 0; query < p.seqlen_q; query += NR) {
      const GradientPanel<Real>& panel = s.panels[query / NR];
      if (any_masked && finite) finite = all_finite(panel.dq, D * NR);
      if (stores && g.needs_dq()) store_dq(p, g, u.batch, head, query, panel.lanes.rows, NR, panel.dq, s.rows);
    }
  }

  void finish_keys(KeySums<Real, NV>& sums) {
    if (!sums.wanted()) return;
    const Range range{k_lo, k_hi};
    if (any_masked && finite && any_came) finite = sums.finite(u, range);
    sums.finish(p, u, range, any_came, s.row);
  }
};

template <class Real, int NV>
void run_key_range(const Operands& p, const Gradients& g, const BackwardBlocking& b, const KeyUnit& u, char* partial,
                   int64_t stride, char* memory) {
  constexpr bool may_pair = has_pairs && sizeof(Real) == 4;
  if (may_pair && p.in_pairs ? KeyRange<Real, NV, may_pair>(p, g, b, u, memory, false).run(partial, stride)
                             : KeyRange<Real, NV>(p, g, b, u, memory, false).run(partial, stride))
    return;
  Gradients again = g;  // what has been added to dbias stays: it is the same in both
  if (again.dense_bias()) again.dbias = Tensor{};
  KeyRange<Real, NV>(p, again, b, u, memory, true).run(partial, stride);  // rare, and keeps the check out of the loop
}

template <class Real>
void run_key_unit(const Operands& p, const Gradients& g, const BackwardBlocking& b, const KeyUnit& u, char* partial,
                  int64_t stride, char* memory) {
  const int64_t group_size = p.group_size();
  for (int32_t batch = 0; batch < u.batches; batch++)
    for (int32_t head_k = 0; head_k < u.heads_k; head_k++) {
      const KeyUnit rest{u.batch + batch, u.head_k + head_k, u.split, u.batches - batch, u.heads_k};
      char* own = partial ? partial + (batch * p.num_heads + head_k * group_size) * stride : nullptr;
      if (b.lanes == VL<Real>)
        run_key_range<Real, 1>(p, g, b, rest, own, stride, memory);
      else
        run_key_range<Real, max_vectors>(p, g, b, rest, own, stride, memory);
    }
}

}  // namespace fastattn::FASTATTN_ISA
