// The buffers that the units of a backward pass fill for the gradients of tensor terms, and their sums.
#pragma once
#include <algorithm>
#include <utility>
#include <vector>

#include "kernels.h"

namespace fastattn {

class ScoreSums {
  struct Buffer {
    std::vector<double> numbers;  // [batch][num_heads][parts][n]
    int64_t parts, n;
    Tensor target;
    int dimension;  // of the target, along which the numbers lie; its stride is 0 where they all add up
  };

  const Operands& p;
  std::vector<Buffer> buffers;

  double* add(const Tensor& target, SumsOver over, int64_t splits) {
    const bool diagonals = over == SumsOver::diagonals;
    const int64_t parts = diagonals ? splits : 1, n = diagonals                   ? p.num_diagonals()
                                                      : over == SumsOver::queries ? p.seqlen_q
                                                      : over == SumsOver::keys    ? p.seqlen_k
                                                                                  : splits;
    std::vector<double> numbers(std::max<int64_t>(p.batch * p.num_heads * parts * n, 1));
    buffers.push_back({std::move(numbers), parts, n, target, over == SumsOver::queries ? 2 : 3});
    return buffers.back().numbers.data();
  }

 public:
  // Sets the pointers in g to buffers that live as long as this.
  ScoreSums(const Operands& p, Gradients& g, int64_t splits) : p(p) {
    for (const TensorTerm& term : tensor_terms)
      if (term.sums && g.*term.gradient) g.*term.sums = add(g.*term.gradient, term.over, splits);
    if (!g.dbias || g.dense_bias()) return;
    if (g.dbias.stride[3])
      g.key_sums = add(g.dbias, SumsOver::keys, splits);
    else
      g.query_sums = add(g.dbias, SumsOver::queries, splits);
  }

  // Adds the numbers to the gradients, in one order whatever thread left them.
  void add_to_gradients() const {
    for (const Buffer& buffer : buffers)
      for (int64_t part = 0; part < p.batch * p.num_heads * buffer.parts; part++) {
        const Tensor& t = buffer.target;
        const int64_t row = part / buffer.parts;
        double* to = (double*)t.data + row / p.num_heads * t.stride[0] + row % p.num_heads * t.stride[1];
        const double* numbers = buffer.numbers.data() + part * buffer.n;
        for (int64_t i = 0; i < buffer.n; i++) to[i * t.stride[buffer.dimension]] += numbers[i];
      }
  }
};

}  // namespace fastattn
