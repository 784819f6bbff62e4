// The functions of OpenMP that csrc/drive/openmp.cpp looks up, on std::thread: without torch there is no runtime to find.
#include <thread>
#include <vector>

namespace {
thread_local int number = 0;
thread_local bool inside = false;
}  // namespace

#define EXPORTED extern "C" __attribute__((visibility("default")))

EXPORTED void GOMP_parallel(void (*run)(void*), void* context, unsigned threads, unsigned) {
  auto member = [=](int i) {
    number = i, inside = true;
    run(context);
    number = 0, inside = false;
  };
  std::vector<std::thread> others;
  for (unsigned i = 1; i < threads; i++) others.emplace_back(member, (int)i);
  member(0);
  for (std::thread& other : others) other.join();
}
EXPORTED int omp_get_thread_num() { return number; }
EXPORTED int omp_in_parallel() { return inside; }
