#include "driver.h"

#include <unistd.h>
#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdlib>
#include <optional>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "block_lists.h"
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

#if defined(FASTATTN_HAVE_AVX2) || defined(FASTATTN_HAVE_AVX512)
// Clang 14's __builtin_cpu_supports does not know it; its registers are AVX's.
bool has_f16c() {
  unsigned eax, ebx, ecx, edx;
  return __get_cpuid(1, &eax, &ebx, &ecx, &edx) && ecx & bit_F16C;
}
#endif

// Best first. The compiler's builtins check cpuid and, for the vector state, XGETBV.
std::vector<Isa> isas() {
  std::vector<Isa> list;
#if defined(FASTATTN_HAVE_AVX512)
  list.push_back({&avx512::kernels, "avx512",
                  __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                      __builtin_cpu_supports("fma") && has_f16c()});
#endif
#if defined(FASTATTN_HAVE_AVX2)
  list.push_back(
      {&avx2::kernels, "avx2", __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c()});
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

struct BackwardCall {
  const Problem& problem;
  const Gradients& gradients;
  const Kernels& kernels;
  BackwardBlocking blocking;
  int64_t scratch_bytes;
  std::vector<KeyUnit> units;
  std::vector<char> partials;  // dq of the wave's [batch][head][split]; empty without splits
  int64_t first_batch, head_bytes;

  char* partial(int64_t batch, int64_t head) {
    return partials.data() + ((batch - first_batch) * problem.num_heads + head) * head_bytes;
  }
};

void run_key_unit(void* context, int64_t index, int) {
  BackwardCall& call = *(BackwardCall*)context;
  const KeyUnit& unit = call.units[index];
  const BackwardBlocking& b = call.blocking;
  const int64_t group_size = call.problem.num_heads / call.problem.num_heads_k;
  char* partial = nullptr;
  if (b.num_splits > 1)
    partial = call.partial(unit.batch, unit.head_k * group_size) + unit.split * (call.head_bytes / b.num_splits);
  call.kernels.run_key_unit(call.problem, call.gradients, b, unit, partial, call.head_bytes,
                            thread_scratch(call.scratch_bytes));
}

void combine_dq(void* context, int64_t index, int) {
  BackwardCall& call = *(BackwardCall*)context;
  const Problem& p = call.problem;
  const int64_t rows = call.blocking.block_rows, blocks = (p.seqlen_q + rows - 1) / rows;
  const int64_t head = index / blocks % p.num_heads, batch = call.first_batch + index / blocks / p.num_heads;
  call.kernels.combine_dq(p, call.gradients, call.blocking, batch, head, index % blocks * rows,
                          call.partial(batch, head), thread_scratch(call.scratch_bytes));
}

// target[b][h][n or broadcast] += source [batch][num_heads][n], n being the target's dimension `dim`.
void add_sums(const Problem& p, const std::vector<double>& source, int64_t n, const Tensor& target, int dim) {
  for (int64_t row = 0; row < p.batch * p.num_heads; row++)
    for (int64_t i = 0; i < n; i++) {
      const int64_t offset = row / p.num_heads * target.stride[0] + row % p.num_heads * target.stride[1];
      ((double*)target.data)[offset + i * target.stride[dim]] += source[row * n + i];
    }
}

// The buffers that the units fill for the gradients of bias (by key or query), alibi_slopes, sinks and scales, and their
// sums.
class ScoreSums {
  std::vector<double> keys, queries, slopes, sinks, scales;
  const Problem& p;
  const int64_t splits;

 public:
  ScoreSums(const Problem& p, Gradients& g, int64_t splits) : p(p), splits(splits) {
    const int64_t rows = p.batch * p.num_heads;
    auto wanted = [](std::vector<double>& buffer, bool wanted, int64_t n) {
      if (wanted) buffer.resize(std::max<int64_t>(n, 1));
      return wanted ? buffer.data() : nullptr;
    };
    const bool vector = g.dbias && !g.dense_bias(), by_key = vector && g.dbias.stride[3];
    g.key_sums = wanted(keys, by_key, rows * p.seqlen_k);
    g.query_sums = wanted(queries, vector && !by_key, rows * p.seqlen_q);
    g.slope_sums = wanted(slopes, (bool)g.dalibi_slopes, rows * splits);
    g.sink_sums = wanted(sinks, (bool)g.dsinks, rows * p.seqlen_q);
    g.scale_sums = wanted(scales, (bool)g.dscales, rows * p.seqlen_q);
  }
  void add_to(const Gradients& g) const {
    if (g.key_sums) add_sums(p, keys, p.seqlen_k, g.dbias, 3);
    if (g.query_sums) add_sums(p, queries, p.seqlen_q, g.dbias, 2);
    if (g.slope_sums) add_sums(p, slopes, splits, g.dalibi_slopes, 3);
    if (g.sink_sums) add_sums(p, sinks, p.seqlen_q, g.dsinks, 3);
    if (g.scale_sums) add_sums(p, scales, p.seqlen_q, g.dscales, 3);
  }
};

#if defined(_SC_LEVEL1_DCACHE_SIZE)
const int64_t l1_bytes = sysconf(_SC_LEVEL1_DCACHE_SIZE);  // when the library is loaded: see kernels()
#else
const int64_t l1_bytes = 0;
#endif

int64_t skipped = 0;  // pairs, over all calls; atomic, but kernels know no std

constexpr int64_t max_partial_bytes = 64 << 20;  // a wave of batches whose dq of all splits fit, but one at least

}  // namespace

