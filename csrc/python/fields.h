// The fields of fastattn's named tuples, read by name: which place a name has, Python says once, when it is imported.
#pragma once
#include <Python.h>

#include <algorithm>
#include <stdexcept>
#include <string>
#include <vector>

namespace fastattn::python {

class Fields {
  const std::string kind;
  const std::vector<const char*> names;
  std::vector<Py_ssize_t> places;  // of each name; empty until bind

 public:
  class Values {
    PyObject* const tuple;
    const Py_ssize_t* const places;

   public:
    Values(PyObject* tuple, const Py_ssize_t* places) : tuple(tuple), places(places) {}
    PyObject* operator[](size_t name) const { return PyTuple_GET_ITEM(tuple, places[name]); }
  };

  Fields(const char* kind, std::vector<const char*> names) : kind(kind), names(std::move(names)) {}

  // std::invalid_argument that names the field which one side has and the other lacks.
  void bind(const std::vector<std::string>& fields) {
    std::vector<Py_ssize_t> found;
    for (const char* name : names) {
      const auto place = std::find(fields.begin(), fields.end(), name);
      if (place == fields.end()) throw std::invalid_argument(kind + ": the field " + name + " is missing");
      found.push_back(place - fields.begin());
    }
    for (size_t i = 0; i < fields.size(); i++)
      if (std::find(found.begin(), found.end(), (Py_ssize_t)i) == found.end())
        throw std::invalid_argument(kind + ": the field " + fields[i] +
                                    " is unknown to the C++ kernels, or twice there");
    places = found;
  }

  Values of(PyObject* tuple) const {
    if (places.empty()) throw std::invalid_argument("bind_fields has not been called for " + kind);
    if (!PyTuple_Check(tuple) || PyTuple_GET_SIZE(tuple) != (Py_ssize_t)places.size())
      throw std::invalid_argument("must be the " + kind + " of fastattn");
    return {tuple, places.data()};
  }
};

}  // namespace fastattn::python
