// The backward pass of a whole call.
#include <algorithm>
#include <list>
#include <optional>
#include <utility>
#include <vector>

#include "block_lists.h"
#include "driver.h"
#include "laid_bias.h"
#include "last_queries.h"
#include "parallel.h"
#include "score_sums.h"
#include "sequences.h"

namespace fastattn {
namespace {

constexpr int64_t max_partial_bytes = 64 << 20;  // a wave of batches whose dq of all splits fit, but one at least

BackwardBlocking blocking_of(const Operands& p, const Gradients& wanted, const Kernels& kernels) {
  BackwardBlocking b = kernels.backward_blocking(p, wanted);
  b.last_queries = last_queries(p, kernels);
  return b;
}

// A call, or a sequence of one: its units leave their dq in `partials` where its keys are split.
class BackwardPass {
  std::vector<char> partials;  // of the wave's [batch][head][split]
  int64_t first_batch = 0;

  char* partial(int64_t batch, int64_t head) {
    return partials.data() + ((batch - first_batch) * p.num_heads + head) * head_bytes;
  }

 public:
  const Operands& p;
  Gradients g;
  const Kernels& kernels;
  const BackwardBlocking b;
  const int64_t scratch_bytes, head_bytes;
  const ScoreSums sums;
  const std::vector<char> laid_gradient;

  BackwardPass(const Operands& p, const Gradients& wanted, const Kernels& kernels)
      : p(p),
        g(wanted),
        kernels(kernels),
        b(blocking_of(p, wanted, kernels)),
        scratch_bytes(kernels.backward_scratch_bytes(p, b)),
        head_bytes(b.num_splits * b.partial_size * element_bytes(p)),
        sums(p, g, b.num_splits),
        laid_gradient(lay_gradient(p, g, b.lanes)) {}
  BackwardPass(const BackwardPass&) = delete;

  int64_t batch_bytes() const { return b.num_splits > 1 ? p.num_heads * head_bytes : 0; }
  int64_t query_blocks() const { return (p.seqlen_q + b.block_rows - 1) / b.block_rows; }
  bool combines() const { return g.needs_dq() && b.num_splits > 1; }

  // Makes room for the partial results of a wave.
  void start(int64_t first, int64_t end) {
    first_batch = first;
    if (batch_bytes()) partials.resize((end - first) * batch_bytes());
  }

  void run_unit(const KeyUnit& unit) {
    char* place = nullptr;
    if (b.num_splits > 1)
      place = partial(unit.batch, unit.head_k * p.group_size()) + unit.split * (head_bytes / b.num_splits);
    kernels.run_key_unit(p, g, b, unit, place, head_bytes, thread_scratch(scratch_bytes));
  }
  void add_sums() {
    sums.add_to_gradients();
    if (g.laid_bias) kernels.add_laid_bias(p, g, b.lanes, thread_scratch(scratch_bytes));
  }
  void combine(int64_t index) {
    const int64_t blocks = query_blocks(), head = index / blocks % p.num_heads;
    const int64_t batch = first_batch + index / blocks / p.num_heads;
    kernels.combine_dq(p, g, b, batch, head, index % blocks * b.block_rows, partial(batch, head),
                       thread_scratch(scratch_bytes));
  }
};

// What runs at once: units of some batch entries of one or several passes, longest first.
class Wave {
  struct Piece {
    BackwardPass* pass;
    KeyUnit unit;
    double pairs;
  };
  struct Block {
    BackwardPass* pass;
    int64_t index;
  };
  std::vector<Piece> pieces;
  std::vector<Block> blocks;
  double flops = 0;

 public:
  void add(BackwardPass& pass, int64_t first, int64_t end) {
    pass.start(first, end);
    const Operands& p = pass.p;
    const Tensor& dbias = pass.g.dbias;
    // Waves come one after the other, so a dbias that the batch shares is added up in the same order for any wave.
    const int64_t batches = pass.g.dense_bias() && !dbias.stride[0] ? end - first : 1;
    const int64_t heads_k = pass.g.dense_bias() && !dbias.stride[1] ? p.num_heads_k : 1;
    for (int64_t batch = first; batch < end; batch += batches)
      for (int64_t head_k = 0; head_k < p.num_heads_k; head_k += heads_k)
        for (int split = 0; split < pass.b.num_splits; split++) {
          const KeyUnit unit{(int32_t)batch, (int32_t)head_k, split, (int32_t)batches, (int32_t)heads_k};
          pieces.push_back({&pass, unit, pass.kernels.count_pairs(p, pass.b, unit)});
          flops += 2 * pieces.back().pairs * (3 * p.head_dim + 2 * p.head_dim_v);
        }
    if (!pass.combines()) return;
    for (int64_t i = 0; i < (end - first) * p.num_heads * pass.query_blocks(); i++) blocks.push_back({&pass, i});
  }

  void run(int threads) {
    std::stable_sort(pieces.begin(), pieces.end(), [](auto& x, auto& y) { return x.pairs > y.pairs; });
    parallel_for((int64_t)pieces.size(), threads, flops,
                 [](void* x, int64_t i, int) { ((Piece*)x)[i].pass->run_unit(((Piece*)x)[i].unit); }, pieces.data());
    parallel_for((int64_t)blocks.size(), threads, flops,
                 [](void* x, int64_t i, int) { ((Block*)x)[i].pass->combine(((Block*)x)[i].index); }, blocks.data());
  }
};

}  // namespace

void backward(Operands& p, const Gradients& wanted, int threads) {
  if (!p.batch || !p.num_heads_k) return;
  std::optional<OwnedLists> lists;
  if (p.block_mask) p.blocks = &lists.emplace(p, true).lists;
  p.skipped_pairs = skipped_counter();
  p.ended = region_ended;
  p.in_pairs = multiplies_pairs(p);
  const Kernels& kernels = instruction_set().kernels_for(p.q.dtype);
  const std::vector<char> laid = lay_bias(p, kernels, kernels.backward_blocking(p, wanted).lanes);
  BackwardPass pass(p, wanted, kernels);
  const int64_t bytes = pass.batch_bytes();
  const int64_t at_once = bytes ? std::max<int64_t>(1, max_partial_bytes / bytes) : p.batch;
  for (int64_t first = 0; first < p.batch; first += at_once) {
    Wave wave;
    wave.add(pass, first, std::min(first + at_once, p.batch));
    wave.run(threads);
  }
  pass.add_sums();
}

void backward(Operands& whole, const Gradients& wanted, const Sequences& s, int threads) {
  const PlacedSequences placed(whole, s);
  if (!whole.num_heads_k) return;
  const Kernels& kernels = instruction_set().kernels_for(whole.q.dtype);
  whole.skipped_pairs = skipped_counter();
  whole.ended = region_ended;
  for (int64_t i = 0; i < s.count;) {
    std::list<Operands> calls;
    std::list<BackwardPass> passes;
    Wave wave;
    for (int64_t bytes = 0; i < s.count && (passes.empty() || bytes < max_partial_bytes); i++) {
      calls.push_back(placed.operands(i));
      calls.back().in_pairs = multiplies_pairs(whole);
      BackwardPass& pass = passes.emplace_back(calls.back(), placed.gradients(wanted, i), kernels);
      wave.add(pass, 0, 1);
      bytes += pass.batch_bytes();
    }
    wave.run(threads);
    for (BackwardPass& pass : passes) pass.add_sums();
  }
}

}  // namespace fastattn
