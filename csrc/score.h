// Score modifications and masks on a tile of scores^T [keys][NR], in their order: softcap, bias (ALiBi, dense), mask.
// A masked score is selected to -inf, never multiplied, so that NaN behind a mask stays there.
#pragma once
#include "block_range.h"
#include "softmax.h"

namespace fastattn::FASTATTN_ISA {

// The query rows that stand in the lanes of one panel. Lanes past `rows` hold zeros and are never stored.
struct Lanes {
  int64_t batch, head, row, rows;  // stacked rows row ... row + rows - 1 from `head`
  Range visited;                   // keys that some lane sees
  Range common;                    // keys that every lane sees
};

// slope: null, or [keys][NR] for the derivative.
template <class Real, int NV>
void softcap_scores(Real* scores, int64_t keys, Real softcap, Real* slope) {
  constexpr int L = VL<Real>, NR = NV * L;
  const Real factor = softcap * (Real)log2e;  // the scores come divided by softcap, not in log2 units
  for (int64_t i = 0; i < keys * NR; i += L) {
    const Vec<Real> t = tanh(load(scores + i));
    store(scores + i, t * factor);
    if (slope) store(slope + i, 1 - t * t);
  }
}

// scores[j][lane] -= slopes[lane] * |position[lane] - key - j|
template <class Real, int NV>
void add_alibi(Real* scores, int64_t keys, const Real* slopes, const Real* positions, int64_t key) {
  constexpr int L = VL<Real>, NR = NV * L;
  for (int v = 0; v < NV; v++) {
    Vec<Real> slope = load(slopes + v * L), position = load(positions + v * L);
    for (int64_t j = 0; j < keys; j++) {
      Real* s = scores + j * NR + v * L;
      store(s, load(s) - slope * vabs(position - (Real)(key + j)));
    }
  }
}

// A bias in log2 units. A finite one stays finite: finfo.min pushes a key away, only -inf masks it; +inf stays too.
template <class Real>
FASTATTN_INLINE Vec<Real> bias_log2(Vec<Real> bias) {
  const Vec<Real> limit = splat((Real)(sizeof(Real) == 8 ? 8e307 : 1.5e38));
  const Vec<Real> b = vmax(-limit, bias * (Real)log2e);
  return b > limit && bias < (Real)__builtin_inf() ? limit : b;
}

// scores[j][lane] += bias[j] (natural log), -inf selects; whether anything is masked.
template <class Real, int NV>
bool add_key_bias(Real* scores, int64_t keys, const Real* bias) {
  constexpr int L = VL<Real>, NR = NV * L;
  const Real lowest = (Real)-__builtin_inf();
  bool masked = false;
  for (int64_t j = 0; j < keys; j++) {
    const bool gone = bias[j] == lowest;
    masked |= gone;
    const Vec<Real> b = bias_log2<Real>(splat(bias[j]));
    for (int v = 0; v < NV; v++) {
      Real* s = scores + j * NR + v * L;
      store(s, gone ? splat(lowest) : load(s) + b);
    }
  }
  return masked;
}

// The same with a bias for each score, [keys][NR].
template <class Real, int NV>
bool add_bias(Real* scores, int64_t keys, const Real* bias) {
  constexpr int L = VL<Real>, NR = NV * L;
  const Vec<Real> lowest = splat((Real)-__builtin_inf());
  auto masked = lowest > lowest;
  for (int64_t i = 0; i < keys * NR; i += L) {
    Vec<Real> b = load(bias + i);
    auto gone = b == lowest;
    masked |= gone;
    store(scores + i, gone ? lowest : load(scores + i) + bias_log2<Real>(b));
  }
  return any<Real>(masked);
}

// Fetches what load_bias will want of the next tile: rows lie too far apart for the hardware to foresee.
FASTATTN_INLINE void prefetch_next(const char* row, const Tensor& t, int64_t keys) {
  const int64_t bytes = keys * bytes_of(t.dtype);
  if (t.stride[3] == 1)
    for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(row + bytes + i, 0, 2);
}

// The bias and mask of the lanes for `keys` keys from `key`, transposed to [keys][NR]; -inf where the mask is False.
template <class Real>
void load_bias(const Problem& p, const Lanes& lanes, int64_t key, int64_t keys, int NR, Real* rows, Real* bias) {
  const Real lowest = (Real)-__builtin_inf();
  const Tensor& first = p.bias ? p.bias : p.mask;
  Real* mask_row = rows + (int64_t)NR * keys;
  const Row q = stacked_row(p, lanes.head, lanes.row);
  const bool whole = lanes.rows == NR && q.query + NR <= p.seqlen_q;  // rows of one head, a lane each
  if (whole && !(p.bias && p.mask) && first.dtype == dtype_of<Real> && first.stride[3] == 1) {
    const char* source = at(first, lanes.batch, q.head, q.query, key);
    for (int64_t r = 0; r < NR; r++) prefetch_next(at(first, lanes.batch, q.head, q.query + r, key), first, keys);
    return transpose((const Real*)source, first.stride[2], (int64_t)NR, keys, bias, (int64_t)NR);
  }
  for (int64_t r = 0; r < NR; r++) {
    Real* row = rows + r * keys;
    if (r >= lanes.rows) {
      for (int64_t j = 0; j < keys; j++) row[j] = 0;
      continue;
    }
    const Row s = stacked_row(p, lanes.head, lanes.row + r);
    const char* source = at(first, lanes.batch, s.head, s.query, key);
    prefetch_next(source, first, keys);
    load_row(source, first.dtype, first.stride[3], keys, row);
    if (p.bias && p.mask) {
      load_row(at(p.mask, lanes.batch, s.head, s.query, key), p.mask.dtype, p.mask.stride[3], keys, mask_row);
      for (int64_t j = 0; j < keys; j++) row[j] = mask_row[j] == lowest ? lowest : row[j];
    }
  }
  transpose(rows, keys, (int64_t)NR, keys, bias, (int64_t)NR);
}

// Masks keys outside the lanes' intervals; first[lane] <= j < last[lane] is seen, j counted from the tile's first key.
// Every lane sees the keys common_lo ... common_hi - 1.
template <class Real, int NV>
void mask_intervals(Real* scores, int64_t keys, const Real* first, const Real* last, int64_t common_lo,
                    int64_t common_hi) {
  constexpr int L = VL<Real>, NR = NV * L;
  const Vec<Real> lowest = splat((Real)-__builtin_inf());
  for (int64_t j = 0; j < keys; j++) {
    if (j == common_lo && common_hi > common_lo) j = common_hi;
    if (j >= keys) break;
    for (int v = 0; v < NV; v++) {
      Real* s = scores + j * NR + v * L;
      Vec<Real> x = load(first + v * L) > (Real)j ? lowest : load(s);
      store(s, load(last + v * L) > (Real)j ? x : lowest);
    }
  }
}

// Bits from ... from + count - 1 of a row of `bytes` bytes, count <= 32.
FASTATTN_INLINE uint32_t bits_of(const uint8_t* row, int64_t bytes, int64_t from) {
  uint64_t word = 0;
  const int64_t byte = from / 8;
  if (byte + 8 <= bytes)
    memcpy(&word, row + byte, 8);
  else
    for (int64_t i = byte; i < bytes; i++) word |= (uint64_t)row[i] << (i - byte) * 8;
  return (uint32_t)(word >> from % 8);
}

// The first to the last of `count` bits from `from` that are 1 in one of `rows` rows of row_bits bits; {0, 0} if none is.
FASTATTN_INLINE Range set_bits(const uint8_t* bits, int64_t row_bits, int64_t from, int64_t count, int64_t rows) {
  Range set{0, 0};
  for (int64_t j = 0; j < count; j += 32) {
    uint32_t word = 0;
    for (int64_t r = 0; r < rows; r++) word |= bits_of(bits + r * row_bits / 8, row_bits / 8, from + j);
    if (count - j < 32) word &= ((uint32_t)1 << (count - j)) - 1;
    if (!word) continue;
    if (!set.hi) set.lo = j + __builtin_ctz(word);
    set.hi = j + 32 - __builtin_clz(word);
  }
  return set;
}

// Masks the pairs whose bit is 0. bits: those of the panel's first row, in rows of row_bits; the keys start at bit `from`.
template <class Real, int NV>
void mask_bits(Real* scores, int64_t keys, const uint8_t* bits, int64_t row_bits, int64_t from, int64_t rows) {
  typedef typename VecOf<Real>::word Word;
  constexpr int L = VL<Real>, NR = NV * L;
  const Vec<Real> lowest = splat((Real)-__builtin_inf());
  Word words[NR] = {};
  for (int64_t j = 0; j < keys; j++) {
    if (j % 32 == 0)
      for (int64_t r = 0; r < rows; r++) words[r] = bits_of(bits + r * row_bits / 8, row_bits / 8, from + j);
    for (int v = 0; v < NV; v++) {
      Real* s = scores + j * NR + v * L;
      const auto seen = (load_words<Real>(words + v * L) >> (Word)(j % 32) & (Word)1) != 0;
      store(s, seen ? load(s) : lowest);
    }
  }
}

}  // namespace fastattn::FASTATTN_ISA
