#define FASTATTN_ISA avx512
#define FASTATTN_WIDTH 64
#define FASTATTN_PAIRS  // where the CPU has AVX512_BF16: only in what is run on pairs
// 32 registers. Wide: two multiply-adds a cycle, which want few loads beside them (Zen 5, Sapphire Rapids, with an L1 of
// 48 KiB). Narrow: Zen 4 with one a cycle and 32 KiB.
#define FASTATTN_NV 2
#define FASTATTN_MR 10
#define FASTATTN_MR_NARROW 8
#ifndef FASTATTN_WIDE_L1  // tests/parity/test_native.py wants both
#define FASTATTN_WIDE_L1 (48 << 10)
#endif
#include "isa.h"
