// Rows on their way into a cache, or queries before the product: rotary embedding, and rounding to what the target holds.
#pragma once
#include "kernels.h"
#include "rows/rotary.h"

namespace fastattn::FASTATTN_ISA {

// A row as integers -127 ... 127 times a factor. A row that is not finite has a factor of NaN, which shows in the result.
template <class Real>
void store_int8_row(const Real* row, int64_t n, const Tensor& t, int64_t batch, int64_t head, int64_t at_row) {
  Real largest = 0, poison = 0;
  for (int64_t d = 0; d < n; d++) {
    largest = larger(largest, row[d] < 0 ? -row[d] : row[d]);
    poison += row[d] * (Real)0;
  }
  const bool bad = poison != 0;
  const Real factor = largest / (Real)127;
  *(float*)at(*t.factors, batch, head, at_row) = bad ? __builtin_nanf("") : (float)factor;
  int8_t* to = (int8_t*)at(t, batch, head, at_row);
  for (int64_t d = 0; d < n; d++, to += t.stride[3])
    *to = bad ? 1 : factor > 0 ? (int8_t)__builtin_rint((double)row[d] / factor) : 0;
}

template <class Real>
void move_rows(const RowMove& m, const Sequences& s, char* memory) {
  Real* row = (Real*)memory;
  for (int64_t j = 0; j < m.rows; j++) {
    load_row(m.from, m.batch, m.head, j, m.columns, row);
    if (m.turns) turn_row(s.rotary, 0, m.position + j * m.step, row, m.columns, row);
    if (m.to.dtype == DType::int8)
      store_int8_row(row, m.columns, m.to, m.to_batch, m.head, m.to_row + j);
    else
      store_row(row, (Real)1, m.columns, m.to, m.to_batch, m.head, m.to_row + j);
  }
}

}  // namespace fastattn::FASTATTN_ISA
