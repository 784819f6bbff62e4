#include "driver.h"

#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <stdexcept>
#include <string>
#include <vector>

#include "parallel.h"

namespace fastattn {

#define FASTATTN_DECLARE(isa)   \
  namespace isa {               \
  extern const Kernels kernels; \
  }
FASTATTN_DECLARE(scalar)
FASTATTN_DECLARE(avx2)
FASTATTN_DECLARE(avx512)
FASTATTN_DECLARE(neon)

namespace {

struct Isa {
  const Kernels* kernels;  // null: not built for this machine
  const char* name;
  bool supported;
};

// Best first. The compiler's builtins check cpuid and, for the vector state, XGETBV.
std::vector<Isa> isas() {
  std::vector<Isa> list;
#if defined(FASTATTN_HAVE_AVX512)
  list.push_back({&avx512::kernels, "avx512",
                  __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                      __builtin_cpu_supports("f16c") && __builtin_cpu_supports("fma")});
#endif
#if defined(FASTATTN_HAVE_AVX2)
  list.push_back({&avx2::kernels, "avx2",
                  __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")});
#endif
#if defined(FASTATTN_HAVE_NEON)
  list.push_back({&neon::kernels, "neon", true});
#endif
#if defined(FASTATTN_HAVE_SCALAR)
#if defined(__x86_64__)
  list.push_back({&scalar::kernels, "scalar", (bool)__builtin_cpu_supports("sse4.2")});
#else
  list.push_back({&scalar::kernels, "scalar", true});
#endif
#endif
  return list;
}

const Kernels& choose() {
  const std::vector<Isa> list = isas();
  const char* wanted = std::getenv("FASTATTN_CPU_ISA");
  std::string built;
  for (const Isa& isa : list) {
    if (wanted && *wanted ? std::string(wanted) == isa.name : isa.supported) {
      if (isa.supported) return *isa.kernels;
      throw std::runtime_error("FASTATTN_CPU_ISA=" + std::string(wanted) +
                               ": this CPU does not have it; unset FASTATTN_CPU_ISA for the best one it has");
    }
    built += (built.empty() ? "" : ", ") + std::string(isa.name);
  }
  throw std::runtime_error(wanted && *wanted ? "FASTATTN_CPU_ISA=" + std::string(wanted) +
                                                   " is not built into this package; built are " + built
                                             : "no kernels for this CPU; built are " + built);
}

struct Call {
  const Problem& problem;
  const Kernels& kernels;
  Blocking blocking;
  int64_t scratch_bytes;
  std::vector<Unit> units;  // the splits of a row block stand together when they are made
  std::vector<int64_t> order;
  std::vector<char> partials;  // out, max, sum of every row of every unit; empty without splits
  int64_t element;

  Partial partial(int64_t unit) {
    const int64_t row = unit * blocking.rows, rows = (int64_t)units.size() * blocking.rows, Dv = problem.head_dim_v;
    char* max = partials.data() + (rows * Dv + row) * element;
    return {partials.data() + row * Dv * element, max, max + rows * element};
  }
};

void run_unit(void* context, int64_t index, int) {
  Call& call = *(Call*)context;
  const int64_t unit = call.order.empty() ? index : call.order[index];
  const Partial partial = call.blocking.num_splits > 1 ? call.partial(unit) : Partial{};
  call.kernels.run_unit(call.problem, call.blocking, call.units[unit], partial, thread_scratch(call.scratch_bytes));
}

void combine(void* context, int64_t index, int) {
  Call& call = *(Call*)context;
  const int64_t unit = index * call.blocking.num_splits;
  call.kernels.combine(call.problem, call.blocking, call.units[unit], call.partial(unit),
                       thread_scratch(call.scratch_bytes));
}

}  // namespace

const Kernels& kernels() {
  static const Kernels& chosen = choose();
  return chosen;
}

void forward(const Problem& p, int threads) {
  if (!p.batch || !p.num_heads || !p.seqlen_q) return;
  const Kernels& kernel = kernels();
  Call call{p, kernel, kernel.blocking(p), 0, {}, {}, {}, p.q.dtype == DType::float64 ? 8 : 4};
  const Blocking& b = call.blocking;
  call.scratch_bytes = kernel.scratch_bytes(p, b);

  // A head's row blocks longest first, so that the last units are short ones and the threads end together.
  const int64_t stacked = b.heads_per_unit * p.seqlen_q, blocks = (stacked + b.rows - 1) / b.rows;
  const int64_t splits = b.num_splits;
  call.units.reserve(p.batch * (p.num_heads / b.heads_per_unit) * blocks * splits);
  double pairs = 0;
  for (int64_t batch = 0; batch < p.batch; batch++)
    for (int64_t head = 0; head < p.num_heads; head += b.heads_per_unit)
      for (int64_t row = 0; row < stacked; row += b.rows)
        for (int64_t split = 0; split < splits; split++) {
          Unit unit{(int32_t)batch, (int32_t)head, (int32_t)split, row, 0, 0};
          kernel.find_keys(p, b, unit);
          pairs += (double)std::max<int64_t>(unit.k_hi - unit.k_lo, 0) * std::min<int64_t>(b.rows, stacked - row);
          call.units.push_back(unit);
        }
  const double flops = 2 * pairs * (p.head_dim + p.head_dim_v);
  if (threads > 1 && call.units.size() > 1) {
    const int64_t per_head = blocks * splits;
    call.order.resize(call.units.size());
    for (size_t i = 0; i < call.order.size(); i++) call.order[i] = (int64_t)i;
    auto keys = [&](int64_t i) { return call.units[i].k_hi - call.units[i].k_lo; };
    std::stable_sort(call.order.begin(), call.order.end(),
                     [&](int64_t i, int64_t j) { return i / per_head != j / per_head ? i < j : keys(i) > keys(j); });
  }
  if (splits > 1) call.partials.resize(call.units.size() * b.rows * (p.head_dim_v + 2) * call.element);

  parallel_for((int64_t)call.units.size(), threads, flops, run_unit, &call);
  const double combine_flops = 4.0 * call.partials.size() / call.element;
  if (splits > 1) parallel_for((int64_t)call.units.size() / splits, threads, combine_flops, combine, &call);
}

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
          flops += kernels().multiply_adds(w.dtype, 20000);
          elapsed = std::chrono::duration<double>(clock::now() - start).count();
        } while (elapsed < w.seconds);
        w.rate[thread] = std::max(w.rate[thread], flops / elapsed);
      },
      &work);
  double total = 0;
  for (double rate : work.rate) total += rate;
  return total;
}

}  // namespace fastattn
