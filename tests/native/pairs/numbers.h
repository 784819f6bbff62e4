// What the tests of pairs of bfloat16 share.
#pragma once
#include <sys/mman.h>

#include <cstdint>
#include <cstdio>
#include <cstring>

// bfloat16 as float, and of a number that it holds.
inline uint16_t half(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  return (uint16_t)(bits >> 16);
}
inline float whole(uint16_t x) {
  const uint32_t bits = (uint32_t)x << 16;
  float y;
  memcpy(&y, &bits, 4);
  return y;
}

// Counts what is not as expected, NaN or the number, and prints the first of it.
inline int wrong = 0;
inline void same(const char* what, float found, float expected) {
  if (found == expected || (found != found && expected != expected)) return;
  if (wrong++ < 10) std::printf("%s: %a, expected %a\n", what, found, expected);
}

// Memory behind which nothing may be read.
struct Guarded {
  static constexpr int64_t bytes = 1 << 16;  // a page of any CPU
  char* memory = (char*)mmap(nullptr, 2 * bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  Guarded() { mprotect(memory + bytes, bytes, PROT_NONE); }
  template <class T>
  T* last(int64_t n) {
    return (T*)(memory + bytes) - n;
  }
};
