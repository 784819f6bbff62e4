// The forward pass of one unit: a block of query rows against the keys that it sees, tile by tile.
//
//   loop 1  key tiles of n_block keys: converted to Real if need be, shared by all panels
//   loop 2    panels of NR query rows: one vector lane a row
//   loop 3      register tiles of MR keys: scores^T = K Q^T          (multiply)
//               score modifications, masks, online softmax           (modify.h, softmax.h)
//   loop 4      register tiles of MR columns: out^T += V^T P^T       (multiply)
#pragma once
#include "blocking.h"
#include "finish.h"
#include "rows/lines_ahead.h"
#include "scores/dropout.h"
#include "scores/modify.h"
#include "scores/pair_panel.h"
#include "scores/skip.h"
#include "tile/products.h"

namespace fastattn::FASTATTN_ISA {

template <class Real>
struct ForwardPanel : Panel<Real> {
  Real* out;  // [head_dim_v][NR]
  Running<Real> run;
  bool fresh;  // out is not written yet, and means 0
  bool skips;  // the tile of this turn
};

// The memory of one thread while it computes a unit.
template <class Real>
struct Scratch {
  ForwardPanel<Real>* panels;
  Real *scores[2], *seen;    // [n_block][NR]; scores before the softmax where they must be kept
  Real *largest, *tile_sum;  // [NR]
  ModifierMemory<Real> modifier;
  Real* rows;      // rows on their way to or from lanes
  Real *k, *v[2];  // [n_block][stride], converted tiles; v outlives its tile by one panel
  int64_t k_stride, v_stride, bytes;
};

template <class Real>
Scratch<Real> forward_layout(const Operands& p, const Blocking& b, char* memory) {
  Arena arena{memory};
  Scratch<Real> s;
  const int64_t NR = b.lanes, keys = b.n_block, panels = b.rows / b.lanes;
  s.panels = arena.take<ForwardPanel<Real>>(panels);
  for (int64_t i = 0; i < panels; i++) {
    ForwardPanel<Real> panel{take_panel<Real>(arena, p.head_dim, NR), nullptr, {}, true, false};
    panel.out = arena.take<Real>(p.head_dim_v * NR);
    panel.run = {arena.take<Real>(NR), arena.take<Real>(NR), arena.take<Real>(NR)};
    if (memory) s.panels[i] = panel;
  }
  for (Real*& scores : s.scores) scores = arena.take<Real>(keys * NR);
  s.seen = arena.take<Real>(keys * NR);
  s.largest = arena.take<Real>(NR), s.tile_sum = arena.take<Real>(NR);
  s.modifier = take_modifier<Real>(arena, keys, NR);
  s.rows = arena.take<Real>(NR * larger(p.head_dim, p.head_dim_v));
  s.k_stride = round_up(p.head_dim, 16) + 16;  // never a power of two, which would thrash the L1
  s.v_stride = round_up(p.head_dim_v, 16) + 16;
  s.k = arena.take<Real>(keys * s.k_stride);
  for (Real*& v : s.v) v = arena.take<Real>(keys * s.v_stride);
  s.bytes = arena.used;
  return s;
}

template <class Real>
int64_t scratch_bytes(const Operands& p, const Blocking& b) {
  return forward_layout<Real>(p, b, nullptr).bytes;
}

// The keys that a unit visits.
inline void find_keys(const Operands& p, const Blocking& b, Unit& u) {
  const int64_t rows = smaller<int64_t>(b.rows, b.heads_per_unit * p.seqlen_q - u.row);
  Range seen = visited_range(p, u.batch, u.head, u.row, rows);
  u.k_lo = larger(seen.lo, u.split * b.split_keys);
  u.k_hi = smaller(seen.hi, (u.split + 1) * b.split_keys);
  if (!p.blocks) return (void)(u.keys = larger<int64_t>(0, u.k_hi - u.k_lo));
  u.keys = 0;
  each_key_tile(p.blocks, p.blocks->index(u.batch, u.head, u.row / b.rows), u.k_lo, u.k_hi, b.n_block,
                [&](const KeyTile& tile) { u.keys += tile.hi - tile.lo; });
}

// A panel before its first key: rows first ... first + rows - 1 of the unit. tmp: room for [NR][head_dim]; key_row: for
// one. in_pairs: its q as Real is wanted only where tiles may be skipped.
template <class Real, int NV, bool in_pairs = false>
void start_panel(const Operands& p, const Unit& u, int64_t first, int64_t rows, ForwardPanel<Real>& panel, Real* tmp,
                 Real* key_row) {
  constexpr int NR = NV * VL<Real>;
  place_lanes(p, u.batch, u.head, u.row + first, rows, NR, panel);
  if (!in_pairs || p.alibi_slopes || skips_in_head(p, panel.slopes[0])) load_lanes(p, NR, panel, tmp);
  for (int r = 0; r < NR; r++) panel.run.max[r] = (Real)-__builtin_inf();
  if (p.alibi_slopes) look_ahead<Real, NV>(p, panel, tmp, key_row, panel.run.max);
  for (int r = 0; r < NR; r++) {
    if (r >= panel.lanes.rows || panel.lo[r] >= panel.hi[r]) panel.run.max[r] = unseen;
    panel.run.shift[r] = panel.run.max[r] == (Real)-__builtin_inf() ? 0 : panel.run.max[r];
    panel.run.sum[r] = 0;
  }
  panel.fresh = true;
}

// Where something is to be added to out, or no key was seen.
template <class Real>
void clear_if_fresh(ForwardPanel<Real>& panel, int64_t elements) {
  for (int64_t j = 0; panel.fresh && j < elements; j++) panel.out[j] = 0;
  panel.fresh = false;
}

// A panel's scores of one tile on their way to its output: they are weighed while the next panel's are computed.
template <class Real, class Element, class Weights>
struct Pending {
  ForwardPanel<Real>* panel = nullptr;
  Weights weigher{};
  Element* weights = nullptr;
  int64_t key = 0, keys = 0;
  TileRows<Element> v{};
  bool select = false;  // v may not be finite, and its weights tell too little
};

constexpr int few_panels = 2;  // that do not hide how keys and values come

// pairs: products are of pairs of bfloat16. Pairs of keys start at even keys, whatever a row or its neighbours see.
template <class Real, int NV, bool pairs = false>
class ForwardUnit {
  static constexpr int NR = NV * VL<Real>, R = MR<NV>;
  using Element = std::conditional_t<pairs, Pair, Real>;
  using Weights = std::conditional_t<pairs, PairWeigher<NV>, Weigher<Real, NV>>;

