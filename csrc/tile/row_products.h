// Products of a few query rows with the rows of a cache, read as they lie, columns in the lanes:
//
//   score_rows   s[row][key] = q[row] . k[key]           key after key, each a chain of multiply-adds over the columns
//   add_values   out[row] += sum of w[row][key] v[key]   columns stay in registers for the keys of a block
//
// Whatever reads a row in pieces loads all its lines first, in the order of their addresses: that is what makes hardware
// fetch ahead. Each sum has one order, however many rows are computed at once.
#pragma once
#include "gather_products.h"
#include "rows/rows.h"

namespace fastattn::FASTATTN_ISA {

// How the elements of a row lie: `step` of them are loaded at once and become `vectors` vectors of Real, of which lane i of
// vector v is element column(v, i).
template <class R>
struct PlainRows {
  using Real = R;
  typedef typename VecOf<R>::bits Raw;
  static constexpr int vectors = 1, step = VL<R>, size = sizeof(R);
  static constexpr int column(int, int lane) { return lane; }
  template <int>
  FASTATTN_INLINE Vec<R> vector(Raw x) {
    return (Vec<R>)x;
  }
};
struct BFloat16Rows {  // a word holds two elements
  using Real = float;
  typedef VecOf<float>::bits Raw;
  static constexpr int vectors = 2, step = 2 * VL<float>, size = 2;
  static constexpr int column(int v, int lane) { return 2 * lane + v; }
  template <int V>
  FASTATTN_INLINE Vec<float> vector(Raw x) {
    return (Vec<float>)(V == 0 ? x << 16 : x & (int32_t)0xffff0000);
  }
};
struct Float16Rows {
  using Real = float;
  typedef uint16_t Raw __attribute__((vector_size(FASTATTN_WIDTH / 2)));
  static constexpr int vectors = 1, step = VL<float>, size = 2;
  static constexpr int column(int, int lane) { return lane; }
  template <int>
  FASTATTN_INLINE Vec<float> vector(Raw x) {
    return load_vector((const uint16_t*)&x, DType::float16);
  }
};

struct Int8Rows {  // without the factor of the row
  using Real = float;
  typedef int8_t Raw __attribute__((vector_size(FASTATTN_WIDTH == 32 ? 16 : FASTATTN_WIDTH / 4)));
  static constexpr int vectors = FASTATTN_WIDTH == 32 ? 2 : 1, step = vectors * VL<float>, size = 1;
  static constexpr int column(int v, int lane) { return v * VL<float> + lane; }
  template <int V>
  FASTATTN_INLINE Vec<float> vector(Raw x) {
#if defined(__AVX512F__)
    return (Vec<float>)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32((__m128i)x));
#elif defined(FASTATTN_AVX2)
    const __m128i half = V == 0 ? (__m128i)x : _mm_unpackhi_epi64((__m128i)x, (__m128i)x);
    return (Vec<float>)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(half));
#else
    return __builtin_convertvector(x, Vec<float>);
#endif
  }
};

template <class Rows>
FASTATTN_INLINE typename Rows::Raw load_raw(const char* p) {
  typename Rows::Raw x;
  memcpy(&x, p, sizeof x);
  return x;
}

// Has memory fetched that is about to be read in pieces, for each row anew: by plain loads of its lines, whose order
// hardware continues, or by prefetch instructions for a row further on, which in runs on end lies `ahead`. Zen 4 is better at
// the former, Zen 3 at the latter.
struct Fetch {
  static constexpr bool by_loads = FASTATTN_WIDTH == 64;
  int64_t bytes, ahead;

  __attribute__((always_inline)) inline void now(const char* row) const {
#pragma GCC unroll 4
    for (int64_t i = 0; i < bytes; i += 64) (void)*(const volatile char*)(row + i);
  }
  __attribute__((always_inline)) inline void later(const char* row) const {
#pragma GCC unroll 4
    for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(row + i);
  }
  __attribute__((always_inline)) inline void operator()(const char* row, const char* further) const {
    if constexpr (by_loads)
      now(row);
    else
      later(further);
  }
};

