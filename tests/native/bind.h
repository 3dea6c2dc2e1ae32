// How a test calls a kernel's launch: BIND(name, function) makes emulator.name(arguments...) of a function of bool, int64_t, uint64_t, double,
// Ints and Array, by numpy ints, floats, sequences of ints, contiguous arrays and None. module.cpp alone sees pybind11, which is slow to compile.
#pragma once

#include <map>
#include <string>
#include <utility>
#include <variant>
#include <vector>

#include "common/device.cuh"
#include "common/mma.cuh"
#include "common/pipeline.cuh"

namespace fastdiff::emulation {

using Ints = std::vector<int64_t>;

struct Array {
  void* data = nullptr;
  int64_t size = 0, itemsize = 0;

  // Its memory as elements of the kernel's type (16-bit floats come as uint16); null for None.
  template <class T>
  Global<T> as() const {
    if (data && itemsize != sizeof(T)) throw std::runtime_error("an array's elements have another size than the kernel's");
    T* first = static_cast<T*>(data);
    return {first, first, first + size};
  }
};

struct Value {
  std::variant<std::monostate, int64_t, double, Ints, Array> held;

  template <class T>
  T to() const {
    if constexpr (std::is_same_v<T, Array>) return std::holds_alternative<std::monostate>(held) ? Array{} : std::get<Array>(held);
    else if constexpr (std::is_same_v<T, Ints>) return std::get<Ints>(held);
    else if constexpr (std::is_floating_point_v<T>)
      return static_cast<T>(std::holds_alternative<int64_t>(held) ? static_cast<double>(std::get<int64_t>(held)) : std::get<double>(held));
    else return static_cast<T>(std::get<int64_t>(held));
  }
};

using Bound = std::function<void(const std::vector<Value>&)>;
inline std::map<std::string, Bound>& bound() {
  static std::map<std::string, Bound> table;
  return table;
}

template <class... P, size_t... i>
Bound unpack(void (*f)(P...), std::index_sequence<i...>) {
  return [f](const std::vector<Value>& values) {
    if (values.size() != sizeof...(P)) throw std::runtime_error("wants " + std::to_string(sizeof...(P)) + " arguments");
    f(values[i].to<std::decay_t<P>>()...);
  };
}

struct Bind {
  template <class... P>
  Bind(const char* name, void (*f)(P...)) { bound()[name] = unpack(f, std::index_sequence_for<P...>()); }
};

}  // namespace fastdiff::emulation

#define BIND(name, ...) static const fastdiff::emulation::Bind bind_##name(#name, __VA_ARGS__);
