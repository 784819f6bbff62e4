// For tests alone, on any CPU: vectors as wide as AVX-512's, on whatever registers there are, and pairs of bfloat16
// multiplied in C++ (tile/pairs.h). FASTATTN_ISAS=emulated builds it, no wheel has it, and it runs only if it is asked for.
#define FASTATTN_ISA emulated
#define FASTATTN_EMULATED
#define FASTATTN_PAIRS
#define FASTATTN_WIDTH 64
#ifndef FASTATTN_NV  // AVX-512's narrow tile; tests/parity/test_native.py wants the wide one too
#define FASTATTN_NV 1
#define FASTATTN_MR 8
#endif
#define FASTATTN_MR_NARROW 8
#define FASTATTN_WIDE_L1 0
#include "isa.h"
