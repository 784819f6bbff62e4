// Rows to lanes and back.
#pragma once
#include "tile/simd.h"

namespace fastattn::FASTATTN_ISA {

// What a transposition makes of the elements x that stand in source column c, one by one or eight beside each other.
struct Unchanged {
  template <class X>
  X of(X x, int64_t) const {
    return x;
  }
};
// Multiplied by one number, or by one of each source column.
template <class Real>
struct Times {
  Real factor;
  template <class X>
  X of(X x, int64_t) const {
    return x * factor;
  }
};
template <class Real>
struct TimesEach {
  const Real* factors;
  template <class X>
  X of(X x, int64_t c) const {
    X y;
    memcpy(&y, factors + c, sizeof y);
    return x * y;
  }
};

#if defined(__AVX2__)
// dst[c][r] = src[r][c] for an 8 x 8 block of float that starts at source column c.
template <class Change>
FASTATTN_INLINE void transpose_8x8(const float* src, int64_t src_row, float* dst, int64_t dst_row, int64_t c,
                                   const Change& change) {
  __m256 r[8], s[8];
#pragma GCC unroll 8
  for (int i = 0; i < 8; i++) r[i] = change.of(_mm256_loadu_ps(src + i * src_row), c);
#pragma GCC unroll 4
  for (int i = 0; i < 8; i += 2) {
    s[i] = _mm256_unpacklo_ps(r[i], r[i + 1]);
    s[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
  }
#pragma GCC unroll 2
  for (int i = 0; i < 8; i += 4) {
    r[i] = _mm256_shuffle_ps(s[i], s[i + 2], 0x44);
    r[i + 1] = _mm256_shuffle_ps(s[i], s[i + 2], 0xee);
    r[i + 2] = _mm256_shuffle_ps(s[i + 1], s[i + 3], 0x44);
    r[i + 3] = _mm256_shuffle_ps(s[i + 1], s[i + 3], 0xee);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) {
    _mm256_storeu_ps(dst + i * dst_row, _mm256_permute2f128_ps(r[i], r[i + 4], 0x20));
    _mm256_storeu_ps(dst + (i + 4) * dst_row, _mm256_permute2f128_ps(r[i], r[i + 4], 0x31));
  }
}
#endif

// dst[c][r] = src[r][c], changed, for r < rows, c < columns.
template <class Real, class Change = Unchanged>
void transpose(const Real* src, int64_t src_row, int64_t rows, int64_t columns, Real* dst, int64_t dst_row,
               const Change& change = {}) {
  int64_t c0 = 0;
#if defined(__AVX2__)
  if constexpr (sizeof(Real) == 4) {
    int64_t r8 = rows / 8 * 8;
    c0 = columns / 8 * 8;
    for (int64_t r = 0; r < r8; r += 8)
      for (int64_t c = 0; c < c0; c += 8)
        transpose_8x8(src + r * src_row + c, src_row, dst + c * dst_row + r, dst_row, c, change);
    for (int64_t r = r8; r < rows; r++)
      for (int64_t c = 0; c < c0; c++) dst[c * dst_row + r] = change.of(src[r * src_row + c], c);
  }
#endif
  for (int64_t r = 0; r < rows; r++)
    for (int64_t c = c0; c < columns; c++) dst[c * dst_row + r] = change.of(src[r * src_row + c], c);
}

}  // namespace fastattn::FASTATTN_ISA
