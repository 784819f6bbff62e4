// The forward pass of a whole call, of one sequence length or of many.
#include <algorithm>
#include <memory>
#include <optional>
#include <stdexcept>
#include <vector>

#include "block_lists.h"
#include "driver.h"
#include "laid_bias.h"
#include "last_queries.h"
#include "parallel.h"
#include "sequences.h"
#include "units.h"

namespace fastattn {
namespace {

// The kernels of one of the algorithms.
struct Algorithm {
  decltype(Kernels::blocking) blocking;
  decltype(Kernels::scratch_bytes) scratch_bytes;
  decltype(Kernels::run_unit) run_unit;
  int64_t least_rows;  // a unit of fewer rows takes as long, for it waits for memory
};
Algorithm prefill_of(const Kernels& kernels) { return {kernels.blocking, kernels.scratch_bytes, kernels.run_unit, 1}; }
Algorithm decode_of(const Kernels& kernels) {
  return {kernels.decode_blocking, kernels.decode_scratch_bytes, kernels.run_decode_unit, 8};
}

constexpr int64_t most_decode_rows = 4096;  // that a thread has memory for

// The call of queries first ... first + count - 1 alone.
Operands queries_of(Operands p, int64_t first, int64_t count) {
  for (Tensor* t : {&p.q, &p.out, &p.lse, &p.lse_parts, &p.out_exact, &p.mask, &p.bias, &p.k_start, &p.k_end})
    *t = t->from(0, first);
  p.seqlen_q = count;
  p.diagonal_lo += first, p.diagonal_hi += first, p.query_start += first;
  p.dropout_start.query += first;
  return p;
}

// Takes `last_queries` from `p`, for `decode` to compute them.
std::optional<Operands> take_last_queries(Operands& p, const Kernels& kernels) {
  const int64_t last = last_queries(p, kernels), others = p.seqlen_q - last;
  if (!last) return {};
  Operands rest = queries_of(p, others, last);
  rest.keys_are_near = true;
  p.seqlen_q = others;
  return rest;
}

class ForwardPass {
  const Operands& p;
  const Kernels& kernels;
  const Algorithm algorithm;
  const Blocking blocking;
  const int64_t element;
  const Units units;
  std::vector<char> partials;  // out, max, sum of every row of every unit; empty without splits
  std::unique_ptr<ForwardPass> last;
  int64_t units_per_last = 1;

  Partial partial(int64_t unit) {
    const int64_t row = unit * blocking.rows, rows = units.size() * blocking.rows, Dv = p.head_dim_v;
    char* max = partials.data() + (rows * Dv + row) * element;
    return {partials.data() + row * Dv * element, max, max + rows * element};
  }

 public:
  const int64_t scratch_bytes;

  ForwardPass(const Operands& p, const Kernels& kernels, const Algorithm& algorithm, int threads)
      : p(p),
        kernels(kernels),
        algorithm(algorithm),
        blocking(algorithm.blocking(p)),
        element(element_bytes(p)),
        units(p, kernels, blocking, threads, algorithm.least_rows),
        scratch_bytes(algorithm.scratch_bytes(p, blocking)) {
    if (blocking.num_splits > 1) partials.resize(units.size() * blocking.rows * (p.head_dim_v + 2) * element);
  }

  // The last queries of the heads, computed after the others of their head, while its keys are near.
  void end_with(const Operands& last_queries, int threads) {
    last = std::make_unique<ForwardPass>(last_queries, kernels, decode_of(kernels), threads);
    units_per_last = size() / last->size();
  }

  int64_t size() const { return units.size(); }
  int64_t combinations() const { return blocking.num_splits > 1 ? units.size() / blocking.num_splits : 0; }
  double flops() const { return 2 * units.pairs * (p.head_dim + p.head_dim_v) + (last ? last->flops() : 0); }
  double combine_flops() const { return 4.0 * partials.size() / element; }

