#include "ops/geglu/op.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <optional>
#include <string>

#include "common/tensor.h"

namespace fastdiff::geglu {
namespace {

using torch::stable::Tensor;

bool is_matrix(const Tensor& x) { return x.dim() == 2 && (x.stride(1) == 1 || x.size(1) == 1); }

// A pass reads and writes `halves` arrays of the size of `half`.
Sizes sizes(const Tensor& x, const std::string& approximate, const Tensor& half, int64_t halves, const Tensor& out) {
  const int64_t width = x.size(x.dim() - 1);
  return {type_of(x), width / 2, is_matrix(x) ? x.stride(0) : width, approximate == "tanh", past_caches(half, halves) && whole_lines(out, width / 2)};
}

Tensor rows(const Tensor& x) { return is_matrix(x) ? x : torch::stable::contiguous(x); }
int64_t grain(const Sizes& s) { return std::max<int64_t>(1, 8192 / std::max<int64_t>(1, s.F)); }

void geglu(const Tensor& x, std::string approximate, const Tensor& y) {
  if (y.numel() == 0) return;
  const Tensor in = rows(x);
  const Sizes s = sizes(in, approximate, y, 3, y);
  const void* from = in.const_data_ptr();
  void* to = y.mutable_data_ptr();
  torch::stable::parallel_for(0, y.numel() / s.F, grain(s), [&](int64_t begin, int64_t end) { pick_kernels().forward(s, from, to, begin, end); });
}

void geglu_backward(const Tensor& dy, const Tensor& x, std::string approximate, const Tensor& dx) {
  if (dx.numel() == 0) return;
  const Tensor in = rows(x), out = torch::stable::contiguous(dy);
  const Sizes s = sizes(in, approximate, dy, 5, dx);
  const void *from = in.const_data_ptr(), *gradient = out.const_data_ptr();
  void* to = dx.mutable_data_ptr();
  torch::stable::parallel_for(0, dy.numel() / s.F, grain(s), [&](int64_t begin, int64_t end) { pick_kernels().backward(s, gradient, from, to, begin, end); });
}

std::optional<Tensor> geglu_eager(const Tensor& x, std::string approximate) {
  const int64_t last = x.dim() - 1;
  if (!is_native_float(x) || last < 0 || last >= static_cast<int64_t>(kRank) || x.size(last) % 2) return std::nullopt;
  int64_t size[kRank];
  std::copy_n(x.sizes().begin(), last, size);
  size[last] = x.size(last) / 2;
  const Tensor y = empty(torch_type(x), last + 1, size);
  geglu(x, approximate, y);
  return y;
}

}  // namespace
}  // namespace fastdiff::geglu

STABLE_TORCH_LIBRARY_FRAGMENT(fastdiff_cpu, m) {
  m.def("geglu(Tensor x, str approximate, Tensor(a!) y) -> ()");
  m.def("geglu_eager(Tensor x, str approximate) -> Tensor?");
  m.def("geglu_backward(Tensor dy, Tensor x, str approximate, Tensor(a!) dx) -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(fastdiff_cpu, CPU, m) {
  m.impl("geglu", TORCH_BOX(&fastdiff::geglu::geglu));
  m.impl("geglu_eager", TORCH_BOX(&fastdiff::geglu::geglu_eager));
  m.impl("geglu_backward", TORCH_BOX(&fastdiff::geglu::geglu_backward));
}
