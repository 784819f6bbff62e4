// Which instruction set this process runs on, and what it knows of the CPU.
#include <unistd.h>
#if defined(__x86_64__)
#include <cpuid.h>
#if defined(FASTATTN_HAVE_AMX)
#include <sys/syscall.h>

#include <cerrno>
#endif
#elif defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#endif

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#include "driver.h"
#include "parallel.h"

namespace fastattn {

// inline: what is not used need not exist
#define FASTATTN_DECLARE(isa)                                                                               \
  namespace isa {                                                                                           \
  extern const Kernels kernels_of_float, kernels_of_double;                                                 \
  inline constexpr InstructionSet instruction_set = {#isa, &kernels_of_float, &kernels_of_double};          \
  inline constexpr InstructionSet with_pairs = {#isa, &kernels_of_float, &kernels_of_double, #isa "_bf16"}; \
  }
FASTATTN_DECLARE(scalar)
FASTATTN_DECLARE(avx2)
FASTATTN_DECLARE(avx512)
FASTATTN_DECLARE(neon)
FASTATTN_DECLARE(amx)
FASTATTN_DECLARE(emulated)
FASTATTN_DECLARE(emulated_amx)

namespace {

struct Candidate {
  const InstructionSet* isa;
  bool supported;
  bool pays = true;         // else it runs only if it is asked for
  void (*ask)() = nullptr;  // the system, before it runs

  std::string name() const { return isa->with_pairs ? isa->with_pairs : isa->name; }
};

#if defined(FASTATTN_HAVE_AVX2) || defined(FASTATTN_HAVE_AVX512) || defined(FASTATTN_HAVE_AMX)
// Clang 14's __builtin_cpu_supports does not know it; its registers are AVX's.
bool has_f16c() {
  unsigned eax, ebx, ecx, edx;
  return __get_cpuid(1, &eax, &ebx, &ecx, &edx) && ecx & bit_F16C;
}
#endif

#if defined(FASTATTN_HAVE_AVX512) || defined(FASTATTN_HAVE_AMX)
bool has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("fma") &&
         has_f16c();
}
#endif

#if defined(FASTATTN_HAVE_AMX)
// What the kernels of amx multiply in tiles and round with. Whether the system keeps tiles, it says when it is asked.
bool has_amx() {
  constexpr unsigned amx_bf16 = 1 << 22, amx_tile = 1 << 24;
  unsigned eax, ebx, ecx, edx;
  return has_avx512() && __builtin_cpu_supports("avx512bf16") && __get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) &&
         edx & amx_bf16 && edx & amx_tile;
}

// A process of Linux (5.16 and later) has to ask for the memory in which its threads' tiles are kept.
void ask_for_tiles() {
  constexpr long request = 0x1023, tile_data = 18;  // ARCH_REQ_XCOMP_PERM
  if (!syscall(SYS_arch_prctl, request, tile_data)) return;
  throw std::invalid_argument("FASTATTN_CPU_ISA=amx_bf16: the system keeps no tiles for this process (arch_prctl: " +
                              std::string(std::strerror(errno)) +
                              "): it must be Linux 5.16 or later and every "
                              "sigaltstack large enough; unset FASTATTN_CPU_ISA for the best one that runs");
}
#endif

#if defined(FASTATTN_HAVE_NEON)
// Arm's FEAT_BF16, which is all of BFDOT, BFMMLA and BFCVT.
bool has_bf16() {
#if defined(__linux__)
  constexpr unsigned long hwcap2_bf16 = 1 << 14;
  return getauxval(AT_HWCAP2) & hwcap2_bf16;
#else
  return false;
#endif
}
#endif

// Those that were built for this kind of machine, best first. The compiler's builtins check cpuid and, for the vector state, XGETBV.
std::vector<Candidate> built_isas() {
  std::vector<Candidate> list;
#if defined(FASTATTN_HAVE_AVX512)
  // Intel's cores take a product of pairs apart: it is slower there than multiply-adds of float.
  list.push_back(
      {&avx512::with_pairs, has_avx512() && __builtin_cpu_supports("avx512bf16"), (bool)__builtin_cpu_is("amd")});
  list.push_back({&avx512::instruction_set, has_avx512()});
#endif
#if defined(FASTATTN_HAVE_AVX2)
  list.push_back(
      {&avx2::instruction_set, __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c()});
#endif
#if defined(FASTATTN_HAVE_NEON)
  list.push_back({&neon::with_pairs, has_bf16()});
  list.push_back({&neon::instruction_set, true});
#endif
#if defined(FASTATTN_HAVE_SCALAR)
#if defined(__x86_64__)
  list.push_back({&scalar::instruction_set, (bool)__builtin_cpu_supports("sse4.2")});
#else
  list.push_back({&scalar::instruction_set, true});
#endif
#endif
#if defined(FASTATTN_HAVE_AMX)
  list.push_back({&amx::with_pairs, has_amx(), false, ask_for_tiles});
#endif
#if defined(FASTATTN_HAVE_EMULATED_AMX)
  list.push_back({&emulated_amx::with_pairs, true, false});
#endif
#if defined(FASTATTN_HAVE_EMULATED)
  list.push_back({&emulated::with_pairs, true, false});
  list.push_back({&emulated::instruction_set, true, false});
#endif
  return list;
}

const InstructionSet& best_isa() {
  const char* wanted = std::getenv("FASTATTN_CPU_ISA");
  std::string built;
  for (const Candidate& x : built_isas()) {
    if (wanted && *wanted ? wanted == x.name() : x.supported && x.pays) {
      if (x.supported && x.ask) x.ask();
      if (x.supported) return *x.isa;
      throw std::invalid_argument("FASTATTN_CPU_ISA=" + std::string(wanted) +
                                  ": this CPU does not have it; unset FASTATTN_CPU_ISA for the best one it has");
    }
    built += (built.empty() ? "" : ", ") + x.name();
  }
  if (!wanted || !*wanted) throw std::runtime_error("no kernels for this CPU; built are " + built);
  throw std::invalid_argument("FASTATTN_CPU_ISA=" + std::string(wanted) +
                              " is not built into this package; built are " + built);
}

#if defined(_SC_LEVEL1_DCACHE_SIZE)
const int64_t l1_bytes = sysconf(_SC_LEVEL1_DCACHE_SIZE);  // asked when the library is loaded, not after a fork
#else
const int64_t l1_bytes = 0;
#endif

}  // namespace

std::vector<std::string> built_names() {
  std::vector<std::string> names;
  for (const Candidate& candidate : built_isas()) names.push_back(candidate.name());
  return names;
}

const InstructionSet& instruction_set() {
  // No guarded static: a child that is forked while a thread decides would wait for that thread without end.
  static std::atomic<const InstructionSet*> chosen{nullptr};
  const InstructionSet* isa = chosen.load(std::memory_order_acquire);
  if (!isa) chosen.store(isa = &best_isa(), std::memory_order_release);
  return *isa;
}

int64_t l1_data_bytes() { return l1_bytes > 0 ? l1_bytes : 32 << 10; }

double fma_rate(DType dtype, double seconds, int threads) {
  using clock = std::chrono::steady_clock;
  struct Work {
    DType dtype;
    double seconds;
    std::vector<double> rate;
  } work{dtype, seconds, std::vector<double>(threads)};
  parallel_for(
      threads, threads, 1e30,
      [](void* context, int64_t, int thread) {
        Work& w = *(Work*)context;
        const auto start = clock::now();
        double flops = 0, elapsed;
        do {
          flops += instruction_set().kernels_for(w.dtype).multiply_adds(20000);
          elapsed = std::chrono::duration<double>(clock::now() - start).count();
        } while (elapsed < w.seconds);
        w.rate[thread] = std::max(w.rate[thread], flops / elapsed);
      },
      &work);
  double total = 0;
  for (double rate : work.rate) total += rate;
  return total;
}

double read_rate(int64_t bytes, int passes, int threads) {
  struct Work {
    std::vector<uint64_t> words, sums;
    size_t first, share;  // of a thread, in words
  } work{std::vector<uint64_t>(bytes / 8, 1), std::vector<uint64_t>(threads), 0, 0};
  const size_t piece = std::min<size_t>(work.words.size(), (32 << 20) / 8);  // short, to fit between disturbances
  work.share = piece / threads / 32 * 32;
  double best = 0;
  for (int pass = 0; pass < passes; pass++)
    for (work.first = 0; work.share && work.first + piece <= work.words.size(); work.first += piece) {
      const auto start = std::chrono::steady_clock::now();
      parallel_for(
          threads, threads, 1e30,
          [](void* context, int64_t part, int) {
            Work& w = *(Work*)context;
            const uint64_t *from = w.words.data() + w.first + part * w.share, *to = from + w.share;
            uint64_t sums[16] = {};
            for (; from < to; from += 16)
              for (int i = 0; i < 16; i++) sums[i] |= from[i];
            for (uint64_t sum : sums) w.sums[part] |= sum;
          },
          &work);
      const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
      best = std::max(best, (double)work.share * threads * 8 / seconds);
    }
  return best;
}

}  // namespace fastattn
