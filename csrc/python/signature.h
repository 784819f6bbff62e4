// The shapes and dtypes of a call's tensors as a dictionary key, cheaper than their Python attributes.
#pragma once
#include <Python.h>

namespace fastattn::python {

inline constexpr const char* signature_doc =
    "signature(q, k, v, *extras) -> (key, (batch, seqlen_q, seqlen_k)), or None where a tensor is not a plain CPU "
    "tensor "
    "that is not negated, or where batch or seqlen_k differ. The key holds the dtypes, the other sizes of q, k and v, "
    "and "
    "of each of up to 8 extras (a tensor or None) its rank and which of its sizes equal 1, batch, num_heads, seqlen_q "
    "or "
    "seqlen_k.";

PyObject* signature(PyObject*, PyObject* const* args, Py_ssize_t count);

}  // namespace fastattn::python
