// For tests alone, on any CPU: isa_amx.cpp with vectors on whatever registers there are, and AMX's instructions in C++
// (tile/pair_tiles.h). FASTATTN_ISAS=emulated_amx builds it, no wheel has it, and it runs only if it is asked for.
#define FASTATTN_ISA emulated_amx
#define FASTATTN_EMULATED
#define FASTATTN_PAIRS
#define FASTATTN_TILES
#define FASTATTN_WIDTH 64
#define FASTATTN_NV 1
#define FASTATTN_MR 16
#define FASTATTN_MR_NARROW 16
#define FASTATTN_WIDE_L1 0
#include "isa.h"
