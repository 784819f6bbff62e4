// Pieces of one block of memory.
#pragma once
#include "simd.h"

namespace fastattn::FASTATTN_ISA {

// Hands out 64-byte aligned pieces; without memory it only counts.
struct Arena {
  char* memory;
  int64_t used = 0;

  template <class T>
  T* take(int64_t n) {
    T* piece = memory ? (T*)(memory + used) : nullptr;
    used += round_up(n * (int64_t)sizeof(T), 64) + 128;  // apart by more than a line: 4 KiB aliasing
    return piece;
  }
};

}  // namespace fastattn::FASTATTN_ISA
