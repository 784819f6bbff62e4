// Between rows in memory, of any dtype and step, and rows of Real.
#pragma once
#include "operands.h"
#include "tile/simd.h"

namespace fastattn::FASTATTN_ISA {

template <class Real>
constexpr DType dtype_of = sizeof(Real) == 8 ? DType::float64 : DType::float32;

FASTATTN_INLINE float to_float(uint16_t bits, DType dtype) {
  if (dtype == DType::bfloat16) {
    uint32_t wide = (uint32_t)bits << 16;
    float x;
    memcpy(&x, &wide, 4);
    return x;
  }
#if defined(__F16C__)
  return _cvtsh_ss(bits);
#elif defined(__aarch64__)
  __fp16 half;
  memcpy(&half, &bits, 2);
  return (float)half;
#else
  uint32_t sign = (uint32_t)(bits & 0x8000) << 16, exponent = bits >> 10 & 31, fraction = bits & 1023, wide;
  if (exponent == 31)
    wide = sign | 0x7f800000 | fraction << 13;
  else if (exponent)
    wide = sign | (exponent + 112) << 23 | fraction << 13;
  else {
    float subnormal = (float)fraction * 5.9604644775390625e-8f;  // 2^-24
    memcpy(&wide, &subnormal, 4);
    wide |= sign;
  }
  float x;
  memcpy(&x, &wide, 4);
  return x;
#endif
}

// Round to nearest even; NaN stays NaN.
FASTATTN_INLINE uint16_t to_bfloat16(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  return x != x ? (uint16_t)(bits >> 16 | 64) : (uint16_t)rounded;
}
FASTATTN_INLINE uint16_t to_float16(float x) {
#if defined(__F16C__)
  return (uint16_t)_cvtss_sh(x, 0);
#elif defined(__aarch64__)
  const __fp16 half = (__fp16)x;
  uint16_t bits;
  memcpy(&bits, &half, 2);
  return bits;
#else
  uint32_t bits;
  memcpy(&bits, &x, 4);
  uint32_t sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
  if (magnitude > 0x7f800000) return (uint16_t)(sign | 0x7e00);
  if (magnitude >= 0x477ff000) return (uint16_t)(sign | 0x7c00);
  if (magnitude < 0x38800000) {  // subnormal: adding 0.5 shifts the fraction into place, rounded by the adder
    float a;
    memcpy(&a, &magnitude, 4);
    a += 0.5f;
    memcpy(&magnitude, &a, 4);
    return (uint16_t)(sign | (magnitude - 0x3f000000));
  }
  magnitude += 0xc8000fff + (magnitude >> 13 & 1);
  return (uint16_t)(sign | magnitude >> 13);
#endif
}

// The same of a vector.
FASTATTN_INLINE void store_bfloat16(Vec<float> x, uint16_t* to) {
  typedef typename VecOf<float>::words Words;
  const Words bits = (Words)x;
  const Words rounded = x == x ? (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16 : bits >> 16 | 64u;
#if defined(FASTATTN_AVX2)  // what GCC 12 takes apart one by one
  const __m256i halves = _mm256_packus_epi32((__m256i)rounded, (__m256i)rounded);
  _mm_storeu_si128((__m128i*)to, _mm256_castsi256_si128(_mm256_permute4x64_epi64(halves, 0x08)));
#else
  typedef uint16_t Narrow __attribute__((vector_size(VL<float> * 2)));
  const Narrow narrow = __builtin_convertvector(rounded, Narrow);
  memcpy(to, &narrow, sizeof narrow);
#endif
}

// The next VL elements of a row of 16-bit floats or bools, as floats.
template <class Narrow>
FASTATTN_INLINE VecOf<float>::bits widen(const Narrow* x) {
  // __builtin_convertvector below says it all, but GCC 12 takes bytes apart one by one.
#if defined(__AVX512F__)
  if constexpr (sizeof(Narrow) == 1)
    return (VecOf<float>::bits)_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)x));
#elif defined(FASTATTN_AVX2)
  if constexpr (sizeof(Narrow) == 1)
    return (VecOf<float>::bits)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)x));
#endif
  typedef Narrow Vector __attribute__((vector_size(VL<float> * sizeof(Narrow))));
  Vector v;
  memcpy(&v, x, sizeof v);
  return __builtin_convertvector(v, VecOf<float>::bits);
}
FASTATTN_INLINE Vec<float> load_vector(const uint16_t* x, DType dtype) {
  if (dtype == DType::bfloat16) return (Vec<float>)(widen(x) << 16);
#if defined(__AVX512F__)
  return (Vec<float>)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)x));
