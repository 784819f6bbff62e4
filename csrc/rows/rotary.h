// Rotary position embedding: rows of q and k turn on their way from memory, their gradients turn back on their way to it.
#pragma once
#include "rows.h"

namespace fastattn::FASTATTN_ISA {

// Entries first ... first + count - 1 of the table's row for a position.
template <class Real>
FASTATTN_INLINE const Real* angles_of(const Tensor& table, int64_t batch, int64_t position, int64_t first,
                                      int64_t count, Real* buffer) {
  const char* from = at(table, batch, 0, position, first);
  if (lies_as<Real>(table)) return (const Real*)from;
  load_row(from, table.dtype, table.stride[3], count, buffer);
  return buffer;
}

// Pairs (x, y) of a row `from` turned by their angles, to the same places of `to`; the first is x[0], y[0], the others lie
// `step` apart. back: by the transpose, which gradients take.
template <bool back, int step, class Real>
FASTATTN_INLINE void turn_pairs(const Real* x, const Real* y, const Real* c, const Real* s, int64_t count, Real* to_x,
                                Real* to_y) {
  constexpr int L = VL<Real>;
  auto turned = [](auto a, auto b, auto cosine, auto sine) {
    return back ? a * cosine + b * sine : a * cosine - b * sine;
  };
  int64_t i = 0;
  if constexpr (step == 1)
    for (; i + L <= count; i += L) {
      const Vec<Real> a = load(x + i), b = load(y + i), cosine = load(c + i), sine = load(s + i);
      store(to_x + i, turned(a, b, cosine, sine)), store(to_y + i, turned(b, -a, cosine, sine));
    }
  for (; i < count; i++) {
    const Real a = x[i * step], b = y[i * step];
    to_x[i * step] = turned(a, b, c[i], s[i]), to_y[i * step] = turned(b, -a, c[i], s[i]);
  }
}

// Row `from` to `to`, which may be the same, turned by the angles of a position.
template <bool back = false, class Real>
void turn_row(const Rotary& r, int64_t batch, int64_t position, const Real* from, int64_t columns, Real* to) {
  constexpr int64_t at_once = 64;
  Real buffers[2][at_once];
  for (int64_t first = 0; first < r.pairs; first += at_once) {
    const int64_t count = smaller(at_once, r.pairs - first);
    const Real* c = angles_of(r.cos, batch, position, first, count, buffers[0]);
    const Real* s = angles_of(r.sin, batch, position, first, count, buffers[1]);
    const int64_t x = r.interleaved ? 2 * first : first, y = r.interleaved ? x + 1 : x + r.pairs;
    if (r.interleaved)
      turn_pairs<back, 2>(from + x, from + y, c, s, count, to + x, to + y);
    else
      turn_pairs<back, 1>(from + x, from + y, c, s, count, to + x, to + y);
  }
  if (from != to)
    for (int64_t d = 2 * r.pairs; d < columns; d++) to[d] = from[d];
}

// A row of q or k as the scores want it: turned, if the call has rotary embedding.
template <class Real>
FASTATTN_INLINE void load_turned(const Operands& p, const Tensor& t, int64_t batch, int64_t head, int64_t row,
                                 int64_t position, Real* to) {
  if (p.rotary && lies_as<Real>(t))
    return turn_row(p.rotary, batch, position, (const Real*)at(t, batch, head, row), p.head_dim, to);
  load_row(t, batch, head, row, p.head_dim, to);
  if (p.rotary) turn_row(p.rotary, batch, position, to, p.head_dim, to);
}
template <class Real>
FASTATTN_INLINE void load_query(const Operands& p, int64_t batch, int64_t head, int64_t query, Real* to) {
  load_turned(p, p.q, batch, head, query, p.query_start + query, to);
}
template <class Real>
FASTATTN_INLINE void load_key(const Operands& p, int64_t batch, int64_t head_k, int64_t key, Real* to) {
  load_turned(p, p.k, batch, head_k, key, key, to);
}

// Rows of q, as `tile_rows`; copied where they turn.
template <class Real>
TileRows<Real> query_rows(const Operands& p, int64_t batch, int64_t head, int64_t query, int64_t count, Real* buffer,
                          int64_t stride) {
  if (!p.rotary) return tile_rows(p.q, batch, head, query, count, p.head_dim, buffer, stride);
  for (int64_t r = 0; r < count; r++) load_query(p, batch, head, query + r, buffer + r * stride);
  return {buffer, stride};
}

// Rows of k, as `tile_rows`; copied where they turn.
template <class Real>
TileRows<Real> key_rows(const Operands& p, int64_t batch, int64_t head_k, int64_t key, int64_t count, Real* buffer,
                        int64_t stride, bool copies = false) {
  if (!p.rotary) return tile_rows(p.k, batch, head_k, key, count, p.head_dim, buffer, stride, copies);
  for (int64_t j = 0; j < count; j++) load_key(p, batch, head_k, key + j, buffer + j * stride);
  return {buffer, stride};
}

}  // namespace fastattn::FASTATTN_ISA
