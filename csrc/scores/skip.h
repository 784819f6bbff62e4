// Key tiles that change nothing: by Cauchy-Schwarz no score exceeds |q| |k| plus ALiBi's largest term, and where that lies
// so far below a row's reference point that exp gives 0 (exp_zero), the tile's weights are 0 and so is all they add.
// A norm is NaN or infinite where a value is, and nothing is skipped: 0 * NaN would have been NaN.
#pragma once
#include "bitmap.h"
#include "panel.h"

namespace fastattn::FASTATTN_ISA {

// The reference point of a lane that sees no key or is no row: whatever the scores, its weights are 0.
constexpr float unseen = 1e30f;

// ALiBi alone makes some weights of a head 0: worth a look ahead, and the search for tiles.
template <class Real>
FASTATTN_INLINE bool is_steep(const Operands& p, Real slope) {
  return !p.bias && p.seqlen_k >= 512 && __builtin_fabs(slope) * larger(p.seqlen_q, p.seqlen_k) > -2 * exp_zero<Real>;
}

// Whether tiles that change nothing are looked for in a head of this slope.
template <class Real>
FASTATTN_INLINE bool skips_in_head(const Operands& p, Real slope) {
  return p.may_skip() && (p.skip_negligible > 0 || is_steep(p, slope));
}

// At least the root of a sum of squares, whatever rounding and underflow did to it.
template <class Real>
FASTATTN_INLINE Real upper_norm(Real squares) {
  const Real lost = (Real)(sizeof(Real) == 8 ? 0x1p-500 : 0x1p-56);
  return (Real)(__builtin_sqrt((double)squares) * (1 + 0x1p-12)) + lost;
}

// Rows at once: a lane each, in the end.
template <class Real>
struct RowSums {
  static constexpr int L = VL<Real>;
  Real parts[L * L], across[L * L];

