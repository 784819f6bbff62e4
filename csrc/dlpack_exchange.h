// The part of DLPack's C exchange API (DLPack 1.2, torch >= 2.10) that reads a tensor without owning it.
#pragma once
#include <Python.h>

#include <cstdint>

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

// The API of a tensor type, or null where it has none; remembered for the last type asked.
inline const ExchangeAPI* exchange_api(PyTypeObject* type) {
  thread_local PyTypeObject* known = nullptr;
  thread_local const ExchangeAPI* api = nullptr;
  if (type == known) return api;
  const ExchangeAPI* found = nullptr;
  if (PyObject* capsule = PyObject_GetAttrString((PyObject*)type, "__dlpack_c_exchange_api__")) {
    found = (const ExchangeAPI*)PyCapsule_GetPointer(capsule, "dlpack_exchange_api");
    if (found && found->version.major != 1) found = nullptr;
    Py_DECREF(capsule);
  }
  PyErr_Clear();
  api = found;
  known = type;
  return found;
}

}  // namespace dlpack
