// dk or dv of a unit: summed in memory of its own and stored in the end, or, where each key has one sum, as that comes.
// start, then add to (or store at) `place`, then `finite` and `finish`.
#pragma once
#include "backward_layout.h"
#include "rows/rotary.h"

namespace fastattn::FASTATTN_ISA {

template <class Real, int NV>
class KeySums {
  static constexpr int L = VL<Real>, NR = NV * L;

  const Tensor& t;
  Real* const memory;  // [tiles][panels][n_block][NR]
  const int64_t columns, panels, n_block;
  const bool turns;     // back what rotary positions have turned
  const bool in_place;  // rows of the tensor are rows of sums
  const bool direct;    // sums go to the tensor as they come

 public:
  const bool fresh;  // each key has one sum

  KeySums(const Tensor& t, Real* memory, int64_t columns, int64_t n_block, bool turns, bool fresh, bool in_pairs)
      : t(t),
        memory(memory),
        columns(columns),
        panels(column_panels(columns, NR)),
        n_block(n_block),
        turns(turns),
        in_place(lies_as<Real>(t) && !turns && columns % NR == 0),
        direct(fresh && in_place && !in_pairs),
        fresh(fresh) {}

  bool wanted() const { return (bool)t; }

  void start(Range keys) {
    if (!fresh) clear(keys);
  }

  // Where column panel c of `key`, the first of a tile, goes; those of the keys that follow go `stride` further.
  Real* place(const KeyUnit& u, int64_t key, int64_t tile, int64_t c) const {
    return direct ? (Real*)at(t, u.batch, u.head_k, key, c * NR) : memory + (tile * panels + c) * n_block * NR;
  }
  int64_t stride() const { return direct ? t.stride[2] : NR; }

  bool finite(const KeyUnit& u, Range keys) const {
    bool all = true;
    if (direct) {
      const int64_t side_by_side = t.stride[2] == columns ? keys.hi - keys.lo : 1;
      for (int64_t key = keys.lo; all && key < keys.hi; key += side_by_side)
        all = all_finite((const Real*)at(t, u.batch, u.head_k, key), side_by_side * columns);
      return all;
    }
    for (int64_t key = keys.lo, tile = 0; key < keys.hi; key += n_block, tile++)
      for (int64_t c = 0; all && c < panels; c++)
        all = all_finite(place(u, key, tile, c), smaller(n_block, keys.hi - key) * NR);
    return all;
  }

  // To the tensor, if they are not there; zeros if none came. row: room for one.
  void finish(const Operands& p, const KeyUnit& u, Range keys, bool any_came, Real* row) {
    if (any_came && direct) return;
    if (!any_came && fresh) clear(keys);
    for (int64_t key = keys.lo, tile = 0, j = 0; key < keys.hi; key++) {
      Real* to = in_place ? (Real*)at(t, u.batch, u.head_k, key) : row;
      for (int64_t c = 0; c < panels; c++) {
        const Real* from = memory + ((tile * panels + c) * n_block + j) * NR;
        for (int i = 0; i < NR; i += L) store(to + c * NR + i, load(from + i));
      }
      if (++j == n_block) tile++, j = 0;
      if (in_place) continue;
      if (turns) turn_row<true>(p.rotary, u.batch, key, row, columns, row);
      store_row(row, (Real)1, columns, t, u.batch, u.head_k, key);
    }
  }

 private:
  void clear(Range keys) {
    for (int64_t i = 0; i < round_up(keys.hi - keys.lo, n_block) * panels * NR; i += L) store(memory + i, Vec<Real>{});
  }
};

}  // namespace fastattn::FASTATTN_ISA
