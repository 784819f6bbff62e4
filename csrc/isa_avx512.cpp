#define FASTATTN_ISA avx512
#define FASTATTN_NAME "avx512"
#define FASTATTN_WIDTH 64
#define FASTATTN_REGISTERS 32
#define FASTATTN_FMA 1
#include "isa.h"
