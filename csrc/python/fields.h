// The fields of fastattn's named tuples, read by name: which place a name has, Python says once, when it is imported.
#pragma once
#include <pybind11/pybind11.h>

#include <vector>

namespace fastattn::python {

class Fields {
  const char* const kind;
  const std::vector<const char*> names;
  std::vector<Py_ssize_t> places;  // of each name; empty until it is known

 public:
  Fields(const char* kind, std::vector<const char*> names) : kind(kind), names(std::move(names)) {}

  // std::invalid_argument that names the field which one side has and the other lacks.
  void bind(const std::vector<std::string>& fields);

  // The values of a tuple of this kind.
  class Values {
    PyObject* const tuple;
    const Py_ssize_t* const places;

   public:
    Values(PyObject* tuple, const Py_ssize_t* places) : tuple(tuple), places(places) {}
    PyObject* operator[](size_t name) const { return PyTuple_GET_ITEM(tuple, places[name]); }
  };
  Values of(PyObject* tuple) const;
};

}  // namespace fastattn::python
