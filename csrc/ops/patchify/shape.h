// The sizes of a call from its tensors: what the CPU and the CUDA side unpack alike.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <string>
#include <vector>

#include "ops/patchify/op.h"

namespace fastdiff::patchify {

using torch::stable::Tensor;

inline Shape shape_of(const Tensor& image, const std::vector<int64_t>& patch, const std::string& order) {
  const int space = static_cast<int>(patch.size()), pad = 3 - space;
  const auto size = image.sizes();
  const auto stride = image.strides();
  Shape s{size[0], size[1], {1, 1, 1}, {1, 1, 1}, {stride[0], stride[1], 0, 0, 0}, order == "pqc"};
  for (int i = 0; i < space; ++i) {
    s.patch[pad + i] = patch[i];
    s.grid[pad + i] = size[2 + i] / patch[i];
    s.stride[2 + pad + i] = stride[2 + i];
  }
  return s;
}

}  // namespace fastdiff::patchify
