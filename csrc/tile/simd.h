// Vectors of one width for the whole translation unit, written once with the compiler's vector extension (GCC, Clang).
// FASTATTN_WIDTH (bytes) and the -m flags of the translation unit decide what it compiles to: see isa_*.cpp.
#pragma once
#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#include "glibc.h"

// The instructions of 256 bits, for vectors of as many: those of isa_emulated.cpp are wider than any register.
#if defined(__AVX2__) && FASTATTN_WIDTH == 32
#define FASTATTN_AVX2
#endif

#define FASTATTN_INLINE static inline __attribute__((always_inline))

namespace fastattn::FASTATTN_ISA {

template <class T>
FASTATTN_INLINE T smaller(T a, T b) {
  return a < b ? a : b;
}
template <class T>
FASTATTN_INLINE T larger(T a, T b) {
  return a < b ? b : a;
}
FASTATTN_INLINE int64_t round_up(int64_t x, int64_t step) { return (x + step - 1) / step * step; }

template <class Real>
struct VecOf;
template <>
struct VecOf<float> {
  typedef float type __attribute__((vector_size(FASTATTN_WIDTH)));
  typedef int32_t bits __attribute__((vector_size(FASTATTN_WIDTH)));
  typedef uint32_t word;
  typedef word words __attribute__((vector_size(FASTATTN_WIDTH)));
};
template <>
struct VecOf<double> {
  typedef double type __attribute__((vector_size(FASTATTN_WIDTH)));
  typedef int64_t bits __attribute__((vector_size(FASTATTN_WIDTH)));
  typedef uint64_t word;
  typedef word words __attribute__((vector_size(FASTATTN_WIDTH)));
};
template <class Real>
using Vec = typename VecOf<Real>::type;
template <class Real>
constexpr int VL = FASTATTN_WIDTH / sizeof(Real);  // lanes of a vector

template <class Real>
FASTATTN_INLINE Vec<Real> load(const Real* p) {
  Vec<Real> v;
  memcpy(&v, p, sizeof v);
  return v;
}
template <class Real>
FASTATTN_INLINE typename VecOf<Real>::words load_words(const typename VecOf<Real>::word* p) {
  typename VecOf<Real>::words v;
  memcpy(&v, p, sizeof v);
  return v;
}
template <class Real>
FASTATTN_INLINE void store(Real* p, Vec<Real> v) {
  memcpy(p, &v, sizeof v);
}
template <class Real>
FASTATTN_INLINE Vec<Real> splat(Real x) {
  return Vec<Real>{} + x;
}
// The second operand where either is NaN, as the x86 instructions do: vmax(bound, x) keeps a NaN x, vmax(x, m) drops it.
template <class V>
FASTATTN_INLINE V vmax(V a, V b) {
#if defined(__AVX512F__)
  if constexpr (sizeof(a[0]) == 4) return (V)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(FASTATTN_AVX2)
  if constexpr (sizeof(a[0]) == 4) return (V)_mm256_max_ps((__m256)a, (__m256)b);
#endif
  return a > b ? a : b;  // which GCC 12 turns into compare and blend where an operand is constant
}
template <class V>
FASTATTN_INLINE V vabs(V x) {
  return x < V{} ? -x : x;
}
template <class Real>
FASTATTN_INLINE bool any(typename VecOf<Real>::bits mask) {
  typename VecOf<Real>::bits zero{};
  return memcmp(&mask, &zero, sizeof mask) != 0;
}

// x * 0 is 0 for finite x, else NaN, which a sum keeps; n is a multiple of the vector length.
template <class Real>
bool all_finite(const Real* x, int64_t n) {
  constexpr int chains = 4;  // of additions, each of which waits for the one before
  Vec<Real> poison[chains]{}, zero{};
  for (int64_t i = 0; i < n; i += chains * VL<Real>)
    for (int c = 0; c < chains && i + c * VL<Real> < n; c++) poison[c] += load(x + i + c * VL<Real>) * zero;
  return !any<Real>(poison[0] + poison[1] + (poison[2] + poison[3]) != zero);
}

// Makes the compiler hold v in a vector register at this point; no instruction. What is narrower than a register stays
// as it is: Clang has none for it.
template <class V>
FASTATTN_INLINE void keep(V& v) {
#if !defined(FASTATTN_EMULATED)
  if constexpr (sizeof(V) >= 16) {
#if defined(__x86_64__)
    asm volatile("" : "+v"(v));
#elif defined(__aarch64__)
    asm volatile("" : "+w"(v));
#endif
  }
#endif
}

constexpr double ln2 = 0.693147180559945309417, log2e = 1.44269504088896340736;

// e^x for x <= 88 (709): 0 below exp_zero, exactly 1 at 0, NaN for NaN. float: 2 ulp near 0, degree 5; double: 1 ulp.
// x log2(e) is a product whose rounding grows with x alone: subtract what scores have in common first. Adding `magic`
// rounds it to an integer whose biased value stands in the low bits, ready to become an exponent.
#if defined(__AVX512DQ__)  // floor and exponent in one instruction each, which leaves the multiply-add pipes alone
FASTATTN_INLINE Vec<float> exp(Vec<float> x) {
  x *= (float)log2e;
  Vec<float> t = (Vec<float>)_mm512_reduce_ps((__m512)x, _MM_FROUND_TO_NEG_INF);  // x - floor(x), 0 at -inf
  Vec<float> p = t * 0.00186810154f + 0.00901452266f;
  p = p * t + 0.0558021889f;
  p = p * t + 0.240163609f;
  p = p * t + 0.693151414f;
  p = p * t + 1.0f;
  return (Vec<float>)_mm512_scalef_ps((__m512)p, (__m512)x);
}
#else
FASTATTN_INLINE Vec<float> exp(Vec<float> x) {
  constexpr float magic = 12582912.0f + 127.0f, to_log2 = (float)log2e;
  x = vmax(splat((float)(-127 * ln2)), x);
  Vec<float> n = x * to_log2 + magic;
  Vec<float> t = x * to_log2 - (n - magic);
  Vec<float> p = t * 0.00132647271f + 0.00967151264f;
  p = p * t + 0.0555073374f;
  p = p * t + 0.240222421f;
  p = p * t + 0.693146978f;
  p = p * t + 1.0f;
  return p * (Vec<float>)((VecOf<float>::bits)n << 23);
}
#endif
FASTATTN_INLINE Vec<double> exp(Vec<double> x) {
  constexpr double magic = 6755399441055744.0 + 1023.0;
  constexpr double ln2_high = 6.93147180369123816490e-01, ln2_low = 1.90821492927058770002e-10;
  constexpr int degree = 13;
  x = vmax(splat(-1023 * ln2), x);
  Vec<double> n = x * log2e + magic;
  Vec<double> t = x - (n - magic) * ln2_high - (n - magic) * ln2_low;
  Vec<double> p = splat(1.0);
  for (int k = degree; k >= 1; k--) p = p * t * (1.0 / k) + 1.0;
  return p * (Vec<double>)((VecOf<double>::bits)n << 52);
}

// exp(x) is 0 for every x below this. 512 bits: where the smallest subnormal has rounded to 0.
template <class Real>
constexpr Real exp_zero = (Real)((sizeof(Real) == 8      ? -1023
                                  : FASTATTN_WIDTH == 64 ? -151
                                                         : -127) *
                                 ln2);

// tanh: x + x^3 P(x^2) near 0 (Cephes), 1 - 2 / (e^2|x| + 1) beyond; float, 2 ulp.
FASTATTN_INLINE Vec<float> tanh(Vec<float> x) {
  Vec<float> a = vabs(x), z = x * x;
  Vec<float> p = z * -5.70498872745e-3f + 2.06390887954e-2f;
  p = p * z - 5.37397155531e-2f;
  p = p * z + 1.33314422036e-1f;
  p = p * z - 3.33332819422e-1f;
  Vec<float> near = p * z * x + x;
  Vec<float> capped = a > 15.0f ? splat(15.0f) : a;  // keeps NaN
  Vec<float> far = 1.0f - 2.0f / (exp(capped * 2.0f) + 1.0f);
  return a < 0.625f ? near : x < 0.0f ? -far : far;
}
FASTATTN_INLINE Vec<double> tanh(Vec<double> x) {
  for (int i = 0; i < VL<double>; i++) x[i] = __builtin_tanh(x[i]);
  return x;
}

}  // namespace fastattn::FASTATTN_ISA
