#include "ops/merge_attention/op.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>

namespace fastdiff::merge_attention {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

Type type_of(const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::BFloat16: return Type::bf16;
    case ScalarType::Half: return Type::f16;
    default: return Type::f32;
  }
}

Tensor with_rows(const Tensor& x) { return x.stride(3) == 1 || x.size(3) == 1 ? x : torch::stable::contiguous(x); }

Side side(const Tensor& rows, const Tensor& lse) {
  return {rows.const_data_ptr(), rows.stride(0), rows.stride(1), rows.stride(2), static_cast<const float*>(lse.const_data_ptr())};
}

void merge_attention(const Tensor& out_a, const Tensor& lse_a, const Tensor& out_b, const Tensor& lse_b, const Tensor& out, const Tensor& lse) {
  if (lse.numel() == 0) return;
  const Tensor x = with_rows(out_a), y = with_rows(out_b);
  const Tensor x_lse = torch::stable::contiguous(lse_a), y_lse = torch::stable::contiguous(lse_b);
  const Side left = side(x, x_lse), right = side(y, y_lse);
  const Type type = type_of(out);
  const int64_t H = out.size(1), M = out.size(2), E = out.size(3);
  void* o = out.mutable_data_ptr();
  float* l = static_cast<float*>(lse.mutable_data_ptr());
  // 32 KiB of float32 rows is worth a thread.
  torch::stable::parallel_for(0, lse.numel(), std::max<int64_t>(1, 8192 / (E + 8)), [&](int64_t begin, int64_t end) {
    pick_kernels().merge(type, left, right, H, M, E, o, l, begin, end);
  });
}

}  // namespace
}  // namespace fastdiff::merge_attention

STABLE_TORCH_LIBRARY_FRAGMENT(fastdiff_cpu, m) {
  m.def("merge_attention(Tensor out_a, Tensor lse_a, Tensor out_b, Tensor lse_b, Tensor(a!) out, Tensor(b!) lse) -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(fastdiff_cpu, CPU, m) { m.impl("merge_attention", TORCH_BOX(&fastdiff::merge_attention::merge_attention)); }