  struct LoadedTile {
    KeyTile keys;
    TileRows<Element> k, v;  // v of pairs: of keys
  };

  const Operands& p;
  const Blocking& b;
  const Unit& u;
  Scratch<Real> s;
  const bool careful;
  int64_t rows;
  int panels;
  bool copies_k, copies_v;
  Modifier<Real, NV> modifier;
  bool any_masked = false, skips = false;
  int tiles = 0, items = 0;
  int64_t skipped_pairs = 0;
  bool comes_fetched = false;  // the unit before has fetched what this one reads
  LinesAhead ahead;
  Pending<Real, Element, Weights> pending;

 public:
  // careful: NaN or Inf in v must not leak from behind a mask.
  ForwardUnit(const Operands& p, const Blocking& b, const Unit& u, char* memory, bool careful)
      : p(p),
        b(b),
        u(u),
        s(forward_layout<Real>(p, b, memory)),
        careful(careful),
        modifier(p, s.modifier, b.heads_per_unit == 1) {
    rows = smaller<int64_t>(b.rows, b.heads_per_unit * p.seqlen_q - u.row);
    panels = (int)((rows + NR - 1) / NR);
    copies_k = panels > few_panels && crowds(p.k), copies_v = panels > few_panels && crowds(p.v);
    for (int i = 0; i < panels; i++) {
      ForwardPanel<Real>& panel = s.panels[i];
      start_panel<Real, NV, pairs>(p, u, i * NR, smaller<int64_t>(NR, rows - i * NR), panel, s.rows, s.k);
      skips = skips_in_head(p, panel.slopes[0]);
      if (skips) find_norms<Real, NV>(p, panel);
      if constexpr (pairs) start_pairs<NV>(p, panel, s.rows);
    }
    fetch_next_unit();
  }

