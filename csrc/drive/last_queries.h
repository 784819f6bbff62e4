// The last queries of a head, where they would leave a panel nearly empty: the 49th of a window, the class token of an image.
// The forward pass gives them to `decode`, and the backward pass has their products in the order that decode has.
#pragma once
#include <algorithm>

#include "kernels.h"

namespace fastattn {

// How many they are. By the shape alone, as their bits depend on it.
inline int64_t last_queries(const Operands& p, const Kernels& kernels) {
  constexpr int64_t lanes_worth = 4;     // of a panel, that take the time of one of these queries
  constexpr int64_t whole_vectors = 16;  // columns that the backward pass reads in place
  constexpr int64_t most_rows = 256;     // of a key head, for which decode takes 4 MiB
  const int64_t lanes = kernels.blocking(p).lanes, last = p.seqlen_q % lanes;
  if (!last || last == p.seqlen_q || last * lanes_worth > lanes || last * p.group_size() > most_rows) return 0;
  if (p.blocks || p.rotary) return 0;  // decode: no blocks, and turned keys are rounded
  // Of 16 bits, decode takes columns in another order than rows that are converted, as those of the backward pass.
  if (bytes_of_dtype[(int)p.q.dtype] == 2 || std::min(p.head_dim, p.head_dim_v) < whole_vectors) return 0;
  Operands part = p;
  part.seqlen_q = p.seqlen_q - last;
  const bool splits = kernels.blocking(part).num_splits > 1;
  part.seqlen_q = last;
  return splits || kernels.decode_blocking(part).num_splits > 1 ? 0 : last;
}

}  // namespace fastattn