  // row[i] = sum of term(x[d], y[d]) over d = i, i + L, ...
  template <class Term>
  void add(int row, const Real* x, const Real* y, int64_t n, const Term& term) {
    Vec<Real> sum{};
    int64_t d = 0;
    for (; d + L <= n; d += L) sum += term(load(x + d), load(y + d));
    if (d < n) {
      Real last[2][L] = {};
      memcpy(last[0], x + d, (n - d) * sizeof(Real)), memcpy(last[1], y + d, (n - d) * sizeof(Real));
      sum += term(load(last[0]), load(last[1]));
    }
    store(parts + row * L, sum);
  }
  Vec<Real> total() {
    transpose(parts, (int64_t)L, (int64_t)L, (int64_t)L, across, (int64_t)L);
    Vec<Real> sum{};
    for (int i = 0; i < L; i++) sum += load(across + i * L);
    return sum;
  }
};

// The largest norm of `keys` rows, rounded up; NaN or infinite if a value is.
template <class Real>
Real largest_norm(TileRows<Real> k, int64_t keys, int64_t head_dim) {
  constexpr int L = VL<Real>;
  RowSums<Real> rows;
  Vec<Real> largest{}, poison{};
  for (int64_t j = 0; j < keys; j += L) {
    for (int i = 0; i < L; i++) {
      const Real* row = k.data + smaller(j + i, keys - 1) * k.stride;
      rows.add(i, row, row, head_dim, [](Vec<Real> x, Vec<Real> y) { return x * y; });
    }
    const Vec<Real> squares = rows.total();
    largest = vmax(squares, largest);
    poison += squares * (Real)0;
  }
  Real norm = 0, bad = 0;
  for (int i = 0; i < L; i++) norm = larger(norm, largest[i]), bad += poison[i];
  return upper_norm(norm + bad);
}

// Whether every value is finite.
template <class Real>
bool rows_finite(TileRows<Real> x, int64_t rows, int64_t columns) {
  constexpr int L = VL<Real>;
  Vec<Real> poison[2] = {};
  Real last = 0;
  for (int64_t j = 0; j < rows; j++) {
    const Real* row = x.data + j * x.stride;
    int64_t d = 0;
    for (; d + L <= columns; d += L) poison[j % 2] += load(row + d) * (Real)0;
    for (; d < columns; d++) last += row[d] * (Real)0;
  }
  return last == 0 && !any<Real>(poison[0] + poison[1] != (Real)0);
}

// What is known of a tile of keys of a key head: the first thread that asks finds it out, any other would find the same.
template <class Find>
FASTATTN_INLINE double known(double* fact, const Find& find) {
  double value;
  __atomic_load(fact, &value, __ATOMIC_RELAXED);
  if (value >= 0 || value != value) return value;
  value = find();
  __atomic_store(fact, &value, __ATOMIC_RELAXED);
  return value;
}

// panel.norms from panel.q.
template <class Real, int NV>
void find_norms(const Operands& p, const Panel<Real>& panel) {
  constexpr int L = VL<Real>, NR = NV * L;
  for (int v = 0; v < NV; v++) {
    Vec<Real> squares{};
    for (int64_t i = v * L; i < p.head_dim * NR; i += NR) squares += load(panel.q + i) * load(panel.q + i);
    store(panel.norms + v * L, squares);
  }
  for (int r = 0; r < NR; r++) panel.norms[r] = upper_norm(panel.norms[r]);
}

// Whether exp(score - reference) is 0 for every lane and the keys k0 ... k1 - 1, none longer than key_norm. A reference
// is finite, or its lane is not known to weigh nothing.
template <class Real, int NV>
bool negligible(const Operands& p, const Panel<Real>& panel, const Real* reference, Real key_norm, int64_t k0,
                int64_t k1) {
  constexpr int L = VL<Real>;
  constexpr Real slack =
      (Real)(sizeof(Real) == 8 ? 0x1p-44 : 0x1p-18);  // of all that is rounded here and in the scores
  const Real cap = (Real)p.softcap;
  for (int v = 0; v < NV; v++) {
    Vec<Real> bound = load(panel.norms + v * L) * key_norm, term{};
    if (p.softcap > 0.0) bound = (bound < (Real)1 ? bound : bound * (Real)0 + (Real)1) * cap;  // NaN and Inf stay bad
    if (p.alibi_slopes) {
      const Vec<Real> slope = load(panel.slopes + v * L), position = load(panel.positions + v * L);
      const Vec<Real> before = (Real)k0 - position, after = position - (Real)(k1 - 1);
      const Vec<Real> nearest = vmax(vmax(before, after), Vec<Real>{});
      term = slope * (slope < (Real)0 ? vmax(vabs(before), vabs(after)) : nearest);
    }
    const Vec<Real> top = load(reference + v * L);
    const Vec<Real> highest = bound - term - top + (bound + vabs(term) + vabs(top)) * slack;
    if (any<Real>(~(highest < exp_zero<Real>))) return false;
  }
  return true;
}

// Whether a row sees a key within its range.
FASTATTN_INLINE bool sees(const Operands& p, int64_t batch, QueryRow row, int64_t key) {
  if (p.mask && !*(const uint8_t*)at(p.mask, batch, row.head, row.query, key)) return false;
  return !p.blocks || block_sees(*p.blocks, batch, row, key);
}

// Before the first key: max, the rows' reference points, -inf, become lower bounds of their nearest keys' scores where the
// head is steep and one of a few keys is seen. These are among the highest: far keys, which causal rows visit first, weigh
// 0 at once. q [NR][head_dim]: the panel's rows, scaled; key_row: room for one.
template <class Real, int NV>
void look_ahead(const Operands& p, const Panel<Real>& panel, const Real* q, Real* key_row, Real* max) {
  constexpr int L = VL<Real>;
  constexpr Real slack = (Real)(sizeof(Real) == 8 ? 0x1p-43 : 0x1p-14);  // of two sums of 512 products
  const Real cap = (Real)p.softcap, lowest = (Real)-__builtin_inf();
  const Lanes& lanes = panel.lanes;
  bool any_steep = false;
  for (int64_t r = 0; r < lanes.rows; r++) any_steep |= is_steep(p, panel.slopes[r]);
  if (!any_steep) return;
  for (int first = 0; first < smaller<int64_t>(NV * L, lanes.rows); first += L) {
    RowSums<Real> products, sizes;
    Real distance[L], known[L];
    for (int i = 0; i < L; i++) {
      const int64_t r = smaller<int64_t>(first + i, lanes.rows - 1);
      const QueryRow row = stacked_row(p, lanes.head, lanes.row + r);
      const int64_t nearest = smaller(larger(row.query + p.query_start, panel.lo[r]), panel.hi[r] - 1);
      const int64_t head_k = p.head_k(row.head), last = larger(panel.lo[r], nearest - 15);
      int64_t key = nearest;
      while (key >= last && !sees(p, lanes.batch, row, key)) key--;
      const bool seen = key >= last && panel.lo[r] < panel.hi[r] && is_steep(p, panel.slopes[r]);
      known[i] = seen, distance[i] = seen ? panel.positions[r] - (Real)key : 0;
      const Real* x = q + r * p.head_dim;
      const Real* y = seen ? key_rows(p, lanes.batch, head_k, key, 1, key_row, 0).data : x;
      products.add(i, x, y, p.head_dim, [](Vec<Real> a, Vec<Real> b) { return a * b; });
      sizes.add(i, x, y, p.head_dim, [](Vec<Real> a, Vec<Real> b) { return vabs(a * b); });
    }
    Vec<Real> score = products.total(), size = sizes.total();
    if (p.softcap > 0.0) score = tanh(score) * cap, size = (size + (Real)1) * cap;
    const Vec<Real> term = load(panel.slopes + first) * vabs(load(distance));
    score = score - term - (size + vabs(term)) * slack;
    score = score * (Real)0 == (Real)0 ? score : splat(lowest);
    store(max + first, load(known) > (Real)0 ? score : splat(lowest));
  }
}

}  // namespace fastattn::FASTATTN_ISA