  // NaN or Inf in v shows in out whatever its weight, 0 * NaN being NaN. False: behind some mask there may be one.
  bool run() {
    const int64_t list = p.blocks ? p.blocks->index(u.batch, u.head, u.row / b.rows) : 0;
    const int64_t k_lo = pairs ? start_of_pairs(u.k_lo, u.k_lo / b.n_block * b.n_block) : u.k_lo;
    each_key_tile(p.blocks, list, k_lo, u.k_hi, b.n_block, [&](const KeyTile& keys) {
      if (skips && !counts(keys)) return;
      const LoadedTile tile = load_tile(keys);
      const int first = items;
      for (int i = 0; i < panels; i++)
        if (!s.panels[i].skips) visit(s.panels[i], tile);
      if (items != first) tiles++;  // a tile that no panel sees must not turn to the v that `pending` still reads
    });
    accumulate();
    if (any_masked && !careful)
      for (int i = 0; i < panels; i++)
        if (!s.panels[i].fresh && !all_finite(s.panels[i].out, p.head_dim_v * NR)) return false;
    return true;
  }

  void finish(const Partial& partial) {
    const int64_t Dv = p.head_dim_v;
    if (skipped_pairs) __atomic_fetch_add(p.skipped_pairs, skipped_pairs, __ATOMIC_RELAXED);
    for (int i = 0; i < panels; i++) {
      ForwardPanel<Real>& panel = s.panels[i];
      const Running<Real>& run = panel.run;
      clear_if_fresh(panel, Dv * NR);
      if (b.num_splits == 1) {
        finish_lanes<Real, NR>(p, panel.lanes, panel.out, run.max, run.sum, s.rows);
        continue;
      }
      transpose(panel.out, (int64_t)NR, Dv, (int64_t)NR, s.rows, Dv);
      const int64_t row = (int64_t)i * NR, n = panel.lanes.rows * sizeof(Real);
      memcpy((Real*)partial.out + row * Dv, s.rows, n * Dv);
      memcpy((Real*)partial.max + row, run.max, n);
      memcpy((Real*)partial.sum + row, run.sum, n);
    }
  }

 private:
  // Whether some panel gets more than zeros from the tile; the others skip it.
  bool counts(const KeyTile& tile) {
    const int64_t count = (p.seqlen_k + b.n_block - 1) / b.n_block, head_k = p.head_k(u.head);
    const int64_t index = tile.lo / b.n_block, key = index * b.n_block,
                  keys = smaller<int64_t>(b.n_block, p.seqlen_k - key);
    double* facts = p.tile_facts + ((u.batch * p.num_heads_k + head_k) * count + index) * 2;
    const double norm = known(facts, [&] {
      return largest_norm(key_rows(p, u.batch, head_k, key, keys, s.k, s.k_stride), keys, p.head_dim);
    });
    auto finite = [&] {
      Real* buffer = s.v[tiles % 2];
      return rows_finite(tile_rows(p.v, u.batch, head_k, key, keys, p.head_dim_v, buffer, s.v_stride), keys,
                         p.head_dim_v);
    };
    bool any = false;
    for (int i = 0; i < panels; i++) {
      ForwardPanel<Real>& panel = s.panels[i];
      const Range seen = panel.lanes.visited;
      const int64_t k0 = larger(tile.lo, seen.lo), k1 = smaller(tile.hi, seen.hi);
      panel.skips = k0 >= k1 || (negligible<Real, NV>(p, panel, panel.run.max, (Real)norm, k0, k1) &&
                                 known(facts + 1, finite) == 1.0);
      if (k0 < k1 && panel.skips) skipped_pairs += panel.lanes.rows * (k1 - k0);
      any |= !panel.skips;
    }
    return any;
  }

