// The products of the backward pass with a few queries that would leave their panel nearly empty: columns in the lanes, in
// the order in which `decode` adds them, so that scores are the very numbers that lse is of. Results stand as a panel's.
#pragma once
#include "backward_layout.h"
#include "tile/row_products.h"

namespace fastattn::FASTATTN_ISA {

template <class Real, int NV>
class FewQueries {
  static constexpr int L = VL<Real>, NR = NV * L;
  using Rows = PlainRows<Real>;
  const int64_t count;
  const FewScratch<Real> s;
  const RowLoads<Rows> q_loads, dout_loads;

 public:
  FewQueries(const Operands& p, const BackwardBlocking& b, const FewScratch<Real>& scratch)
      : count(b.last_queries), s(scratch), q_loads(p.head_dim), dout_loads(p.head_dim_v) {}

  bool are(const Lanes& lanes) const { return count && lanes.rows == count; }

  // Lanes of a panel, [columns][NR], as the products want them.
  void pack_q(const Real* lanes) const { pack(q_loads, lanes, s.q); }
  void pack_dout(const Real* lanes) const { pack(dout_loads, lanes, s.dout); }

  // q . k and dout . v for `keys` rows of k or v, to [keys][NR]; 0 in lanes that are no queries.
  void scores(TileRows<Real> k, int64_t keys, Real* to) const { multiply(q_loads, s.q, k, keys, to); }
  void dp(TileRows<Real> v, int64_t keys, Real* to) const { multiply(dout_loads, s.dout, v, keys, to); }

  // dq [head_dim][NR] += the rows of k times ds, [keys] rows at `stride`.
  void add_dq(TileRows<Real> k, const Real* ds, int64_t stride, int64_t keys, Real* dq) const {
    for (int64_t r = 0; r < count; r++)
      for (int64_t j = 0; j < keys; j++) s.products[r * s.stride + j] = ds[j * stride + r];
    const int64_t size = q_loads.vectors() * L;
    memset(s.out, 0, count * size * sizeof(Real));
    each_rows(count, [&](int64_t r, auto R) {
      add_values<Rows, decltype(R)::value>((const char*)k.data, k.stride * (int64_t)sizeof(Real), keys, q_loads,
                                           s.products + r * s.stride, s.stride, nullptr, false, s.out + r * size, size);
    });
    for (int64_t i = 0; i < q_loads.count; i++)
      for (int lane = 0; lane < L; lane++)
        for (int64_t r = 0; q_loads.is_fresh(i, lane) && r < count; r++)
          dq[(q_loads.first(i) + lane) * NR + r] += s.out[r * size + i * L + lane];
  }

 private:
  void pack(const RowLoads<Rows>& loads, const Real* lanes, Real* to) const {
    each_rows(count, [&](int64_t first, auto R) {
      for (int64_t i = 0; i < loads.count; i++)
        for (int64_t r = first; r < first + R; r++)
          for (int lane = 0; lane < L; lane++)
            *to++ = loads.is_fresh(i, lane) ? lanes[(loads.first(i) + lane) * NR + r] : 0;
    });
  }

  void multiply(const RowLoads<Rows>& loads, const Real* packed, TileRows<Real> rows, int64_t keys, Real* to) const {
    each_rows(count, [&](int64_t r, auto R) {
      score_rows<Rows, decltype(R)::value>((const char*)rows.data, rows.stride * (int64_t)sizeof(Real), keys, false,
                                           loads, packed + r * loads.vectors() * L, s.products + r * s.stride,
                                           s.stride);
    });
    for (int64_t j = 0; j < keys; j++, to += NR) {
      for (int i = 0; i < NR; i += L) store(to + i, Vec<Real>{});
      for (int64_t r = 0; r < count; r++) to[r] = s.products[r * s.stride + j];
    }
  }
};

}  // namespace fastattn::FASTATTN_ISA
