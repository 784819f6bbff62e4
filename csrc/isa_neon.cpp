#define FASTATTN_ISA neon
#define FASTATTN_PAIRS  // where the CPU has BF16
#define FASTATTN_WIDTH 16
// 32 registers.
#define FASTATTN_NV 2
#define FASTATTN_MR 8
#define FASTATTN_MR_NARROW 12
#define FASTATTN_WIDE_L1 0
#include "isa.h"
