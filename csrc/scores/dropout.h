// Dropout bits from Philox-4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011), the same as
// in fastattn/scores/dropout.py: keyed by the seed, counter (key / 4, query, head, batch), a word for each of four keys.
// Head, query and key count in a whole of which the call may be a part: from Operands::dropout_start.
#pragma once
#include "panel.h"

namespace fastattn::FASTATTN_ISA {

// A 32-bit word in each 64-bit lane; what stands in the upper half is of no meaning.
typedef uint64_t Words __attribute__((vector_size(FASTATTN_WIDTH)));

// The 64-bit products of the lower halves.
FASTATTN_INLINE Words multiply_words(Words a, uint32_t b) {
#if defined(__AVX512F__)
  return (Words)_mm512_mul_epu32((__m512i)a, _mm512_set1_epi64(b));
#elif defined(FASTATTN_AVX2)
  return (Words)_mm256_mul_epu32((__m256i)a, _mm256_set1_epi64x(b));
#elif defined(__x86_64__) && FASTATTN_WIDTH == 16
  return (Words)_mm_mul_epu32((__m128i)a, _mm_set1_epi64x(b));
#else
  return (a & 0xffffffff) * b;
#endif
}

struct Counter {
  Words c[4];
};

FASTATTN_INLINE Counter philox(Counter x, uint64_t seed) {
  uint32_t key0 = (uint32_t)seed, key1 = (uint32_t)(seed >> 32);
#pragma GCC unroll 10
  for (int round = 0; round < 10; round++) {
    const Words product0 = multiply_words(x.c[0], 0xd2511f53), product1 = multiply_words(x.c[2], 0xcd9e8d57);
    x = {{product1 >> 32 ^ x.c[1] ^ key0, product1, product0 >> 32 ^ x.c[3] ^ key1, product0}};
    key0 += 0x9e3779b9, key1 += 0xbb67ae85;
  }
  return x;
}

// Calls apply(j, v, kept) for keys key + j and the panel's vectors v; kept: a mask of the lanes whose weight stays.
template <class Real, int NV, class Apply>
FASTATTN_INLINE void each_kept(const Operands& p, const Panel<Real>& panel, int64_t key, int64_t keys,
                               const Apply& apply) {
  typedef typename VecOf<Real>::words Lane;
  constexpr int L = VL<Real>;
  const int64_t place = key + p.dropout_start.key;
  for (int64_t quad = place / 4; quad * 4 < place + keys; quad++)
    for (int v = 0; v < NV; v++) {
      // Of float lanes, the even ones come in the lower halves and the odd ones in the upper.
      const Words query = (Words)load_words<Real>(panel.queries + v * L),
                  head = (Words)load_words<Real>(panel.heads + v * L);
      const Words first = Words{} + (uint64_t)quad, last = Words{} + (uint64_t)panel.lanes.batch;
      const Counter even = philox({{first, query, head, last}}, p.seed);
      Counter odd{};
      if constexpr (sizeof(Real) == 4) odd = philox({{first, query >> 32, head >> 32, last}}, p.seed);
      for (int i = 0; i < 4; i++) {
        const int64_t j = quad * 4 + i - place;
        if (j >= 0 && j < keys)
          apply(j, v, (Lane)((even.c[i] & 0xffffffff) | odd.c[i] << 32) >= (typename VecOf<Real>::word)p.drop_below);
      }
    }
}

// weights [keys][NR] of dropped keys become 0.
template <class Real, int NV>
void drop(const Operands& p, const Panel<Real>& panel, int64_t key, int64_t keys, Real* weights) {
  each_kept<Real, NV>(p, panel, key, keys, [&](int64_t j, int v, auto kept) {
    Real* w = weights + (j * NV + v) * VL<Real>;
    store(w, kept ? load(w) : Vec<Real>{});
  });
}

// The same of weights that are pairs of keys, [keys / 2][NR].
template <int NV>
void drop(const Operands& p, const Panel<float>& panel, int64_t key, int64_t keys, Pair* weights) {
  each_kept<float, NV>(p, panel, key, keys, [&](int64_t j, int v, auto kept) {
    Pair* w = weights + (j / 2 * NV + v) * PL;
    const Pairs other = Pairs{} + (j % 2 ? 0xffffu : 0xffff0000u);
    store_pairs(w, load_pairs(w) & ((Pairs)kept | other));
  });
}

// The same for the weights of one query.
template <class Real>
void drop_row(const Operands& p, int64_t batch, QueryRow row, int64_t key, int64_t keys, Real* weights) {
  constexpr int quads = FASTATTN_WIDTH / 8;
  Words lane;
  for (int i = 0; i < quads; i++) lane[i] = (uint64_t)i;
  const int64_t place = key + p.dropout_start.key;
  const Words query = Words{} + (uint64_t)(row.query + p.dropout_start.query),
              head = Words{} + (uint64_t)(row.head + p.dropout_start.head), last = Words{} + (uint64_t)batch;
  for (int64_t j = -(place % 4); j < keys; j += 4 * quads) {
    const Counter drawn = philox({{lane + (uint64_t)((place + j) / 4), query, head, last}}, p.seed);
    uint64_t words[4][quads];
    memcpy(words, drawn.c, sizeof words);
    for (int64_t i = larger<int64_t>(j, 0); i < smaller(j + 4 * quads, keys); i++)
      if ((uint32_t)words[(i - j) % 4][(i - j) / 4] < p.drop_below) weights[i] = 0;
  }
}

}  // namespace fastattn::FASTATTN_ISA