  void run_unit(int64_t index) {
    const int64_t unit = units.place(index);
    const Partial place = blocking.num_splits > 1 ? partial(unit) : Partial{};
    algorithm.run_unit(p, blocking, units.units[unit], place, thread_scratch(scratch_bytes));
    if (last && (index + 1) % units_per_last == 0) last->run_unit(index / units_per_last);
  }
  void combine(int64_t index) {
    const int64_t unit = index * blocking.num_splits;
    kernels.combine(p, blocking, units.units[unit], partial(unit), thread_scratch(scratch_bytes));
  }
};

void run(ForwardPass& pass, int threads) {
  parallel_for(
      pass.size(), threads, pass.flops(), [](void* x, int64_t i, int) { ((ForwardPass*)x)->run_unit(i); }, &pass);
  if (const int64_t count = pass.combinations())
    parallel_for(
        count, threads, pass.combine_flops(), [](void* x, int64_t i, int) { ((ForwardPass*)x)->combine(i); }, &pass);
}

// Many passes, the largest first: their units in one loop, then their combinations.
void run(std::vector<ForwardPass>& passes, int threads) {
  struct Place {
    ForwardPass* pass;
    int64_t index;
  };
  std::vector<ForwardPass*> order;
  for (ForwardPass& pass : passes) order.push_back(&pass);
  std::stable_sort(order.begin(), order.end(), [](auto* x, auto* y) { return x->flops() > y->flops(); });
  std::vector<Place> units, combinations;
  double flops = 0, combine_flops = 0;
  for (ForwardPass* pass : order) {
    for (int64_t i = 0; i < pass->size(); i++) units.push_back({pass, i});
    for (int64_t i = 0; i < pass->combinations(); i++) combinations.push_back({pass, i});
    flops += pass->flops(), combine_flops += pass->combine_flops();
  }
  parallel_for((int64_t)units.size(), threads, flops,
               [](void* x, int64_t i, int) { ((Place*)x)[i].pass->run_unit(((Place*)x)[i].index); }, units.data());
  parallel_for((int64_t)combinations.size(), threads, combine_flops,
               [](void* x, int64_t i, int) { ((Place*)x)[i].pass->combine(((Place*)x)[i].index); },
               combinations.data());
}

int64_t skipped = 0;  // over all calls; added to atomically, without std, which kernels do not know

// Room for what prefill finds out about the tiles of keys of a call that may skip some.
std::vector<double> take_tile_facts(Operands& p, const Kernels& kernels) {
  if (!p.may_skip()) return {};
  const int64_t n_block = kernels.blocking(p).n_block;
  std::vector<double> facts(p.batch * p.num_heads_k * ((p.seqlen_k + n_block - 1) / n_block) * 2, -1.0);
  p.tile_facts = facts.data(), p.skipped_pairs = skipped_counter();
  return facts;
}

}  // namespace

int64_t* skipped_counter() { return &skipped; }
int64_t skipped_pairs() { return __atomic_load_n(&skipped, __ATOMIC_RELAXED); }

void forward(Operands& p, int threads) {
  if (!p.batch || !p.num_heads || !p.seqlen_q) return;
  std::optional<OwnedLists> lists;
  if (p.block_mask) p.blocks = &lists.emplace(p, false).lists;
  p.in_pairs = multiplies_pairs(p);
  const Kernels& kernels = instruction_set().kernels_for(p.q.dtype);
  const std::optional<Operands> last = take_last_queries(p, kernels);
  const std::vector<double> tile_facts = take_tile_facts(p, kernels);
  const Blocking b = kernels.blocking(p);
  std::vector<char> laid;
  if (b.heads_per_unit == 1) laid = lay_bias(p, kernels, b.lanes);
  ForwardPass pass(p, kernels, prefill_of(kernels), threads);
  if (last) pass.end_with(*last, threads);
  run(pass, threads);
}

void decode(Operands& p, int threads) {
  if (p.block_mask) throw std::invalid_argument("block_mask: this kernel takes none");
  if (!p.batch || !p.num_heads || !p.seqlen_q) return;
  if (p.seqlen_q > most_decode_rows / p.group_size()) throw std::invalid_argument("seqlen_q: too many rows a key head");
  const Kernels& kernels = instruction_set().kernels_for(p.q.dtype);
  ForwardPass pass(p, kernels, decode_of(kernels), threads);
  run(pass, threads);
}

void forward(Operands& whole, const Sequences& s, int threads) {
  const PlacedSequences placed(whole, s);
  std::vector<char> rotated;
  append(whole, s, placed, rotated, threads);
  if (!whole.num_heads) return;
  const Kernels& kernels = instruction_set().kernels_for(whole.q.dtype);
  std::vector<Operands> calls;
  for (int64_t i = 0; i < s.count; i++)
    if (placed.sequences[i].q_rows) calls.push_back(placed.operands(i));
  std::vector<std::vector<double>> tile_facts;
  std::vector<ForwardPass> passes;
  std::vector<std::optional<Operands>> last(calls.size());
  passes.reserve(calls.size());
  for (Operands& p : calls) {
    p.link_factors();
    p.in_pairs = multiplies_pairs(p);
    const bool few = !p.lse_parts && p.seqlen_q * p.group_size() <= few_rows;
    std::optional<Operands>& its_last = last[passes.size()];
    if (!few) {
      its_last = take_last_queries(p, kernels);
      tile_facts.push_back(take_tile_facts(p, kernels));
    }
    passes.emplace_back(p, kernels, few ? decode_of(kernels) : prefill_of(kernels), threads);
    if (its_last) passes.back().end_with(*its_last, threads);
  }
  run(passes, threads);
}

}  // namespace fastattn
