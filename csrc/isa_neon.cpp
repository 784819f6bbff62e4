#define FASTATTN_ISA neon
#define FASTATTN_NAME "neon"
#define FASTATTN_WIDTH 16
#define FASTATTN_REGISTERS 32
#define FASTATTN_FMA 1
#include "isa.h"
