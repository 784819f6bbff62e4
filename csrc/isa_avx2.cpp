#define FASTATTN_ISA avx2
#define FASTATTN_WIDTH 32
// 16 registers; 12 accumulators cover two multiply-adds a cycle at a latency of up to 5.
#define FASTATTN_NV 2
#define FASTATTN_MR 6
#define FASTATTN_MR_NARROW 12
#define FASTATTN_WIDE_L1 0
#include "isa.h"
