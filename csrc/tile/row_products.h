// Products of a few query rows with the rows of a cache, read as they lie, columns in the lanes:
//
//   score_rows   s[row][key] = q[row] . k[key]           key after key, each a chain of multiply-adds over the columns
//   add_values   out[row] += sum of w[row][key] v[key]   columns stay in registers for the keys of a block
//
// Whatever reads rows in pieces loads all their lines first, by one instruction and in the order of their addresses: that
// is what makes hardware fetch ahead. Each sum has one order, however many rows are computed at once.
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

// Rows of so many bytes, `stride` apart, that are about to be read in pieces.
struct ColdRows {
  int64_t bytes, stride;  // 0 bytes: there are none

  // Loads each half line of `rows` rows, in loops that are not unrolled: what hardware foresees is what one instruction
  // loads next. It fetches no further than it is led by such loads, and prefetch instructions mislead it.
  __attribute__((always_inline)) inline void touch(const char* row, int64_t rows) const {
    const int64_t each = stride == bytes ? bytes * rows : bytes;
    if (stride == bytes) rows = 1;
#pragma GCC unroll 1
    for (int64_t r = 0; r < rows; r++, row += stride)
#pragma GCC unroll 1
      for (int64_t i = 0; i < each; i += 32) (void)*(const volatile char*)(row + i);
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

// Adds one load of each of the tile's keys, which lie `apart` from the first, times that of each of its rows; q:
// [rows][vectors][VL].
template <class Rows, int R, int KB, int... I, int... J>
FASTATTN_INLINE void dot_step(Tile<typename Rows::Real, R * KB, 1>& tile, const char* key, const int64_t* apart,
                              typename Rows::Raw fresh, const typename Rows::Real* q, std::integer_sequence<int, I...>,
                              std::integer_sequence<int, J...>) {
  using Real = typename Rows::Real;
  constexpr int L = VL<Real>, V = Rows::vectors;
  typename Rows::Raw x[KB] = {(load_raw<Rows>(key + apart[J]) & fresh)...};
  (keep(x[J]), ...);  // loaded once, as `one`
  auto row = [&](int r, auto v) __attribute__((always_inline)) {
    Vec<Real> one = load(q + (r * V + v) * L);
    keep(one);  // and not by each multiply-add
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

// One key after the other, as their addresses go: `keep` holds the compiler off from mixing them. In a loop over the keys
// where that pays (see `ColdRows::touch`): 512 bits of float32 and float16, not the twice as many steps of others.
template <class Rows, int... J>
FASTATTN_INLINE void dot_keys(Tile<typename Rows::Real, (int)sizeof...(J), 1>& tile, const char* k, int64_t stride,
                              int64_t last, const RowLoads<Rows>& loads, const typename Rows::Real* q,
                              std::integer_sequence<int, J...>) {
  using Real = typename Rows::Real;
  constexpr int L = VL<Real>, V = Rows::vectors;
  auto one = [&](int64_t j) __attribute__((always_inline)) {
    const char* key = k + smaller(j, last) * stride;
    Vec<Real> sum{};
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
    return sum;
  };
  if constexpr (FASTATTN_WIDTH == 64 && V == 1) {
    Real sums[sizeof...(J) * L];
    for (int64_t j = 0; j < (int64_t)sizeof...(J); j++) store(sums + j * L, one(j));
    ((tile.c[J] = load(sums + J * L)), ...);
  } else {
    ((tile.c[J] = one(J)), ...);
  }
}

// s [R rows][s_stride] of `keys` keys, and of as many more as make up whole chains: these are of no meaning.
// cold: nobody has read the keys; one row alone does not ask.
template <class Rows, int R>
__attribute__((noinline)) void score_rows(const char* k, int64_t stride, int64_t keys, bool cold,
                                          const RowLoads<Rows>& loads, const typename Rows::Real* q,
                                          typename Rows::Real* s, int64_t s_stride) {
  using Real = typename Rows::Real;
  constexpr int N = row_chains<Real>, KB = N / R, L = VL<Real>, V = Rows::vectors;
  constexpr std::make_integer_sequence<int, N> all;
  constexpr std::make_integer_sequence<int, KB> some;
  constexpr std::make_integer_sequence<int, R> each_row;
  constexpr std::make_integer_sequence<int, N / L> sums;
  const ColdRows rows{loads.row_bytes(), stride};
  int64_t apart[KB];
  for (int i = 0; i < KB; i++) apart[i] = smaller<int64_t>(i, keys - 1) * stride;
  for (int64_t j = 0; j < keys; j += KB) {
    Tile<Real, N, 1> tile{};
    if constexpr (R == 1) {
      dot_keys<Rows>(tile, k + j * stride, stride, keys - 1 - j, loads, q, all);
      store_sums<Real>(tile, s + j, sums);
    } else {
      const int64_t first = smaller(j, larger<int64_t>(keys - KB, 0));  // some keys once more rather than less than KB
      const char* key = k + first * stride;
      if (cold) rows.touch(key, smaller<int64_t>(KB, keys));
      const typename Rows::Raw old = ~(loads.fresh ^ loads.fresh);
      for (int64_t i = 0; i < loads.whole; i++)
        dot_step<Rows, R, KB>(tile, key + i * Rows::step * Rows::size, apart, old, q + i * R * V * L, each_row, some);
      if (loads.whole < loads.count)
        dot_step<Rows, R, KB>(tile, key + loads.offset(loads.whole), apart, loads.fresh, q + loads.whole * R * V * L,
                              each_row, some);
      Real lanes[N];
      store_sums<Real>(tile, lanes, sums);
      for (int r = 0; r < R; r++) memcpy(s + r * s_stride + first, lanes + r * KB, KB * sizeof(Real));
    }
  }
}

// out [R][out_stride] += weights of `C` loads of columns, from v on. seen: null, or the scores of one row, of which -inf
// masks: such a key adds nothing, not 0 * NaN.
template <class Rows, int R, int C, int... I, int... J>
FASTATTN_INLINE void add_value_columns(const char* v, int64_t stride, int64_t keys, const typename Rows::Real* w,
                                       int64_t w_stride, const typename Rows::Real* seen, ColdRows cold,
                                       typename Rows::Real* out, int64_t out_stride,
                                       std::integer_sequence<int, I...> all, std::integer_sequence<int, J...>) {
  using Real = typename Rows::Real;
  constexpr int V = Rows::vectors, N = sizeof...(I), columns = C * V, L = VL<Real>;
  Tile<Real, N, 1> tile{};
  for (int64_t j = 0; j < keys; j++, v += stride) {
    if (cold.bytes) cold.touch(v, 1);
    if (R == 1 && seen && seen[j] == (Real)-__builtin_inf()) continue;
    const typename Rows::Raw x[C] = {load_raw<Rows>(v + J * Rows::step * Rows::size)...};
    ((tile.c[I] += Rows::template vector<I % V>(x[I % columns / V]) * splat(w[I / columns * w_stride + j])), ...);
    pin<Real, N, 1>(tile, all);
  }
  Real* to[R];
  for (int r = 0; r < R; r++) to[r] = out + r * out_stride;
  ((store(to[I / columns] + I % columns * L, load(to[I / columns] + I % columns * L) + tile.c[I])), ...);
}
template <class Rows, int R, int C>
__attribute__((noinline)) void add_values_of(const char* v, int64_t stride, int64_t keys, const typename Rows::Real* w,
                                             int64_t w_stride, const typename Rows::Real* seen, ColdRows cold,
                                             typename Rows::Real* out, int64_t out_stride) {
  add_value_columns<Rows, R, C>(v, stride, keys, w, w_stride, seen, cold, out, out_stride,
                                std::make_integer_sequence<int, R * C * Rows::vectors>{},
                                std::make_integer_sequence<int, C>{});
}

// Loads that a pass over the keys of a block keeps in registers.
template <class Rows, int R>
constexpr int value_loads =
    R * Rows::vectors < row_chains<typename Rows::Real> ? row_chains<typename Rows::Real> / (R * Rows::vectors) : 1;

// out [R][out_stride] += w v over a block of keys: in passes, the first of which touches the rows.
template <class Rows, int R, int C = value_loads<Rows, R>>
FASTATTN_INLINE int64_t add_values(const char* v, int64_t stride, int64_t keys, const RowLoads<Rows>& loads,
                                   const typename Rows::Real* w, int64_t w_stride, const typename Rows::Real* seen,
                                   bool cold, typename Rows::Real* out, int64_t out_stride, int64_t done = 0) {
  constexpr int L = VL<typename Rows::Real>, V = Rows::vectors;
  // The first pass touches whole rows, unless it reads all of them itself, in their order.
  auto touched = [&](int64_t columns) __attribute__((always_inline)) {
    const bool in_order = columns == loads.count && stride == loads.row_bytes();
    return ColdRows{cold && !done && !in_order ? loads.row_bytes() : 0, stride};
  };
  for (; done + C <= loads.whole; done += C)
    add_values_of<Rows, R, C>(v + done * Rows::step * Rows::size, stride, keys, w, w_stride, seen, touched(C),
                              out + done * V * L, out_stride);
  if constexpr (C > 1)
    return add_values<Rows, R, C / 2>(v, stride, keys, loads, w, w_stride, seen, cold, out, out_stride, done);
  if (done < loads.count)
    add_values_of<Rows, R, 1>(v + loads.offset(done), stride, keys, w, w_stride, seen, touched(1), out + done * V * L,
                              out_stride);
  return loads.count;
}

}  // namespace fastattn::FASTATTN_ISA
