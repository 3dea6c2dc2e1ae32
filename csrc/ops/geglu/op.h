// y = a gelu(b), [a | b] the halves of a row, and its gradient.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "common/isa.h"

namespace fastdiff::geglu {

struct Sizes {
  Type type;
  int64_t F;       // columns of a half
  int64_t stride;  // between rows of x
  bool tanh;
  bool stream;  // results are stored past the caches: their rows are whole cache lines
};

// Rows [begin, end); y, dy and dx are contiguous.
struct Kernels {
  void (*forward)(const Sizes&, const void* x, void* y, int64_t begin, int64_t end);
  void (*backward)(const Sizes&, const void* dy, const void* x, void* dx, int64_t begin, int64_t end);
};

FASTDIFF_PER_ISA(Kernels, kernels)

}  // namespace fastdiff::geglu
