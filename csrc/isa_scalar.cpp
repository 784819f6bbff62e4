#define FASTATTN_ISA scalar
#define FASTATTN_WIDTH 16
// SSE4.2: 16 registers, multiply and add apart.
#define FASTATTN_NV 2
#define FASTATTN_MR 4
#define FASTATTN_MR_NARROW 8
#define FASTATTN_WIDE_L1 0
#include "isa.h"
