// The panels and register tiles of AMX and of its twin for tests.
#pragma once
#define FASTATTN_PAIRS
#define FASTATTN_TILES
#define FASTATTN_WIDTH 64
#define FASTATTN_NV 1
#define FASTATTN_MR 16  // rows of a tile register
#define FASTATTN_MR_NARROW 16
#define FASTATTN_WIDE_L1 0