const Kernels& kernels() {
  static std::atomic<const Kernels*> chosen{nullptr};  // a guarded static would block a child forked during choose()
  if (!chosen.load(std::memory_order_acquire)) chosen.store(&choose(), std::memory_order_release);
  return *chosen.load(std::memory_order_acquire);
}

int64_t l1_data_bytes() { return l1_bytes > 0 ? l1_bytes : 32 << 10; }

void forward(const Problem& problem, int threads) {
  Problem p = problem;
  if (!p.batch || !p.num_heads || !p.seqlen_q) return;
  std::optional<OwnedLists> lists;
  if (p.block_mask) p.blocks = &lists.emplace(p, false).lists;
  const Kernels& kernel = kernels();
  Call call{p, kernel, kernel.blocking(p), 0, {}, {}, {}, p.q.dtype == DType::float64 ? 8 : 4};
  const Blocking& b = call.blocking;
  call.scratch_bytes = kernel.scratch_bytes(p, b);
  std::vector<double> tile_facts;
  if (p.may_skip()) {
    tile_facts.assign(p.batch * p.num_heads_k * ((p.seqlen_k + b.n_block - 1) / b.n_block) * 2, -1.0);
    p.tile_facts = tile_facts.data(), p.skipped_pairs = &skipped;
  }

  // A head's row blocks longest first, so that the last units are short ones and the threads end together.
  const int64_t stacked = b.heads_per_unit * p.seqlen_q, blocks = (stacked + b.rows - 1) / b.rows;
  const int64_t splits = b.num_splits;
  call.units.reserve(p.batch * (p.num_heads / b.heads_per_unit) * blocks * splits);
  double pairs = 0;
  for (int64_t batch = 0; batch < p.batch; batch++)
    for (int64_t head = 0; head < p.num_heads; head += b.heads_per_unit)
      for (int64_t row = 0; row < stacked; row += b.rows)
        for (int64_t split = 0; split < splits; split++) {
          Unit unit{(int32_t)batch, (int32_t)head, (int32_t)split, row, 0, 0, 0};
          kernel.find_keys(p, b, unit);
          pairs += (double)unit.keys * std::min<int64_t>(b.rows, stacked - row);
          call.units.push_back(unit);
        }
  const double flops = 2 * pairs * (p.head_dim + p.head_dim_v);
  if (threads > 1 && call.units.size() > 1) {
    const int64_t per_head = blocks * splits;
    call.order.resize(call.units.size());
    for (size_t i = 0; i < call.order.size(); i++) call.order[i] = (int64_t)i;
    auto keys = [&](int64_t i) { return call.units[i].keys; };
    std::stable_sort(call.order.begin(), call.order.end(),
                     [&](int64_t i, int64_t j) { return i / per_head != j / per_head ? i < j : keys(i) > keys(j); });
  }
  if (splits > 1) call.partials.resize(call.units.size() * b.rows * (p.head_dim_v + 2) * call.element);

  parallel_for((int64_t)call.units.size(), threads, flops, run_unit, &call);
  const double combine_flops = 4.0 * call.partials.size() / call.element;
  if (splits > 1) parallel_for((int64_t)call.units.size() / splits, threads, combine_flops, combine, &call);
}

