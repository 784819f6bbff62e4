#include "parallel.h"

#include <omp.h>
#include <pthread.h>

#include <atomic>
#include <cstdlib>
#include <exception>
#include <memory>
#include <new>

namespace fastattn {
namespace {

constexpr int most_threads = 4096;    // OpenMP ends the process where it cannot start so many
constexpr double serial_flops = 2e6;  // about 30 us of work: below it, waking threads costs more than it saves

// OpenMP keeps a pool for each thread that opens a region. In a forked child the calling thread alone is left, and waits
// for the others of its pool without end; threads that the child starts get pools of their own.
thread_local bool pool_lost = false;
const int at_fork = pthread_atfork(nullptr, nullptr, [] { pool_lost = true; });

struct Free {
  void operator()(char* p) const { std::free(p); }
};

}  // namespace

void parallel_for(int64_t count, int threads, double flops, void (*run)(void*, int64_t, int), void* context) {
  if (threads > count) threads = (int)count;
  if (threads > most_threads) threads = most_threads;
  if (threads <= 1 || flops < serial_flops || pool_lost || omp_in_parallel()) {
    for (int64_t i = 0; i < count; i++) run(context, i, 0);
    return;
  }
  std::atomic<int64_t> next{0};
  std::atomic<bool> failed{false};  // no lock, which a child forked meanwhile would find locked
  std::exception_ptr error;
#pragma omp parallel num_threads(threads)
  {
    try {
      for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < count;)
        run(context, i, omp_get_thread_num());
    } catch (...) {
      if (!failed.exchange(true)) error = std::current_exception();
      next = count;
    }
  }
  if (error) std::rethrow_exception(error);
}

char* thread_scratch(int64_t bytes) {
  thread_local std::unique_ptr<char, Free> memory;
  thread_local int64_t capacity = 0;
  if (bytes > capacity) {
    memory.reset();
    capacity = 0;
    memory.reset((char*)std::aligned_alloc(64, (bytes + 63) / 64 * 64));
    if (!memory) throw std::bad_alloc();
    capacity = bytes;
  }
  return memory.get();
}

}  // namespace fastattn
