// Where the rows of a tensor lie: all that kernels know of layouts. A kernel names a row by batch, head and position and
// asks for one row, for a run of rows beside each other (`tile_rows`) or for listed rows (`gather_rows`).
//
//   dense   row i of (batch, head) lies `stride[2]` behind row i - 1: `at` is the only place that says so
//   csr     the same tensors, read by `gather_rows` at the keys that a query lists
//   packed  dense: the driver gives each sequence Operands of its own, whose tensors start with its first row
//   paged   row i lies in the page that the table of the sequence names: `at` looks it up, `runs_on` says where rows lie
//           in one run
//
// The rows of an int8 cache have a factor each, which `load_row` applies.
#pragma once
#include "convert.h"
#include "tile/microkernel.h"

namespace fastattn::FASTATTN_ISA {

FASTATTN_INLINE char* at(const Tensor& t, int64_t b, int64_t h, int64_t row, int64_t column = 0) {
  if (t.pages) {
    row += t.pages->first;
    b = t.pages->table[row / t.pages->size], row %= t.pages->size;
  }
  int64_t offset = b * t.stride[0] + h * t.stride[1] + row * t.stride[2] + column * t.stride[3];
  return t.data + offset * bytes_of(t.dtype);
}

// Whether `count` rows from `row` on lie stride[2] apart.
FASTATTN_INLINE bool runs_on(const Tensor& t, int64_t row, int64_t count) {
  return !t.pages || (t.pages->first + row) % t.pages->size + count <= t.pages->size;
}

// Whether the lines of a tile of rows share so few sets of an L1 that they throw each other out.
FASTATTN_INLINE bool crowds(const Tensor& t) { return t.stride[2] && t.stride[2] * bytes_of(t.dtype) % 512 == 0; }

FASTATTN_INLINE float factor_of(const Tensor& t, int64_t batch, int64_t head, int64_t row) {
  return *(const float*)at(*t.factors, batch, head, row);
}

// Row `row` as Real.
template <class Real>
FASTATTN_INLINE void load_row(const Tensor& t, int64_t batch, int64_t head, int64_t row, int64_t columns, Real* to) {
  load_row(at(t, batch, head, row), t.dtype, t.stride[3], columns, to);
  if (!t.factors) return;
  const Real factor = (Real)factor_of(t, batch, head, row);
  for (int64_t d = 0; d < columns; d++) to[d] *= factor;
}
template <class Real>
FASTATTN_INLINE void store_row(const Real* from, Real factor, int64_t columns, const Tensor& t, int64_t batch,
                               int64_t head, int64_t row) {
  store_row(from, factor, columns, at(t, batch, head, row), t.dtype, t.stride[3]);
}

// The one element of a row that has one.
template <class Real>
FASTATTN_INLINE Real load_number(const Tensor& t, int64_t batch, int64_t head, int64_t row = 0, int64_t column = 0) {
  return load_scalar<Real>(at(t, batch, head, row, column), t.dtype);
}

// Whether the rows can be read as they lie: Real, side by side.
template <class Real>
FASTATTN_INLINE bool lies_as(const Tensor& t) {
  return t.dtype == dtype_of<Real> && t.stride[3] == 1;
}

// Rows from `row` on and their columns from `column` on, if they lie as Real.
template <class Real>
FASTATTN_INLINE TileRows<Real> rows_in_place(const Tensor& t, int64_t batch, int64_t head, int64_t row,
                                             int64_t column = 0) {
  return {(const Real*)at(t, batch, head, row, column), t.stride[2]};
}

// Rows row ... row + count - 1: in place if they lie as Real, else (or if asked) copied into buffer, `stride` apart.
template <class Real>
TileRows<Real> tile_rows(const Tensor& t, int64_t batch, int64_t head, int64_t row, int64_t count, int64_t columns,
                         Real* buffer, int64_t stride, bool copies = false) {
  if (!copies && lies_as<Real>(t) && runs_on(t, row, count)) return rows_in_place<Real>(t, batch, head, row);
  for (int64_t j = 0; j < count; j++) load_row(t, batch, head, row + j, columns, buffer + j * stride);
  return {buffer, stride};
}

// Rows listed[0] ... listed[n - 1]: in place if they are whole vectors of Real, else copied, padded by the zeros that
// `copies` has there already.
template <class Real>
FASTATTN_INLINE void gather_rows(const Tensor& t, int64_t batch, int64_t head, const int64_t* listed, int64_t n,
                                 int64_t columns, Real* copies, const Real** rows) {
  const int64_t stride = round_up(columns, VL<Real>), row_bytes = t.stride[2] * bytes_of(t.dtype);
  const char* first = at(t, batch, head, 0);
  if (lies_as<Real>(t) && stride == columns) {
    for (int64_t j = 0; j < n; j++) rows[j] = (const Real*)(first + listed[j] * row_bytes);
  } else {
    for (int64_t j = 0; j < n; j++) {
      load_row(first + listed[j] * row_bytes, t.dtype, t.stride[3], columns, copies + j * stride);
      rows[j] = copies + j * stride;
    }
  }
}

// The bytes of rows row ... row + count - 1, side by side and `bytes` apart; what lies behind `columns` elements is left.
FASTATTN_INLINE void copy_rows(const Tensor& t, int64_t batch, int64_t head, int64_t row, int64_t count,
                               int64_t columns, char* copies, int64_t bytes) {
  const int64_t size = bytes_of(t.dtype), step = t.stride[3] * size;
  for (int64_t j = 0; j < count; j++) {
    const char* from = at(t, batch, head, row + j);
    char* to = copies + j * bytes;
    if (step == size) {
      memcpy(to, from, columns * size);
      continue;
    }
    for (int64_t d = 0; d < columns; d++, from += step, to += size) {
      if (size == 1)
        *to = *from;
      else if (size == 2)
        memcpy(to, from, 2);
      else if (size == 4)
        memcpy(to, from, 4);
      else
        memcpy(to, from, 8);
    }
  }
}

// Fetches `columns` elements of a row, if they lie side by side.
FASTATTN_INLINE void prefetch_row(const Tensor& t, int64_t batch, int64_t head, int64_t row, int64_t columns) {
  const char* first = at(t, batch, head, row);
  const int64_t bytes = columns * bytes_of(t.dtype);
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(first + i, 0, 2);
}

}  // namespace fastattn::FASTATTN_ISA
