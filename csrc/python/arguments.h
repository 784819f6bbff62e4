// The arguments of _C's functions, checked: everything that native code relies on, whatever the caller has checked.
#pragma once
#include "fields.h"
#include "tensors.h"

namespace fastattn::python {

struct ForwardArguments {
  PyObject *q, *k, *v, *out, *lse, *lse_parts, *out_exact, *extras, *threads;
};
struct BackwardArguments {
  PyObject *q, *k, *v, *out, *lse_parts, *extras, *dout, *dlse, *dq, *dk, *dv, *grads, *threads;
};
struct AppendArguments {
  PyObject *k, *v, *extras, *threads;
};
struct TangentArguments {
  PyObject *q, *k, *v, *extras, *tq, *tk, *tv, *textras, *tout, *tlse, *threads;
};
struct StatisticsArguments {
  PyObject *q, *k, *lse_parts, *extras, *key_mass, *entropy, *distance, *max, *threads;
};

struct ThresholdArguments {
  PyObject *scores, *found, *rule, *top_k, *threads;
};

// What stands in the place of `extras`: a Terms, an Edges of the csr layout, or a Sequences.
enum class Extras { terms, edges, sequences };

// A call: what it reads and writes, and what must live until it ends.
class Bound {
 protected:
  Owned owned;

  Bound() = default;
  void read_call(PyObject* q, PyObject* k, PyObject* v, PyObject* extras, Extras kind);
  void read_inputs(PyObject* q, PyObject* k, PyObject* v);
  void read_sequences(PyObject* q, PyObject* k, PyObject* v,
                      const Fields::Values& fields);  // q: None, if rows are only appended
  void read_lists(const Fields::Values& fields, int64_t entries);
  void read_new_rows(const Fields::Values& fields);

 public:
  Operands p{};
  Csr lists{};  // of an Edges
  Sequences sequences{};
  int64_t one_length = 0;  // of all sequences, where cache_seqlens is a number
  int threads = 1;

  Bound(const ForwardArguments& arguments, Extras kind);
};
class BoundBackward : public Bound {
 public:
  Gradients g{};

  BoundBackward(const BackwardArguments& arguments, Extras kind);
};
class BoundTangent : public Bound {
 public:
  Tangents t{};

  explicit BoundTangent(const TangentArguments& arguments);
};
class BoundAppend : public Bound {
 public:
  explicit BoundAppend(const AppendArguments& arguments);
};
class BoundStatistics : public Bound {
 public:
  Statistics t{};

  explicit BoundStatistics(const StatisticsArguments& arguments);
};

// Rows of scores and what is to be found of each.
struct BoundThresholds {
  Owned owned;
  Tensor scores, found;
  int64_t rows, keys, rule, top_k;
  int threads;

  explicit BoundThresholds(const ThresholdArguments& arguments);
};

void bind_fields(const std::string& kind, const std::vector<std::string>& fields);

// signature(q, k, v, *extras): the shapes and dtypes of a call's tensors as a dictionary key, cheaper than their Python
// attributes.
PyObject* signature(PyObject*, PyObject* const* args, Py_ssize_t count);

// shapes(*tensors): the same of up to 16 tensors, ints and Nones, with all sizes; None where one is not a plain CPU tensor.
PyObject* shapes(PyObject*, PyObject* const* args, Py_ssize_t count);

}  // namespace fastattn::python
