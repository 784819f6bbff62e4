// Sizes that a caller passes, multiplied without wrapping round: the one place that makes sure that no product of them
// which the driver or the kernels form is more than an int64 holds.
#pragma once
#include <algorithm>
#include <initializer_list>
#include <stdexcept>

#include "operands.h"

namespace fastattn::python {

inline void check_product(std::initializer_list<int64_t> sizes) {
  int64_t product = 1;
  for (int64_t size : sizes)
    if (__builtin_mul_overflow(product, std::max<int64_t>(size, 1), &product))
      throw std::invalid_argument("the sizes of q, k and v are too large to be multiplied");
}
inline int64_t checked_sum(int64_t a, int64_t b) {
  int64_t sum;
  if (__builtin_add_overflow(a, b, &sum)) check_product({INT64_MAX, INT64_MAX});
  return sum;
}

// Whatever is allocated or addressed for a call has at most so many bytes: a row of either head_dim for each query or key
// of each head, once for each of up to 32 splits, in elements of 8 bytes; lengths and columns rounded up to blocks.
inline void check_sizes(const Operands& p) {
  constexpr int64_t bytes = 32 * 8, most_rounded_rows = 512, most_rounded_columns = 64;
  const int64_t rows = checked_sum(std::max(p.seqlen_q, p.seqlen_k), most_rounded_rows);
  const int64_t columns = checked_sum(checked_sum(p.head_dim, p.head_dim_v), most_rounded_columns);
  check_product({p.batch, std::max(p.num_heads, p.num_heads_k), rows, columns, bytes});
  if (std::max({p.batch, p.num_heads, p.num_heads_k}) > INT32_MAX)  // units number them so
    throw std::invalid_argument("batch and num_heads must be below 2^31");
}

}  // namespace fastattn::python
