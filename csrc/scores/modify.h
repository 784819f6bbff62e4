// Everything between the scores' product and the softmax: softcap, bias, masks on one panel and one tile of keys.
#pragma once
#include "bias.h"
#include "bitmap.h"
#include "panel.h"
#include "rows/lines_ahead.h"

namespace fastattn::FASTATTN_ISA {

template <class Real>
struct ModifierMemory {
  Real *rows, *bias, *key_bias;  // [NR][n_block], [n_block][NR], [n_block]
  Real *first, *last;            // [NR], the keys that a lane sees, counted from the tile's first
};

template <class Real>
ModifierMemory<Real> take_modifier(Arena& arena, int64_t n_block, int64_t NR) {
  return {arena.take<Real>(NR * n_block), arena.take<Real>(n_block * NR), arena.take<Real>(n_block),
          arena.take<Real>(NR), arena.take<Real>(NR)};
}

template <class Real, int NV>
class Modifier {
  static constexpr int NR = NV * VL<Real>;
  const Operands& p;
  const ModifierMemory<Real> s;
  bool has_key_bias;                // bias and mask are the same for all rows
  bool reads_rows;                  // of a bias or a mask, a row a query
  const uint8_t* bitmap = nullptr;  // of the tile's block, null if it is full
  int64_t first_key = 0;            // the tile's, counted in its block

 public:
  Modifier(const Operands& p, const ModifierMemory<Real>& memory, bool one_head) : p(p), s(memory) {
    auto same_for_all_rows = [&](const Tensor& t) {
      return !t || (t.stride[2] == 0 && (t.stride[1] == 0 || one_head));
    };
    has_key_bias = (p.bias || p.mask) && same_for_all_rows(p.bias) && same_for_all_rows(p.mask);
    auto has_rows = [](const Tensor& t) { return t && t.stride[2] && t.stride[3] == 1; };
    reads_rows = !has_key_bias && !p.laid_bias && (has_rows(p.bias) || has_rows(p.mask));
  }

  // Masks only lower a score: without any of these, the maximum of the product stays an upper bound.
  bool raises() const { return p.bias || p.softcap > 0.0 || p.alibi_slopes; }

  // Before the first panel of a tile.
  void load_tile(int64_t batch, int64_t head, int64_t row, const KeyTile& tile) {
    use_bitmap(tile.bitmap, tile.lo);
    if (has_key_bias)
      load_key_bias(p, batch, stacked_row(p, head, row), tile.lo, tile.hi - tile.lo, s.rows, s.key_bias);
  }

  // While panel i visits the tile of `keys`: has `ahead` fetch what the visit that follows will read of bias and mask,
  // and the same rows of `also`, in place of what it had. That visit is the next panel's, or, after the last, the first
  // one's of the next tile. Rows of a bias lie too far apart for the hardware to foresee.
  template <class AnyPanel>
  void fetch_after(LinesAhead& ahead, const AnyPanel* panels, int64_t count, int64_t i, Range keys, int64_t n_block,
                   int64_t visits, const Tensor* also = nullptr) const {
    if (!reads_rows) return;
    const bool last = i + 1 == count;
    const Lanes& next = panels[last ? 0 : i + 1].lanes;
    if (last) keys = {keys.hi, keys.hi + n_block};
    keys = {larger(keys.lo, next.visited.lo), smaller(keys.hi, next.visited.hi)};
    if (keys.lo >= keys.hi) return;
    const QueryRow first = stacked_row(p, next.head, next.row);
    const int64_t of_its_head = smaller(next.rows, p.seqlen_q - first.query);
    ahead = {};
    for (const Tensor* t : {&p.bias, &p.mask, also})
      if (t) ahead.add(*t, next.batch, first.head, first.query, of_its_head, keys.hi - keys.lo, keys.lo);
    ahead.spread(visits);
  }

