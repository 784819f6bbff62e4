#define FASTATTN_ISA scalar
#define FASTATTN_NAME "scalar"
#define FASTATTN_WIDTH 16
#define FASTATTN_REGISTERS 16
#define FASTATTN_FMA 0
#include "isa.h"
