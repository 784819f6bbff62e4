// The largest norm of each tile of keys, for a forward pass that skips tiles (skip.h).
#pragma once
#include <vector>

#include "params.h"

namespace fastattn {

// [batch][num_heads_k][tiles], the tiles being those of the blocking; O(seqlen_k * (head_dim + head_dim_v)) time.
std::vector<double> key_norms(const Problem& problem, const Kernels& kernels, const Blocking& blocking, int threads);

}  // namespace fastattn
