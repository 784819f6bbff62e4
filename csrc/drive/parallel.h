// Work over threads: torch's own OpenMP pool, serial where that is unsafe (the thread that a fork left in the child, a
// nested region) or not worth it.
#pragma once
#include <cstdint>

namespace fastattn {

// Calls run(context, index, thread) for index 0 ... count - 1, each once, on up to `threads` threads, in order of index
// as threads become free. `flops` decides whether threads pay.
void parallel_for(int64_t count, int threads, double flops, void (*run)(void*, int64_t, int), void* context);

// Memory of the calling thread, 64-byte aligned, kept for its next call; throws std::bad_alloc.
char* thread_scratch(int64_t bytes);

}  // namespace fastattn
