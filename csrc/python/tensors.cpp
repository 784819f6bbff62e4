#include "tensors.h"

#include <stdexcept>

#include "dlpack_exchange.h"

namespace fastattn::python {
namespace py = pybind11;
namespace {

DType dtype_of_dlpack(dlpack::DataType type) {
  const int bits = type.lanes == 1 ? type.bits : 0;
  if (type.code == dlpack::kFloat && bits == 32) return DType::float32;
  if (type.code == dlpack::kFloat && bits == 64) return DType::float64;
  if (type.code == dlpack::kFloat && bits == 16) return DType::float16;
  if (type.code == dlpack::kBfloat && bits == 16) return DType::bfloat16;
  if (type.code == dlpack::kBool && bits == 8) return DType::boolean;
  if (type.code == dlpack::kUInt && bits == 8) return DType::uint8;
  if (type.code == dlpack::kInt && bits == 8) return DType::int8;
  if (type.code == dlpack::kInt && bits == 32) return DType::int32;
  if (type.code == dlpack::kInt && bits == 64) return DType::int64;
  throw std::invalid_argument("a tensor's dtype is not supported by the CPU kernels");
}

View view_by_attributes(PyObject* tensor) {
  py::handle t(tensor);
  if (py::str(t.attr("device").attr("type")).cast<std::string>() != "cpu")
    throw std::invalid_argument("a tensor is not on the CPU");
  View view{};
  py::tuple shape(t.attr("shape")), stride(t.attr("stride")());
  view.ndim = (int)shape.size();
  if (view.ndim > 4) throw std::invalid_argument("a tensor has more than 4 dimensions");
  for (int i = 0; i < view.ndim; i++) {
    view.shape[i] = shape[i].cast<int64_t>();
    view.stride[i] = stride[i].cast<int64_t>();
  }
  view.data = (char*)t.attr("data_ptr")().cast<uintptr_t>();
  const std::string dtype = py::str(t.attr("dtype")).cast<std::string>();
  view.dtype = dtype_of(dtype.substr(dtype.find('.') + 1));
  return view;
}

// The memory of a tensor as it lies there, whatever its sign.
View raw_view(const dlpack::TensorType& type, PyObject* tensor) {
  if (!type.api) return view_by_attributes(tensor);
  dlpack::DLTensor t;
  if (type.api->dltensor_from_py_object_no_sync(tensor, &t)) throw py::error_already_set();
  if (t.device_type != dlpack::kCPU) throw std::invalid_argument("a tensor is not on the CPU");
  if (t.ndim > 4) throw std::invalid_argument("a tensor has more than 4 dimensions");
  View view{(char*)t.data + t.byte_offset, t.ndim, {}, {}, dtype_of_dlpack(t.dtype)};
  for (int i = 0; i < t.ndim; i++) {
    view.shape[i] = t.shape[i];
    view.stride[i] = t.strides[i];
  }
  return view;
}

const dlpack::TensorType& type_of(PyObject* tensor) {
  const dlpack::TensorType* type = dlpack::tensor_type(Py_TYPE(tensor));
  if (!type) throw py::error_already_set();
  return *type;
}

bool negated(const dlpack::TensorType& type, PyObject* tensor) {
  const int answer = dlpack::is_negated(type, tensor);
  if (answer < 0) throw py::error_already_set();
  return answer;
}

View view_of(const dlpack::TensorType& type, PyObject* tensor) {
  const View view = raw_view(type, tensor);
  if (view.data) return view;
  for (int i = 0; i < view.ndim; i++)
    if (view.shape[i] == 0) return view;
  throw std::invalid_argument("a tensor has elements but no memory (fake, meta or freed)");
}

}  // namespace

void refuse(const char* name, const char* rule) { throw std::invalid_argument(std::string(name) + " " + rule); }

DType dtype_of(const std::string& name) {
  if (name == "float32") return DType::float32;
  if (name == "float64") return DType::float64;
  if (name == "bfloat16") return DType::bfloat16;
  if (name == "float16") return DType::float16;
  if (name == "bool") return DType::boolean;
  if (name == "uint8") return DType::uint8;
  if (name == "int8") return DType::int8;
  if (name == "int32") return DType::int32;
  if (name == "int64") return DType::int64;
  throw std::invalid_argument("dtype " + name + " is not supported by the CPU kernels");
}

DType compute_dtype(DType dtype) { return dtype == DType::float64 ? DType::float64 : DType::float32; }

bool is_index(DType dtype) { return dtype == DType::int32 || dtype == DType::int64; }

bool is_float(DType dtype) {
  return dtype == DType::float32 || dtype == DType::float64 || dtype == DType::bfloat16 || dtype == DType::float16;
}

View written(PyObject* tensor) { return view_of(type_of(tensor), tensor); }

View read(PyObject* tensor, Owned& owned) {
  const dlpack::TensorType& type = type_of(tensor);
  if (!negated(type, tensor)) return view_of(type, tensor);
  owned.push_back(py::handle(tensor).attr("resolve_neg")());
  PyObject* copy = owned.back().ptr();
  if (negated(type_of(copy), copy)) throw std::invalid_argument("a tensor stays negated after resolve_neg()");
  return written(copy);
}

Tensor broadcast(const View& view, const char* name, const int64_t (&sizes)[4], int missing_right) {
  Tensor t;
  t.data = view.data;
  t.dtype = view.dtype;
  const int first = 4 - missing_right - view.ndim;
  if (first < 0) refuse(name, "has too many dimensions");
  for (int i = 0; i < view.ndim; i++) {
    if (view.shape[i] != 1 && view.shape[i] != sizes[first + i]) refuse(name, "does not broadcast to the scores");
    t.stride[first + i] = view.shape[i] == 1 ? 0 : view.stride[i];
  }
  static char empty[8];
  if (!t.data) t.data = empty;  // a tensor without elements has no memory, but is not absent; nothing reads this
  return t;
}

Tensor exact(View view, const char* name, const int64_t (&sizes)[4], DType dtype, int missing_right) {
  if (view.ndim != 4 - missing_right) refuse(name, "has a wrong number of dimensions");
  for (; view.ndim < 4; view.ndim++) view.shape[view.ndim] = 1, view.stride[view.ndim] = 0;
  for (int i = 0; i < 4; i++)
    if (view.shape[i] != sizes[i]) refuse(name, "has a size that does not fit the other tensors");
  if (view.dtype != dtype) refuse(name, "has another dtype than q");
  return broadcast(view, name, sizes);
}

Tensor reduced(const View& view, const char* name, const int64_t (&sizes)[4], int missing_right) {
  int64_t next = 1;
  for (int i = view.ndim - 1; i >= 0; i--) {
    if (view.shape[i] > 1 && view.stride[i] != next) refuse(name, "must be contiguous");
    next *= view.shape[i] > 1 ? view.shape[i] : 1;
  }
  return broadcast(view, name, sizes, missing_right);
}

}  // namespace fastattn::python
