// Calls of many sequences: packed rows, caches and pages. What lists say of rows is checked by the driver, which reads them.
#include <algorithm>

#include "checked.h"
#include "readers.h"

namespace fastattn::python {
namespace {

// The fields of a Sequences that the kernels read beside those of a Terms.
enum SequencesField : size_t {
  kCuSeqlensQ = num_terms_fields,
  kCuSeqlensK,
  kSequsedQ,
  kSequsedK,
  kBlockTable,
  kCacheSeqlens,
  kCacheBatchIdx,
  kCacheLeftpad,
  kNewK,
  kNewV,
  kKScale,
  kVScale,
};

// No two elements may lie in one place where rows are written.
View apart(const View& v, const char* name) {
  std::vector<std::pair<int64_t, int64_t>> steps;  // stride, size
  for (int i = 0; i < v.ndim; i++)
    if (v.shape[i] > 1) steps.push_back({v.stride[i], v.shape[i]});
  std::sort(steps.begin(), steps.end());
  int64_t least = 1;
  for (const auto& [stride, size] : steps) {
    if (stride < least) refuse(name, "has elements that share memory (an expanded view?); they cannot be written");
    check_product({stride, size});
    least = checked_sum(stride * (size - 1), least);
  }
  return v;
}

// The places of the tensor terms of these names.
std::vector<size_t> places_of(std::initializer_list<std::string> names) {
  std::vector<size_t> places;
  for (const std::string& name : names)
    for (size_t i = 0; i < num_tensor_terms; i++)
      if (tensor_terms[i].name == name) places.push_back(i);
  return places;
}

}  // namespace

std::vector<const char*> names_of_sequences() {
  std::vector<const char*> names = names_of_terms();
  for (const char* name : {"cu_seqlens_q", "cu_seqlens_k", "seqused_q", "seqused_k", "block_table", "cache_seqlens",
                           "cache_batch_idx", "cache_leftpad", "k", "v", "k_scale", "v_scale"})
    names.push_back(name);
  return names;
}

void Bound::read_sequences(PyObject* q_object, PyObject* k_object, PyObject* v_object, const Fields::Values& fields) {
  const View k = read(k_object, owned), v = read(v_object, owned);
  if (fields[kNewK] != Py_None && !owned.empty())
    refuse("k_cache and v_cache", "are negated views and cannot be written");
  const View q = q_object == Py_None ? View{} : read(q_object, owned);
  const bool only_appends = q_object == Py_None;
  if (k.ndim != 4 || v.ndim != 4 || (q.ndim != 4 && !only_appends)) refuse("q, k and v", "must have 4 dimensions");
  Sequences& s = sequences;
  s.key_entries = k.shape[0];
  p.num_heads_k = k.shape[1], p.head_dim = k.shape[3], p.head_dim_v = v.shape[3];
  p.seqlen_k = k.shape[2];
  if (only_appends) {
    if (fields[kNewK] == Py_None) refuse("k", "must be given");
    const View rows = read(fields[kNewK], owned);
    if (rows.ndim != 4) refuse("k", "must have 4 dimensions");
    p.q.dtype = rows.dtype, p.batch = s.count = rows.shape[0];
  } else {
    p.batch = q.shape[0], p.num_heads = q.shape[1], p.seqlen_q = q.shape[2], p.q.dtype = q.dtype;
    if (p.num_heads && (!p.num_heads_k || p.num_heads % p.num_heads_k))
      refuse("num_heads", "must be a multiple of num_heads_k");
    s.count = p.batch;
    if (fields[kCuSeqlensQ] != Py_None) {
      const View starts = read(fields[kCuSeqlensQ], owned);
      if (p.batch != 1) refuse("q", "must have one batch entry, in which the sequences of cu_seqlens_q lie");
      if (starts.ndim != 1 || starts.shape[0] < 1) refuse("cu_seqlens_q", "must be a list of at least one entry");
      s.count = starts.shape[0] - 1;
      s.cu_seqlens_q = list_of(starts, "cu_seqlens_q", s.count + 1);
    }
  }
  if (!is_float(p.q.dtype)) refuse("q", "must have a float dtype");
  read_lists(fields, k.shape[2]);
  check_sizes([&] {
    Operands largest = p;
    largest.batch = std::max({p.batch, s.count, s.key_entries});
    largest.seqlen_k = std::max(p.seqlen_k, k.shape[2]);
    return largest;
  }());
  const bool narrow = k.dtype == DType::int8;
  if (narrow && p.q.dtype == DType::float64) refuse("an int8 cache", "takes no float64 queries");
  if (narrow && !s.is_cache) refuse("k", "has another dtype than q");
  if (!only_appends) p.q = exact(q, "q", {p.batch, p.num_heads, p.seqlen_q, p.head_dim}, p.q.dtype);
  const DType stored = narrow ? DType::int8 : p.q.dtype;
  p.k = exact(k, "k", {s.key_entries, p.num_heads_k, k.shape[2], p.head_dim}, stored);
  p.v = exact(v, "v", {s.key_entries, p.num_heads_k, k.shape[2], p.head_dim_v}, stored);
  for (auto [field, name, factors] : {std::tuple<size_t, const char*, Tensor*>{kKScale, "k_scale", &p.k_factors},
                                      {kVScale, "v_scale", &p.v_factors}}) {
    if (narrow != (fields[field] != Py_None)) refuse(name, "must be given for an int8 cache, and for no other");
    if (!narrow) continue;
    const View view = written(fields[field]);
    *factors = exact(view, name, {s.key_entries, p.num_heads_k, k.shape[2], 1}, DType::float32, 1);
    if (fields[kNewK] != Py_None) apart(view, name);
  }
  static const std::vector<size_t> refused = places_of({"mask", "bias", "relative", "k_start", "k_end"});
  for (size_t i : refused)
    if (fields[i] != Py_None) refuse(tensor_terms[i].name, "is not taken by sequences");
  if (fields[kBlockMask] != Py_None) refuse("block_mask", "is not taken by sequences");
  read_terms(fields, {{s.count, p.num_heads, 1, 1}}, p, owned);
  if (p.rotary.cos.stride[0] || p.rotary.sin.stride[0]) refuse("rotary_cos", "must be [positions, rotary_dim / 2]");
  if (s.is_cache) std::swap(p.rotary, s.rotary);  // what a cache holds has turned already
  if (fields[kNewK] == Py_None) {
    if (fields[kNewV] != Py_None || s.rotary) refuse("v, rotary_cos and rotary_sin", "belong to k, which is absent");
    return;
  }
  apart(k, "k_cache"), apart(v, "v_cache");
  read_new_rows(fields);
}

void Bound::read_lists(const Fields::Values& fields, int64_t rows) {
  Sequences& s = sequences;
  s.is_cache = fields[kCacheSeqlens] != Py_None;
  auto list = [&](size_t field, const char* name, int64_t size) {
    return fields[field] == Py_None ? Tensor{} : list_of(read(fields[field], owned), name, size);
  };
  s.seqused_q = list(kSequsedQ, "seqused_q", s.count), s.seqused_k = list(kSequsedK, "seqused_k", s.count);
  s.cu_seqlens_k = list(kCuSeqlensK, "cu_seqlens_k", s.count + 1);
  s.cache_batch_idx = list(kCacheBatchIdx, "cache_batch_idx", s.count);
  s.cache_leftpad = list(kCacheLeftpad, "cache_leftpad", s.count);
  if (s.is_cache && PyLong_Check(fields[kCacheSeqlens])) {
    one_length = integer(fields[kCacheSeqlens]);
    s.cache_seqlens = {(char*)&one_length, {0, 0, 0, 0}, DType::int64};
  } else {
    s.cache_seqlens = list(kCacheSeqlens, "cache_seqlens", s.count);
  }
  if (s.is_cache) {
    if (s.cu_seqlens_q || s.cu_seqlens_k || s.seqused_q || s.seqused_k)
      refuse("cu_seqlens and seqused", "do not go with cache_seqlens");
  } else if (s.cache_batch_idx || s.cache_leftpad || fields[kNewK] != Py_None) {
    refuse("cache_batch_idx, cache_leftpad and new k", "need cache_seqlens");
  }
  if (fields[kBlockTable] != Py_None) {
    const View table = read(fields[kBlockTable], owned);
    if (table.ndim != 2 || !is_index(table.dtype) || table.shape[0] != s.count)
      refuse("block_table", "must be int32 or int64 [sequences, entries]");
    if (s.cache_batch_idx) refuse("cache_batch_idx", "does not go with block_table, which names the pages");
    if (!rows) refuse("k", "must have pages of at least one row");
    s.block_table = broadcast(table, "block_table", {1, 1, s.count, table.shape[1]});
    s.page_size = rows;
    check_product({table.shape[1], rows});
    p.seqlen_k = table.shape[1] * rows;
  } else if (!s.is_cache) {
    if (!s.cu_seqlens_k) refuse("cu_seqlens_k", "must be given");
    if (s.key_entries != 1) refuse("k", "must have one batch entry, in which the sequences of cu_seqlens_k lie");
  } else if (!s.cache_batch_idx && s.count > s.key_entries) {
    refuse("k_cache", "has fewer entries than there are sequences");
  }
  if (s.block_table && !s.is_cache && !s.seqused_k && !s.cu_seqlens_k) refuse("seqused_k", "must be given");
}

void Bound::read_new_rows(const Fields::Values& fields) {
  Sequences& s = sequences;
  if (fields[kNewV] == Py_None) refuse("v", "must be given with k");
  const View k = read(fields[kNewK], owned), v = read(fields[kNewV], owned);
  if (k.ndim != 4) refuse("k", "must have 4 dimensions");
  s.new_rows = k.shape[2];
  s.k = exact(k, "k", {s.count, p.num_heads_k, s.new_rows, p.head_dim}, p.q.dtype);
  s.v = exact(v, "v", {s.count, p.num_heads_k, s.new_rows, p.head_dim_v}, p.q.dtype);
  constexpr int64_t far = (int64_t)1 << 39;
  s.rotary_steps = p.diagonal_lo > -far || p.diagonal_hi < far;  // causal, or a window
}

}  // namespace fastattn::python
