// The Python module: tensors in through DLPack's C exchange API (torch >= 2.10) or their attributes, no torch headers.
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "dlpack_exchange.h"
#include "driver.h"

namespace py = pybind11;
using fastattn::Csr;
using fastattn::DType;
using fastattn::Gradients;
using fastattn::Problem;
using fastattn::Tensor;

namespace {

struct View {  // a tensor as it came: sizes and strides of its own rank
  char* data;
  int ndim;
  int64_t shape[4], stride[4];
  DType dtype;
};

DType dtype_of(const std::string& name) {
  if (name == "float32") return DType::float32;
  if (name == "float64") return DType::float64;
  if (name == "bfloat16") return DType::bfloat16;
  if (name == "float16") return DType::float16;
  if (name == "bool") return DType::boolean;
  if (name == "uint8") return DType::uint8;
  if (name == "int32") return DType::int32;
  if (name == "int64") return DType::int64;
  throw std::invalid_argument("dtype " + name + " is not supported by the CPU kernels");
}

DType dtype_of(dlpack::DataType type) {
  const int bits = type.lanes == 1 ? type.bits : 0;
  if (type.code == dlpack::kFloat && bits == 32) return DType::float32;
  if (type.code == dlpack::kFloat && bits == 64) return DType::float64;
  if (type.code == dlpack::kFloat && bits == 16) return DType::float16;
  if (type.code == dlpack::kBfloat && bits == 16) return DType::bfloat16;
  if (type.code == dlpack::kBool && bits == 8) return DType::boolean;
  if (type.code == dlpack::kUInt && bits == 8) return DType::uint8;
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

// Copies that the call made, alive until it ends.
using Owned = std::vector<py::object>;

// The memory of a tensor as it lies there, whatever its sign.
View raw_view(const dlpack::TensorType& type, PyObject* tensor) {
  if (!type.api) return view_by_attributes(tensor);
  dlpack::DLTensor t;
  if (type.api->dltensor_from_py_object_no_sync(tensor, &t)) throw py::error_already_set();
  if (t.device_type != dlpack::kCPU) throw std::invalid_argument("a tensor is not on the CPU");
  if (t.ndim > 4) throw std::invalid_argument("a tensor has more than 4 dimensions");
  View view{(char*)t.data + t.byte_offset, t.ndim, {}, {}, dtype_of(t.dtype)};
  for (int i = 0; i < t.ndim; i++) {
    view.shape[i] = t.shape[i];
    view.stride[i] = t.strides[i];
  }
  return view;
}

// A tensor that a kernel writes: fastattn has allocated it, so that it is not negated.
View written_view(PyObject* tensor) {
  const dlpack::TensorType* type = dlpack::tensor_type(Py_TYPE(tensor));
  if (!type) throw py::error_already_set();
  const View view = raw_view(*type, tensor);
  bool empty = false;
  for (int i = 0; i < view.ndim; i++) empty |= view.shape[i] == 0;
  if (!view.data && !empty) throw std::invalid_argument("a tensor has elements but no memory (fake, meta or freed)");
  return view;
}

bool is_negated(PyObject* tensor) {
  const dlpack::TensorType* type = dlpack::tensor_type(Py_TYPE(tensor));
  const int negated = type ? dlpack::is_negated(*type, tensor) : -1;
  if (negated < 0) throw py::error_already_set();
  return negated;
}

View view(PyObject* tensor, Owned& owned) {
  const View view = written_view(tensor);
  if (!is_negated(tensor)) return view;
  owned.push_back(py::handle(tensor).attr("resolve_neg")());
  if (is_negated(owned.back().ptr())) throw std::invalid_argument("a tensor stays negated after resolve_neg()");
  return written_view(owned.back().ptr());
}

[[noreturn]] void mismatch(const char* name, const char* rule) {
  throw std::invalid_argument(std::string(name) + " " + rule);
}

// `view` right-aligned against `sizes`, which it must broadcast to; size 1 becomes stride 0.
Tensor broadcast(const View& view, const char* name, const int64_t (&sizes)[4], int missing_right = 0) {
  Tensor t;
  t.data = view.data;
  t.dtype = view.dtype;
  const int first = 4 - missing_right - view.ndim;
  if (first < 0) mismatch(name, "has too many dimensions");
  for (int i = 0; i < view.ndim; i++) {
    if (view.shape[i] != 1 && view.shape[i] != sizes[first + i]) mismatch(name, "does not broadcast to the scores");
    t.stride[first + i] = view.shape[i] == 1 ? 0 : view.stride[i];
  }
  static char empty[8];
  if (!t.data) t.data = empty;  // no element is ever read; absent is another thing
  return t;
}

Tensor exact(const View& view, const char* name, const int64_t (&sizes)[4], DType dtype) {
  if (view.ndim != 4) mismatch(name, "must have 4 dimensions");
  for (int i = 0; i < 4; i++)
    if (view.shape[i] != sizes[i]) mismatch(name, "has a size that does not fit the other tensors");
  if (view.dtype != dtype) mismatch(name, "has another dtype than q");
  return broadcast(view, name, sizes);
}

Tensor optional(PyObject* object, const char* name, const int64_t (&sizes)[4], Owned& owned, int missing_right = 0) {
  return object == Py_None ? Tensor{} : broadcast(view(object, owned), name, sizes, missing_right);
}

// None, or every element of `sizes` (missing_right of them left out) in one dtype: what kernels write.
Tensor complete(PyObject* object, const char* name, const int64_t (&sizes)[4], DType dtype, Owned& owned,
                int missing_right = 0) {
  if (object == Py_None) return Tensor{};
  View v = view(object, owned);
  if (v.ndim != 4 - missing_right) mismatch(name, "has a wrong number of dimensions");
  for (; v.ndim < 4; v.ndim++) v.shape[v.ndim] = 1, v.stride[v.ndim] = 0;
  return exact(v, name, sizes, dtype);
}

// None, or a gradient that broadcasts to `sizes`: no two elements in one place, or threads would meet there.
Tensor reduced(PyObject* object, const char* name, const int64_t (&sizes)[4], Owned& owned, int missing_right = 0) {
  if (object == Py_None) return Tensor{};
  const View v = view(object, owned);
  int64_t next = 1;
  for (int i = v.ndim - 1; i >= 0; i--) {
    if (v.shape[i] > 1 && v.stride[i] != next) mismatch(name, "must be contiguous");
    next *= v.shape[i] > 1 ? v.shape[i] : 1;
  }
  return broadcast(v, name, sizes, missing_right);
}

DType real_of(DType dtype) { return dtype == DType::float64 ? DType::float64 : DType::float32; }

bool is_index(DType dtype) { return dtype == DType::int32 || dtype == DType::int64; }

bool is_float(DType dtype) { return dtype != DType::boolean && dtype != DType::uint8 && !is_index(dtype); }

double number(PyObject* object) {
  const double x = PyFloat_AsDouble(object);
  if (x == -1.0 && PyErr_Occurred()) throw py::error_already_set();
  return x;
}
int64_t integer(PyObject* object) {
  const long long x = PyLong_AsLongLong(object);
  if (x == -1 && PyErr_Occurred()) throw py::error_already_set();
  return x;
}

// multiply-adds, a few microseconds: below it, giving up the GIL costs more than it gives
constexpr double tiny_work = 1e5;

// The places of fastattn.problem.Terms.
enum Term {
  kScale,
  kSoftcap,
  kDiagonalLo,
  kDiagonalHi,
  kKStart,
  kKEnd,
  kMask,
  kBlockMask,
  kBias,
  kAlibiSlopes,
  kSinks,
  kDropoutP,
  kSeed,
  kSkipNegligible,
  kTerms
};

// The lists' entries are checked by the driver, which reads them all.
fastattn::BlockMask block_mask_of(py::handle mask, const Problem& p, Owned& owned) {
  fastattn::BlockMask m{};
  auto pair = [&](const char* name, int64_t& first, int64_t& second) {
    const auto both = mask.attr(name).cast<std::pair<int64_t, int64_t>>();
    first = both.first, second = both.second;
  };
  auto tensor = [&](const char* name) {
    owned.push_back(mask.attr(name));
    const View v = view(owned.back().ptr(), owned);
    if (v.dtype != (name[0] == 'b' ? DType::uint8 : DType::int32)) mismatch(name, "has a wrong dtype");
    return v;
  };
  int64_t seqlen_q, seqlen_k;
  pair("BLOCK_SIZE", m.block_q, m.block_k), pair("seq_lengths", seqlen_q, seqlen_k);
  for (int64_t size : {m.block_q, m.block_k})
    if (size < 16 || size > 256 || size % 16) mismatch("BLOCK_SIZE", "must be multiples of 16 in 16 ... 256");
  if (seqlen_q != p.seqlen_q || seqlen_k != p.seqlen_k) mismatch("seq_lengths", "do not fit q and k");
  const int64_t rows = (p.seqlen_q + m.block_q - 1) / m.block_q;
  auto counts = [&](const char* name) {
    const int64_t sizes[4] = {p.batch, p.num_heads, rows, 1};
    View v = tensor(name);
    if (v.ndim != 3 || v.shape[2] != rows) mismatch(name, "must have a number for each block of queries");
    return broadcast(v, name, sizes, 1);
  };
  auto list = [&](const char* name, int64_t& longest) {
    View v = tensor(name);
    if (v.ndim != 4 || v.shape[2] != rows) mismatch(name, "must have a list for each block of queries");
    longest = v.shape[3];
    const int64_t sizes[4] = {p.batch, p.num_heads, rows, longest};
    return broadcast(v, name, sizes);
  };
  int64_t longest_bitmap;
  m.num_partial = counts("kv_num_blocks"), m.num_full = counts("full_kv_num_blocks");
  m.partial = list("kv_indices", m.longest_partial), m.full = list("full_kv_indices", m.longest_full);
  m.bitmap = list("kv_bitmaps", longest_bitmap);
  if (longest_bitmap != m.longest_partial) mismatch("kv_bitmaps", "must have the shape of kv_indices");
  for (const Tensor* t : {&m.partial, &m.bitmap, &m.num_full, &m.full})
    for (int i = 0; i < 2; i++)
      if ((t->stride[i] == 0) != (m.num_partial.stride[i] == 0)) mismatch("block_mask", "has lists of unequal shapes");
  const View bits = tensor("bitmaps");
  const int64_t bytes = m.block_k / 8, strides[3] = {m.block_q * bytes, bytes, 1};
  bool fits = bits.ndim == 3 && bits.shape[1] == m.block_q && bits.shape[2] == bytes;
  for (int i = 0; i < 3; i++) fits = fits && (bits.shape[i] <= 1 || bits.stride[i] == strides[i]);
  if (!fits) mismatch("bitmaps", "must be contiguous [num_bitmaps, block_q, block_k / 8]");
  m.bitmaps = (const uint8_t*)bits.data, m.num_bitmaps = bits.shape[0];
  return m;
}

// Everything that native code relies on is checked here, whatever the caller has checked.
// q, k, v, out; backward: out is in the compute dtype.
Problem tensors_of(PyObject* const* qkvo, PyObject* lse, PyObject* lse_parts, bool backward, Owned& owned) {
  const View q = view(qkvo[0], owned), k = view(qkvo[1], owned), v = view(qkvo[2], owned), out = backward ? view(qkvo[3], owned) : written_view(qkvo[3]);
  if (q.ndim != 4 || k.ndim != 4 || v.ndim != 4) mismatch("q, k and v", "must have 4 dimensions");
  if (!is_float(q.dtype)) mismatch("q", "must have a float dtype");
  Problem p{};
  p.batch = q.shape[0], p.num_heads = q.shape[1], p.seqlen_q = q.shape[2], p.head_dim = q.shape[3];
  p.num_heads_k = k.shape[1], p.seqlen_k = k.shape[2], p.head_dim_v = v.shape[3];
  if (p.num_heads && (!p.num_heads_k || p.num_heads % p.num_heads_k))
    mismatch("num_heads", "must be a multiple of num_heads_k");
  const int64_t queries[4] = {p.batch, p.num_heads, p.seqlen_q, p.head_dim};
  const int64_t keys[4] = {p.batch, p.num_heads_k, p.seqlen_k, p.head_dim};
  const int64_t values[4] = {p.batch, p.num_heads_k, p.seqlen_k, p.head_dim_v};
  const int64_t outs[4] = {p.batch, p.num_heads, p.seqlen_q, p.head_dim_v};
  p.q = exact(q, "q", queries, q.dtype), p.k = exact(k, "k", keys, q.dtype), p.v = exact(v, "v", values, q.dtype);
  const DType real = real_of(q.dtype);
  p.out = exact(out, "out", outs, backward ? real : q.dtype);
  const int64_t rows[4] = {p.batch, p.num_heads, p.seqlen_q, 1}, parts[4] = {p.batch, p.num_heads, p.seqlen_q, 2};
  p.lse = complete(lse, "lse", rows, real, owned, 1);
  p.lse_parts = complete(lse_parts, "lse_parts", parts, real, owned);
  return p;
}

void read_terms(PyObject* terms, Problem& p, Owned& owned) {
  if (!PyTuple_Check(terms) || PyTuple_GET_SIZE(terms) != kTerms) mismatch("terms", "must be a Terms");
  auto term = [&](Term name) { return PyTuple_GET_ITEM(terms, name); };
  const int64_t scores[4] = {p.batch, p.num_heads, p.seqlen_q, p.seqlen_k};
  if (PyFloat_Check(term(kScale)) || PyLong_Check(term(kScale)))
    p.softmax_scale = number(term(kScale));
  else
    p.scales = optional(term(kScale), "softmax_scale", scores, owned, 2);
  p.softcap = number(term(kSoftcap));
  p.diagonal_lo = integer(term(kDiagonalLo)), p.diagonal_hi = integer(term(kDiagonalHi));
  p.k_start = optional(term(kKStart), "k_start", scores, owned, 1);
  p.k_end = optional(term(kKEnd), "k_end", scores, owned, 1);
  p.mask = optional(term(kMask), "mask", scores, owned), p.bias = optional(term(kBias), "bias", scores, owned);
  p.alibi_slopes = optional(term(kAlibiSlopes), "alibi_slopes", scores, owned, 2);
  if (term(kBlockMask) != Py_None) p.block_mask = block_mask_of(term(kBlockMask), p, owned);
  p.sinks = optional(term(kSinks), "sinks", scores, owned, 2);
  if ((p.k_start && p.k_start.dtype != DType::int32) || (p.k_end && p.k_end.dtype != DType::int32))
    mismatch("k_start and k_end", "must be int32");
  if (p.mask && p.mask.dtype != DType::boolean) mismatch("mask", "must be bool");
  for (const Tensor* t : {&p.bias, &p.alibi_slopes, &p.sinks, &p.scales})
    if (*t && !is_float(t->dtype)) mismatch("bias, alibi_slopes, sinks and softmax_scale", "must have a float dtype");
  const double dropout_p = number(term(kDropoutP));
  if (!(dropout_p >= 0.0 && dropout_p < 1.0)) mismatch("dropout_p", "must be in [0, 1)");
  p.keep_factor = 1.0 / (1.0 - dropout_p);
  p.drop_below = (uint32_t)(dropout_p * 4294967296.0);
  if (dropout_p > 0.0) p.seed = (uint64_t)integer(term(kSeed));
  if (term(kSkipNegligible) != Py_None) p.skip_negligible = integer(term(kSkipNegligible)) != 0;
}

Tensor out_exact_of(PyObject* object, const Problem& p, Owned& owned) {
  return complete(object, "out_exact", {p.batch, p.num_heads, p.seqlen_q, p.head_dim_v}, real_of(p.q.dtype), owned);
}

// dout, dlse, dq, dk, dv.
Gradients gradients_of(const Problem& p, PyObject* const* args, Owned& owned) {
  if (!p.lse_parts) mismatch("lse_parts", "must be given");
  const int64_t outs[4] = {p.batch, p.num_heads, p.seqlen_q, p.head_dim_v}, rows[4] = {outs[0], outs[1], outs[2], 1};
  const int64_t queries[4] = {p.batch, p.num_heads, p.seqlen_q, p.head_dim};
  const int64_t keys[4] = {p.batch, p.num_heads_k, p.seqlen_k, p.head_dim};
  const int64_t values[4] = {p.batch, p.num_heads_k, p.seqlen_k, p.head_dim_v};
  Gradients g{};
  g.dout = exact(view(args[0], owned), "dout", outs, p.q.dtype);
  g.dlse = complete(args[1], "dlse", rows, p.lse_parts.dtype, owned, 1);
  g.dq = complete(args[2], "dq", queries, p.q.dtype, owned);
  g.dk = complete(args[3], "dk", keys, p.q.dtype, owned);
  g.dv = complete(args[4], "dv", values, p.q.dtype, owned);
  return g;
}

// Runs `body` of a METH_FASTCALL function, without pybind11's argument conversion: it would cost more than a tiny call.
template <class Body>
PyObject* guarded(Py_ssize_t count, Py_ssize_t expected, Body body) {
  try {
    if (count != expected) throw std::invalid_argument("takes " + std::to_string(expected) + " arguments");
    body();
  } catch (py::error_already_set& error) {
    error.restore();
    return nullptr;
  } catch (const std::bad_alloc&) {
    return PyErr_NoMemory();
  } catch (const std::invalid_argument& error) {
    PyErr_SetString(PyExc_ValueError, error.what());
    return nullptr;
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
    return nullptr;
  }
  Py_RETURN_NONE;
}

// Shapes and dtypes of CPU tensors as bytes, a dictionary key that is cheaper than their Python attributes; None where a
// tensor is not one that the exchange API describes.
PyObject* signature(PyObject*, PyObject* const* args, Py_ssize_t count) {
  constexpr int max_tensors = 3, words = 5;
  int64_t key[max_tensors * words] = {};
  if (count > max_tensors) count = max_tensors;
  for (Py_ssize_t i = 0; i < count; i++) {
    const dlpack::TensorType* type = dlpack::tensor_type(Py_TYPE(args[i]));
    dlpack::DLTensor t;
    if (!type || !type->api || type->api->dltensor_from_py_object_no_sync(args[i], &t)) {
      PyErr_Clear();
      Py_RETURN_NONE;
    }
    if (t.device_type != dlpack::kCPU || t.ndim != words - 1) Py_RETURN_NONE;
    for (int d = 0; d < t.ndim; d++) key[i * words + d] = t.shape[d];
    key[i * words + t.ndim] = t.dtype.code | t.dtype.bits << 8;
  }
  return PyBytes_FromStringAndSize((const char*)key, count * words * (Py_ssize_t)sizeof(int64_t));
}

PyObject* forward(PyObject*, PyObject* const* args, Py_ssize_t count) {
  return guarded(count, 9, [&] {
    Owned owned;
    Problem p = tensors_of(args, args[4], args[5], false, owned);
    p.out_exact = out_exact_of(args[6], p, owned);
    read_terms(args[7], p, owned);
    const int threads = (int)integer(args[8]);
    const double pairs = (double)p.batch * p.num_heads * p.seqlen_q * p.seqlen_k;
    if (pairs * (p.head_dim + p.head_dim_v) < tiny_work) {
      fastattn::forward(p, 1);
    } else {
      py::gil_scoped_release release;
      fastattn::forward(p, threads);
    }
  });
}

PyObject* backward(PyObject*, PyObject* const* args, Py_ssize_t count) {
  return guarded(count, 16, [&] {
    Owned owned;
    Problem p = tensors_of(args, Py_None, args[4], true, owned);
    read_terms(args[5], p, owned);
    PyObject* const* more = args + 6;
    const int64_t scores[4] = {p.batch, p.num_heads, p.seqlen_q, p.seqlen_k};
    Gradients g = gradients_of(p, more, owned);
    g.dbias = reduced(more[5], "dbias", scores, owned);
    g.dalibi_slopes = reduced(more[6], "dalibi_slopes", scores, owned, 2);
    g.dsinks = reduced(more[7], "dsinks", scores, owned, 2);
    g.dscales = reduced(more[8], "dsoftmax_scale", scores, owned, 2);
    if (g.dbias && g.dbias.dtype != (g.dense_bias() ? p.lse_parts.dtype : DType::float64))
      mismatch("dbias", "has a wrong dtype");
    for (const Tensor* t : {&g.dalibi_slopes, &g.dsinks, &g.dscales})
      if (*t && t->dtype != DType::float64) mismatch("dalibi_slopes, dsinks and dsoftmax_scale", "must be float64");
    if ((g.dsinks && !p.sinks) || (g.dalibi_slopes && !p.alibi_slopes) || (g.dscales && !p.scales))
      mismatch("a gradient", "has no tensor");
    const int threads = (int)integer(more[9]);
    py::gil_scoped_release release;
    fastattn::backward(p, g, threads);
  });
}

// Entries of one of the lists of edges.
Tensor list(const View& v, const char* name, int64_t size) {
  if (v.ndim != 1) mismatch(name, "must have 1 dimension");
  if (!is_index(v.dtype)) mismatch(name, "must be int32 or int64");
  if (v.shape[0] != size) mismatch(name, "has a wrong length");
  return broadcast(v, name, {1, 1, 1, size});
}

constexpr int num_csr_arguments = 10;

// The first 10 arguments of csr_forward and csr_backward; the entries of the lists are checked later, without the GIL.
std::pair<Problem, Csr> edges_of(PyObject* const* args, bool backward, Owned& owned) {
  Problem p = tensors_of(args, args[4], args[5], backward, owned);
  p.softmax_scale = number(args[6]);
  Csr lists{};
  const View indices = view(args[8], owned);
  lists.num_edges = indices.ndim == 1 ? indices.shape[0] : 0;
  lists.indptr = list(view(args[7], owned), "indptr", p.seqlen_q + 1);
  lists.indices = list(indices, "indices", lists.num_edges);
  p.bias = optional(args[9], "edge_bias", {p.batch, p.num_heads, 1, lists.num_edges}, owned);
  if (p.bias && !is_float(p.bias.dtype)) mismatch("edge_bias", "must have a float dtype");
  return {p, lists};
}

PyObject* csr_forward(PyObject*, PyObject* const* args, Py_ssize_t count) {
  return guarded(count, num_csr_arguments + 2, [&] {
    Owned owned;
    auto [p, lists] = edges_of(args, false, owned);
    p.out_exact = out_exact_of(args[num_csr_arguments], p, owned);
    const int threads = (int)integer(args[num_csr_arguments + 1]);
    py::gil_scoped_release release;
    fastattn::csr_forward(p, lists, threads);
  });
}

PyObject* csr_backward(PyObject*, PyObject* const* args, Py_ssize_t count) {
  return guarded(count, num_csr_arguments + 7, [&] {
    Owned owned;
    const auto [p, lists] = edges_of(args, true, owned);
    PyObject* const* more = args + num_csr_arguments;
    Gradients g = gradients_of(p, more, owned);
    g.dbias = reduced(more[5], "dedge_bias", {p.batch, p.num_heads, 1, lists.num_edges}, owned);
    if (g.dbias && (!p.bias || g.dbias.dtype != p.lse_parts.dtype)) mismatch("dedge_bias", "has a wrong dtype");
    if (g.dbias && lists.num_edges > 1 && !g.dbias.stride[3]) mismatch("dedge_bias", "must have an element an edge");
    const int threads = (int)integer(more[6]);
    py::gil_scoped_release release;
    fastattn::csr_backward(p, g, lists, threads);
  });
}

PyMethodDef fast_methods[] = {
    {"signature", (PyCFunction)(void (*)())signature, METH_FASTCALL,
     "signature(q, k, v): their shapes and dtypes as bytes, or None if one is not a plain 4-D CPU tensor."},
    {"forward", (PyCFunction)(void (*)())forward, METH_FASTCALL,
     "forward(q, k, v, out, lse, lse_parts, out_exact, terms, threads): fills out, and those of lse, lse_parts and "
     "out_exact that are not None."},
    {"backward", (PyCFunction)(void (*)())backward, METH_FASTCALL,
     "backward(q, k, v, out, lse_parts, terms, dout, dlse, dq, dk, dv, dbias, dalibi_slopes, dsinks, "
     "dsoftmax_scale, threads): fills those of dq, dk, dv that are not None, adds to those of the others."},
    {"csr_forward", (PyCFunction)(void (*)())csr_forward, METH_FASTCALL,
     "csr_forward(q, k, v, out, lse, lse_parts, softmax_scale, indptr, indices, edge_bias, out_exact, threads): fills "
     "out, and those of lse, lse_parts and out_exact that are not None. edge_bias broadcasts to [batch, num_heads, 1, "
     "edges]."},
    {"csr_backward", (PyCFunction)(void (*)())csr_backward, METH_FASTCALL,
     "csr_backward(<the first 10 of csr_forward, out in the compute dtype>, dout, dlse, dq, dk, dv, dedge_bias, "
     "threads): fills those of dq, dk, dv that are not None, adds to dedge_bias."},
    {nullptr, nullptr, 0, nullptr}};

}  // namespace

PYBIND11_MODULE(_C, m, py::mod_gil_not_used()) {
  m.doc() = "fastattn's compiled CPU kernels.";
  PyModule_AddFunctions(m.ptr(), fast_methods);
  m.def("isa", [] { return fastattn::kernels().name; }, "The instruction set that the kernels run on.");
  m.def("skipped_pairs", fastattn::skipped_pairs,
        "How many (query, key) pairs the calls of this process have skipped because their weights are 0.");
  m.def(
      "fma_rate",
      [](const std::string& dtype, double seconds, int threads) {
        const DType type = dtype_of(dtype);
        py::gil_scoped_release release;
        return fastattn::fma_rate(type, seconds, threads);
      },
      py::arg("dtype"), py::arg("seconds"), py::arg("threads"),
      "Peak multiply-add rate of `threads` threads together, in FLOP/s, measured on registers for `seconds`.");
}
