#include "ops/linear/op.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <optional>

#include "common/parallel.h"
#include "common/tensor.h"

namespace fastdiff::linear {
namespace {

using torch::stable::Tensor;

// W is packed whole up to this size.
constexpr int64_t kPackedFloats = 2 << 20;

// From sizes alone. 96 rows of x and of y beside a panel of W fit a core's L2; narrower blocks where there would be fewer than 8 items.
Plan plan_of(const Problem& p) {
  const int64_t M = p.M, N = p.N, K = std::max<int64_t>(1, p.K);
  Plan plan{std::min<int64_t>(M, 96), std::min<int64_t>(N, 256), std::min<int64_t>(K, p.type == Type::bf16 ? 512 : 256), K};
  const auto pieces = [](int64_t n, int64_t block) { return (n + block - 1) / block; };
  while (plan.columns > 64 && pieces(M, plan.rows) * pieces(N, plan.columns) < 8) plan.columns = std::max<int64_t>(64, plan.columns / 128 * 64);
  if (N * K > kPackedFloats) plan.slab = std::max<int64_t>(1, kPackedFloats / N / plan.depth) * plan.depth;
  return plan;
}

// One of the strides is 1 (a size of 1 counts as such), or x is copied once.
Tensor with_order(const Tensor& x) { return x.stride(1) == 1 || x.stride(0) == 1 ? x : torch::stable::contiguous(x); }

Matrix matrix(const Tensor& x) { return {x.const_data_ptr(), x.stride(0), x.stride(1)}; }

void linear(const Tensor& x_, const Tensor& weight_, const std::optional<Tensor>& bias_, const std::optional<Tensor>& added_,
            const Tensor& y) {
  if (y.numel() == 0) return;
  const Tensor x = with_order(x_), weight = with_order(weight_);
  std::optional<Tensor> bias, added;
  if (bias_) bias = torch::stable::contiguous(*bias_);
  if (added_) added = torch::stable::contiguous(*added_);
  const Problem p{type_of(x), type_of(y), x.size(0), weight.size(0), x.size(1), matrix(x), matrix(weight), bias ? bias->const_data_ptr() : nullptr,
                  added ? added->const_data_ptr() : nullptr, y.mutable_data_ptr()};
  const Plan plan = plan_of(p);
  const Kernels& kernels = pick_kernels();
  const int64_t width = kernels.padded(plan.columns);
  const Buffer packed = allocate(plan.packs(p) * plan.slab * width);
  const Buffer sums = allocate(plan.slab < p.K ? plan.items(p) * plan.rows * width : 0);
  for (int64_t k = 0; k < std::max<int64_t>(1, p.K); k += plan.slab) {
    for_items(plan.packs(p), plan.columns * kernels.padded(plan.depth),
              [&](int64_t block, float* scratch) { kernels.pack(p, plan, k, block, packed.get(), scratch); });
    for_items(plan.items(p), kernels.scratch(plan),
              [&](int64_t item, float* scratch) { kernels.run(p, plan, k, packed.get(), sums.get(), item, scratch); });
  }
}

}  // namespace
}  // namespace fastdiff::linear

STABLE_TORCH_LIBRARY_FRAGMENT(fastdiff_cpu, m) { m.def("linear(Tensor x, Tensor weight, Tensor? bias, Tensor? added, Tensor(a!) y) -> ()"); }
STABLE_TORCH_LIBRARY_IMPL(fastdiff_cpu, CPU, m) { m.impl("linear", TORCH_BOX(&fastdiff::linear::linear)); }
