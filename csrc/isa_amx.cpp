// AVX-512 with products of pairs of bfloat16 in AMX's tile registers (tile/pair_tiles.h). FASTATTN_ISAS=amx builds it, no
// wheel has it, and it runs only if it is asked for: no machine has run it. isa_emulated_amx.cpp is its twin for tests.
#define FASTATTN_ISA amx
#include "amx_panels.h"
#include "isa.h"
