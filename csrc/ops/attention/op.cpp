#include "ops/attention/op.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <tuple>
#include <vector>


#include "common/parallel.h"
#include "common/tensor.h"

namespace fastdiff::attention {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

View view(const Tensor& x) {
  const auto stride = x.strides();
  return {x.data_ptr(), stride[0], stride[1], stride[2]};
}

// Absent (E = 0) beside float32, whose rounding is no larger than that of the sums.
View low_view(const Tensor& x) { return x.size(3) ? view(x) : View{}; }

const float* floats(const std::optional<Tensor>& x) { return x ? static_cast<const float*>(x->const_data_ptr()) : nullptr; }

// Keeps the tensors a Problem points into alive.
struct Inputs {
  Tensor q, k, v;
  std::optional<Tensor> bias, key_lengths;
  Problem problem;

  Inputs(const Tensor& q_, const Tensor& k_, const Tensor& v_, const std::optional<Tensor>& bias_,
         const std::optional<Tensor>& key_lengths_, bool causal, std::optional<double> scale)
      : q(with_rows(q_)), k(with_rows(k_)), v(with_rows(v_)), bias(bias_) {
    if (key_lengths_) key_lengths = torch::stable::contiguous(*key_lengths_);
    problem = {type_of(q), q.size(0), q.size(1), q.size(2), k.size(2), q.size(3), v.size(3), view(q), view(k), view(v), nullptr, {}, nullptr, causal,
               static_cast<float>(scale ? *scale : 1.0 / std::sqrt(static_cast<double>(std::max<int64_t>(1, q.size(3)))))};
    if (bias) {
      problem.bias = bias->const_data_ptr();
      for (int i = 0; i < 4; ++i) problem.bias_stride[i] = bias->size(i) == 1 ? 0 : bias->stride(i);
    }
    if (key_lengths) problem.key_lengths = static_cast<const int64_t*>(key_lengths->const_data_ptr());
  }
};

// Enough items that any machine of today's core counts is busy and a slow core does not hold up the rest.
constexpr int64_t kItems = 32;
// A core's L2 holds what an item works on; 1 MiB of it is common, most of it is used for what must stay: queries, their sums, keys and values.
constexpr int64_t kResidentFloats = 144 * 1024;

Plan forward_plan(int64_t B, int64_t H, int64_t M, int64_t N, int64_t width) {
  Plan plan;
  width = std::max<int64_t>(width, 1);  // E = 0 is legal
  const int64_t heads = std::max<int64_t>(1, B * H);
  const int64_t rows = std::clamp<int64_t>(kResidentFloats / (2 * width) / 6 * 6, 48, 510);
  plan.key_block = std::min(std::clamp<int64_t>(72 * 1024 / (2 * width) / 64 * 64, 64, 256), std::max<int64_t>(1, N));
  plan.query_block = std::min<int64_t>(24, std::max<int64_t>(1, M));
  // Keys are cut first, down to 1024: that needs a merge of a row per split. Cutting queries, down to 96 rows, packs keys again.
  const int64_t wanted = ceil_div(kItems, heads), fewest = std::max<int64_t>(1, ceil_div(M, rows));
  plan.key_splits = std::clamp<int64_t>(std::min(ceil_div(wanted, fewest), N / 1024), 1, kItems);
  plan.query_splits = std::max(fewest, std::min(ceil_div(wanted, plan.key_splits), M / 96));
  plan.query_rows = std::max<int64_t>(1, round_up(ceil_div(M, plan.query_splits), 6));
  plan.query_splits = std::max<int64_t>(1, ceil_div(M, plan.query_rows));
  plan.query_rows = std::min(plan.query_rows, std::max<int64_t>(1, M));
  plan.key_chunk = std::max<int64_t>(1, round_up(ceil_div(N, plan.key_splits), plan.key_block));
  plan.key_splits = std::max<int64_t>(1, ceil_div(N, plan.key_chunk));
  return plan;
}

Plan backward_plan(int64_t B, int64_t H, int64_t M, int64_t N, int64_t width, bool causal) {
  Plan plan;
  width = std::max<int64_t>(width, 1);  // E = 0 is legal
  const int64_t heads = std::max<int64_t>(1, B * H), wanted = std::min<int64_t>(16, ceil_div(kItems, heads));
  // All keys in one block, where they fit, need no statistics of the rows.
  plan.key_block = std::min<int64_t>(width > 96 ? 64 : width <= 64 && N <= 256 ? 256 : 128, std::max<int64_t>(1, N));
  plan.query_block = std::min<int64_t>(causal ? 48 : 96, std::max<int64_t>(1, M));
  // The longer side is cut: its own gradients stay whole, the partial sums are of the shorter side.
  plan.query_splits = M > N ? std::clamp<int64_t>(M / 128, 1, wanted) : 1;
  plan.key_splits = M > N ? 1 : std::clamp<int64_t>(N / 128, 1, wanted);
  plan.query_rows = std::max<int64_t>(1, std::min(M, round_up(ceil_div(M, plan.query_splits), plan.query_block)));
  plan.query_splits = std::max<int64_t>(1, ceil_div(M, plan.query_rows));
  plan.key_chunk = std::max<int64_t>(1, round_up(ceil_div(N, plan.key_splits), plan.key_block));
  plan.key_splits = std::max<int64_t>(1, ceil_div(N, plan.key_chunk));
  return plan;
}

std::vector<int64_t> plan_numbers(const Plan& p) { return {p.query_splits, p.query_rows, p.key_splits, p.key_chunk, p.query_block, p.key_block}; }

void forward(const Problem& p, const View& out, const View& out_low, float* lse, float* lse_low) {
  const ForwardKernels& kernels = pick_forward();
  const int64_t width = kernels.padded(p.V);
  const Plan plan = forward_plan(p.B, p.H, p.M, p.N, kernels.padded(std::max(p.E, p.V)));
  const int64_t items = plan.items(p), rows = plan.key_splits > 1 ? items * plan.query_rows : 0;
  const Buffer partial = allocate(rows * width), stats = allocate(rows * kStats);
  const ForwardOut o{out, out_low, lse, lse_low, partial.get(), stats.get()};
  for_items(items, kernels.scratch(p, plan), [&](int64_t item, float* scratch) { kernels.run(p, plan, o, item, scratch); });
  if (rows)
    for_items(items / plan.key_splits, 0, [&](int64_t group, float*) { kernels.merge(p, plan, o, group); });
}

void attention(const Tensor& q, const Tensor& k, const Tensor& v, const std::optional<Tensor>& bias, const std::optional<Tensor>& key_lengths,
               bool causal, std::optional<double> scale, const Tensor& out, const Tensor& out_low,
               const Tensor& lse, const Tensor& lse_low) {
  if (lse.numel() == 0) return;
  const Inputs in(q, k, v, bias, key_lengths, causal, scale);
  forward(in.problem, view(out), low_view(out_low), static_cast<float*>(lse.mutable_data_ptr()), static_cast<float*>(lse_low.mutable_data_ptr()));
}

// Whether an eager entry takes this call: native floats of one type, sizes that fit, q as dense as its result.
bool is_plain(const Tensor& q, const Tensor& k, const Tensor& v) {
  if (!is_native_float(q) || !k.is_cpu() || !v.is_cpu()) return false;
  if (k.scalar_type() != q.scalar_type() || v.scalar_type() != q.scalar_type()) return false;
  if (q.dim() != 4 || k.dim() != 4 || v.dim() != 4 || q.numel() == 0 || !q.is_contiguous()) return false;
  for (int i = 0; i < 4; ++i)
    if (k.size(i) != v.size(i) || (i != 2 && k.size(i) != q.size(i))) return false;
  return true;
}

std::optional<Tensor> attention_eager(const Tensor& q, const Tensor& k, const Tensor& v, bool causal, std::optional<double> scale) {
  if (!is_plain(q, k, v)) return std::nullopt;
  const Tensor out = empty_like_type<4>(q, {q.size(0), q.size(1), q.size(2), q.size(3)});
  forward(Inputs(q, k, v, std::nullopt, std::nullopt, causal, scale).problem, view(out), View{}, nullptr, nullptr);
  return out;
}

std::tuple<std::optional<Tensor>, std::optional<Tensor>> attention_with_lse_eager(const Tensor& q, const Tensor& k, const Tensor& v,
                                                                                  bool causal, std::optional<double> scale) {
  if (!is_plain(q, k, v)) return {};
  const Tensor out = empty_like_type<4>(q, {q.size(0), q.size(1), q.size(2), q.size(3)});
  const Tensor lse = empty_floats<3>({q.size(0), q.size(1), q.size(2)});
  forward(Inputs(q, k, v, std::nullopt, std::nullopt, causal, scale).problem, view(out), View{},
          static_cast<float*>(lse.mutable_data_ptr()), nullptr);
  return {out, lse};
}

void attention_backward(const Tensor& dout, const std::optional<Tensor>& dlse, const Tensor& q, const Tensor& k, const Tensor& v,
                        const std::optional<Tensor>& bias, const std::optional<Tensor>& key_lengths, const Tensor& out, const Tensor& out_low,
                        const Tensor& lse, const Tensor& lse_low, bool causal, std::optional<double> scale, bool bias_grad, bool partial,
                        const Tensor& dq, const Tensor& dk, const Tensor& dv,
                        const Tensor& dbias) {
  const Inputs inputs(q, k, v, bias, key_lengths, causal, scale);
  const Problem& p = inputs.problem;
  const BackwardKernels& kernels = pick_backward();
  const int64_t heads = p.B * p.H, width = kernels.padded(p.E), v_width = kernels.padded(p.V);
  const Plan plan = backward_plan(p.B, p.H, p.M, p.N, std::max(width, v_width), causal);
  const Tensor y = with_rows(out), y_low = with_rows(out_low), dy = with_rows(dout), rows = torch::stable::contiguous(lse), low = torch::stable::contiguous(lse_low);
  std::optional<Tensor> drows;
  if (dlse) drows = torch::stable::contiguous(*dlse);
  const Buffer dq_partial = allocate(plan.key_splits > 1 ? plan.key_splits * heads * p.M * width : 0);
  const int64_t per_key = plan.query_splits > 1 ? plan.query_splits * heads * p.N : 0;
  const Buffer dk_partial = allocate(per_key * width), dv_partial = allocate(per_key * v_width);
  const BackwardIn in{view(y), low_view(y_low), view(dy), floats(rows), floats(low), floats(drows), partial};
  // A bias that is one number for all keys of a query moves its log-sum-exp and nothing else: its gradient is dlse, exactly.
  const bool by_row = bias_grad && dbias.size(3) == 1, by_score = bias_grad && !by_row;
  const bool reduce_bias = by_score && dbias.numel() != heads * p.M * p.N;
  const Buffer full_bias = allocate(reduce_bias ? heads * p.M * p.N : by_row ? heads * p.M : 0);
  const BackwardOut o{view(dq), view(dk), view(dv), !by_score ? nullptr : reduce_bias ? full_bias.get() : dbias.mutable_data_ptr(), reduce_bias,
                      dq_partial.get(), dk_partial.get(), dv_partial.get()};
  for_items(plan.items(p), kernels.scratch(p, plan), [&](int64_t item, float* scratch) { kernels.run(p, plan, in, o, item, scratch); });
  const auto add = [&](const View& x, int64_t S, int64_t columns, const Buffer& partial, int64_t splits) {
    if (splits > 1)
      torch::stable::parallel_for(0, heads * S, std::max<int64_t>(1, 16384 / std::max<int64_t>(1, columns * splits)),
                                  [&](int64_t begin, int64_t end) { kernels.sum(p, x, S, columns, partial.get(), splits, begin, end); });
  };
  add(o.dq, p.M, p.E, dq_partial, plan.key_splits);
  add(o.dk, p.N, p.E, dk_partial, plan.query_splits);
  add(o.dv, p.N, p.V, dv_partial, plan.query_splits);
  if (by_row)
    for (int64_t i = 0; i < heads * p.M; ++i) full_bias[i] = drows && in.lse[i] != -INFINITY ? in.dlse[i] : 0.0f;
  if ((reduce_bias || by_row) && dbias.numel()) {
    const int64_t size[4] = {dbias.size(0), dbias.size(1), dbias.size(2), dbias.size(3)};
    torch::stable::parallel_for(0, dbias.numel() / size[3], 1, [&](int64_t begin, int64_t end) {
      kernels.sum_bias(p, size, full_bias.get(), dbias.mutable_data_ptr(), begin, end);
    });
  }
}

std::vector<int64_t> attention_plan(int64_t B, int64_t H, int64_t M, int64_t N, int64_t E, bool causal, bool backward) {
  const int64_t width = pick_forward().padded(E);
  return plan_numbers(backward ? backward_plan(B, H, M, N, width, causal) : forward_plan(B, H, M, N, width));
}

}  // namespace
}  // namespace fastdiff::attention

