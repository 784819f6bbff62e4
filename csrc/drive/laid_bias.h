// The bias of a short call in lanes, laid once for all batch entries that share it: windows of an image, padded batches.
#pragma once
#include <vector>

#include "driver.h"

namespace fastattn {

// What p.laid_bias points to from now on; empty, and p as it was, where laying it does not pay. No larger than a bias of
// all heads that the caller holds may be: sequences are short.
inline std::vector<char> lay_bias(Operands& p, const Kernels& kernels, int lanes) {
  constexpr int64_t short_sequence = 128, fewest_entries = 4;
  auto shared = [](const Tensor& t) { return !t || !t.stride[0]; };
  auto alike = [](const Tensor& t) { return !t || !t.stride[2]; };  // for all rows, which is cheaper as it is
  if ((!p.bias && !p.mask) || !shared(p.bias) || !shared(p.mask) || (alike(p.bias) && alike(p.mask))) return {};
  if (p.batch < fewest_entries || p.seqlen_q > short_sequence || p.seqlen_k > short_sequence || p.blocks) return {};
  const int64_t panels = (p.seqlen_q + lanes - 1) / lanes, element = element_bytes(p);
  std::vector<char> laid(p.num_heads * panels * p.seqlen_k * lanes * element);
  std::vector<char> scratch((lanes + 1) * p.seqlen_k * element);
  kernels.lay_bias(p, lanes, laid.data(), scratch.data());
  p.laid_bias = laid.data();
  return laid;
}

}  // namespace fastattn
