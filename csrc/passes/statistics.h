// What the weights of a head amount to, without values: sums over queries for each key, sums over keys for each query.
//
//   loop 1  row blocks of a group: panels, as in prefill.h, and their lse
//   loop 2    key tiles of n_block keys
//   loop 3      panels: S^T = K Q^T; modifications, masks; X = S - lse, P = exp(X)
//               of a key: P summed over lanes; of a lane: the largest X, P X and P * distance summed over keys
//
// With lse known, a weight is final at once. The row blocks of a group add up in one array of keys; how many groups a head
// has follows from the shape, so that the sums do not depend on the threads.
#pragma once
#include "blocking.h"
#include "scores/modify.h"
#include "scores/skip.h"
#include "tile/gradient_products.h"

namespace fastattn::FASTATTN_ISA {

template <class Real>
Blocking make_statistics_blocking(const Operands& p) {
  Operands one_head = p;
  one_head.num_heads = p.num_heads_k;  // heads that share keys are not stacked: each has its own sums
  Blocking b = make_blocking<Real>(one_head);
  const int64_t blocks = larger<int64_t>(1, (p.seqlen_q + b.rows - 1) / b.rows);
  b.num_splits = (int)smaller(larger<int64_t>(1, few_units / larger<int64_t>(1, p.num_heads)), blocks);
  b.split_keys = round_up(larger<int64_t>(p.seqlen_k, 1), b.n_block);
  return b;
}

template <class Real>
struct StatisticsPanel : Panel<Real> {
  Real *top, *log_sum;              // [NR], as in lse_parts
  Real *largest, *logs, *distance;  // [NR]: of X, and the sums of P X and of P * distance
};

// The memory of one thread while it computes a unit.
template <class Real>
struct StatisticsScratch {
  StatisticsPanel<Real>* panels;
  Real* scores;    // [n_block][NR]
  Real* ignored;   // [NR]
  Real* key_sums;  // [n_block][lanes of a vector]
  ModifierMemory<Real> modifier;
  Real* rows;  // [NR][head_dim]
  Real* k;     // [n_block][k_stride], a converted tile
  int64_t k_stride, bytes;
};

template <class Real>
StatisticsScratch<Real> statistics_layout(const Operands& p, const Blocking& b, char* memory) {
  Arena arena{memory};
  StatisticsScratch<Real> s;
  const int64_t NR = b.lanes, keys = b.n_block, panels = b.rows / b.lanes;
  s.panels = arena.take<StatisticsPanel<Real>>(panels);
  for (int64_t i = 0; i < panels; i++) {
    StatisticsPanel<Real> panel{};
    (Panel<Real>&)panel = take_panel<Real>(arena, p.head_dim, NR);
    for (Real** row : {&panel.top, &panel.log_sum, &panel.largest, &panel.logs, &panel.distance})
      *row = arena.take<Real>(NR);
    if (memory) s.panels[i] = panel;
  }
  s.scores = arena.take<Real>(keys * NR), s.ignored = arena.take<Real>(NR);
  s.key_sums = arena.take<Real>(keys * VL<Real>);
  s.modifier = take_modifier<Real>(arena, keys, NR);
  s.rows = arena.take<Real>(NR * p.head_dim);
  s.k_stride = round_up(p.head_dim, 16) + 16;  // never a power of two
  s.k = arena.take<Real>(keys * s.k_stride);
  s.bytes = arena.used;
  return s;
}

template <class Real>
int64_t statistics_scratch_bytes(const Operands& p, const Blocking& b) {
  return statistics_layout<Real>(p, b, nullptr).bytes;
}

// Scores [keys][NR] -> weights in place, and what the lanes sum up; `key`: position of the first.
template <class Real, int NV>
void weigh_statistics(const StatisticsPanel<Real>& panel, int64_t key, int64_t keys, Real* scores) {
  constexpr int L = VL<Real>, NR = NV * L;
  for (int v = 0; v < NV; v++) {
    const Vec<Real> top = load(panel.top + v * L), log_sum = load(panel.log_sum + v * L);
    Vec<Real> largest = load(panel.largest + v * L), logs{}, distances{};
    Vec<Real> distance = load(panel.positions + v * L) - (Real)key;
    for (int64_t j = v * L; j < keys * NR; j += NR) {
      // Bounded where exp(X) is 0, so that 0 * X is 0; NaN stays.
      const Vec<Real> x = vmax(splat(exp_zero<Real>), load(scores + j) - top - log_sum), weight = exp(x);
      store(scores + j, weight);
      largest = vmax(x, largest);
      logs += weight * x;
      distances += weight * vmax(distance, -distance);
      distance -= (Real)1;
    }
    store(panel.largest + v * L, largest);
    store(panel.logs + v * L, load(panel.logs + v * L) + logs);
    store(panel.distance + v * L, load(panel.distance + v * L) + distances);
  }
}

template <class Real, int NV>
class StatisticsUnit {
  static constexpr int L = VL<Real>, NR = NV * L;

  const Operands& p;
  const Statistics& t;
  const Blocking& b;
  StatisticsScratch<Real> s;
  Modifier<Real, NV> modifier;
  int panels = 0;

 public:
  StatisticsUnit(const Operands& p, const Statistics& t, const Blocking& b, char* memory)
      : p(p), t(t), b(b), s(statistics_layout<Real>(p, b, memory)), modifier(p, s.modifier, true) {}