#elif defined(FASTATTN_AVX2)
  return (Vec<float>)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)x));
#else
  Vec<float> v;
  for (int i = 0; i < VL<float>; i++) v[i] = to_float(x[i], dtype);
  return v;
#endif
}
FASTATTN_INLINE Vec<float> load_vector(const uint8_t* x, DType) {
  return widen(x) != 0 ? Vec<float>{} : splat(-__builtin_inff());
}
FASTATTN_INLINE float load_element(const uint16_t* x, DType dtype) { return to_float(*x, dtype); }
FASTATTN_INLINE float load_element(const uint8_t* x, DType) { return *x ? 0.0f : -__builtin_inff(); }

template <class Real, class Narrow>
FASTATTN_INLINE void load_narrow_row(const Narrow* x, DType dtype, int64_t stride, int64_t n, Real* row) {
  int64_t i = 0;
  if constexpr (sizeof(Real) == 4)
    if (stride == 1)
      for (; i + VL<float> <= n; i += VL<float>) store(row + i, load_vector(x + i, dtype));
  for (; i < n; i++) row[i] = (Real)load_element(x + i * stride, dtype);
}

// n elements of a strided row as Real. A bool becomes 0 (attend) or -inf.
template <class Real>
void load_row(const char* source, DType dtype, int64_t stride, int64_t n, Real* row) {
  switch (dtype) {
    case DType::float32: {
      const float* x = (const float*)source;
      if (stride == 1)
        for (int64_t i = 0; i < n; i++) row[i] = (Real)x[i];
      else
        for (int64_t i = 0; i < n; i++) row[i] = (Real)x[i * stride];
      return;
    }
    case DType::float64:
      for (int64_t i = 0; i < n; i++) row[i] = (Real)((const double*)source)[i * stride];
      return;
    case DType::bfloat16: return load_narrow_row((const uint16_t*)source, DType::bfloat16, stride, n, row);
    case DType::float16: return load_narrow_row((const uint16_t*)source, DType::float16, stride, n, row);
    case DType::boolean: return load_narrow_row((const uint8_t*)source, DType::boolean, stride, n, row);
    case DType::int8:
      for (int64_t i = 0; i < n; i++) row[i] = (Real)((const int8_t*)source)[i * stride];
      return;
    case DType::uint8:
    case DType::int32:
    case DType::int64: return;
  }
}

template <class Real>
Real load_scalar(const char* source, DType dtype) {
  Real x;
  load_row(source, dtype, 1, 1, &x);
  return x;
}

// A row times `factor` into n elements of a tensor.
template <class Real>
void store_row(const Real* row, Real factor, int64_t n, char* target, DType dtype, int64_t stride) {
  switch (dtype) {
    case DType::float32: {
      float* x = (float*)target;
      if (stride == 1)
        for (int64_t i = 0; i < n; i++) x[i] = (float)(row[i] * factor);
      else
        for (int64_t i = 0; i < n; i++) x[i * stride] = (float)(row[i] * factor);
      return;
    }
    case DType::float64:
      for (int64_t i = 0; i < n; i++) ((double*)target)[i * stride] = (double)(row[i] * factor);
      return;
    case DType::bfloat16: {
      uint16_t* x = (uint16_t*)target;
      int64_t i = 0;
      if constexpr (sizeof(Real) == 4)
        for (; stride == 1 && i + VL<float> <= n; i += VL<float>) store_bfloat16(load(row + i) * factor, x + i);
      for (; i < n; i++) x[i * stride] = to_bfloat16((float)(row[i] * factor));
      return;
    }
    case DType::float16: {
      int64_t i = 0;
#if defined(__F16C__)
      if (stride == 1 && sizeof(Real) == 4)
        for (; i + 8 <= n; i += 8) {
          float wide[8];
          for (int j = 0; j < 8; j++) wide[j] = (float)(row[i + j] * factor);
          _mm_storeu_si128((__m128i*)((uint16_t*)target + i), _mm256_cvtps_ph(_mm256_loadu_ps(wide), 0));
        }
#endif
      for (; i < n; i++) ((uint16_t*)target)[i * stride] = to_float16((float)(row[i] * factor));
      return;
    }
    default: return;
  }
}

FASTATTN_INLINE int64_t bytes_of(DType dtype) { return bytes_of_dtype[(int)dtype]; }

}  // namespace fastattn::FASTATTN_ISA
