#include "key_norms.h"

#include "parallel.h"

namespace fastattn {

std::vector<double> key_norms(const Problem& problem, const Kernels& kernels, const Blocking& blocking, int threads) {
  struct Work {
    const Problem& p;
    const Kernels& kernels;
    const Blocking& blocking;
    int64_t tiles, scratch_bytes;
    std::vector<double> norms;
  } work{problem,
         kernels,
         blocking,
         (problem.seqlen_k + blocking.n_block - 1) / blocking.n_block,
         kernels.scratch_bytes(problem, blocking),
         {}};
  const int64_t count = problem.batch * problem.num_heads_k * work.tiles;
  work.norms.resize(count);
  const double flops = 2.0 * count * blocking.n_block * (problem.head_dim + problem.head_dim_v);
  parallel_for(
      count, threads, flops,
      [](void* context, int64_t index, int) {
        Work& w = *(Work*)context;
        const int64_t row = index / w.tiles;
        w.norms[index] = w.kernels.tile_norm(w.p, w.blocking, row / w.p.num_heads_k, row % w.p.num_heads_k,
                                             index % w.tiles, thread_scratch(w.scratch_bytes));
      },
      &work);
  return std::move(work.norms);
}

}  // namespace fastattn