  // null: nothing is masked; lo: the tile's first key.
  void use_bitmap(const uint8_t* bits, int64_t lo) {
    bitmap = bits;
    if (bits) first_key = lo % p.blocks->block_k;
  }

  // Whether `apply` may mask some of the keys k0 ... k1 - 1.
  bool may_mask(const Panel<Real>& panel, int64_t k0, int64_t k1) const {
    return p.bias || p.mask || bitmap || k0 < panel.lanes.common.lo || k1 > panel.lanes.common.hi;
  }

  // From the first to the last key of the tile lo ... hi - 1 that some lane sees; {0, 0} if none is.
  Range seen_by(const Lanes& lanes, int64_t lo, int64_t hi) const {
    Range seen{larger(lo, lanes.visited.lo), smaller(hi, lanes.visited.hi)};
    if (bitmap && seen.lo < seen.hi) {
      const int64_t row = lanes.row % p.blocks->block_q, row_bits = p.blocks->block_k;
      const Range bits =
          set_bits(bitmap + row * row_bits / 8, row_bits, first_key + seen.lo - lo, seen.hi - seen.lo, lanes.rows);
      seen = {seen.lo + bits.lo, seen.lo + bits.hi};
    }
    return seen.lo < seen.hi ? seen : Range{0, 0};
  }

  // The panel's scores [keys][NR] of keys k0 ... k1 - 1, the tile's first `skipped` left out; whether some may be
  // masked. slope: null, or where the derivative of the softcap goes.
  bool apply(const Panel<Real>& panel, int64_t k0, int64_t k1, int64_t skipped, Real* scores, Real* slope = nullptr) {
    const int64_t keys = k1 - k0;
    const Range common = panel.lanes.common;
    bool masked = false;
    if (p.softcap > 0.0) softcap_scores<Real, NV>(scores, keys, (Real)p.softcap, slope);
    if (p.alibi_slopes) add_alibi<Real, NV>(scores, keys, panel.slopes, panel.positions, k0);
    if (has_key_bias) {
      masked |= add_key_bias<Real, NV>(scores, keys, s.key_bias + skipped);
    } else if (p.laid_bias) {
      masked |= add_bias<Real, NV>(
          scores, keys, (const Real*)p.laid_bias + laid_place(p, panel.lanes.head, panel.lanes.row, k0, NR), NR);
    } else {
      if (p.bias) masked |= add_rows_of_bias(panel.lanes, k0, keys, scores);
      if (p.mask) masked |= mask_rows<Real, NV>(p, panel.lanes, k0, keys, scores);
    }
    if (k0 < common.lo || k1 > common.hi) {
      for (int r = 0; r < NR; r++) {
        s.first[r] = (Real)(int32_t)smaller(larger<int64_t>(panel.lo[r] - k0, 0), keys);
        s.last[r] = (Real)(int32_t)smaller(larger<int64_t>(panel.hi[r] - k0, 0), keys);
      }
      mask_intervals<Real, NV>(scores, keys, s.first, s.last, common.lo - k0, common.hi - k0);
      masked = true;
    }
    if (bitmap) {
      const int64_t row = panel.lanes.row % p.blocks->block_q, row_bits = p.blocks->block_k;
      mask_bits<Real, NV>(scores, keys, bitmap + row * row_bits / 8, row_bits, first_key + skipped, panel.lanes.rows);
      masked = true;
    }
    return masked;
  }

 private:
  bool add_rows_of_bias(const Lanes& lanes, int64_t key, int64_t keys, Real* scores) {
    if (const Real* bias = bias_in_lanes<Real>(p, lanes, key, NR))
      return add_bias<Real, NV>(scores, keys, bias, p.bias.stride[3]);
    load_bias(p, lanes, key, keys, NR, s.rows, s.bias);
    return add_bias<Real, NV>(scores, keys, s.bias, NR);
  }
};

}  // namespace fastattn::FASTATTN_ISA
