// The union of two partial attentions, row by row.
#pragma once

#include <cstdint>

#include "common/isa.h"

namespace fastdiff::merge_attention {

enum class Type { f32, bf16, f16 };

// One side: (B, H, M, E) rows of any strides with last stride 1, and its contiguous log-sum-exp.
struct Side {
  const void* out;
  int64_t b, h, m;
  const float* lse;
};

struct Kernels {
  // Rows [begin, end) of the B H M; out and lse are contiguous.
  void (*merge)(Type, const Side& left, const Side& right, int64_t H, int64_t M, int64_t E, void* out, float* lse, int64_t begin, int64_t end);
};

FASTDIFF_PER_ISA(Kernels, kernels)

}  // namespace fastdiff::merge_attention
