// Work over threads: torch's own OpenMP pool, serial where that is unsafe (the thread that a fork left in the child, a
// nested region), not worth it, or not there.
#pragma once
#include <cstdint>

namespace fastattn {

// Calls run(context, index, thread) for index 0 ... count - 1, each once, on up to `threads` threads, in order of index
// as threads become free. `flops` decides whether threads pay. An exception of run, or of `check_often`, ends the call.
void parallel_for(int64_t count, int threads, double flops, void (*run)(void*, int64_t, int), void* context);

// Whether the parallel_for that calls this (through run) will end with an exception; does what is due of check_often.
bool region_ended();

// check() is called from then on by the thread that is in parallel_for, a few times a second.
void check_often(void (*check)());

// Memory of the calling thread, 64-byte aligned, kept for its next call; throws std::bad_alloc.
char* thread_scratch(int64_t bytes);

// Frees that memory of the calling thread and of the OpenMP threads that it has used; returns how many bytes it was.
int64_t release_scratch();

}  // namespace fastattn
