// The arguments of _C's functions, checked: everything that native code relies on, whatever the caller has checked.
#pragma once
#include "tensors.h"

namespace fastattn::python {

double number(PyObject* object);
int64_t integer(PyObject* object);

// The tensors that every forward call begins with, and every backward call.
struct ForwardArguments {
  PyObject *q, *k, *v, *out, *lse, *lse_parts, *out_exact, *extras, *threads;
};
struct BackwardArguments {
  PyObject *q, *k, *v, *out, *lse_parts, *extras, *dout, *dlse, *dq, *dk, *dv, *grads, *threads;
};

// A call: what it reads and writes, and what must live until it ends. extras: a Terms, or of the csr layout an Edges.
struct Bound {
  Owned owned;
  Operands p{};
  Gradients g{};
  Csr lists{};  // of the csr layout
  int threads = 1;

  Bound(const ForwardArguments& arguments, bool csr);
  Bound(const BackwardArguments& arguments, bool csr);

 private:
  void read_tensors(PyObject* q, PyObject* k, PyObject* v);
  void read_terms(PyObject* terms);
  void read_edges(PyObject* edges);
  void read_grads(PyObject* grads);
  void read_edge_grads(PyObject* grads);
};

void bind_fields(const std::string& kind, const std::vector<std::string>& fields);

}  // namespace fastattn::python
