// The backward pass of a whole call.
#include <algorithm>
#include <optional>
#include <utility>
#include <vector>

#include "block_lists.h"
#include "driver.h"
#include "parallel.h"
#include "score_sums.h"

namespace fastattn {
namespace {

constexpr int64_t max_partial_bytes = 64 << 20;  // a wave of batches whose dq of all splits fit, but one at least

struct BackwardPass {
  const Operands& p;
  const Gradients& g;
  const Kernels& kernels;
  BackwardBlocking blocking;
  int64_t scratch_bytes;
  std::vector<KeyUnit> units;
  std::vector<char> partials;  // dq of the wave's [batch][head][split]; empty without splits
  int64_t first_batch, head_bytes;

  char* partial(int64_t batch, int64_t head) {
    return partials.data() + ((batch - first_batch) * p.num_heads + head) * head_bytes;
  }
};

void run_key_unit(void* context, int64_t index, int) {
  BackwardPass& pass = *(BackwardPass*)context;
  const KeyUnit& unit = pass.units[index];
  const BackwardBlocking& b = pass.blocking;
  const int64_t group_size = pass.p.group_size();
  char* partial = nullptr;
  if (b.num_splits > 1)
    partial = pass.partial(unit.batch, unit.head_k * group_size) + unit.split * (pass.head_bytes / b.num_splits);
  pass.kernels.run_key_unit(pass.p, pass.g, b, unit, partial, pass.head_bytes, thread_scratch(pass.scratch_bytes));
}

void combine_dq(void* context, int64_t index, int) {
  BackwardPass& pass = *(BackwardPass*)context;
  const Operands& p = pass.p;
  const int64_t rows = pass.blocking.block_rows, blocks = (p.seqlen_q + rows - 1) / rows;
  const int64_t head = index / blocks % p.num_heads, batch = pass.first_batch + index / blocks / p.num_heads;
  pass.kernels.combine_dq(p, pass.g, pass.blocking, batch, head, index % blocks * rows, pass.partial(batch, head),
                          thread_scratch(pass.scratch_bytes));
}

}  // namespace

void backward(Operands& p, const Gradients& wanted, int threads) {
  if (!p.batch || !p.num_heads_k) return;
  std::optional<OwnedLists> lists;
  if (p.block_mask) p.blocks = &lists.emplace(p, true).lists;
  const Kernels& kernels = instruction_set().kernels_for(p.q.dtype);
  Gradients g = wanted;
  p.skipped_pairs = skipped_counter();
  BackwardPass pass{p, g, kernels, kernels.backward_blocking(p, g), 0, {}, {}, 0, 0};
  const BackwardBlocking& b = pass.blocking;
  const ScoreSums sums(p, g, b.num_splits);
  pass.scratch_bytes = kernels.backward_scratch_bytes(p, b);
  pass.head_bytes = b.num_splits * b.partial_size * element_bytes(p);
  const int64_t batch_bytes = b.num_splits > 1 ? p.num_heads * pass.head_bytes : 0;
  const int64_t wave = batch_bytes ? std::max<int64_t>(1, max_partial_bytes / batch_bytes) : p.batch;
  if (batch_bytes) pass.partials.resize(std::min(wave, p.batch) * batch_bytes);

  for (pass.first_batch = 0; pass.first_batch < p.batch; pass.first_batch += wave) {
    const int64_t end = std::min(pass.first_batch + wave, p.batch);
    // Waves come one after the other, so a dbias that the batch shares is added up in the same order for any wave.
    const int64_t batches = g.dense_bias() && !g.dbias.stride[0] ? end - pass.first_batch : 1;
    const int64_t heads_k = g.dense_bias() && !g.dbias.stride[1] ? p.num_heads_k : 1;
    std::vector<std::pair<double, KeyUnit>> units;
    double pairs = 0;
    for (int64_t batch = pass.first_batch; batch < end; batch += batches)
      for (int64_t head_k = 0; head_k < p.num_heads_k; head_k += heads_k)
        for (int split = 0; split < b.num_splits; split++) {
          const KeyUnit unit{(int32_t)batch, (int32_t)head_k, split, (int32_t)batches, (int32_t)heads_k};
          units.push_back({kernels.count_pairs(p, b, unit), unit});
          pairs += units.back().first;
        }
    std::stable_sort(units.begin(), units.end(), [](auto& x, auto& y) { return x.first > y.first; });
    pass.units.clear();
    for (auto& [_, unit] : units) pass.units.push_back(unit);

    const double flops = 2 * pairs * (3 * p.head_dim + 2 * p.head_dim_v);
    parallel_for((int64_t)units.size(), threads, flops, run_key_unit, &pass);
    const int64_t blocks = (p.seqlen_q + b.block_rows - 1) / b.block_rows;
    if (g.needs_dq() && b.num_splits > 1)
      parallel_for((end - pass.first_batch) * p.num_heads * blocks, threads, flops, combine_dq, &pass);
  }
  sums.add_to_gradients();
}

}  // namespace fastattn
