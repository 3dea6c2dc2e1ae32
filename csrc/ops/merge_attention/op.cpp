#include "ops/merge_attention/op.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>
#include <tuple>

#include "common/eager.h"

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

std::tuple<std::optional<Tensor>, std::optional<Tensor>> merge_attention_eager(const Tensor& out_a, const Tensor& lse_a, const Tensor& out_b,
                                                                               const Tensor& lse_b) {
  const bool plain = is_native_float(out_a) && out_b.is_cpu() && out_b.scalar_type() == out_a.scalar_type() && lse_a.is_cpu() &&
                     lse_b.is_cpu() && lse_a.scalar_type() == ScalarType::Float && lse_b.scalar_type() == ScalarType::Float &&
                     out_a.dim() == 4 && out_b.dim() == 4 && lse_a.dim() == 3 && lse_b.dim() == 3;
  if (!plain) return {};
  const std::array<int64_t, 4> size{out_a.size(0), out_a.size(1), out_a.size(2), out_a.size(3)};
  for (int i = 0; i < 4; ++i)
    if (out_b.size(i) != size[i] || (i < 3 && (lse_a.size(i) != size[i] || lse_b.size(i) != size[i]))) return {};
  const Tensor out = empty_like_type<4>(out_a, size), lse = empty_like_type<3>(lse_a, {size[0], size[1], size[2]});
  merge_attention(out_a, lse_a, out_b, lse_b, out, lse);
  return {out, lse};
}

}  // namespace
}  // namespace fastdiff::merge_attention

STABLE_TORCH_LIBRARY_FRAGMENT(fastdiff_cpu, m) {
  m.def("merge_attention_eager(Tensor out_a, Tensor lse_a, Tensor out_b, Tensor lse_b) -> (Tensor?, Tensor?)");
  m.def("merge_attention(Tensor out_a, Tensor lse_a, Tensor out_b, Tensor lse_b, Tensor(a!) out, Tensor(b!) lse) -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(fastdiff_cpu, CPU, m) {
  m.impl("merge_attention", TORCH_BOX(&fastdiff::merge_attention::merge_attention));
  m.impl("merge_attention_eager", TORCH_BOX(&fastdiff::merge_attention::merge_attention_eager));
}
