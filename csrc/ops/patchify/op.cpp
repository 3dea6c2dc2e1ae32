#include "ops/patchify/op.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <string>
#include <vector>

namespace fastdiff::patchify {
namespace {

using torch::stable::Tensor;

Shape shape_of(const Tensor& image, const std::vector<int64_t>& patch, const std::string& order) {
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

// Pieces per thread worth waking one for: 32 KiB of elements.
int64_t grain(const Shape& s, int64_t bytes) { return std::max<int64_t>(1, 32768 * pieces(s) / std::max<int64_t>(1, bytes)); }

void patchify(const Tensor& x, std::vector<int64_t> patch, std::string order, const Tensor& out) {
  if (out.numel() == 0) return;
  const Shape s = shape_of(x, patch, order);
  const int size = static_cast<int>(x.element_size());
  const void* image = x.const_data_ptr();
  void* tokens = out.mutable_data_ptr();
  torch::stable::parallel_for(0, pieces(s), grain(s, out.numel() * size),
                              [&](int64_t begin, int64_t end) { pick_kernels().to_tokens(s, size, image, tokens, begin, end); });
}

void unpatchify(const Tensor& tokens, std::vector<int64_t> patch, std::vector<int64_t>, std::string order, const Tensor& out) {
  if (out.numel() == 0) return;
  const Tensor rows = torch::stable::contiguous(tokens);
  const Shape s = shape_of(out, patch, order);
  const int size = static_cast<int>(out.element_size());
  const void* source = rows.const_data_ptr();
  void* image = out.mutable_data_ptr();
  torch::stable::parallel_for(0, pieces(s), grain(s, out.numel() * size),
                              [&](int64_t begin, int64_t end) { pick_kernels().to_image(s, size, source, image, begin, end); });
}

}  // namespace
}  // namespace fastdiff::patchify

STABLE_TORCH_LIBRARY_FRAGMENT(fastdiff_cpu, m) {
  m.def("patchify(Tensor x, int[] patch, str order, Tensor(a!) out) -> ()");
  m.def("unpatchify(Tensor tokens, int[] patch, int[] grid, str order, Tensor(a!) out) -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(fastdiff_cpu, CPU, m) {
  m.impl("patchify", TORCH_BOX(&fastdiff::patchify::patchify));
  m.impl("unpatchify", TORCH_BOX(&fastdiff::patchify::unpatchify));
}
