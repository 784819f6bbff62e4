// AVX-512 with products of pairs of bfloat16 in AMX's tile registers (tile/pair_tiles.h). FASTATTN_ISAS=amx builds it, no
// wheel has it, and it runs only if it is asked for: no machine has run it. isa_emulated_amx.cpp is its twin for tests.
#define FASTATTN_ISA amx
#define FASTATTN_PAIRS
#define FASTATTN_TILES
#define FASTATTN_WIDTH 64
#define FASTATTN_NV 1
#define FASTATTN_MR 16  // rows of a tile register
#define FASTATTN_MR_NARROW 16
#define FASTATTN_WIDE_L1 0
#include "isa.h"
