// Pairs of bfloat16 and the one operation on them: an accumulator of float plus two products. An instruction set that has
// it defines FASTATTN_PAIRS and says here how it loads, multiplies and rounds; everything else is written once.
//
//   vdpbf16ps   two fused multiply-adds, the high half first, each rounded to nearest even; subnormal numbers, also sums,
//               are 0 whatever MXCSR says. `emulated` does the same in C++, but for products that overflow.
//   bfdot       both products, their sum, and its sum with the accumulator, each rounded to odd; subnormal numbers are 0
//               and NaN is always the same. What bfcvtn rounds, to nearest even, keeps its subnormal numbers.
#pragma once
#include "simd.h"

namespace fastattn::FASTATTN_ISA {

#if defined(FASTATTN_PAIRS)
constexpr bool has_pairs = true;
#else
constexpr bool has_pairs = false;
#endif

// Pairs that one instruction adds up: of tile registers (pair_tiles.h) a whole row.
#if defined(FASTATTN_TILES)
constexpr int64_t pair_steps = 16;
#else
constexpr int64_t pair_steps = 1;
struct TilesInUse {};
#endif
constexpr bool has_tiles = pair_steps > 1;

// Sums over keys are of whole instructions, counted from a tile's first key, for bits that depend on no neighbour: where
// the one with `key` starts, and where the one before `key` ends. first: even.
FASTATTN_INLINE int64_t start_of_pairs(int64_t key, int64_t first) {
  return has_tiles ? first + (key - first) / (2 * pair_steps) * (2 * pair_steps) : key / 2 * 2;
}
FASTATTN_INLINE int64_t end_of_pairs(int64_t key, int64_t first) {
  return has_tiles ? first + round_up(key - first, 2 * pair_steps) : round_up(key, 2);
}

// Two bfloat16 that are neighbours in a sum. Rows of bfloat16 are rows of pairs where they lie.
struct Pair {
  uint16_t low, high;
};

typedef VecOf<float>::words Pairs;  // a pair in each lane
constexpr int PL = VL<float>;       // lanes of them

FASTATTN_INLINE Pairs load_pairs(const Pair* p) {
  Pairs v;
  memcpy(&v, p, sizeof v);
  return v;
}
FASTATTN_INLINE void store_pairs(Pair* p, Pairs v) { memcpy(p, &v, sizeof v); }

#if defined(__AVX512F__)

// sum += a . b in each lane. The instruction reads and broadcasts the pair by itself, which GCC 12 does not find.
FASTATTN_INLINE void add_products(Vec<float>& sum, const Pair& a, Pairs b) {
  asm("vdpbf16ps %2%{1to16%}, %1, %0" : "+v"(sum) : "v"(b), "m"(a));
}
// The same for several vectors: one load for all.
FASTATTN_INLINE Pairs broadcast(const Pair& a) {
  uint32_t word;
  memcpy(&word, &a, 4);
  return (Pairs)_mm512_set1_epi32((int)word);
}
FASTATTN_INLINE void add_products(Vec<float>& sum, Pairs a, Pairs b) {
  asm("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(b), "v"(a));
}

// Two vectors rounded to bfloat16: the lanes of `first`, then those of `second`.
struct Rounded {
  __m512i halves;
};
FASTATTN_INLINE Rounded round_two(Vec<float> first, Vec<float> second) {
  Rounded r;
  asm("vcvtne2ps2bf16 %2, %1, %0" : "=v"(r.halves) : "v"(second), "v"(first));
  return r;
}
FASTATTN_INLINE void store_rows(Rounded r, uint16_t* first, uint16_t* second) {
  _mm256_storeu_si256((__m256i*)first, _mm512_castsi512_si256(r.halves));
  _mm256_storeu_si256((__m256i*)second, _mm512_extracti64x4_epi64(r.halves, 1));
}
FASTATTN_INLINE Pairs pairs_of(Rounded r) {
  alignas(64) static constexpr uint16_t order[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                     8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  return (Pairs)_mm512_permutexvar_epi16(_mm512_load_si512(order), r.halves);
}

#elif defined(__aarch64__) && FASTATTN_WIDTH == 16

// BFDOT by element takes its pair for all lanes out of one lane. The directive instead of a flag: the rest of the
// translation unit is for every CPU.
#define FASTATTN_BF16 ".arch_extension bf16\n\t"

struct InLaneZero {
  float word;
};
FASTATTN_INLINE InLaneZero broadcast(const Pair& a) {
  InLaneZero one;
  memcpy(&one, &a, sizeof one);
  return one;
}
FASTATTN_INLINE void add_products(Vec<float>& sum, InLaneZero a, Pairs b) {
  asm(FASTATTN_BF16 "bfdot %0.4s, %1.8h, %2.2h[0]" : "+w"(sum) : "w"(b), "w"(a.word));
}
FASTATTN_INLINE void add_products(Vec<float>& sum, const Pair& a, Pairs b) { add_products(sum, broadcast(a), b); }

typedef uint16_t Rounded __attribute__((vector_size(16)));  // the lanes of the first, then those of the second
FASTATTN_INLINE Rounded round_two(Vec<float> first, Vec<float> second) {
  Rounded r;
  asm(FASTATTN_BF16 "bfcvtn %0.4h, %1.4s" : "=w"(r) : "w"(first));
  asm(FASTATTN_BF16 "bfcvtn2 %0.8h, %1.4s" : "+w"(r) : "w"(second));
  return r;
}
FASTATTN_INLINE void store_rows(Rounded r, uint16_t* first, uint16_t* second) {
  memcpy(first, &r, 8);
  memcpy(second, (const char*)&r + 8, 8);
}
FASTATTN_INLINE Pairs pairs_of(Rounded r) {
  return (Pairs)vzip1q_u16((uint16x8_t)r, vextq_u16((uint16x8_t)r, (uint16x8_t)r, 4));
}

#else

FASTATTN_INLINE Vec<float> without_subnormals(Vec<float> x) {
  const Pairs bits = (Pairs)x;
  return (Vec<float>)((bits & 0x7f800000u) != 0u ? bits : bits & 0x80000000u);
}
FASTATTN_INLINE Vec<float> high_of(Pairs x) { return without_subnormals((Vec<float>)(x & 0xffff0000u)); }
FASTATTN_INLINE Vec<float> low_of(Pairs x) { return without_subnormals((Vec<float>)(x << 16)); }

FASTATTN_INLINE Pairs broadcast(const Pair& a) { return Pairs{} + ((uint32_t)a.high << 16 | a.low); }
FASTATTN_INLINE void add_products(Vec<float>& sum, Pairs a, Pairs b) {
  sum = without_subnormals(without_subnormals(sum) + high_of(a) * high_of(b));
  sum = without_subnormals(sum + low_of(a) * low_of(b));
}
FASTATTN_INLINE void add_products(Vec<float>& sum, const Pair& a, Pairs b) { add_products(sum, broadcast(a), b); }

struct Rounded {
  Pairs first, second;  // in the lower halves
};
FASTATTN_INLINE Pairs rounded(Vec<float> x) {
  const Pairs bits = (Pairs)without_subnormals(x);
  return x == x ? (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16 : (Pairs)x >> 16 | 64u;
}
FASTATTN_INLINE Rounded round_two(Vec<float> first, Vec<float> second) { return {rounded(first), rounded(second)}; }
FASTATTN_INLINE void store_rows(Rounded r, uint16_t* first, uint16_t* second) {
  for (int i = 0; i < PL; i++) first[i] = (uint16_t)r.first[i], second[i] = (uint16_t)r.second[i];
}
FASTATTN_INLINE Pairs pairs_of(Rounded r) { return r.first | r.second << 16; }

#endif

}  // namespace fastattn::FASTATTN_ISA
