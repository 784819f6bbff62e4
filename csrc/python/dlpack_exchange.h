// The part of DLPack's C exchange API (DLPack 1.2, torch >= 2.10) that reads a tensor without owning it.
#pragma once
#include <Python.h>

#include <cstdint>
#include <string_view>

namespace dlpack {

enum : uint8_t { kInt = 0, kUInt = 1, kFloat = 2, kBfloat = 4, kBool = 6 };
enum : int32_t { kCPU = 1 };

struct DataType {
  uint8_t code, bits;
  uint16_t lanes;
};
struct DLTensor {
  void* data;
  int32_t device_type, device_id;
  int32_t ndim;
  DataType dtype;
  int64_t *shape, *strides;
  uint64_t byte_offset;
};
struct ExchangeAPI {
  struct {
    uint32_t major, minor;
  } version;
  ExchangeAPI* previous;
  void *allocator, *managed_from_py_object, *managed_to_py_object;
  int (*dltensor_from_py_object_no_sync)(void* py_object, DLTensor* out);  // borrowed while the object lives
  void* current_work_stream;
};

// What is known of a tensor type: its API, null where it has none, and its method is_neg.
struct TensorType {
  PyTypeObject* type = nullptr;  // owned, as is_neg, so that no other type takes its address
  PyObject* is_neg = nullptr;
  PyCFunction is_neg_in_c = nullptr;  // the same without a detour, where it is torch's own method; else null
  const ExchangeAPI* api = nullptr;
  bool dispatches = false;  // takes operators apart itself (fake tensors, wrappers): its elements may lie elsewhere
};

inline bool find_tensor_type(PyTypeObject* type, TensorType& found) {
  PyObject* is_neg = PyObject_GetAttrString((PyObject*)type, "is_neg");
  if (!is_neg) return false;
  const ExchangeAPI* api = nullptr;
  if (PyObject* capsule = PyObject_GetAttrString((PyObject*)type, "__dlpack_c_exchange_api__")) {
    api = (const ExchangeAPI*)PyCapsule_GetPointer(capsule, "dlpack_exchange_api");
    if (api && api->version.major != 1) api = nullptr;
    Py_DECREF(capsule);
  }
  PyErr_Clear();
  PyObject* dispatch = PyObject_GetAttrString((PyObject*)type, "__torch_dispatch__");
  const bool dispatches =
      dispatch && !(PyCFunction_Check(dispatch) &&
                    ((PyCFunctionObject*)dispatch)->m_ml->ml_name == std::string_view("_disabled_torch_dispatch_impl"));
  Py_XDECREF(dispatch);
  PyErr_Clear();
  Py_INCREF(type);
  Py_XDECREF(found.type), Py_XDECREF(found.is_neg);
  const bool in_c = Py_IS_TYPE(is_neg, &PyMethodDescr_Type);
  const PyMethodDef* method = in_c ? ((PyMethodDescrObject*)is_neg)->d_method : nullptr;
  found = {type, is_neg, method && method->ml_flags == METH_NOARGS ? method->ml_meth : nullptr, api, dispatches};
  return true;
}

// Null, with a Python error set, for what is no tensor. The last two types are remembered: torch.Tensor and Parameter.
inline const TensorType* tensor_type(PyTypeObject* type) {
  thread_local TensorType known[2];
  thread_local int oldest = 0;
  for (const TensorType& one : known)
    if (one.type == type) return &one;
  TensorType& place = known[oldest];
  if (!find_tensor_type(type, place)) return nullptr;
  oldest = !oldest;
  return &place;
}

// Whether a tensor's elements are stored with the other sign (z.conj().imag), which DLPack does not tell; -1 and a Python
// error if that cannot be known.
inline int is_negated(const TensorType& type, PyObject* tensor) {
  PyObject* answer =
      type.is_neg_in_c ? type.is_neg_in_c(tensor, nullptr) : PyObject_Vectorcall(type.is_neg, &tensor, 1, nullptr);
  if (!answer) return -1;
  const int negated = answer == Py_False ? 0 : PyObject_IsTrue(answer);
  Py_DECREF(answer);
  return negated;
}

}  // namespace dlpack
