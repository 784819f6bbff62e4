// For tests alone, on any CPU: isa_amx.cpp with vectors on whatever registers there are, and AMX's instructions in C++
// (tile/pair_tiles.h). FASTATTN_ISAS=emulated_amx builds it, no wheel has it, and it runs only if it is asked for.
#define FASTATTN_ISA emulated_amx
#define FASTATTN_EMULATED
#include "amx_panels.h"
#include "isa.h"
