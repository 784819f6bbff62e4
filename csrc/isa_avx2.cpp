#define FASTATTN_ISA avx2
#define FASTATTN_NAME "avx2"
#define FASTATTN_WIDTH 32
#define FASTATTN_REGISTERS 16
#define FASTATTN_FMA 1
#include "isa.h"
