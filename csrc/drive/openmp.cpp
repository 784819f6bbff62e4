#include "openmp.h"

#ifndef _WIN32
#include <dlfcn.h>
#endif

#include "glibc.h"

namespace fastattn {

#ifdef _WIN32
const OpenMP openmp{};
std::string openmp_library() { return {}; }
#else
namespace {

// Through torch's library, so that of several runtimes in a process it is the one that torch runs on. Without torch (in
// tests/native/) whichever the program has. Names that GCC's runtime has, and LLVM's and Intel's on Linux.
OpenMP find() {
  void* torch = dlopen("libtorch_cpu.so", RTLD_LAZY | RTLD_NOLOAD);
  OpenMP found{};
  auto look_up = [torch](auto& function, const char* name) {
    function = reinterpret_cast<std::decay_t<decltype(function)> >(dlsym(torch ? torch : RTLD_DEFAULT, name));
    return function != nullptr;
  };
  const bool complete = look_up(found.parallel, "GOMP_parallel") && look_up(found.thread_num, "omp_get_thread_num") &&
                        look_up(found.in_parallel, "omp_in_parallel");
  return complete ? found : OpenMP{};
}

}  // namespace

const OpenMP openmp = find();  // when this library is loaded, not after a fork

std::string openmp_library() {
  Dl_info info;
  return openmp.parallel && dladdr((void*)openmp.parallel, &info) && info.dli_fname ? info.dli_fname : "";
}
#endif

}  // namespace fastattn
