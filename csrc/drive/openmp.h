// The OpenMP runtime that torch has loaded, by the names of its functions. Linking one would bring a second runtime with
// threads of its own where torch brings its own under another file name, or none at all on a slim system.
#pragma once
#include <string>
#include <type_traits>

namespace fastattn {

struct OpenMP {
  void (*parallel)(void (*run)(void*), void* context, unsigned threads, unsigned flags);  // null where there is none
  int (*thread_num)();
  int (*in_parallel)();
};

extern const OpenMP openmp;

std::string openmp_library();  // the path of its file; empty where there is none

}  // namespace fastattn
