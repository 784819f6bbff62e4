#include "parallel.h"

#ifndef _WIN32
#include <pthread.h>
#endif

#include <algorithm>
#include <atomic>
#include <chrono>
#include <exception>
#include <new>
#include <utility>

#include "openmp.h"

#if defined(FASTATTN_OLD_GLIBC)
// libstdc++, which is linked statically, asks whether it may leave atomics out. The answer is no.
extern "C" char __libc_single_threaded;
char __libc_single_threaded = 0;
#endif

namespace fastattn {
namespace {

using Clock = std::chrono::steady_clock;

constexpr int most_threads = 4096;    // OpenMP ends the process where it cannot start so many
constexpr double serial_flops = 2e6;  // about 30 us of work: below it, waking threads costs more than it saves
constexpr auto check_after = std::chrono::milliseconds(200);
constexpr int64_t most_kept = 32 << 20;  // bytes of scratch between calls; a backward pass over long lengths takes more

// OpenMP keeps a pool for each thread that opens a region. In a forked child the calling thread alone is left, and waits
// for the others of its pool without end; threads that the child starts get pools of their own.
thread_local bool pool_lost = false;
#ifndef _WIN32
const int at_fork = pthread_atfork(nullptr, nullptr, [] { pool_lost = true; });
#endif

thread_local int widest = 1;  // the most threads that this thread has run on

void (*check)() = [] {};

struct Scratch {
  char* memory = nullptr;
  int64_t capacity = 0;

  int64_t release() {
    operator delete(memory, std::align_val_t{64});
    memory = nullptr;
    return std::exchange(capacity, 0);
  }
  void swap(Scratch& other) { std::swap(memory, other.memory), std::swap(capacity, other.capacity); }
  ~Scratch() { release(); }
};
thread_local Scratch scratch;

// One parallel_for, as its threads share it.
class Region {
  const int64_t count;
  void (*const run)(void*, int64_t, int);
  void* const context;
  std::atomic<int64_t> next{0};
  std::atomic<bool> failed{false};  // no lock, which a child forked meanwhile would find locked
  std::exception_ptr error;
  Clock::time_point last_check = Clock::now();  // of thread 0, which is the caller's

  // Ends the region if step() throws.
  template <class Step>
  void attempt(Step step) {
    try {
      step();
    } catch (...) {
      if (!failed.exchange(true)) error = std::current_exception();
      next = count;
    }
  }

 public:
  static thread_local Region* current;
  static thread_local int thread;

  Region(int64_t count, void (*run)(void*, int64_t, int), void* context) : count(count), run(run), context(context) {}

  bool ended();

  void work(int number) {
    current = this, thread = number;
    attempt([this] {
      for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < count && !ended();) run(context, i, thread);
    });
    current = nullptr;
    if (scratch.capacity > most_kept) scratch.release();
  }

  void rethrow() {
    if (error) std::rethrow_exception(error);
  }
};
thread_local Region* Region::current = nullptr;
thread_local int Region::thread = 0;

// What this thread works on, out of the way of calls that a signal's handler makes, which free and fill scratch memory.
class Aside {
  Region* const region = std::exchange(Region::current, nullptr);
  const int thread = Region::thread;
  Scratch kept;

 public:
  Aside() { kept.swap(scratch); }
  ~Aside() {
    kept.swap(scratch);
    Region::current = region, Region::thread = thread;
  }
};

bool Region::ended() {
  if (thread == 0 && Clock::now() - last_check > check_after)
    attempt([this] {
      Aside aside;
      check();
      last_check = Clock::now();
    });
  return failed.load(std::memory_order_relaxed);
}

}  // namespace

void parallel_for(int64_t count, int threads, double flops, void (*run)(void*, int64_t, int), void* context) {
  if (flops < serial_flops) {
    for (int64_t i = 0; i < count; i++) run(context, i, 0);
    return;
  }
  threads = (int)std::min<int64_t>({count, threads, most_threads});
  Region region(count, run, context);
  if (threads <= 1 || pool_lost || !openmp.parallel || openmp.in_parallel()) {
    region.work(0);
  } else {
    widest = std::max(widest, threads);
    openmp.parallel([](void* shared) { ((Region*)shared)->work(openmp.thread_num()); }, &region, threads, 0);
  }
  region.rethrow();
}

bool region_ended() { return Region::current && Region::current->ended(); }

void check_often(void (*function)()) { check = function; }

char* thread_scratch(int64_t bytes) {
  if (bytes > scratch.capacity) {
    scratch.release();
    scratch.memory = (char*)operator new(bytes, std::align_val_t{64});
    scratch.capacity = bytes;
  }
  return scratch.memory;
}

int64_t release_scratch() {
  std::atomic<int64_t> released{0};
  auto release = [](void* sum) { *(std::atomic<int64_t>*)sum += scratch.release(); };
  if (widest > 1 && !pool_lost && !openmp.in_parallel())
    openmp.parallel(release, &released, widest, 0);
  else
    release(&released);
  return released;
}

}  // namespace fastattn