// The loads of a row: as many as fit side by side, and one more for the rest that ends with the row and overlaps the one
// before it, whose elements `fresh` masks there. A row shorter than a load is copied and padded by zeros.
template <class Rows>
struct RowLoads {
  int64_t columns, padded, whole, count;
  typename Rows::Raw fresh;

  explicit RowLoads(int64_t columns) : columns(columns), padded(columns > Rows::step ? columns : Rows::step) {
    whole = padded / Rows::step;
    const int64_t rest = padded % Rows::step;
    count = whole + (rest != 0);
    char bytes[sizeof fresh];
    for (int64_t i = 0; i < (int64_t)sizeof bytes; i++)
      bytes[i] = rest == 0 || i >= (Rows::step - rest) * Rows::size ? -1 : 0;
    memcpy(&fresh, bytes, sizeof fresh);
  }
  int64_t first(int64_t load) const { return load < whole ? load * Rows::step : padded - Rows::step; }
  int64_t offset(int64_t load) const { return first(load) * Rows::size; }  // in bytes
  bool is_fresh(int64_t load, int column) const { return first(load) + column >= load * Rows::step; }
  int64_t vectors() const { return count * Rows::vectors; }
  int64_t row_bytes() const { return padded * Rows::size; }
  // Of whole rows, 2 KiB ahead.
  Fetch fetch(int64_t stride) const { return {row_bytes(), larger<int64_t>(1, 2048 / row_bytes()) * stride}; }
};

// body(first row, how many at once) for all rows.
template <class Body>
FASTATTN_INLINE void each_rows(int64_t rows, const Body& body) {
  int64_t r = 0;
  for (; r + 4 <= rows; r += 4) body(r, std::integral_constant<int, 4>{});
  if (r + 2 <= rows) body(r, std::integral_constant<int, 2>{}), r += 2;
  if (r < rows) body(r, std::integral_constant<int, 1>{});
}

// Accumulators: they hide the latency of a multiply-add, and their sums fill whole vectors.
template <class Real>
constexpr int row_chains = VL<Real> > 8 ? VL<Real> : 8;

// Adds one load of each of the tile's keys times that of each of its rows; q: [rows][vectors][VL].
template <class Rows, int R, int KB, int... I, int... J>
FASTATTN_INLINE void dot_step(Tile<typename Rows::Real, R * KB, 1>& tile, const char* const* keys, int64_t offset,
                              typename Rows::Raw fresh, const typename Rows::Real* q, std::integer_sequence<int, I...>,
                              std::integer_sequence<int, J...>) {
  using Real = typename Rows::Real;
  constexpr int L = VL<Real>, V = Rows::vectors;
  const typename Rows::Raw x[KB] = {(load_raw<Rows>(keys[J] + offset) & fresh)...};
  auto row = [&](int r, auto v) __attribute__((always_inline)) {
    Vec<Real> one = load(q + (r * V + v) * L);
    keep(one);  // loaded once, and not by each multiply-add
    ((tile.c[r * KB + J] += Rows::template vector<decltype(v)::value>(x[J]) * one), ...);
  };
  (row(I, std::integral_constant<int, 0>{}), ...);
  if constexpr (V == 2) (row(I, std::integral_constant<int, 1>{}), ...);
  pin<Real, R * KB, 1>(tile, std::make_integer_sequence<int, R * KB>{});
}

// The sums over the lanes of each accumulator, side by side.
template <class Real, int N, int... I>
FASTATTN_INLINE void store_sums(const Tile<Real, N, 1>& tile, Real* sums, std::integer_sequence<int, I...>) {
  (store(sums + I * VL<Real>, sums_of<Real, I * VL<Real>>(tile)), ...);
}

