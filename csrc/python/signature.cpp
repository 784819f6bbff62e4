#include "arguments.h"
#include "dlpack_exchange.h"

namespace fastattn::python {
namespace {

// False, without a Python error, for what is not a plain CPU tensor. Whether it is negated need not be asked here: that
// decides nothing, and the functions that read it ask.
bool describe(PyObject* object, dlpack::DLTensor& t) {
  const dlpack::TensorType* type = dlpack::tensor_type(Py_TYPE(object));
  const bool plain = type && type->api && !type->dispatches &&
                     type->api->dltensor_from_py_object_no_sync(object, &t) == 0 && t.device_type == dlpack::kCPU;
  if (!plain) PyErr_Clear();
  return plain;
}

int64_t dtype_and_rank(const dlpack::DLTensor& t) {
  return t.dtype.code | t.dtype.bits << 8 | (int64_t)t.dtype.lanes << 16 | (int64_t)t.ndim << 32;
}

}  // namespace

PyObject* signature(PyObject*, PyObject* const* args, Py_ssize_t count) {
  constexpr Py_ssize_t qkv = 3, most_extras = 8, most_dimensions = 4;
  int64_t key[qkv * 3 + most_extras * (1 + most_dimensions)];
  if (count < qkv || count > qkv + most_extras) Py_RETURN_NONE;
  dlpack::DLTensor t[qkv];
  Py_ssize_t n = 0;
  for (Py_ssize_t i = 0; i < qkv; i++) {
    if (!describe(args[i], t[i]) || t[i].ndim != 4) Py_RETURN_NONE;
    key[n++] = dtype_and_rank(t[i]), key[n++] = t[i].shape[1], key[n++] = t[i].shape[3];
  }
  const auto& [q, k, v] = t;
  const int64_t batch = q.shape[0], seqlen_q = q.shape[2], seqlen_k = k.shape[2];
  if (k.shape[0] != batch || v.shape[0] != batch || v.shape[2] != seqlen_k) Py_RETURN_NONE;
  const int64_t sizes[] = {1, batch, q.shape[1], seqlen_q, seqlen_k, seqlen_q + seqlen_k - 1};
  for (Py_ssize_t i = qkv; i < count; i++) {
    if (args[i] == Py_None) {
      key[n++] = -1;
      continue;
    }
    dlpack::DLTensor extra;
    if (!describe(args[i], extra) || extra.ndim > most_dimensions) Py_RETURN_NONE;
    key[n++] = dtype_and_rank(extra);
    for (int d = 0; d < extra.ndim; d++) {
      int64_t equal = 0;  // one bit for each of `sizes`
      for (int64_t bit = 0; bit < 6; bit++) equal |= (int64_t)(extra.shape[d] == sizes[bit]) << bit;
      key[n++] = equal ? equal : ~extra.shape[d];  // below 0, so that it is no set of bits
    }
  }
  PyObject *pair = PyTuple_New(2), *lengths = PyTuple_New(3);
  PyObject* bytes = PyBytes_FromStringAndSize((const char*)key, n * (Py_ssize_t)sizeof *key);
  PyObject* numbers[] = {PyLong_FromLongLong(batch), PyLong_FromLongLong(seqlen_q), PyLong_FromLongLong(seqlen_k)};
  if (!pair || !lengths || !bytes || !numbers[0] || !numbers[1] || !numbers[2]) {
    for (PyObject* object : {pair, lengths, bytes, numbers[0], numbers[1], numbers[2]}) Py_XDECREF(object);
    return nullptr;
  }
  for (int i = 0; i < 3; i++) PyTuple_SET_ITEM(lengths, i, numbers[i]);
  PyTuple_SET_ITEM(pair, 0, bytes), PyTuple_SET_ITEM(pair, 1, lengths);
  return pair;
}

PyObject* shapes(PyObject*, PyObject* const* args, Py_ssize_t count) {
  constexpr Py_ssize_t most = 16, most_dimensions = 4;
  int64_t key[most * (1 + most_dimensions)];
  if (count > most) Py_RETURN_NONE;
  Py_ssize_t n = 0;
  for (Py_ssize_t i = 0; i < count; i++) {
    if (args[i] == Py_None || PyLong_CheckExact(args[i])) {
      key[n++] = args[i] == Py_None ? -1 : -2;
      continue;
    }
    dlpack::DLTensor t;
    if (!describe(args[i], t) || t.ndim > most_dimensions) Py_RETURN_NONE;
    key[n++] = dtype_and_rank(t);
    for (int d = 0; d < t.ndim; d++) key[n++] = t.shape[d];
  }
  return PyBytes_FromStringAndSize((const char*)key, n * (Py_ssize_t)sizeof *key);
}

}  // namespace fastattn::python
