// How the backward pass cuts a shape into units and blocks, and the memory of one thread for a unit.
#pragma once
#include "blocking.h"
#include "rows/pair_rows.h"
#include "scores/gradients.h"
#include "scores/modify.h"

namespace fastattn::FASTATTN_ISA {

constexpr int64_t block_queries = 128, backward_few_units = 8, min_unit_keys = 512;

// Columns of a row copy or a gradient: panels of NR columns beside each other.
FASTATTN_INLINE int64_t column_panels(int64_t columns, int64_t NR) { return (columns + NR - 1) / NR; }

template <class Real>
BackwardBlocking make_backward_blocking(const Operands& p, const Gradients& g) {
  BackwardBlocking b{};
  b.lanes = panel_lanes<Real>(p.seqlen_q, p.blocks);
  b.block_rows = p.blocks ? (int)p.blocks->block_q
                          : (int)smaller(round_up(block_queries * 4 / sizeof(Real), b.lanes),
                                         round_up(larger<int64_t>(p.seqlen_q, 1), b.lanes));
  static_assert(MR<1> % 2 == 0 && MR<max_vectors> % 2 == 0, "a tile holds whole pairs of keys");
  const int64_t tile_rows = b.lanes == VL<Real> ? MR<1> : MR<max_vectors>;
  b.n_block = (int)smaller(tile_keys<Real>(b.lanes), round_up(larger<int64_t>(p.seqlen_k, 1), tile_rows));
  if (p.blocks) b.n_block = (int)tile_of_block(p.blocks->block_k, key_block * 4 / sizeof(Real), p.in_pairs);
  const int64_t units = g.dense_bias() && !g.dbias.stride[1] ? 1 : p.num_heads_k;
  int64_t splits = units && units < backward_few_units ? backward_few_units / units : 1;
  splits = larger<int64_t>(1, smaller(splits, p.seqlen_k / min_unit_keys));
  const int64_t step = p.blocks ? p.blocks->block_k : b.n_block;
  b.split_keys = larger(step, round_up((p.seqlen_k + splits - 1) / splits, step));
  b.num_splits = (int)larger<int64_t>(1, (p.seqlen_k + b.split_keys - 1) / b.split_keys);
  b.partial_size = round_up(p.seqlen_q, b.lanes) * p.head_dim;
  b.sums_diagonals = (bool)g.drelative;
  return b;
}

template <class Real>
struct GradientPanel : Panel<Real> {
  Real *dout, *dq;  // [head_dim_v][NR], [head_dim][NR]
  LaneSums<Real> sums;
  Range seen;  // keys of this turn's tile that some lane sees
  Softmax<Real> softmax;
  Real* reference;  // [NR], of skip.h
};

// From the first to the last panel that sees one of the keys from ... to - 1.
template <class Real>
Range panels_that_see(const GradientPanel<Real>* panel, int64_t panels, int64_t from, int64_t to) {
  auto sees = [&](int64_t i) { return panel[i].seen.lo < to && from < panel[i].seen.hi; };
  int64_t first = 0, last = panels;
  while (first < last && !sees(first)) first++;
  while (first < last && !sees(last - 1)) last--;
  return {first, last};
}

// What products of pairs of bfloat16 want beside. Panels, row copies, P and dS are pairs where those of Real would be.
struct PairScratch {
  Pair *k, *v;                                              // [n_block][stride], rows that do not lie as pairs
  Pair* k_pairs;                                            // [n_block / 2][k_pairs_stride], of keys
  Pair* ds_pairs;                                           // [n_block / 2][NR], of keys
  int64_t k_stride, v_stride, k_pairs_stride, tile_stride;  // that of P and dS
};

// What products with few queries want beside (few_queries.h).
template <class Real>
struct FewScratch {
  Real *q, *dout, *out;  // packed rows, and a dq on its way
  Real* products;        // [queries][stride]
  int64_t stride;
};

// The memory of one thread while it computes a unit.
template <class Real>
struct BackwardScratch {
  GradientPanel<Real>* panels;
  bool* prepared;             // [blocks], of the query head of this turn
  Real *q_rows, *dout_rows;   // [blocks][column panels][block_rows][NR]
  Real *dk, *dv;              // [tiles][column panels][n_block][NR]
  Real *k, *v;                // [n_block][stride]
  Real *scores, *dp, *slope;  // [n_block][NR]
  Real* kept;                 // [n_block][NR], the mask of dropout
  Real *p, *ds;               // [n_block][tile_stride]
  Real *key_sum, *diagonals;  // [keys of the range][vector], [keys of the range + rows][NR], of dS
  ModifierMemory<Real> modifier;
  Real* out;   // [head_dim_v][NR]
  Real* rows;  // [NR][widest head dim], rows on their way to or from lanes
  Real* row;   // one, padded
  int64_t k_stride, v_stride, tile_stride, bytes;
  PairScratch pairs;
  FewScratch<Real> few;
};

template <class Real>
BackwardScratch<Real> backward_layout(const Operands& p, const BackwardBlocking& b, char* memory) {
  Arena arena{memory};
  BackwardScratch<Real> s;
  const int64_t NR = b.lanes, panels = (p.seqlen_q + NR - 1) / NR, D = p.head_dim, Dv = p.head_dim_v;
  const int64_t blocks = (p.seqlen_q + b.block_rows - 1) / b.block_rows, widest = larger(D, Dv);
  const int64_t keys = b.n_block, range = smaller(b.split_keys, round_up(p.seqlen_k, b.n_block));
  s.panels = arena.take<GradientPanel<Real>>(panels);
  for (int64_t i = 0; i < panels; i++) {
    GradientPanel<Real> panel{take_panel<Real>(arena, D, NR), nullptr, nullptr, {}, {}, {}, nullptr};
    panel.dout = arena.take<Real>(Dv * NR);
    panel.dq = b.num_splits == 1 ? arena.take<Real>(D * NR) : nullptr;
    panel.sums = {arena.take<Real>(NR)};
    panel.softmax = {arena.take<Real>(NR), arena.take<Real>(NR), arena.take<Real>(NR)};
    panel.reference = arena.take<Real>(NR);
    if (memory) s.panels[i] = panel;
  }
  s.prepared = arena.take<bool>(blocks);
  s.q_rows = arena.take<Real>(blocks * b.block_rows * column_panels(D, NR) * NR);
  s.dout_rows = arena.take<Real>(blocks * b.block_rows * column_panels(Dv, NR) * NR);
  s.dk = arena.take<Real>(range * column_panels(D, NR) * NR);
  s.dv = arena.take<Real>(range * column_panels(Dv, NR) * NR);
  s.k_stride = round_up(D, 16) + 16, s.v_stride = round_up(Dv, 16) + 16;  // never a power of two
  s.tile_stride = round_up(b.block_rows, 64 / sizeof(Real)) + 64 / sizeof(Real);
  s.k = arena.take<Real>(keys * s.k_stride), s.v = arena.take<Real>(keys * s.v_stride);
  s.scores = arena.take<Real>(keys * NR), s.dp = arena.take<Real>(keys * NR), s.slope = arena.take<Real>(keys * NR);
  s.kept = arena.take<Real>(p.drops() ? keys * NR : 0);
  s.p = arena.take<Real>(keys * s.tile_stride), s.ds = arena.take<Real>(keys * s.tile_stride);
  s.key_sum = arena.take<Real>(range * VL<Real>);
  s.diagonals = arena.take<Real>(b.sums_diagonals ? (range + panels * NR) * NR : 0);
  s.modifier = take_modifier<Real>(arena, keys, NR);
  s.out = arena.take<Real>(Dv * NR);
  s.rows = arena.take<Real>(NR * widest), s.row = arena.take<Real>(round_up(widest, NR));
  if (p.in_pairs) {
    PairScratch& x = s.pairs;
    x.k_stride = round_up(pairs_in(D), 16) + 16, x.v_stride = round_up(pairs_in(Dv), 16) + 16;
    x.k_pairs_stride = round_up(D, 16) + 16, x.tile_stride = round_up(b.block_rows / 2, 16) + 16;
    x.k = arena.take<Pair>(keys * x.k_stride), x.v = arena.take<Pair>(keys * x.v_stride);
    x.k_pairs = arena.take<Pair>(packed(pairs_in(keys)) * x.k_pairs_stride);
    x.ds_pairs = arena.take<Pair>(pairs_in(keys) * NR);
  }
  const int64_t few = b.last_queries, vector = VL<Real>;
  s.few.stride = round_up(keys, 16) + 16;
  s.few.q = arena.take<Real>(few * round_up(D, vector)), s.few.dout = arena.take<Real>(few * round_up(Dv, vector));
  s.few.out = arena.take<Real>(few * round_up(D, vector)), s.few.products = arena.take<Real>(few * s.few.stride);
  s.bytes = arena.used;
  return s;
}

template <class Real>
int64_t backward_scratch_bytes(const Operands& p, const BackwardBlocking& b) {
  return backward_layout<Real>(p, b, nullptr).bytes;
}

// Rows from `query` on, times a factor, to their place among the column panels of their block.
template <class Real, int NV>
void copy_rows(const BackwardBlocking& b, TileRows<Real> x, int64_t rows, int64_t columns, Real factor, int64_t query,
               Real* copies) {
  constexpr int L = VL<Real>, NR = NV * L;
  const int64_t panels = column_panels(columns, NR), block = query / b.block_rows, first = query % b.block_rows;
  for (int64_t c = 0; c < panels; c++) {
    const Real* from = x.data + c * NR;
    Real* to = copies + ((block * panels + c) * b.block_rows + first) * NR;
    const int64_t n = smaller<int64_t>(NR, columns - c * NR);
    for (int64_t r = 0; r < rows; r++, from += x.stride, to += NR) {
      if (n == NR) {
        for (int i = 0; i < NR; i += L) store(to + i, load(from + i) * factor);
      } else {
        for (int64_t d = 0; d < NR; d++) to[d] = d < n ? from[d] * factor : 0;
      }
    }
  }
}

// Blocks count as wholly seen or not at all.
inline double count_pairs(const Operands& p, const BackwardBlocking& b, const KeyUnit& u) {
  const int64_t group_size = p.group_size(), k_lo = u.split * b.split_keys, k_hi = k_lo + b.split_keys;
  double pairs = 0;
  if (p.blocks) {
    for (int64_t key = k_lo; key < smaller(k_hi, p.seqlen_k); key += p.blocks->block_k)
      for (int64_t head = u.head_k * group_size; head < (u.head_k + u.heads_k) * group_size; head++) {
        const int64_t list = p.blocks->index(u.batch, head, key / p.blocks->block_k);
        pairs += (double)(p.blocks->first[list + 1] - p.blocks->first[list]) * p.blocks->block_q * p.blocks->block_k;
      }
    return pairs * u.batches;
  }
  for (int64_t query = 0; query < p.seqlen_q; query += b.block_rows) {
    const int64_t rows = smaller<int64_t>(b.block_rows, p.seqlen_q - query);
    const Range seen = visited_range(p, u.batch, u.head_k * group_size, query, rows);
    pairs += (double)rows * larger<int64_t>(0, smaller(seen.hi, k_hi) - larger(seen.lo, k_lo));
  }
  return pairs * group_size * u.batches * u.heads_k;
}

}  // namespace fastattn::FASTATTN_ISA
