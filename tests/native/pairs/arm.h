// The arithmetic of BFDOT and BFMMLA (Arm Architecture Reference Manual, BFMulH, FPAdd_BF16 and BFDotAdd), where FPCR.EBF is
// 0 as on every Linux: each product and sum rounded to odd, subnormal numbers 0 before and after, one NaN for all.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

namespace arm {

template <class To, class From>
To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}

inline float flushed(float x) { return std::fpclassify(x) == FP_SUBNORMAL ? std::copysign(0.0f, x) : x; }

// Of the exact value high + low, |low| below half of an ulp of high.
inline float rounded_to_odd(double high, double low) {
  if (std::fabs(high) < std::numeric_limits<float>::min()) return std::copysign(0.0f, (float)high);
  if (std::fabs(high) >= std::ldexp(1.0, 128))
    return std::copysign(std::numeric_limits<float>::infinity(), (float)high);
  uint64_t bits = bit_cast<uint64_t>(high);
  if (low != 0 && std::signbit(low) != std::signbit(high)) bits--;  // a little nearer to 0
  constexpr uint64_t dropped = (1ull << 29) - 1;                    // the fraction's bits that a float has no room for
  const bool inexact = bits & dropped || low != 0;
  const float truncated = (float)bit_cast<double>(bits & ~dropped);
  return bit_cast<float>(bit_cast<uint32_t>(truncated) | (uint32_t)inexact);
}

inline float canonical(float x) { return std::isnan(x) ? bit_cast<float>(0x7fc00000u) : x; }

inline float multiply(uint32_t a, uint32_t b) {  // bfloat16 in the low halves; a finite product is exact in double
  const float x = flushed(bit_cast<float>(a << 16)), y = flushed(bit_cast<float>(b << 16));
  const double product = (double)x * y;
  if (!std::isfinite(product) || product == 0) return canonical((float)product);
  return rounded_to_odd(product, 0);
}

inline float add(float x, float y) {
  x = flushed(x), y = flushed(y);
  const double a = x, b = y, sum = a + b;
  if (!std::isfinite(sum) || sum == 0) return canonical((float)sum);
  const double of_b = sum - a;  // Knuth's exact error of a sum
  return rounded_to_odd(sum, (a - (sum - of_b)) + (b - of_b));
}

// A word holds two bfloat16.
inline float dot(float sum, uint32_t a, uint32_t b) {
  return add(sum, add(multiply(a & 0xffff, b & 0xffff), multiply(a >> 16, b >> 16)));
}

}  // namespace arm
