// Memory that the next unit or panel will want, fetched beside the products of this one: a few lines at a time, for many
// at once hold up the loads of the products.
#pragma once
#include "rows.h"

namespace fastattn::FASTATTN_ISA {

// Whether the rows of the call, and of the other sequences of its call, are more than an L2 has room for.
inline bool exceeds_caches(const Operands& p) { return larger(p.bytes(), p.sequences_bytes) > (1 << 20); }

class LinesAhead {
  static constexpr int64_t line = 64;
  struct Rows {
    const char* first;
    int64_t count, stride, bytes;
  };
  static constexpr int most = 8;
  Rows tensors[most];
  int count = 0, tensor = 0, per_visit = 0;
  int64_t row = 0, lines = 0;
  const char *next = nullptr, *end = nullptr;  // of the row before `row` of `tensor`, which is under way

  bool turn_to_next_row() {
    if (tensor == count) return false;
    const Rows& rows = tensors[tensor];
    next = rows.first + row * rows.stride, end = next + rows.bytes;
    if (++row == rows.count) row = 0, tensor++;
    return true;
  }

 public:
  // Rows row ... row + rows - 1 of a head of the tensor, of each `columns` from `column` on, where those are neighbours;
  // rows that there is no more room for are left out.
  void add(const Tensor& t, int64_t batch, int64_t head, int64_t row, int64_t rows, int64_t columns,
           int64_t column = 0) {
    if (!t || t.pages || t.stride[3] != 1 || !rows || count == most) return;
    if (t.stride[2] == 0) rows = 1;
    const int64_t size = bytes_of(t.dtype), bytes = columns * size, stride = t.stride[2] * size;
    Rows added{at(t, batch, head, row, column), rows, stride, bytes};
    if (stride == bytes) added = {added.first, 1, 0, rows * bytes};
    tensors[count++] = added;
    lines += added.count * ((added.bytes + line - 1) / line);
  }
  // Of that many visits, each fetches its part.
  void spread(int64_t visits) { per_visit = (int)((lines + visits - 1) / larger<int64_t>(1, visits)); }

  // Without a member in the inner loop: the compiler keeps those in memory, and each line would wait for the last one's.
  __attribute__((always_inline)) inline void operator()() {
    for (int64_t left = per_visit; left > 0;) {
      if (next == end && !turn_to_next_row()) return;
      const char *from = next, *to = from + smaller<int64_t>(left * line, end - from);
      for (; from < to; from += line) __builtin_prefetch(from, 0, 2), left--;
      next = smaller(from, end);
    }
  }
};

}  // namespace fastattn::FASTATTN_ISA