// One key after the other, as their addresses go: `keep` holds the compiler off from mixing them.
template <class Rows, int... J>
FASTATTN_INLINE void dot_keys(Tile<typename Rows::Real, (int)sizeof...(J), 1>& tile, const char* k, int64_t stride,
                              int64_t last, const RowLoads<Rows>& loads, const typename Rows::Real* q,
                              std::integer_sequence<int, J...>) {
  using Real = typename Rows::Real;
  constexpr int L = VL<Real>, V = Rows::vectors;
  auto one = [&](Vec<Real>& sum, const char* key) __attribute__((always_inline)) {
    auto add = [&](typename Rows::Raw x, const Real* at) __attribute__((always_inline)) {
      sum += Rows::template vector<0>(x) * load(at);
      if constexpr (V == 2) sum += Rows::template vector<1>(x) * load(at + L);
    };
    int64_t i = 0;
    for (; i + 4 <= loads.whole; i += 4) {
#pragma GCC unroll 4
      for (int u = 0; u < 4; u++) add(load_raw<Rows>(key + (i + u) * Rows::step * Rows::size), q + (i + u) * V * L);
    }
    for (; i < loads.whole; i++) add(load_raw<Rows>(key + i * Rows::step * Rows::size), q + i * V * L);
    if (i < loads.count) add(load_raw<Rows>(key + loads.offset(i)) & loads.fresh, q + i * V * L);
    keep(sum);
  };
  (one(tile.c[J], k + smaller<int64_t>(J, last) * stride), ...);
}

// s [R rows][s_stride] of `keys` keys, and of as many more as make up whole chains: these are of no meaning.
// further: null, or as many rows that will be wanted later.
template <class Rows, int R>
__attribute__((noinline)) void score_rows(const char* k, int64_t stride, int64_t keys, const char* further,
                                          const RowLoads<Rows>& loads, const typename Rows::Real* q,
                                          typename Rows::Real* s, int64_t s_stride) {
  using Real = typename Rows::Real;
  constexpr int N = row_chains<Real>, KB = N / R, L = VL<Real>, V = Rows::vectors;
  constexpr std::make_integer_sequence<int, N> all;
  constexpr std::make_integer_sequence<int, KB> some;
  constexpr std::make_integer_sequence<int, R> each_row;
  constexpr std::make_integer_sequence<int, N / L> sums;
  const Fetch fetch = loads.fetch(stride);
  for (int64_t j = 0; j < keys; j += KB) {
    Tile<Real, N, 1> tile{};
    if constexpr (R == 1) {
      if (further)
        for (int i = 0; i < KB; i++) fetch.later(further + (j + i) * stride);
      dot_keys<Rows>(tile, k + j * stride, stride, keys - 1 - j, loads, q, all);
      store_sums<Real>(tile, s + j, sums);
    } else {
      const char* key[KB];
      for (int i = 0; i < KB; i++) key[i] = k + smaller(j + i, keys - 1) * stride;
      if (Fetch::by_loads || further)
        for (int i = 0; i < KB; i++) fetch(key[i], further + (j + i) * stride);
      const typename Rows::Raw old = ~(loads.fresh ^ loads.fresh);
      for (int64_t i = 0; i < loads.whole; i++)
        dot_step<Rows, R, KB>(tile, key, i * Rows::step * Rows::size, old, q + i * R * V * L, each_row, some);
      if (loads.whole < loads.count)
        dot_step<Rows, R, KB>(tile, key, loads.offset(loads.whole), loads.fresh, q + loads.whole * R * V * L, each_row,
                              some);
      Real lanes[N];
      store_sums<Real>(tile, lanes, sums);
      for (int r = 0; r < R; r++) memcpy(s + r * s_stride + j, lanes + r * KB, KB * sizeof(Real));
    }
  }
}

