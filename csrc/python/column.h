// One column of a table passed from Python: a list of ints, read without the cost of a generic conversion. Must not
// know what the numbers mean.
#pragma once

#include <pybind11/pybind11.h>

#include <string>

namespace adamops {

class Column {
 public:
  Column(const pybind11::list& values, size_t expected, const char* name) : values_(values) {
    if (values.size() != expected)
      throw pybind11::value_error(std::string(name) + " has " + std::to_string(values.size()) + " entries, expected " +
                                  std::to_string(expected));
  }
  size_t operator[](size_t index) const {
    const size_t value = PyLong_AsSize_t(PyList_GET_ITEM(values_.ptr(), static_cast<Py_ssize_t>(index)));
    if (value == static_cast<size_t>(-1) && PyErr_Occurred()) throw pybind11::error_already_set();
    return value;
  }
  template <class T>
  T* pointer(size_t index) const {
    return reinterpret_cast<T*>((*this)[index]);
  }

 private:
  const pybind11::list& values_;
};

}  // namespace adamops
