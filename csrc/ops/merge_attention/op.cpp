#include "ops/merge_attention/op.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <optional>
#include <tuple>

#include "common/tensor.h"

namespace fastdiff::merge_attention {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

View view(const Tensor& x) { return {x.const_data_ptr(), x.stride(0), x.stride(1), x.stride(2)}; }
Side side(const Tensor& out, const Tensor& lse) { return {view(out), static_cast<const float*>(lse.const_data_ptr())}; }
Result result(const Tensor& out, const Tensor& lse) { return {out.mutable_data_ptr(), static_cast<float*>(lse.mutable_data_ptr())}; }
Sizes sizes(const Tensor& out) { return {type_of(out), out.size(1), out.size(2), out.size(3)}; }
// Rows per thread worth waking one for: 32 KiB of float32.
int64_t grain(const Sizes& n) { return std::max<int64_t>(1, 8192 / (n.E + 8)); }

void merge_attention(const Tensor& out_a, const Tensor& lse_a, const Tensor& out_b, const Tensor& lse_b, const Tensor& out, const Tensor& lse) {
  if (lse.numel() == 0) return;
  const Tensor x = with_rows(out_a), y = with_rows(out_b);
  const Tensor x_lse = torch::stable::contiguous(lse_a), y_lse = torch::stable::contiguous(lse_b);
  const Sizes n = sizes(out);
  const Side a = side(x, x_lse), b = side(y, y_lse);
  const Result merged = result(out, lse);
  torch::stable::parallel_for(0, lse.numel(), grain(n),
                              [&](int64_t begin, int64_t end) { pick_kernels().merge(n, a, b, merged, begin, end); });
}

void merge_attention_backward(const Tensor& dout, const std::optional<Tensor>& dlse, const Tensor& out_a, const Tensor& lse_a, const Tensor& out_b,
                              const Tensor& lse_b, const Tensor& dout_a, const Tensor& dlse_a, const Tensor& dout_b, const Tensor& dlse_b) {
  if (dlse_a.numel() == 0) return;
  const Tensor dy = with_rows(dout), x = with_rows(out_a), y = with_rows(out_b);
  const Tensor x_lse = torch::stable::contiguous(lse_a), y_lse = torch::stable::contiguous(lse_b);
  std::optional<Tensor> rows;
  if (dlse) rows = torch::stable::contiguous(*dlse);
  const float* row_grads = rows ? static_cast<const float*>(rows->const_data_ptr()) : nullptr;
  const Sizes n = sizes(out_a);
  const View d = view(dy);
  const Side a = side(x, x_lse), b = side(y, y_lse);
  const Result da = result(dout_a, dlse_a), db = result(dout_b, dlse_b);
  torch::stable::parallel_for(0, dlse_a.numel(), grain(n),
                              [&](int64_t begin, int64_t end) { pick_kernels().backward(n, d, row_grads, a, b, da, db, begin, end); });
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
  m.def(
      "merge_attention_backward(Tensor dout, Tensor? dlse, Tensor out_a, Tensor lse_a, Tensor out_b, Tensor lse_b, Tensor(a!) dout_a, "
      "Tensor(b!) dlse_a, Tensor(c!) dout_b, Tensor(d!) dlse_b) -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(fastdiff_cpu, CPU, m) {
  m.impl("merge_attention", TORCH_BOX(&fastdiff::merge_attention::merge_attention));
  m.impl("merge_attention_backward", TORCH_BOX(&fastdiff::merge_attention::merge_attention_backward));
  m.impl("merge_attention_eager", TORCH_BOX(&fastdiff::merge_attention::merge_attention_eager));
}
