// y = x W^T with one order of addition, whatever the threads.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "common/isa.h"

namespace fastdiff::linear {

// Element (i, k) at i * row + k * column; one of the two is 1.
struct Matrix {
  const void* data;
  int64_t row, column;
};

struct Problem {
  Type type;
  int64_t M, N, K;
  Matrix x, weight;  // (M, K), (N, K)
  void* y;           // (M, N) contiguous
};

// Blocks that lie in a core's L2: a block of y, of W, and (where it has to be converted) of x.
struct Plan {
  int64_t rows, columns, depth;
  int64_t items(const Problem& p) const { return (p.M + rows - 1) / rows * ((p.N + columns - 1) / columns); }
};

struct Kernels {
  int64_t (*scratch)(const Problem&, const Plan&);  // floats
  void (*run)(const Problem&, const Plan&, int64_t item, float* scratch);
};

FASTDIFF_PER_ISA(Kernels, kernels)

}  // namespace fastdiff::linear
