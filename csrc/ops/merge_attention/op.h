// The union of two partial attentions and its gradient, row by row.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "common/isa.h"

namespace fastdiff::merge_attention {

// (B, H, M, E) rows of any strides with last stride 1.
struct View {
  const void* data;
  int64_t b, h, s;
};

// One of the two attentions, with its contiguous log-sum-exp (B, H, M).
struct Side {
  View out;
  const float* lse;
};

struct Sizes {
  Type type;
  int64_t H, M, E;
};

// A contiguous result of one side.
struct Result {
  void* out;
  float* lse;
};

struct Kernels {
  // Rows [begin, end) of the B H M.
  void (*merge)(const Sizes&, const Side& a, const Side& b, const Result& merged, int64_t begin, int64_t end);
  // dlse may be null.
  void (*backward)(const Sizes&, const View& dout, const float* dlse, const Side& a, const Side& b, const Result& da, const Result& db,
                   int64_t begin, int64_t end);
};

FASTDIFF_PER_ISA(Kernels, kernels)

}  // namespace fastdiff::merge_attention
