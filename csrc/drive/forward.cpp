// The forward pass of a whole call.
#include <optional>
#include <stdexcept>
#include <vector>

#include "block_lists.h"
#include "driver.h"
#include "parallel.h"
#include "units.h"

namespace fastattn {
namespace {

// The kernels of one of the algorithms.
struct Algorithm {
  decltype(Kernels::scratch_bytes) scratch_bytes;
  decltype(Kernels::run_unit) run_unit;
  int64_t least_rows;  // a unit of fewer rows takes as long, for it waits for memory
};

constexpr int64_t most_decode_rows = 4096;  // that a thread has memory for

struct ForwardPass {
  const Operands& p;
  const Kernels& kernels;
  const Algorithm& algorithm;
  const Blocking blocking;
  const int64_t scratch_bytes, element;
  const Units units;
  std::vector<char> partials;  // out, max, sum of every row of every unit; empty without splits

  Partial partial(int64_t unit) {
    const int64_t row = unit * blocking.rows, rows = units.size() * blocking.rows, Dv = p.head_dim_v;
    char* max = partials.data() + (rows * Dv + row) * element;
    return {partials.data() + row * Dv * element, max, max + rows * element};
  }
};

void run_unit(void* context, int64_t index, int) {
  ForwardPass& pass = *(ForwardPass*)context;
  const int64_t unit = pass.units.place(index);
  const Partial partial = pass.blocking.num_splits > 1 ? pass.partial(unit) : Partial{};
  pass.algorithm.run_unit(pass.p, pass.blocking, pass.units.units[unit], partial, thread_scratch(pass.scratch_bytes));
}

void combine(void* context, int64_t index, int) {
  ForwardPass& pass = *(ForwardPass*)context;
  const int64_t unit = index * pass.blocking.num_splits;
  pass.kernels.combine(pass.p, pass.blocking, pass.units.units[unit], pass.partial(unit),
                       thread_scratch(pass.scratch_bytes));
}

int64_t skipped = 0;  // over all calls; added to atomically, without std, which kernels do not know

void run(const Operands& p, const Kernels& kernels, const Algorithm& algorithm, const Blocking& b, int threads) {
  ForwardPass pass{p,
                   kernels,
                   algorithm,
                   b,
                   algorithm.scratch_bytes(p, b),
                   element_bytes(p),
                   Units(p, kernels, b, threads, algorithm.least_rows),
                   {}};
  if (b.num_splits > 1) pass.partials.resize(pass.units.size() * b.rows * (p.head_dim_v + 2) * pass.element);

  const double flops = 2 * pass.units.pairs * (p.head_dim + p.head_dim_v);
  parallel_for(pass.units.size(), threads, flops, run_unit, &pass);
  const double combine_flops = 4.0 * pass.partials.size() / pass.element;
  if (b.num_splits > 1) parallel_for(pass.units.size() / b.num_splits, threads, combine_flops, combine, &pass);
}

}  // namespace

int64_t* skipped_counter() { return &skipped; }
int64_t skipped_pairs() { return __atomic_load_n(&skipped, __ATOMIC_RELAXED); }

void forward(Operands& p, int threads) {
  if (!p.batch || !p.num_heads || !p.seqlen_q) return;
  std::optional<OwnedLists> lists;
  if (p.block_mask) p.blocks = &lists.emplace(p, false).lists;
  const Kernels& kernels = instruction_set().kernels_for(p.q.dtype);
  const Blocking b = kernels.blocking(p);
  std::vector<double> tile_facts;
  if (p.may_skip()) {
    tile_facts.assign(p.batch * p.num_heads_k * ((p.seqlen_k + b.n_block - 1) / b.n_block) * 2, -1.0);
    p.tile_facts = tile_facts.data(), p.skipped_pairs = skipped_counter();
  }
  run(p, kernels, {kernels.scratch_bytes, kernels.run_unit, 1}, b, threads);
}

void decode(Operands& p, int threads) {
  if (p.block_mask) throw std::invalid_argument("block_mask: this kernel takes none");
  if (!p.batch || !p.num_heads || !p.seqlen_q) return;
  if (p.seqlen_q > most_decode_rows / p.group_size()) throw std::invalid_argument("seqlen_q: too many rows a key head");
  const Kernels& kernels = instruction_set().kernels_for(p.q.dtype);
  run(p, kernels, {kernels.decode_scratch_bytes, kernels.run_decode_unit, 8}, kernels.decode_blocking(p), threads);
}

}  // namespace fastattn