  // What the unit that follows reads and writes: its queries and, where a head is one visit, its keys and values. Several
  // threads share units out as they come: there it may be another's, which costs nothing that shows.
  void fetch_next_unit() {
    const int64_t Dv = p.head_dim_v, stacked = b.heads_per_unit * p.seqlen_q;
    if (b.num_splits > 1 || !exceeds_caches(p)) return;
    comes_fetched = p.seqlen_k <= b.n_block && stacked <= b.rows && !p.blocks && !p.k.pages && !p.v.pages;
    int64_t batch = u.batch, head = u.head, first = u.row + b.rows;
    if (first >= stacked) first = 0, head += b.heads_per_unit;
    if (head >= p.num_heads) batch++, head = 0;
    if (batch >= p.batch) return;
    if (comes_fetched) {
      ahead.add(p.k, batch, p.head_k(head), 0, p.seqlen_k, p.head_dim);
      ahead.add(p.v, batch, p.head_k(head), 0, p.seqlen_k, Dv);
    }
    for (int64_t row = first, rows; row < smaller(first + b.rows, stacked); row += rows) {
      const QueryRow top = stacked_row(p, head, row);
      rows = smaller(smaller(first + b.rows, stacked) - row, p.seqlen_q - top.query);
      ahead.add(p.q, batch, top.head, top.query, rows, p.head_dim);
      for (const Tensor* t : {&p.out, &p.out_exact}) ahead.add(*t, batch, top.head, top.query, rows, Dv);
    }
    int64_t visits = 0;
    for (int i = 0; i < panels; i++) {
      const Range seen = s.panels[i].lanes.visited;
      const int64_t keys = p.blocks ? u.keys : larger<int64_t>(0, seen.hi - seen.lo);
      visits += tiles_of<R>(keys) + (keys + b.n_block - 1) / b.n_block * tiles_of<R>(Dv);
    }
    ahead.spread(visits);
  }

  LoadedTile load_tile(const KeyTile& tile) {
    const int64_t head_k = p.head_k(u.head), keys = tile.hi - tile.lo;
    modifier.load_tile(u.batch, u.head, u.row, tile);
    Real* v_copies = s.v[tiles % 2];
    if constexpr (pairs) {
      pack_columns(p.v, u.batch, head_k, tile.lo, keys, p.head_dim_v, (Pair*)v_copies, s.v_stride);
      if (careful) drop_unfinite((Pair*)v_copies, s.v_stride, packed(pairs_in(keys)), packed(p.head_dim_v));
      return {tile,
              pair_rows(p.k, u.batch, head_k, tile.lo, keys, p.head_dim, (Pair*)s.k, s.k_stride / 2, copies_k),
              {(const Pair*)v_copies, s.v_stride}};
    } else {
      return load_reals(tile, head_k, v_copies);
    }
  }

  LoadedTile load_reals(const KeyTile& tile, int64_t head_k, Real* v_copies) {
    const int64_t keys = tile.hi - tile.lo;
    const LoadedTile loaded{
        tile, key_rows(p, u.batch, head_k, tile.lo, keys, s.k, s.k_stride, copies_k),
        tile_rows(p.v, u.batch, head_k, tile.lo, keys, p.head_dim_v, v_copies, s.v_stride, copies_v)};
    if (panels <= few_panels && !comes_fetched) {  // waits for memory: in the order of addresses, unlike the products
      if (loaded.k.data != s.k) touch(loaded.k, keys, p.head_dim);
      if (loaded.v.data != v_copies) touch(loaded.v, keys, p.head_dim_v);
    }
    return loaded;
  }

  static void touch(const TileRows<Real>& x, int64_t keys, int64_t columns) {
    for (int64_t j = 0; j < keys; j++)
      for (int64_t d = 0; d < columns; d += 64 / sizeof(Real)) (void)*(const volatile Real*)(x.data + j * x.stride + d);
  }