  // The row block from u.row on; key_mass: null or [seqlen_k], to which its weights are added.
  void run(Unit u, Real* key_mass) {
    find_keys(p, b, u);
    start(u);
    const int64_t list = p.blocks ? p.blocks->index(u.batch, u.head, u.row / b.rows) : 0;
    each_key_tile(p.blocks, list, u.k_lo, u.k_hi, b.n_block,
                  [&](const KeyTile& keys) { visit_tile(u, keys, key_mass); });
    for (int i = 0; i < panels; i++) finish(s.panels[i]);
  }

 private:
  void start(const Unit& u) {
    const int64_t rows = smaller<int64_t>(b.rows, p.seqlen_q - u.row);
    panels = (int)((rows + NR - 1) / NR);
    for (int i = 0; i < panels; i++) {
      StatisticsPanel<Real>& panel = s.panels[i];
      const int64_t first = u.row + i * NR, count = smaller<int64_t>(NR, rows - i * NR);
      place_lanes(p, u.batch, u.head, first, count, NR, panel);
      load_lanes(p, NR, panel, s.rows);
      for (int64_t r = 0; r < NR; r++) {
        const bool is_row = r < count;
        panel.top[r] = is_row ? *(const Real*)at(p.lse_parts, u.batch, u.head, first + r, 0) : 0;
        panel.log_sum[r] =
            is_row ? *(const Real*)at(p.lse_parts, u.batch, u.head, first + r, 1) : (Real)__builtin_inf();
        panel.positions[r] = (Real)(first + r + p.query_start);
        panel.largest[r] = exp_zero<Real>, panel.logs[r] = panel.distance[r] = 0;
      }
    }
  }

  void visit_tile(const Unit& u, const KeyTile& tile, Real* key_mass) {
    const int64_t keys = tile.hi - tile.lo, D = p.head_dim;
    modifier.load_tile(u.batch, u.head, u.row, tile);
    const TileRows<Real> k = key_rows(p, u.batch, p.head_k(u.head), tile.lo, keys, s.k, s.k_stride);
    clear_rows<Real, 1>(s.key_sums, L, keys);
    for (int i = 0; i < panels; i++) {
      const StatisticsPanel<Real>& panel = s.panels[i];
      const auto [k0, k1] = modifier.seen_by(panel.lanes, tile.lo, tile.hi);
      const int64_t seen = k1 - k0, skipped = k0 - tile.lo;
      if (!seen) continue;
      Weigher<Real, NV> none{};
      scores_product<Real, NV>({k.data + skipped * k.stride, k.stride}, seen, panel.q, D, s.scores, s.ignored, none);
      modifier.apply(panel, k0, k1, skipped, s.scores);
      weigh_statistics<Real, NV>(panel, k0, seen, s.scores);
      if (key_mass) add_key_sums<Real, NV>(s.scores, NR, seen, s.key_sums + skipped * L);
    }
    if (!key_mass) return;
    for (int64_t j = 0; j < keys; j++) {
      Real sum = 0;
      for (int i = 0; i < L; i++) sum += s.key_sums[j * L + i];
      key_mass[tile.lo + j] += sum;
    }
  }

  void finish(const StatisticsPanel<Real>& panel) {
    for (int64_t r = 0; r < panel.lanes.rows; r++) {
      auto put = [&](const Tensor& to, double x) {
        if (to) *(Real*)at(to, panel.lanes.batch, panel.lanes.head, panel.lanes.row + r) = (Real)x;
      };
      put(t.entropy, 0.0 - panel.logs[r]);
      put(t.distance, panel.distance[r]);
      const double largest = panel.largest[r] > exp_zero<Real> ? __builtin_exp2(panel.largest[r] * log2e) : 0;
      put(t.max, largest + 0 * panel.logs[r]);  // NaN, which a maximum leaves out
    }
  }
};

template <class Real, int NV>
void run_statistics_lanes(const Operands& p, const Statistics& t, const Blocking& b, int64_t batch, int64_t head,
                          int64_t group, char* key_mass, char* memory) {
  StatisticsUnit<Real, NV> unit(p, t, b, memory);
  for (int64_t row = group * b.rows; row < p.seqlen_q; row += b.num_splits * b.rows)
    unit.run({(int32_t)batch, (int32_t)head, 0, row, 0, 0, 0}, (Real*)key_mass);
}

template <class Real>
void run_statistics_unit(const Operands& p, const Statistics& t, const Blocking& b, int64_t batch, int64_t head,
                         int64_t group, char* key_mass, char* memory) {
  if (b.lanes == VL<Real>)
    run_statistics_lanes<Real, 1>(p, t, b, batch, head, group, key_mass, memory);
  else
    run_statistics_lanes<Real, max_vectors>(p, t, b, batch, head, group, key_mass, memory);
}

// key_mass of a head from those of its groups, one after the other.
template <class Real>
void add_groups(const Operands& p, const Statistics& t, const Blocking& b, int64_t batch, int64_t head,
                const char* first) {
  const Real* of_groups = (const Real*)first;
  for (int64_t j = 0; j < p.seqlen_k; j++) {
    double sum = 0;
    for (int64_t group = 0; group < b.num_splits; group++) sum += of_groups[group * p.seqlen_k + j];
    *(Real*)at(t.key_mass, batch, head, j) = (Real)sum;
  }
}

}  // namespace fastattn::FASTATTN_ISA
