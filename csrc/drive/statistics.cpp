// The statistics of the weights of a whole call.
#include <optional>
#include <vector>

#include "block_lists.h"
#include "driver.h"
#include "parallel.h"

namespace fastattn {
namespace {

struct StatisticsPass {
  const Operands& p;
  const Statistics& t;
  const Kernels& kernels;
  const Blocking blocking;
  const int64_t scratch_bytes, bytes;  // bytes: of the key_mass of a group
  std::vector<char> key_mass;          // [batch][num_heads][groups][seqlen_k], empty if nobody asks

  char* of_unit(int64_t unit) { return key_mass.empty() ? nullptr : key_mass.data() + unit * bytes; }
};

void run_unit(void* context, int64_t index, int) {
  StatisticsPass& pass = *(StatisticsPass*)context;
  const int64_t group = index % pass.blocking.num_splits, entry = index / pass.blocking.num_splits;
  pass.kernels.run_statistics_unit(pass.p, pass.t, pass.blocking, entry / pass.p.num_heads, entry % pass.p.num_heads,
                                   group, pass.of_unit(index), thread_scratch(pass.scratch_bytes));
}

void add_groups(void* context, int64_t entry, int) {
  StatisticsPass& pass = *(StatisticsPass*)context;
  pass.kernels.add_groups(pass.p, pass.t, pass.blocking, entry / pass.p.num_heads, entry % pass.p.num_heads,
                          pass.of_unit(entry * pass.blocking.num_splits));
}

}  // namespace

void statistics(Operands& p, const Statistics& t, int threads) {
  if (!p.batch || !p.num_heads) return;
  std::optional<OwnedLists> lists;
  if (p.block_mask) p.blocks = &lists.emplace(p, false).lists;
  const Kernels& kernels = instruction_set().kernels_for(p.q.dtype);
  const Blocking blocking = kernels.statistics_blocking(p);
  const int64_t bytes = p.seqlen_k * element_bytes(p), entries = p.batch * p.num_heads;
  StatisticsPass pass{p, t, kernels, blocking, kernels.statistics_scratch_bytes(p, blocking), bytes, {}};
  if (t.key_mass) pass.key_mass.resize(entries * blocking.num_splits * bytes);
  const double pairs = (double)entries * p.seqlen_q * p.seqlen_k;
  parallel_for(entries * blocking.num_splits, threads, 2 * pairs * p.head_dim, run_unit, &pass);
  if (bytes && t.key_mass)
    parallel_for(entries, threads, (double)entries * blocking.num_splits * p.seqlen_k, add_groups, &pass);
}

}  // namespace fastattn
