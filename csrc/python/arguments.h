// The arguments of _C's functions, checked: everything that native code relies on, whatever the caller has checked.
#pragma once
#include "tensors.h"

namespace fastattn::python {

struct ForwardArguments {
  PyObject *q, *k, *v, *out, *lse, *lse_parts, *out_exact, *extras, *threads;
};
struct BackwardArguments {
  PyObject *q, *k, *v, *out, *lse_parts, *extras, *dout, *dlse, *dq, *dk, *dv, *grads, *threads;
};
struct TangentArguments {
  PyObject *q, *k, *v, *extras, *tq, *tk, *tv, *textras, *tout, *tlse, *threads;
};

// A call: what it reads and writes, and what must live until it ends. `extras` is a Terms, or an Edges of the csr layout.
class Bound {
 protected:
  Owned owned;

  Bound() = default;
  void read_inputs(PyObject* q, PyObject* k, PyObject* v);
  void read_extras(PyObject* extras, bool csr);

 public:
  Operands p{};
  Csr lists{};  // of the csr layout
  int threads = 1;

  Bound(const ForwardArguments& arguments, bool csr);
};
class BoundBackward : public Bound {
 public:
  Gradients g{};

  BoundBackward(const BackwardArguments& arguments, bool csr);
};
class BoundTangent : public Bound {
 public:
  Tangents t{};

  BoundTangent(const TangentArguments& arguments, bool csr);
};

void bind_fields(const std::string& kind, const std::vector<std::string>& fields);

// signature(q, k, v, *extras): the shapes and dtypes of a call's tensors as a dictionary key, cheaper than their Python
// attributes.
PyObject* signature(PyObject*, PyObject* const* args, Py_ssize_t count);

}  // namespace fastattn::python