STABLE_TORCH_LIBRARY_FRAGMENT(fastdiff_cpu, m) {
  m.def(
      "attention(Tensor q, Tensor k, Tensor v, Tensor? bias, Tensor? key_lengths, bool causal, float? scale, Tensor(a!) out, "
      "Tensor(b!) out_low, Tensor(c!) lse, Tensor(d!) lse_low) -> ()");
  m.def(
      "attention_backward(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor? bias, Tensor? key_lengths, Tensor out, "
      "Tensor out_low, Tensor lse, Tensor lse_low, bool causal, float? scale, bool bias_grad, bool partial, Tensor(a!) dq, Tensor(b!) dk, Tensor(c!) dv, Tensor(d!) dbias) -> ()");
  m.def("attention_eager(Tensor q, Tensor k, Tensor v, bool causal, float? scale) -> Tensor?");
  m.def("attention_with_lse_eager(Tensor q, Tensor k, Tensor v, bool causal, float? scale) -> (Tensor?, Tensor?)");
  m.def("attention_plan(int B, int H, int M, int N, int E, bool causal, bool backward) -> int[]");
}
STABLE_TORCH_LIBRARY_IMPL(fastdiff_cpu, CPU, m) {
  m.impl("attention", TORCH_BOX(&fastdiff::attention::attention));
  m.impl("attention_eager", TORCH_BOX(&fastdiff::attention::attention_eager));
  m.impl("attention_with_lse_eager", TORCH_BOX(&fastdiff::attention::attention_with_lse_eager));
  m.impl("attention_backward", TORCH_BOX(&fastdiff::attention::attention_backward));
}
STABLE_TORCH_LIBRARY_IMPL(fastdiff_cpu, CompositeExplicitAutograd, m) {
  m.impl("attention_plan", TORCH_BOX(&fastdiff::attention::attention_plan));
}
