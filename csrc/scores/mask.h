// The bool mask of each pair, 32 keys of a row at a time: a lane's word, a bit for each key.
#pragma once
#include "intervals.h"

namespace fastattn::FASTATTN_ISA {

// Masks the keys of each lane whose bits are 0; whether there are any. word(r, j, count): bits of the `count` keys from
// j on of lane r; those behind them may be anything.
template <class Real, int NV, class Word>
bool mask_by_words(Real* scores, int64_t keys, int64_t rows, const Word& word) {
  typedef typename VecOf<Real>::bits Bits;
  constexpr int L = VL<Real>, NR = NV * L, top = 8 * sizeof(Real) - 1;
  const Vec<Real> lowest = splat((Real)-__builtin_inf());
  bool masked = false;
  for (int64_t j = 0; j < keys; j += 32) {
    const int64_t count = smaller<int64_t>(32, keys - j);
    typename VecOf<Real>::word words[NR] = {};
    uint32_t common = ~(uint32_t)0;
    for (int64_t r = 0; r < rows; r++) {
      const uint32_t w = word(r, j, count);
      words[r] = w, common &= w;
    }
    if (!(~common << (32 - count))) continue;  // every row sees all of them
    masked = true;
    for (int v = 0; v < NV; v++) {
      const auto lanes = load_words<Real>(words + v * L);
      for (int64_t i = 0; i < count; i++) {  // the key's bit as the sign, which is what a blend asks for
        Real* s = scores + (j + i) * NR + v * L;
        store(s, (Bits)(lanes << (int)(top - i)) < 0 ? load(s) : lowest);
      }
    }
  }
  return masked;
}

// Bit j: whether bool j of a row is True; those of 32 keys, of which `count` are there. before: how many lie before.
FASTATTN_INLINE uint32_t true_bits(const uint8_t* row, int64_t stride, int64_t count, [[maybe_unused]] int64_t before) {
#if defined(__AVX2__)
  if (stride == 1 && before + count >= 32) {
    const __m256i bools = _mm256_loadu_si256((const __m256i*)(row + count - 32));
    return ~(uint32_t)_mm256_movemask_epi8(_mm256_cmpeq_epi8(bools, _mm256_setzero_si256())) >> (32 - count);
  }
#endif
  uint32_t word = 0;
  for (int64_t j = 0; j < count; j++) word |= (uint32_t)(row[j * stride] != 0) << j;
  return word;
}

// Masks what the mask of the lanes does not let see of `keys` keys from `key`; whether that is anything.
template <class Real, int NV>
bool mask_rows(const Operands& p, const Lanes& lanes, int64_t key, int64_t keys, Real* scores) {
  const uint8_t* rows[NV * VL<Real>];
  for (int64_t r = 0; r < lanes.rows; r++) {
    const QueryRow s = stacked_row(p, lanes.head, lanes.row + r);
    rows[r] = (const uint8_t*)at(p.mask, lanes.batch, s.head, s.query, key);
  }
  const int64_t stride = p.mask.stride[3];
  return mask_by_words<Real, NV>(scores, keys, lanes.rows, [&](int64_t r, int64_t j, int64_t count) {
    return true_bits(rows[r] + j * stride, stride, count, j);
  });
}

}  // namespace fastattn::FASTATTN_ISA
