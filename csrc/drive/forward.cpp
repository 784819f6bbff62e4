// The forward pass of a whole call.
#include <algorithm>
#include <optional>
#include <stdexcept>
#include <vector>

#include "block_lists.h"
#include "driver.h"
#include "parallel.h"

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
  Blocking blocking;
  int64_t scratch_bytes;
  std::vector<Unit> units;  // the splits of a row block stand together when they are made
  std::vector<int64_t> order;
  std::vector<char> partials;  // out, max, sum of every row of every unit; empty without splits
  int64_t element;

  Partial partial(int64_t unit) {
    const int64_t row = unit * blocking.rows, rows = (int64_t)units.size() * blocking.rows, Dv = p.head_dim_v;
    char* max = partials.data() + (rows * Dv + row) * element;
    return {partials.data() + row * Dv * element, max, max + rows * element};
  }
};

void run_unit(void* context, int64_t index, int) {
  ForwardPass& pass = *(ForwardPass*)context;
  const int64_t unit = pass.order.empty() ? index : pass.order[index];
  const Partial partial = pass.blocking.num_splits > 1 ? pass.partial(unit) : Partial{};
  pass.algorithm.run_unit(pass.p, pass.blocking, pass.units[unit], partial, thread_scratch(pass.scratch_bytes));
}

void combine(void* context, int64_t index, int) {
  ForwardPass& pass = *(ForwardPass*)context;
  const int64_t unit = index * pass.blocking.num_splits;
  pass.kernels.combine(pass.p, pass.blocking, pass.units[unit], pass.partial(unit), thread_scratch(pass.scratch_bytes));
}

int64_t skipped = 0;  // over all calls; added to atomically, without std, which kernels do not know

void run(const Operands& p, const Kernels& kernels, const Algorithm& algorithm, const Blocking& b, int threads) {
  ForwardPass pass{p, kernels, algorithm, b, algorithm.scratch_bytes(p, b), {}, {}, {}, element_bytes(p)};

  // A head's row blocks longest first, so that the last units are short ones and the threads end together.
  const int64_t stacked = b.heads_per_unit * p.seqlen_q, blocks = (stacked + b.rows - 1) / b.rows;
  const int64_t splits = b.num_splits;
  pass.units.reserve(p.batch * (p.num_heads / b.heads_per_unit) * blocks * splits);
  double pairs = 0;
  for (int64_t batch = 0; batch < p.batch; batch++)
    for (int64_t head = 0; head < p.num_heads; head += b.heads_per_unit)
      for (int64_t row = 0; row < stacked; row += b.rows)
        for (int64_t split = 0; split < splits; split++) {
          Unit unit{(int32_t)batch, (int32_t)head, (int32_t)split, row, 0, 0, 0};
          kernels.find_keys(p, b, unit);
          pairs += (double)unit.keys * std::max(std::min<int64_t>(b.rows, stacked - row), algorithm.least_rows);
          pass.units.push_back(unit);
        }
  const double flops = 2 * pairs * (p.head_dim + p.head_dim_v);
  if (threads > 1 && pass.units.size() > 1) {
    const int64_t per_head = blocks * splits;
    pass.order.resize(pass.units.size());
    for (size_t i = 0; i < pass.order.size(); i++) pass.order[i] = (int64_t)i;
    auto keys = [&](int64_t i) { return pass.units[i].keys; };
    std::stable_sort(pass.order.begin(), pass.order.end(),
                     [&](int64_t i, int64_t j) { return i / per_head != j / per_head ? i < j : keys(i) > keys(j); });
  }
  if (splits > 1) pass.partials.resize(pass.units.size() * b.rows * (p.head_dim_v + 2) * pass.element);

  parallel_for((int64_t)pass.units.size(), threads, flops, run_unit, &pass);
  const double combine_flops = 4.0 * pass.partials.size() / pass.element;
  if (splits > 1) parallel_for((int64_t)pass.units.size() / splits, threads, combine_flops, combine, &pass);
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
