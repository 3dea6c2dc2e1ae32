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

// A of an item: what fits a core's L2 beside a panel of W.
constexpr int64_t kItemFloats = 96 * 1024;

// From sizes alone. Blocks of W are whole vectors of columns unless there is one alone.
Plan plan_of(const Problem& p) {
  int64_t rows = std::clamp<int64_t>(kItemFloats / std::max<int64_t>(1, p.K), 6, kRowsAtMost);
  while (rows > 24 && p.M < 16 * rows) rows /= 2;
  return {rows, std::min<int64_t>(p.N, 256)};
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

// One of the strides is 1 (a size of 1 counts as such), or the weight is copied once.
Tensor with_order(const Tensor& x) { return x.stride(1) == 1 || x.stride(0) == 1 ? x : torch::stable::contiguous(x); }

template <class Kernel>
void run(Kernel kernel, Problem p, const Tensor& weight_, const std::optional<Tensor>& bias_, const std::optional<Tensor>& position_,
         const Tensor& x, const Tensor& y) {
  const Tensor weight = with_order(weight_);
  std::optional<Tensor> bias, position;
  if (bias_) bias = torch::stable::contiguous(*bias_);
  if (position_) position = torch::stable::contiguous(*position_);
  p.weight = {weight.const_data_ptr(), weight.stride(0), weight.stride(1)};
  p.bias = bias ? bias->const_data_ptr() : nullptr;
  p.position = position ? position->const_data_ptr() : nullptr;
  const Plan plan = plan_of(p);
  const Forward& kernels = pick_forward();
  const Buffer packed = allocate(kernels.packed(p, plan));
  for_items(plan.packs(p), plan.columns * kernels.padded(p.K),
            [&](int64_t block, float* scratch) { kernels.pack(p, plan, block, packed.get(), scratch); });
  for_items(plan.items(p), kernels.scratch(p, plan), [&](int64_t item, float* scratch) {
    (kernels.*kernel)(p, plan, x.const_data_ptr(), packed.get(), y.mutable_data_ptr(), item, scratch);
  });
}

void patch_embed(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, const std::optional<Tensor>& position,
                 std::vector<int64_t> patch, const Tensor& y) {
  if (y.numel() == 0) return;
  const int64_t N = weight.size(0), K = weight.size(1);
  const Problem p{type_of(y), shape_of(x, patch), y.size(0) * y.size(1), N, K, {}, nullptr, nullptr, past_caches(y, 1) && whole_lines(y, N)};
  run(&Forward::embed, p, weight, bias, position, x, y);
}

void unpatch_project(const Tensor& tokens_, const Tensor& weight, const std::optional<Tensor>& bias, std::vector<int64_t> patch,
                     std::vector<int64_t>, const Tensor& image) {
  if (image.numel() == 0) return;
  const Tensor tokens = torch::stable::contiguous(tokens_);
  const int64_t M = tokens.size(0) * tokens.size(1);
  const Problem p{type_of(image), shape_of(image, patch), M, weight.size(0), weight.size(1), {}, nullptr, nullptr, false};
  run(&Forward::project, p, weight, bias, std::nullopt, tokens, image);
}

// A block of what an item makes stays in a core's L2, beside `depth` patches and tokens.
constexpr int64_t kBlockFloats = 96 * 1024;

// From sizes alone. More than one slab, or blocks narrower than they could be, where there would be fewer than 8 items.
GradientPlan gradient_plan(const Gradient& p) {
  const int64_t pixels = p.shape.patch[0] * p.shape.patch[1] * p.shape.patch[2], N = std::max<int64_t>(1, p.N);
  const auto whole = [](int64_t columns) { return Plan::ceil_div(columns, GradientPlan::kStrip) * GradientPlan::kStrip; };
  GradientPlan plan{p.M, std::min<int64_t>(p.M, 96), std::clamp<int64_t>(256 / pixels, 1, std::max<int64_t>(1, p.shape.channels)), 0};
  const int64_t widest = std::max<int64_t>(256, kBlockFloats / (plan.channels * pixels));
  plan.columns = whole(Plan::ceil_div(N, GradientPlan::blocks(N, widest)));
  const int64_t slabs = std::clamp<int64_t>(std::min(8 / plan.items(p), p.M / 512), 1, 8);
  plan.tokens = Plan::ceil_div(Plan::ceil_div(p.M, slabs), plan.depth) * plan.depth;
  while (plan.items(p) < 4 && plan.columns > 128) plan.columns = whole(plan.columns / 2);
  return plan;
}

void patch_product(const Tensor& tokens_, const Tensor& image, std::vector<int64_t> patch, bool by_tokens, const Tensor& weight,
                   const Tensor& token_sums, const Tensor& patch_sums) {
  const Tensor tokens = torch::stable::contiguous(tokens_);
  const Gradient p{type_of(tokens), shape_of(image, patch), tokens.size(0) * tokens.size(1), token_sums.size(0), patch_sums.size(0),
                   tokens.const_data_ptr(), image.const_data_ptr(), by_tokens, weight.mutable_data_ptr(), token_sums.mutable_data_ptr(),
                   patch_sums.mutable_data_ptr()};
  if (p.M == 0) {
    for (const Tensor* out : {&weight, &token_sums, &patch_sums}) torch::stable::zero_(*const_cast<Tensor*>(out));
    return;
  }
  const Backward& kernels = pick_backward();
  const GradientPlan plan = gradient_plan(p);
  const Buffer partials = allocate(plan.slabs(p) * kernels.partial(p, plan));
  for_items(plan.items(p), kernels.scratch(p, plan), [&](int64_t item, float* scratch) { kernels.sum(p, plan, partials.get(), item, scratch); });
  for_items(plan.strips(p), 0, [&](int64_t strip, float*) { kernels.write(p, plan, partials.get(), strip); });
}

}  // namespace
}  // namespace fastdiff::patch_embed

STABLE_TORCH_LIBRARY_FRAGMENT(fastdiff_cpu, m) {
  m.def("patch_embed(Tensor x, Tensor weight, Tensor? bias, Tensor? position, int[] patch, Tensor(a!) y) -> ()");
  m.def("unpatch_project(Tensor tokens, Tensor weight, Tensor? bias, int[] patch, int[] grid, Tensor(a!) image) -> ()");
  m.def("patch_product(Tensor tokens, Tensor image, int[] patch, bool by_tokens, Tensor(a!) weight, Tensor(b!) token_sums, "
        "Tensor(c!) patch_sums) -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(fastdiff_cpu, CPU, m) {
  m.impl("patch_embed", TORCH_BOX(&fastdiff::patch_embed::patch_embed));
  m.impl("unpatch_project", TORCH_BOX(&fastdiff::patch_embed::unpatch_project));
  m.impl("patch_product", TORCH_BOX(&fastdiff::patch_embed::patch_product));
}