void backward(const Problem& problem, const Gradients& wanted, int threads) {
  Problem p = problem;
  if (!p.batch || !p.num_heads_k) return;
  std::optional<OwnedLists> lists;
  if (p.block_mask) p.blocks = &lists.emplace(p, true).lists;
  const Kernels& kernel = kernels();
  const int64_t element = p.q.dtype == DType::float64 ? 8 : 4;
  Gradients g = wanted;
  p.skipped_pairs = &skipped;
  BackwardCall call{p, g, kernel, kernel.backward_blocking(p, g), 0, {}, {}, 0, 0};
  const BackwardBlocking& b = call.blocking;
  const ScoreSums sums(p, g, b.num_splits);
  call.scratch_bytes = kernel.backward_scratch_bytes(p, b);
  call.head_bytes = b.num_splits * b.partial_size * element;
  const int64_t batch_bytes = b.num_splits > 1 ? p.num_heads * call.head_bytes : 0;
  const int64_t wave = batch_bytes ? std::max<int64_t>(1, max_partial_bytes / batch_bytes) : p.batch;
  if (batch_bytes) call.partials.resize(std::min(wave, p.batch) * batch_bytes);

  for (call.first_batch = 0; call.first_batch < p.batch; call.first_batch += wave) {
    const int64_t end = std::min(call.first_batch + wave, p.batch);
    // Waves come one after the other, so a dbias that the batch shares is added up in the same order for any wave.
    const int64_t batches = g.dense_bias() && !g.dbias.stride[0] ? end - call.first_batch : 1;
    const int64_t heads_k = g.dense_bias() && !g.dbias.stride[1] ? p.num_heads_k : 1;
    std::vector<std::pair<double, KeyUnit>> units;
    double pairs = 0;
    for (int64_t batch = call.first_batch; batch < end; batch += batches)
      for (int64_t head_k = 0; head_k < p.num_heads_k; head_k += heads_k)
        for (int split = 0; split < b.num_splits; split++) {
          const KeyUnit unit{(int32_t)batch, (int32_t)head_k, split, (int32_t)batches, (int32_t)heads_k};
          units.push_back({kernel.count_pairs(p, b, unit), unit});
          pairs += units.back().first;
        }
    std::stable_sort(units.begin(), units.end(), [](auto& x, auto& y) { return x.first > y.first; });
    call.units.clear();
    for (auto& [_, unit] : units) call.units.push_back(unit);

    const double flops = 2 * pairs * (3 * p.head_dim + 2 * p.head_dim_v);
    parallel_for((int64_t)units.size(), threads, flops, run_key_unit, &call);
    const int64_t blocks = (p.seqlen_q + b.block_rows - 1) / b.block_rows;
    if (g.needs_dq() && b.num_splits > 1)
      parallel_for((end - call.first_batch) * p.num_heads * blocks, threads, flops, combine_dq, &call);
  }
  sums.add_to(g);
}

int64_t skipped_pairs() { return __atomic_load_n(&skipped, __ATOMIC_RELAXED); }

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
