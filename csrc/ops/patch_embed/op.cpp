#include "ops/patch_embed/op.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <optional>
#include <vector>

#include "common/parallel.h"
#include "common/tensor.h"

namespace fastdiff::patch_embed {
namespace {

using torch::stable::Tensor;

// A and the products of an item: what fits a core's L2 beside a block of W.
constexpr int64_t kItemFloats = 96 * 1024;

// Samples that take the rows of a position table one after the other, so that it is read from memory once for them.
constexpr int64_t kSharing = 8;

// From sizes alone. Blocks of W are whole vectors of columns unless there is one alone.
Plan plan_of(const Problem& p) {
  const int64_t T = p.shape.tokens(), B = p.shape.batch;
  int64_t rows = std::clamp<int64_t>(kItemFloats / std::max<int64_t>(1, p.K), 6, 96);
  while (rows > 24 && p.M < 8 * rows) rows /= 2;
  const int64_t samples = std::min(B, T <= rows ? rows / T : p.position ? std::min(kSharing, rows / 6) : 1);
  return {std::min(T, rows / samples), samples, std::min<int64_t>(p.N, 256), std::clamp<int64_t>(p.K, 1, 256)};
}

Shape shape_of(const Tensor& image, const std::vector<int64_t>& patch) {
  const int space = static_cast<int>(patch.size()), pad = 3 - space;
  Shape s{image.size(0), image.size(1), {1, 1, 1}, {1, 1, 1}, {image.stride(0), image.stride(1), 0, 0, 0}};
  for (int i = 0; i < space; ++i) {
    s.patch[pad + i] = patch[i];
    s.grid[pad + i] = image.size(2 + i) / patch[i];
    s.stride[2 + pad + i] = image.stride(2 + i);
  }
  return s;
}

template <class Kernel>
void run(Kernel kernel, Problem p, const Tensor& weight_, const std::optional<Tensor>& bias_, const std::optional<Tensor>& position_,
         const Tensor& x, const Tensor& y) {
  const Tensor weight = torch::stable::contiguous(weight_);
  std::optional<Tensor> bias, position;
  if (bias_) bias = torch::stable::contiguous(*bias_);
  if (position_) position = torch::stable::contiguous(*position_);
  p.weight = weight.const_data_ptr();
  p.bias = bias ? bias->const_data_ptr() : nullptr;
  p.position = position ? position->const_data_ptr() : nullptr;
  const Plan plan = plan_of(p);
  const Kernels& kernels = pick_kernels();
  const Buffer packed = allocate(kernels.packed(p, plan));
  for_items(plan.packs(p), plan.columns * kernels.padded(plan.depth),
            [&](int64_t block, float* scratch) { kernels.pack(p, plan, block, packed.get(), scratch); });
  for_items(plan.items(p), kernels.scratch(p, plan), [&](int64_t item, float* scratch) {
    (kernels.*kernel)(p, plan, x.const_data_ptr(), packed.get(), y.mutable_data_ptr(), item, scratch);
  });
}

void patch_embed(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, const std::optional<Tensor>& position,
                 std::vector<int64_t> patch, const Tensor& y) {
  if (y.numel() == 0) return;
  const Problem p{type_of(y), shape_of(x, patch), y.size(0) * y.size(1), weight.size(0), weight.size(1), nullptr, nullptr, nullptr};
  run(&Kernels::embed, p, weight, bias, position, x, y);
}

void unpatch_project(const Tensor& tokens_, const Tensor& weight, const std::optional<Tensor>& bias, std::vector<int64_t> patch,
                     std::vector<int64_t>, const Tensor& image) {
  if (image.numel() == 0) return;
  const Tensor tokens = torch::stable::contiguous(tokens_);
  const int64_t M = tokens.size(0) * tokens.size(1);
  const Problem p{type_of(image), shape_of(image, patch), M, weight.size(0), weight.size(1), nullptr, nullptr, nullptr};
  run(&Kernels::project, p, weight, bias, std::nullopt, tokens, image);
}

}  // namespace
}  // namespace fastdiff::patch_embed

STABLE_TORCH_LIBRARY_FRAGMENT(fastdiff_cpu, m) {
  m.def("patch_embed(Tensor x, Tensor weight, Tensor? bias, Tensor? position, int[] patch, Tensor(a!) y) -> ()");
  m.def("unpatch_project(Tensor tokens, Tensor weight, Tensor? bias, int[] patch, int[] grid, Tensor(a!) image) -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(fastdiff_cpu, CPU, m) {
  m.impl("patch_embed", TORCH_BOX(&fastdiff::patch_embed::patch_embed));
  m.impl("unpatch_project", TORCH_BOX(&fastdiff::patch_embed::unpatch_project));
}
