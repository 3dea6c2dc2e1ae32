#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include "bind.h"

namespace py = pybind11;
using namespace fastdiff::emulation;

static Value value(py::handle x) {
  if (x.is_none()) return {};
  if (py::isinstance<py::array>(x)) {
    const auto array = py::reinterpret_borrow<py::array>(x);
    if (!(array.flags() & py::array::c_style)) throw py::type_error("an array is not contiguous");
    return {Array{const_cast<void*>(array.data()), array.size(), array.itemsize()}};
  }
  if (py::isinstance<py::sequence>(x)) {
    Ints ints;
    for (py::handle i : x) ints.push_back(i.cast<int64_t>());
    return {ints};
  }
  if (py::isinstance<py::float_>(x)) return {x.cast<double>()};
  return {x.cast<int64_t>()};
}

PYBIND11_MODULE(emulator, m) {
  for (const auto& [name, call] : bound())
    m.def(name.c_str(), [&call = call](const py::args& arguments) {
      std::vector<Value> values;
      for (py::handle x : arguments) values.push_back(value(x));
      call(values);
    });
}