// out [R][out_stride] += weights of `C` loads of columns, `offset` bytes from where the rows begin. seen: null, or the
// scores of one row, of which -inf masks: such a key adds nothing, not 0 * NaN.
template <class Rows, int R, int C, int... I, int... J>
FASTATTN_INLINE void add_value_columns(const RowRuns& rows, int64_t offset, int64_t keys, const typename Rows::Real* w,
                                       int64_t w_stride, const typename Rows::Real* seen, Fetch fetch,
                                       typename Rows::Real* out, int64_t out_stride,
                                       std::integer_sequence<int, I...> all, std::integer_sequence<int, J...>) {
  using Real = typename Rows::Real;
  constexpr int V = Rows::vectors, N = sizeof...(I), columns = C * V, L = VL<Real>;
  Tile<Real, N, 1> tile{};
  const char *const *run = rows.first, *const *next = rows.ahead;
  for (int64_t j = 0, end = rows.head; j < keys; end = smaller(end + rows.each, keys), run++) {
    const char *v = *run + offset, *further = next ? *next++ + offset : v + fetch.ahead;
    for (; j < end; j++, v += rows.stride, further += rows.stride) {
      if (fetch.bytes) fetch(v, further);
      if (R == 1 && seen && seen[j] == (Real)-__builtin_inf()) continue;
      const typename Rows::Raw x[C] = {load_raw<Rows>(v + J * Rows::step * Rows::size)...};
      ((tile.c[I] += Rows::template vector<I % V>(x[I % columns / V]) * splat(w[I / columns * w_stride + j])), ...);
      pin<Real, N, 1>(tile, all);
    }
  }
  Real* to[R];
  for (int r = 0; r < R; r++) to[r] = out + r * out_stride;
  ((store(to[I / columns] + I % columns * L, load(to[I / columns] + I % columns * L) + tile.c[I])), ...);
}
template <class Rows, int R, int C>
__attribute__((noinline)) void add_values_of(const RowRuns& rows, int64_t offset, int64_t keys,
                                             const typename Rows::Real* w, int64_t w_stride,
                                             const typename Rows::Real* seen, Fetch fetch, typename Rows::Real* out,
                                             int64_t out_stride) {
  add_value_columns<Rows, R, C>(rows, offset, keys, w, w_stride, seen, fetch, out, out_stride,
                                std::make_integer_sequence<int, R * C * Rows::vectors>{},
                                std::make_integer_sequence<int, C>{});
}

// Loads that a pass over the keys of a block keeps in registers.
template <class Rows, int R>
constexpr int value_loads =
    R * Rows::vectors < row_chains<typename Rows::Real> ? row_chains<typename Rows::Real> / (R * Rows::vectors) : 1;

// out [R][out_stride] += w v over a block of keys: in passes, the first of which touches the rows.
template <class Rows, int R, int C = value_loads<Rows, R>>
FASTATTN_INLINE int64_t add_values(const RowRuns& rows, int64_t keys, const RowLoads<Rows>& loads,
                                   const typename Rows::Real* w, int64_t w_stride, const typename Rows::Real* seen,
                                   bool cold, typename Rows::Real* out, int64_t out_stride, int64_t done = 0) {
  constexpr int L = VL<typename Rows::Real>, V = Rows::vectors;
  // One row, or by loads: whole rows in the first pass. Else each pass its columns of the block that follows.
  constexpr bool whole_rows = R == 1 || Fetch::by_loads;
  auto fetch = [&](int64_t columns) __attribute__((always_inline)) {
    const bool in_order = columns == loads.count && rows.stride == loads.row_bytes() && !rows.ahead;
    if (!cold || (whole_rows && (done || in_order))) return Fetch{0, 0};
    return whole_rows ? loads.fetch(rows.stride) : Fetch{columns * Rows::step * Rows::size, keys * rows.stride};
  };
  for (; done + C <= loads.whole; done += C)
    add_values_of<Rows, R, C>(rows, done * Rows::step * Rows::size, keys, w, w_stride, seen, fetch(C),
                              out + done * V * L, out_stride);
  if constexpr (C > 1)
    return add_values<Rows, R, C / 2>(rows, keys, loads, w, w_stride, seen, cold, out, out_stride, done);
  if (done < loads.count)
    add_values_of<Rows, R, 1>(rows, loads.offset(done), keys, w, w_stride, seen, fetch(1), out + done * V * L,
                              out_stride);
  return loads.count;
}

}  // namespace fastattn::FASTATTN_ISA
