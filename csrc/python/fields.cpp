#include "fields.h"

#include <algorithm>
#include <stdexcept>
#include <string>

namespace fastattn::python {

void Fields::bind(const std::vector<std::string>& fields) {
  const std::string of_kind = std::string(kind) + ": ";
  std::vector<Py_ssize_t> found;
  for (const char* name : names) {
    const auto place = std::find(fields.begin(), fields.end(), name);
    if (place == fields.end()) throw std::invalid_argument(of_kind + "the field " + name + " is missing");
    found.push_back(place - fields.begin());
  }
  for (size_t i = 0; i < fields.size(); i++)
    if (std::find(found.begin(), found.end(), (Py_ssize_t)i) == found.end())
      throw std::invalid_argument(of_kind + "the field " + fields[i] +
                                  " is unknown to the C++ kernels, or there twice");
  places = found;
}

Fields::Values Fields::of(PyObject* tuple) const {
  if (!PyTuple_Check(tuple) || places.empty() || PyTuple_GET_SIZE(tuple) != (Py_ssize_t)places.size())
    throw std::invalid_argument(std::string("must be the ") + kind +
                                (places.empty() ? ", whose fields bind_fields has not named yet" : " of fastattn"));
  return {tuple, places.data()};
}

}  // namespace fastattn::python
