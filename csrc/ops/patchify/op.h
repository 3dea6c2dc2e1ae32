// Moves elements between an image of any strides and contiguous rows, or columns, of patches.
#pragma once

#include <cstdint>

#include "common/isa.h"

namespace fastdiff::patchify {

// A 1-D to 3-D problem, padded to 3-D with leading axes of size 1.
struct Shape {
  int64_t batch, channels;
  int64_t grid[3], patch[3];
  int64_t stride[5];   // of the image, in elements: batch, channel, three of space
  bool channels_last;  // order "pqc" within a token; otherwise "cpq"
  bool columns = false;  // a sample is (elements of a token, tokens) in memory, not (tokens, elements)
};

// Independent pieces of work: one row of patches along the last axis for each batch and leading grid position.
inline int64_t pieces(const Shape& s) { return s.batch * s.grid[0] * s.grid[1]; }

struct Kernels {
  // Pieces [begin, end), elements of 2 or 4 bytes; tokens are contiguous.
  void (*to_tokens)(const Shape&, int element_size, const void* image, void* tokens, int64_t begin, int64_t end);
  void (*to_image)(const Shape&, int element_size, const void* tokens, void* image, int64_t begin, int64_t end);
};

FASTDIFF_PER_ISA(Kernels, kernels)

}  // namespace fastdiff::patchify