  // One panel against one tile: its scores now, its output when the next panel's scores are computed.
  void visit(ForwardPanel<Real>& panel, const LoadedTile& tile) {
    auto [k0, k1] = modifier.seen_by(panel.lanes, tile.keys.lo, tile.keys.hi);
    if (k0 == k1) return;
    if constexpr (pairs) {
      k0 = start_of_pairs(k0, tile.keys.lo);
      k1 = smaller(end_of_pairs(k1, tile.keys.lo), tile.keys.hi);
    }
    const int64_t keys = k1 - k0, skipped = k0 - tile.keys.lo, steps = pairs ? pairs_in(p.head_dim) : p.head_dim;
    Real* scores = s.scores[items++ % 2];
    for (int r = 0; r < NR; r++) s.largest[r] = (Real)-__builtin_inf();
    pending.weigher.spread(keys, steps);
    scores_product<Real, NV>({tile.k.data + skipped * tile.k.stride, tile.k.stride}, keys, (const Element*)panel.q,
                             steps, scores, s.largest, pending.weigher, ahead);
    accumulate();

    const bool masked = modifier.apply(panel, k0, k1, skipped, scores);
    if (!comes_fetched)
      modifier.fetch_after(ahead, s.panels, panels, &panel - s.panels, {tile.keys.lo, tile.keys.hi}, b.n_block,
                           tiles_of<R>(keys) + tiles_of<R>(p.head_dim_v));
    follow_max<Real, NV, pairs>(scores, keys, modifier.raises(), masked, s.largest, panel.run, panel.out,
                                panel.fresh ? 0 : p.head_dim_v);
    for (int r = 0; r < NR; r++) s.tile_sum[r] = 0;

    pending.panel = &panel;
    if constexpr (pairs) {
      for (int r = 0; keys % 2 && r < NR; r++) scores[keys * NR + r] = (Real)-__builtin_inf();
      pending.weigher = {scores, scores + round_up(keys, 2) * NR, (Pair*)scores, panel.run.shift, s.tile_sum, 0, 0};
    } else {
      pending.weigher = {scores, scores + keys * NR, panel.run.shift, s.tile_sum, 0, 0};
    }
    pending.weights = (Element*)scores;
    pending.key = k0, pending.keys = keys;
    pending.v = {tile.v.data + (pairs ? skipped / 2 : skipped) * tile.v.stride, tile.v.stride};
    pending.select = careful && (masked || pairs);
    if (pending.select) memcpy(s.seen, scores, keys * NR * sizeof(Real));
    any_masked |= masked;
  }

  void accumulate() {
    if (!pending.panel) return;
    pending.weigher.finish();
    ForwardPanel<Real>& panel = *pending.panel;
    for (int r = 0; r < NR; r++) panel.run.sum[r] += s.tile_sum[r];
    if constexpr (pairs) {
      if (p.drops()) drop<NV>(p, panel, pending.key, pending.keys, pending.weights);
      out_product<Real, NV>(pending.v, p.head_dim_v, (const Pair*)pending.weights, pairs_in(pending.keys), panel.fresh,
                            panel.out, ahead);
      if (pending.select)
        add_unfinite<NV>(p, panel.lanes, {pending.key, pending.key + pending.keys}, pending.weights, s.seen, panel.out);
    } else {
      if (p.drops()) drop<Real, NV>(p, panel, pending.key, pending.keys, pending.weights);
      if (pending.select) {
        clear_if_fresh(panel, p.head_dim_v * NR);
        select_out<Real, NV>(pending.v, pending.weights, s.seen, pending.keys, p.head_dim_v, panel.out);
      } else {
        out_product<Real, NV>(pending.v, p.head_dim_v, (const Real*)pending.weights, pending.keys, panel.fresh,
                              panel.out, ahead);
      }
    }
    panel.fresh = false;
    pending.panel = nullptr;
  }
};

template <class Real, int NV, bool pairs>
void run_unit_of(const Operands& p, const Blocking& b, const Unit& u, const Partial& partial, char* memory) {
  ForwardUnit<Real, NV, pairs> unit(p, b, u, memory, false);
  if (unit.run()) return unit.finish(partial);
  ForwardUnit<Real, NV, pairs> again(p, b, u, memory, true);  // rare, and keeps the check out of the loop
  again.run();
  again.finish(partial);
}

template <class Real, int NV>
void run_unit_lanes(const Operands& p, const Blocking& b, const Unit& u, const Partial& partial, char* memory) {
  if constexpr (has_pairs && sizeof(Real) == 4)
    if (p.in_pairs) {
      [[maybe_unused]] const TilesInUse tiles{};
      return run_unit_of<Real, NV, true>(p, b, u, partial, memory);
    }
  run_unit_of<Real, NV, false>(p, b, u, partial, memory);
}

template <class Real>
void run_unit(const Operands& p, const Blocking& b, const Unit& u, const Partial& partial, char* memory) {
  if (b.lanes == VL<Real>)
    run_unit_lanes<Real, 1>(p, b, u, partial, memory);
  else
    run_unit_lanes<Real, max_vectors>(p, b, u, partial, memory);
}

}  // namespace fastattn::FASTATTN_ISA
