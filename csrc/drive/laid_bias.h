// The bias of a short call in lanes, laid once for all batch entries that share it: windows of an image, padded batches.
// Its gradient likewise: in lanes until the last entry has been added.
#pragma once
#include <vector>

#include "driver.h"

namespace fastattn {

// What is laid is no larger than a bias of all heads that the caller holds may be: sequences are short.
inline bool many_short(const Operands& p) {
  constexpr int64_t short_sequence = 128, fewest_entries = 4;
  return p.batch >= fewest_entries && p.seqlen_q <= short_sequence && p.seqlen_k <= short_sequence && !p.blocks;
}

inline std::vector<char> laid_bytes(const Operands& p, int64_t heads, int lanes) {
  return std::vector<char>(heads * ((p.seqlen_q + lanes - 1) / lanes) * p.seqlen_k * lanes * element_bytes(p));
}

// What p.laid_bias points to from now on; empty, and p as it was, where laying it does not pay.
inline std::vector<char> lay_bias(Operands& p, const Kernels& kernels, int lanes) {
  auto shared = [](const Tensor& t) { return !t || !t.stride[0]; };
  auto alike = [](const Tensor& t) { return !t || !t.stride[2]; };  // for all rows, which is cheaper as it is
  if ((!p.bias && !p.mask) || !shared(p.bias) || !shared(p.mask) || (alike(p.bias) && alike(p.mask))) return {};
  if (!many_short(p)) return {};
  std::vector<char> laid = laid_bytes(p, p.num_heads, lanes);
  std::vector<char> scratch(lanes * p.seqlen_k * element_bytes(p));
  kernels.lay_bias(p, lanes, laid.data(), scratch.data());
  p.laid_bias = laid.data();
  return laid;
}

// What g.laid_bias points to from now on, zeros; empty, and g as it was, where dbias is added to at once.
inline std::vector<char> lay_gradient(const Operands& p, Gradients& g, int lanes) {
  if (!g.dense_bias() || g.dbias.stride[0] || !many_short(p)) return {};
  std::vector<char> laid = laid_bytes(p, g.dbias.stride[1] ? p.num_heads : 1, lanes);
  g.laid_bias = laid.data();
  return laid;
}

}  // namespace fastattn
