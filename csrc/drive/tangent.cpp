// The forward-mode pass of a whole call.
#include <optional>

#include "block_lists.h"
#include "driver.h"
#include "parallel.h"
#include "units.h"

namespace fastattn {
namespace {

struct TangentPass {
  const Operands& p;
  const Tangents& tangents;
  const Kernels& kernels;
  const Blocking blocking;
  const int64_t scratch_bytes;
  const Units units;
};

void run_unit(void* context, int64_t index, int) {
  const TangentPass& pass = *(const TangentPass*)context;
  const Unit& unit = pass.units.units[pass.units.place(index)];
  pass.kernels.run_tangent_unit(pass.p, pass.tangents, pass.blocking, unit, thread_scratch(pass.scratch_bytes));
}

}  // namespace

void tangent(Operands& p, const Tangents& tangents, int threads) {
  if (!p.batch || !p.num_heads || !p.seqlen_q) return;
  std::optional<OwnedLists> lists;
  if (p.block_mask) p.blocks = &lists.emplace(p, false).lists;
  const Kernels& kernels = instruction_set().kernels_for(p.q.dtype);
  const Blocking blocking = kernels.tangent_blocking(p);
  TangentPass pass{
      p, tangents, kernels, blocking, kernels.tangent_scratch_bytes(p, blocking), Units(p, kernels, blocking, threads)};
  const double flops = 6 * pass.units.pairs * (p.head_dim + p.head_dim_v);
  parallel_for(pass.units.size(), threads, flops, run_unit, &pass);
}

}  // namespace fastattn
