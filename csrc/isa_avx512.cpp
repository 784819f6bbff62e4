#define FASTATTN_ISA avx512
#define FASTATTN_NAME "avx512"
#define FASTATTN_WIDTH 64
// one multiply-add a cycle at a latency of 4 on Zen 4; a narrow panel keeps scores and output in the L1.
#define FASTATTN_NV 1
#define FASTATTN_MR 8
#define FASTATTN_MR_NARROW 8
#include "isa.h"
