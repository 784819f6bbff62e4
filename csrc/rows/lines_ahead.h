// Memory that the next unit will want, fetched beside the products of this one: a few lines at a time, for many at once
// hold up the loads of the products.
#pragma once
#include "rows.h"

namespace fastattn::FASTATTN_ISA {

// Whether the tensors of the call are more than an L2 has room for.
inline bool exceeds_caches(const Operands& p) {
  const double rows = (double)p.num_heads * p.seqlen_q + (double)p.num_heads_k * p.seqlen_k;
  return p.batch * rows * (p.head_dim + p.head_dim_v) * bytes_of(p.q.dtype) > (1 << 20);
}

class LinesAhead {
  static constexpr int64_t line = 64;
  struct Rows {
    const char* first;
    int64_t count, stride, bytes;
  };
  static constexpr int most = 8;
  Rows tensors[most];
  int count = 0, tensor = 0, per_visit = 0;
  int64_t row = 0, offset = 0, lines = 0;

 public:
  // The first `rows` rows of a head of the tensor; one that there is no more room for is left out.
  void add(const Tensor& t, int64_t batch, int64_t head, int64_t rows, int64_t columns) {
    if (!t || t.pages || !rows || count == most) return;
    const int64_t size = bytes_of(t.dtype), bytes = columns * size, stride = t.stride[2] * size;
    Rows added{at(t, batch, head, 0), rows, stride, bytes};
    if (stride == bytes) added = {added.first, 1, 0, rows * bytes};
    tensors[count++] = added;
    lines += added.count * ((added.bytes + line - 1) / line);
  }
  // Of that many visits, each fetches its part.
  void spread(int64_t visits) { per_visit = (int)((lines + visits - 1) / larger<int64_t>(1, visits)); }

  __attribute__((always_inline)) inline void operator()() {
    for (int i = 0; i < per_visit && tensor < count; i++) {
      const Rows& rows = tensors[tensor];
      __builtin_prefetch(rows.first + row * rows.stride + offset, 0, 2);
      offset += line;
      if (offset < rows.bytes) continue;
      offset = 0;
      if (++row == rows.count) row = 0, tensor++;
    }
  }
};

}  // namespace fastattn::FASTATTN_ISA
