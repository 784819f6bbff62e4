// Tensors of Python as the kernels see them: through DLPack's C exchange API (torch >= 2.10) or their attributes, without
// torch's headers. std::invalid_argument, which becomes a ValueError, where one does not fit.
#pragma once
#include <pybind11/pybind11.h>

#include <string>
#include <vector>

#include "operands.h"

namespace fastattn::python {

struct View {  // a tensor as it came: sizes and strides of its own rank
  char* data;
  int ndim;
  int64_t shape[4], stride[4];
  DType dtype;
};

// Objects that the call made or looked up, alive until it ends.
using Owned = std::vector<pybind11::object>;

[[noreturn]] void refuse(const char* name, const char* rule);

DType dtype_of(const std::string& name);
DType compute_dtype(DType dtype);
bool is_float(DType dtype);
bool is_index(DType dtype);

// A tensor that a kernel reads. One whose elements are stored negated is copied with its sign.
View read(PyObject* tensor, Owned& owned);

// A tensor that a kernel writes. fastattn has allocated it, so that nobody needs to ask whether it is negated.
View written(PyObject* tensor);

// `view` right-aligned against `sizes`, which it must broadcast to; size 1 becomes stride 0. missing_right: how many of
// the last dimensions it lacks.
Tensor broadcast(const View& view, const char* name, const int64_t (&sizes)[4], int missing_right = 0);

// Every element of `sizes`, the last missing_right of them left out.
Tensor exact(View view, const char* name, const int64_t (&sizes)[4], DType dtype, int missing_right = 0);

// A gradient that broadcasts to `sizes`: contiguous, so that no two elements lie in one place, where threads would meet.
Tensor reduced(const View& view, const char* name, const int64_t (&sizes)[4], int missing_right = 0);

}  // namespace fastattn::python
