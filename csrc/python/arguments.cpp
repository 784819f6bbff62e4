#include "arguments.h"

#include <stdexcept>
#include <utility>

#include "checked.h"
#include "readers.h"

namespace fastattn::python {
namespace py = pybind11;

std::vector<const char*> names_of_terms() {
  std::vector<const char*> names;
  for (const TensorTerm& term : tensor_terms) names.push_back(term.name);
  for (const char* name : {"softcap", "diagonal_lo", "diagonal_hi", "query_start", "block_mask", "dropout_p", "seed",
                           "dropout_start", "skip_negligible", "rotary_cos", "rotary_sin", "rotary_interleaved"})
    names.push_back(name);
  return names;
}

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

Tensor list_of(const View& v, const char* name, int64_t size) {
  if (v.ndim != 1) refuse(name, "must have 1 dimension");
  if (!is_index(v.dtype)) refuse(name, "must be int32 or int64");
  if (v.shape[0] != size) refuse(name, "has a wrong length");
  return broadcast(v, name, {1, 1, 1, size});
}

namespace {

Fields terms_fields("Terms", names_of_terms());
Fields sequences_fields("Sequences", names_of_sequences());

enum EdgesField : size_t { kIndptr, kIndices, kEdgeBias, kEdgesScale };
Fields edges_fields("Edges", {"indptr", "indices", "bias", "softmax_scale"});

bool is_number(PyObject* object) { return PyFloat_Check(object) || PyLong_Check(object); }

// A distance between positions, far beyond any sequence at most, so that adding a position to it cannot overflow.
int64_t distance(PyObject* object) {
  constexpr int64_t most = (int64_t)1 << 61;
  return std::min(std::max(integer(object), -most), most);
}

DropoutStart dropout_start(PyObject* object) {
  if (object == Py_None) return {};
  if (!PyTuple_Check(object) || PyTuple_GET_SIZE(object) != 3)
    refuse("dropout_start", "must be a tuple (head, query, key)");
  int64_t places[3];
  for (int i = 0; i < 3; i++) {
    places[i] = integer(PyTuple_GET_ITEM(object, i));
    if (places[i] < 0 || places[i] >> 32) refuse("dropout_start", "must be in 0 ... 2^32 - 1");
  }
  return {places[0], places[1], places[2]};
}

void check_dtype(const Tensor& t, const char* name, Holds holds) {
  if (holds == Holds::floats && !is_float(t.dtype)) refuse(name, "must have a float dtype");
  if (holds == Holds::booleans && t.dtype != DType::boolean) refuse(name, "must be bool");
  if (holds == Holds::int32s && t.dtype != DType::int32) refuse(name, "must be int32");
}

// The lists' entries are checked by the driver, which reads them all.
BlockMask read_block_mask(py::handle mask, const Operands& p, Owned& owned) {
  BlockMask m{};
  auto pair = [&](const char* name, int64_t& first, int64_t& second) {
    const auto both = mask.attr(name).cast<std::pair<int64_t, int64_t>>();
    first = both.first, second = both.second;
  };
  auto tensor = [&](const char* name) {
    owned.push_back(mask.attr(name));  // integers are never negated
    const View v = written(owned.back().ptr());
    if (v.dtype != (name[0] == 'b' ? DType::uint8 : DType::int32)) refuse(name, "has a wrong dtype");
    return v;
  };
  int64_t seqlen_q, seqlen_k;
  pair("BLOCK_SIZE", m.block_q, m.block_k), pair("seq_lengths", seqlen_q, seqlen_k);
  for (int64_t size : {m.block_q, m.block_k})
    if (size < 16 || size > 256 || size % 16) refuse("BLOCK_SIZE", "must be multiples of 16 in 16 ... 256");
  if (seqlen_q != p.seqlen_q || seqlen_k != p.seqlen_k) refuse("seq_lengths", "do not fit q and k");
  const int64_t rows = (p.seqlen_q + m.block_q - 1) / m.block_q;
  auto counts = [&](const char* name) {
    const int64_t sizes[4] = {p.batch, p.num_heads, rows, 1};
    View v = tensor(name);
    if (v.ndim != 3 || v.shape[2] != rows) refuse(name, "must have a number for each block of queries");
    return broadcast(v, name, sizes, 1);
  };
  auto list = [&](const char* name, int64_t& longest) {
    View v = tensor(name);
    if (v.ndim != 4 || v.shape[2] != rows) refuse(name, "must have a list for each block of queries");
    longest = v.shape[3];
    const int64_t sizes[4] = {p.batch, p.num_heads, rows, longest};
    return broadcast(v, name, sizes);
  };
  int64_t longest_bitmap;
  m.num_partial = counts("kv_num_blocks"), m.num_full = counts("full_kv_num_blocks");
  m.partial = list("kv_indices", m.longest_partial), m.full = list("full_kv_indices", m.longest_full);
  m.bitmap = list("kv_bitmaps", longest_bitmap);
  if (longest_bitmap != m.longest_partial) refuse("kv_bitmaps", "must have the shape of kv_indices");
  for (const Tensor* t : {&m.partial, &m.bitmap, &m.num_full, &m.full})
    for (int i = 0; i < 2; i++)
      if ((t->stride[i] == 0) != (m.num_partial.stride[i] == 0)) refuse("block_mask", "has lists of unequal shapes");
  const View bits = tensor("bitmaps");
  const int64_t bytes = m.block_k / 8, strides[3] = {m.block_q * bytes, bytes, 1};
  bool fits = bits.ndim == 3 && bits.shape[1] == m.block_q && bits.shape[2] == bytes;
  for (int i = 0; i < 3; i++) fits = fits && (bits.shape[i] <= 1 || bits.stride[i] == strides[i]);
  if (!fits) refuse("bitmaps", "must be contiguous [num_bitmaps, block_q, block_k / 8]");
  m.bitmaps = (const uint8_t*)bits.data, m.num_bitmaps = bits.shape[0];
  return m;
}

// [batch, num_heads, edges] as [batch, num_heads, 1, edges].
View with_row(View v, const char* name) {
  if (v.ndim == 0 || v.ndim > 3) refuse(name, "must broadcast to [batch, num_heads, edges]");
  const int last = v.ndim++ - 1;
  v.shape[last + 1] = v.shape[last], v.stride[last + 1] = v.stride[last];
  v.shape[last] = 1, v.stride[last] = 0;
  return v;
}

Sizes queries(const Operands& p, int64_t columns) { return {{p.batch, p.num_heads, p.seqlen_q, columns}}; }
Sizes keys(const Operands& p, int64_t columns) { return {{p.batch, p.num_heads_k, p.seqlen_k, columns}}; }
Sizes scores(const Operands& p) { return queries(p, p.seqlen_k); }
Sizes edge_scores(const Operands& p, const Csr& lists) { return {{p.batch, p.num_heads, 1, lists.num_edges}}; }

// A term's tensor, gradient or tangent among scores of these sizes; `align` is broadcast or reduced.
template <auto align = broadcast>
Tensor placed(View view, const char* name, const TensorTerm& term, const Sizes& scores, const Operands& p) {
  if (term.over != SumsOver::diagonals) return align(view, name, scores, term.missing_right);
  if (view.ndim == 0 || view.shape[view.ndim - 1] != p.num_diagonals())
    refuse(name, "must have seqlen_q + seqlen_k - 1 entries a head");
  const int64_t sizes[4] = {p.batch, p.num_heads, 1, p.num_diagonals()};
  return align(with_row(view, name), name, sizes, 0);
}

// [positions, pairs], or where there is one batch a head also [batch, positions, pairs], as [batch, 1, positions, pairs].
Tensor table_of(View v, const char* name, const Operands& p, const Rotary& r) {
  if (v.ndim == 3) {  // the table lacks heads
    for (int i = 3; i > 1; i--) v.shape[i] = v.shape[i - 1], v.stride[i] = v.stride[i - 1];
    v.shape[1] = 1, v.stride[1] = 0, v.ndim = 4;
  }
  const Tensor t = broadcast(v, name, {p.batch, 1, r.positions, r.pairs});
  check_dtype(t, name, Holds::floats);
  return t;
}

void read_rotary(const Fields::Values& terms, Operands& p, Owned& owned) {
  if ((terms[kRotaryCos] == Py_None) != (terms[kRotarySin] == Py_None))
    refuse("rotary_cos and rotary_sin", "must be given together");
  if (terms[kRotaryCos] == Py_None) return;
  const View cos = read(terms[kRotaryCos], owned), sin = read(terms[kRotarySin], owned);
  if (cos.ndim != sin.ndim || (cos.ndim != 2 && cos.ndim != 3))
    refuse("rotary_cos and rotary_sin", "must be [positions, rotary_dim / 2] or [batch, positions, rotary_dim / 2]");
  p.rotary.positions = cos.shape[cos.ndim - 2], p.rotary.pairs = cos.shape[cos.ndim - 1];
  if (p.rotary.pairs > p.head_dim / 2) refuse("rotary_cos", "must have at most head_dim / 2 columns");
  for (int i = 0; i < cos.ndim; i++)
    if (sin.shape[i] != cos.shape[i]) refuse("rotary_sin", "must have the shape of rotary_cos");
  p.rotary.interleaved = integer(terms[kRotaryInterleaved]) != 0;
  p.rotary.cos = table_of(cos, "rotary_cos", p, p.rotary), p.rotary.sin = table_of(sin, "rotary_sin", p, p.rotary);
}

// A result that may be left out.
Tensor result(PyObject* object, const char* name, const Sizes& sizes, DType dtype, int missing_right = 0) {
  return object == Py_None ? Tensor{} : exact(written(object), name, sizes, dtype, missing_right);
}

}  // namespace

void read_terms(const Fields::Values& terms, const Sizes& scores, Operands& p, Owned& owned) {
  for (size_t i = 0; i < num_tensor_terms; i++) {
    const TensorTerm& term = tensor_terms[i];
    if (terms[i] == Py_None) continue;
    if (term.number && is_number(terms[i])) {
      p.*term.number = number(terms[i]);
      continue;
    }
    const Tensor& t = p.*term.tensor = placed(read(terms[i], owned), term.name, term, scores, p);
    check_dtype(t, term.name, term.holds);
  }
  if (p.relative && p.bias) refuse("relative", "does not go with bias");
  if (p.relative) p.bias = p.along_diagonals(p.relative);
  p.softcap = number(terms[kSoftcap]);
  p.diagonal_lo = distance(terms[kDiagonalLo]), p.diagonal_hi = distance(terms[kDiagonalHi]);
  p.query_start = distance(terms[kQueryStart]);
  if (terms[kBlockMask] != Py_None) p.block_mask = read_block_mask(terms[kBlockMask], p, owned);
  const double dropout_p = number(terms[kDropoutP]);
  if (!(dropout_p >= 0.0 && dropout_p < 1.0)) refuse("dropout_p", "must be in [0, 1)");
  p.keep_factor = 1.0 / (1.0 - dropout_p);
  p.drop_below = (uint32_t)(dropout_p * 4294967296.0);
  if (dropout_p > 0.0) p.seed = (uint64_t)integer(terms[kSeed]), p.dropout_start = dropout_start(terms[kDropoutStart]);
  if (terms[kSkipNegligible] != Py_None) p.skip_negligible = integer(terms[kSkipNegligible]) != 0;
  read_rotary(terms, p, owned);
}

namespace {

void read_edges(PyObject* object, Operands& p, Csr& lists, Owned& owned) {
  const Fields::Values edges = edges_fields.of(object);
  p.softmax_scale = number(edges[kEdgesScale]);
  const View indices = read(edges[kIndices], owned);
  lists.num_edges = indices.ndim == 1 ? indices.shape[0] : 0;
  lists.indptr = list_of(read(edges[kIndptr], owned), "indptr", p.seqlen_q + 1);
  lists.indices = list_of(indices, "indices", lists.num_edges);
  if (edges[kEdgeBias] == Py_None) return;
  p.bias = broadcast(with_row(read(edges[kEdgeBias], owned), "edge_bias"), "edge_bias", edge_scores(p, lists));
  check_dtype(p.bias, "edge_bias", Holds::floats);
}

void read_grads(const Fields::Values& grads, const Sizes& scores, const Operands& p, Gradients& g) {
  for (size_t i = 0; i < num_tensor_terms; i++) {
    const TensorTerm& term = tensor_terms[i];
    if (grads[i] == Py_None) continue;
    const std::string name = std::string("d") + term.name;
    if (!term.gradient) refuse(name.c_str(), "is no gradient that the kernels compute");
    if (!(p.*term.tensor)) refuse(name.c_str(), "has no tensor of which it is the gradient");
    const View view = written(grads[i]);
    g.*term.gradient = placed<reduced>(view, name.c_str(), term, scores, p);
    const bool dense = term.gradient == &Gradients::dbias && g.dense_bias();
    if (view.dtype != (dense ? compute_dtype(p.q.dtype) : DType::float64)) refuse(name.c_str(), "has a wrong dtype");
  }
}

// The tangents of terms; one of a tensor has its dtype and shape.
void read_tangents(PyObject* object, const Operands& p, Tangents& t, Owned& owned) {
  const Fields::Values tangents = terms_fields.of(object);
  for (size_t i = 0; i < num_terms_fields; i++) {
    if (tangents[i] == Py_None) continue;
    const bool has_one = i < num_tensor_terms && tensor_terms[i].tangent;
    if (!has_one) refuse("a tangent", "is given for what has none");
    const TensorTerm& term = tensor_terms[i];
    const std::string name = std::string("the tangent of ") + term.name;
    if (!(p.*term.tensor)) refuse(name.c_str(), "has no tensor of which it is the tangent");
    const Tensor& x = t.*term.tangent = placed(read(tangents[i], owned), name.c_str(), term, scores(p), p);
    check_dtype(x, name.c_str(), term.holds);
  }
  if (t.relative) t.bias = p.along_diagonals(t.relative);
}

void read_edge_grads(PyObject* object, const Operands& p, const Csr& lists, Gradients& g) {
  const Fields::Values grads = edges_fields.of(object);
  for (size_t field : {kIndptr, kIndices, kEdgesScale})
    if (grads[field] != Py_None) refuse("a gradient", "is given for what has none");
  if (grads[kEdgeBias] == Py_None) return;
  g.dbias = reduced(with_row(written(grads[kEdgeBias]), "dedge_bias"), "dedge_bias", edge_scores(p, lists));
  if (!p.bias || g.dbias.dtype != compute_dtype(p.q.dtype)) refuse("dedge_bias", "has a wrong dtype");
  if (lists.num_edges > 1 && !g.dbias.stride[3]) refuse("dedge_bias", "must have an element an edge");
}

}  // namespace

void bind_fields(const std::string& kind, const std::vector<std::string>& fields) {
  for (auto& [name, of_kind] : {std::pair<const char*, Fields&>{"Terms", terms_fields},
                                {"Edges", edges_fields},
                                {"Sequences", sequences_fields}})
    if (kind == name) return of_kind.bind(fields);
  refuse(kind.c_str(), "is no kind of arguments: it must be Terms, Edges or Sequences");
}

Bound::Bound(const ForwardArguments& a, Extras kind) {
  read_call(a.q, a.k, a.v, a.extras, kind);
  const DType real = compute_dtype(p.q.dtype);
  p.out = exact(written(a.out), "out", queries(p, p.head_dim_v), p.q.dtype);
  p.lse = result(a.lse, "lse", queries(p, 1), real, 1);
  p.lse_parts = result(a.lse_parts, "lse_parts", queries(p, 2), real);
  p.out_exact = result(a.out_exact, "out_exact", queries(p, p.head_dim_v), real);
  threads = (int)integer(a.threads);
}

BoundBackward::BoundBackward(const BackwardArguments& a, Extras kind) {
  read_call(a.q, a.k, a.v, a.extras, kind);
  if (sequences.block_table || sequences.is_cache) refuse("a cache", "has no gradients");
  const DType real = compute_dtype(p.q.dtype);
  if (a.lse_parts == Py_None) refuse("lse_parts", "must be given");
  p.out = exact(read(a.out, owned), "out", queries(p, p.head_dim_v), real);
  p.lse_parts = exact(read(a.lse_parts, owned), "lse_parts", queries(p, 2), real);
  g.dout = exact(read(a.dout, owned), "dout", queries(p, p.head_dim_v), p.q.dtype);
  if (a.dlse != Py_None) g.dlse = exact(read(a.dlse, owned), "dlse", queries(p, 1), real, 1);
  g.dq = result(a.dq, "dq", queries(p, p.head_dim), p.q.dtype);
  g.dk = result(a.dk, "dk", keys(p, p.head_dim), p.q.dtype);
  g.dv = result(a.dv, "dv", keys(p, p.head_dim_v), p.q.dtype);
  if (kind == Extras::edges)
    read_edge_grads(a.grads, p, lists, g);
  else if (kind == Extras::terms)
    read_grads(terms_fields.of(a.grads), scores(p), p, g);
  else
    read_grads(sequences_fields.of(a.grads), {{sequences.count, p.num_heads, 1, 1}}, p, g);
  threads = (int)integer(a.threads);
}

BoundTangent::BoundTangent(const TangentArguments& a) {
  read_call(a.q, a.k, a.v, a.extras, Extras::terms);
  auto tangent_of = [&](PyObject* object, const char* name, const Sizes& sizes) {
    return object == Py_None ? Tensor{} : exact(read(object, owned), name, sizes, p.q.dtype);
  };
  if (p.rotary) refuse("rotary_cos", "is not taken by the forward mode");
  t.q = tangent_of(a.tq, "tq", queries(p, p.head_dim));
  t.k = tangent_of(a.tk, "tk", keys(p, p.head_dim));
  t.v = tangent_of(a.tv, "tv", keys(p, p.head_dim_v));
  read_tangents(a.textras, p, t, owned);
  t.out = exact(written(a.tout), "tout", queries(p, p.head_dim_v), p.q.dtype);
  t.lse = result(a.tlse, "tlse", queries(p, 1), compute_dtype(p.q.dtype), 1);
  threads = (int)integer(a.threads);
}

BoundStatistics::BoundStatistics(const StatisticsArguments& a) {
  read_call(a.q, a.k, a.k, a.extras, Extras::terms);
  const DType real = compute_dtype(p.q.dtype);
  p.lse_parts = exact(read(a.lse_parts, owned), "lse_parts", queries(p, 2), real);
  t.key_mass = result(a.key_mass, "key_mass", {{p.batch, p.num_heads, p.seqlen_k, 1}}, real, 1);
  t.entropy = result(a.entropy, "entropy", queries(p, 1), real, 1);
  t.distance = result(a.distance, "distance", queries(p, 1), real, 1);
  t.max = result(a.max, "max", queries(p, 1), real, 1);
  threads = (int)integer(a.threads);
}

BoundThresholds::BoundThresholds(const ThresholdArguments& a) {
  const View from = read(a.scores, owned), to = written(a.found);
  if (from.ndim != 2 || to.ndim != 1 || to.shape[0] != from.shape[0])
    refuse("found", "must be [rows], of scores [rows, keys]");
  if (from.dtype != to.dtype || (from.dtype != DType::float32 && from.dtype != DType::float64))
    refuse("found", "must be float32 or float64, as scores");
  rows = from.shape[0], keys = from.shape[1];
  const int64_t of_scores[4] = {1, 1, rows, keys}, of_found[4] = {1, 1, 1, rows};
  scores = reduced(from, "scores", of_scores), found = reduced(to, "found", of_found);
  rule = integer(a.rule), top_k = integer(a.top_k), threads = (int)integer(a.threads);
  if (rule < 0 || rule > 2) refuse("rule", "must be 0, 1 or 2");
  if (top_k < 1) refuse("top_k", "must be at least 1");
}

BoundAppend::BoundAppend(const AppendArguments& a) {
  read_sequences(Py_None, a.k, a.v, sequences_fields.of(a.extras));
  threads = (int)integer(a.threads);
}

void Bound::read_call(PyObject* q, PyObject* k, PyObject* v, PyObject* extras, Extras kind) {
  if (kind == Extras::sequences) return read_sequences(q, k, v, sequences_fields.of(extras));
  read_inputs(q, k, v);
  if (kind == Extras::edges)
    read_edges(extras, p, lists, owned);
  else
    read_terms(terms_fields.of(extras), scores(p), p, owned);
  const int64_t positions = p.rotary.positions;
  if (p.rotary.pairs && (p.query_start < 0 || p.query_start + p.seqlen_q > positions || p.seqlen_k > positions))
    refuse("rotary_cos", "must have a row for the position of each query and key");
}

void Bound::read_inputs(PyObject* q_object, PyObject* k_object, PyObject* v_object) {
  const View q = read(q_object, owned), k = read(k_object, owned), v = read(v_object, owned);
  if (q.ndim != 4 || k.ndim != 4 || v.ndim != 4) refuse("q, k and v", "must have 4 dimensions");
  if (!is_float(q.dtype)) refuse("q", "must have a float dtype");
  p.batch = q.shape[0], p.num_heads = q.shape[1], p.seqlen_q = q.shape[2], p.head_dim = q.shape[3];
  p.num_heads_k = k.shape[1], p.seqlen_k = k.shape[2], p.head_dim_v = v.shape[3];
  if (p.num_heads && (!p.num_heads_k || p.num_heads % p.num_heads_k))
    refuse("num_heads", "must be a multiple of num_heads_k");
  check_sizes(p);
  p.q = exact(q, "q", queries(p, p.head_dim), q.dtype);
  p.k = exact(k, "k", keys(p, p.head_dim), q.dtype);
  p.v = exact(v, "v", keys(p, p.head_dim_v), q.dtype);
}

}  // namespace fastattn::python
