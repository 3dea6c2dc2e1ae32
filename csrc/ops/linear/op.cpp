#include "ops/linear/op.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>

#include "common/parallel.h"
#include "common/tensor.h"

namespace fastdiff::linear {
namespace {

using torch::stable::Tensor;

// From sizes alone. 192 x 256 of y, 256 x 256 of W and what 192 rows of x touch fit 1 MiB of L2; narrower blocks where there would be
// fewer than 32 items.
Plan plan_of(int64_t M, int64_t N, int64_t K) {
  Plan plan{std::min<int64_t>(M, 192), std::min<int64_t>(N, 256), std::min<int64_t>(K, 256)};
  const auto pieces = [](int64_t n, int64_t block) { return (n + block - 1) / block; };
  while (pieces(M, plan.rows) * pieces(N, plan.columns) < 32 && (plan.rows > 96 || plan.columns > 64)) {
    if (plan.rows > 96) plan.rows = std::max<int64_t>(96, plan.rows / 12 * 6);
    else plan.columns = std::max<int64_t>(64, plan.columns / 128 * 64);
  }
  return plan;
}

// One of the strides is 1 (a size of 1 counts as such), or x is copied once.
Tensor with_order(const Tensor& x) { return x.stride(1) == 1 || x.stride(0) == 1 ? x : torch::stable::contiguous(x); }

Matrix matrix(const Tensor& x) { return {x.const_data_ptr(), x.stride(0), x.stride(1)}; }

void linear(const Tensor& x_, const Tensor& weight_, const Tensor& y) {
  if (y.numel() == 0) return;
  const Tensor x = with_order(x_), weight = with_order(weight_);
  const Problem p{type_of(y), x.size(0), weight.size(0), x.size(1), matrix(x), matrix(weight), y.mutable_data_ptr()};
  const Plan plan = plan_of(p.M, p.N, std::max<int64_t>(1, p.K));
  for_items(plan.items(p), pick_kernels().scratch(p, plan), [&](int64_t item, float* scratch) { pick_kernels().run(p, plan, item, scratch); });
}

}  // namespace
}  // namespace fastdiff::linear

STABLE_TORCH_LIBRARY_FRAGMENT(fastdiff_cpu, m) { m.def("linear(Tensor x, Tensor weight, Tensor(a!) y) -> ()"); }
STABLE_TORCH_LIBRARY_IMPL(fastdiff_cpu, CPU, m) { m.impl("linear", TORCH_BOX(&fastdiff::linear::linear)); }
