#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <optional>
#include <vector>

#include "common/launch.cuh"
#include "ops/attention/backward.cuh"
#include "ops/attention/forward.cuh"

namespace fastdiff::attention {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// x with last stride 1 and rows of whole, aligned 16 bytes, or a copy that has them.
Tensor aligned(const Tensor& x) {
  const int64_t size = x.element_size();
  bool is = x.stride(3) == 1 && reinterpret_cast<uintptr_t>(x.data_ptr()) % 16 == 0;
  for (int a = 0; a < 3; ++a) is = is && (x.size(a) == 1 || x.stride(a) * size % 16 == 0);
  if (is) return x;
  Tensor copy = torch::stable::new_empty(x, {x.size(0), x.size(1), x.size(2), x.size(3)});
  torch::stable::copy_(copy, x);
  return copy;
}

template <class T>
Rows<T> rows(const Tensor& x) { return {data<T>(x), x.stride(0), x.stride(1), x.stride(2)}; }

Tensor floats(const Tensor& like, std::vector<int64_t> size) { return torch::stable::new_empty(like, size, ScalarType::Float); }

// The tensors of a call, kept while its kernels are launched, and what they mean.
template <class T>
struct Call {
  Tensor q, k, v;
  Problem<T> p;

  Call(const Tensor& q_, const Tensor& k_, const Tensor& v_, const std::optional<Tensor>& bias, const std::optional<Tensor>& lengths, bool causal,
       std::optional<double> scale)
      : q(aligned(q_)), k(aligned(k_)), v(aligned(v_)), p{} {
    p.B = q.size(0), p.H = q.size(1), p.M = static_cast<int>(q.size(2)), p.N = static_cast<int>(k.size(2)), p.E = static_cast<int>(q.size(3));
    p.q = rows<const T>(q), p.k = rows<const T>(k), p.v = rows<const T>(v);
    if (bias) {
      p.bias = data<const T>(*bias);
      for (int a = 0; a < 4; ++a) p.bias_stride[a] = bias->size(a) == 1 ? 0 : bias->stride(a);
    }
    if (lengths) p.lengths = data<const int64_t>(*lengths), p.lengths_stride = lengths->stride(0);
    p.causal = causal, p.scale = static_cast<float>(scale ? *scale : 1 / std::sqrt(static_cast<double>(p.E)));
  }
};

template <class F>
void by_type(const Tensor& x, const F& f) {
  if (x.scalar_type() == ScalarType::Float) f(float{});
  else if (x.scalar_type() == ScalarType::BFloat16) f(bf16{});
  else f(f16{});
}

void attend(const Tensor& q, const Tensor& k, const Tensor& v, std::optional<Tensor> bias, std::optional<Tensor> key_lengths, bool causal,
            std::optional<double> scale, const Tensor& out, const Tensor& out_low, const Tensor& lse, const Tensor& lse_low) {
  if (out.numel() == 0) return;
  by_type(q, [&](auto x) {
    using T = decltype(x);
    on_stream_of(q, "attention", [&](const Launcher& launch) {
      const Call<T> call(q, k, v, bias, key_lengths, causal, scale);
      const Problem<T>& p = call.p;
      const Shares by = forward_shares(launch.architecture, p);
      ForwardOut<T> o{rows<T>(out), out_low.numel() ? data<T>(out_low) : nullptr, {data<float>(lse), data<float>(lse_low)}, nullptr, nullptr, nullptr};
      if (by.splits == 1) return run_forward<T>(launch, p, o, by);
      const Tensor parts = floats(q, {by.splits, p.B, p.H, p.M, p.E}), tops = floats(q, {2, by.splits, p.B, p.H, p.M});
      o.parts = data<float>(parts), o.tops = data<float>(tops), o.totals = o.tops + by.splits * p.B * p.H * p.M;
      run_forward<T>(launch, p, o, by);
    });
  });
}

void attend_backward(const Tensor& dout_, std::optional<Tensor> dlse_, const Tensor& q, const Tensor& k, const Tensor& v, std::optional<Tensor> bias,
              std::optional<Tensor> key_lengths, const Tensor& out_, const Tensor& out_low_, const Tensor& lse_, const Tensor& lse_low_, bool causal,
              std::optional<double> scale, bool, bool, const Tensor& dq, const Tensor& dk, const Tensor& dv, const Tensor&) {
  if (dq.numel() == 0 && dk.numel() == 0) return;
  by_type(q, [&](auto x) {
    using T = decltype(x);
    on_stream_of(q, "attention_backward", [&](const Launcher& launch) {
      const Call<T> call(q, k, v, bias, key_lengths, causal, scale);
      const Problem<T>& p = call.p;
      const Tensor dout = aligned(dout_), out = aligned(out_), lse = torch::stable::contiguous(lse_), lse_low = torch::stable::contiguous(lse_low_);
      const bool has_low = out_low_.numel() > 0;
      const Tensor out_low = has_low ? aligned(out_low_) : out_low_, dlse = dlse_ ? torch::stable::contiguous(*dlse_) : lse;
      const Tensor stats = floats(q, {4, p.B, p.H, p.M});
      Backward<T> g{rows<const T>(dout), rows<const T>(out), has_low ? rows<const T>(out_low) : Rows<const T>{}, data<const float>(lse),
                    data<const float>(lse_low), dlse_ ? data<const float>(dlse) : nullptr, data<float>(stats), rows<T>(dq), rows<T>(dk), rows<T>(dv),
                    nullptr, nullptr, nullptr};
      const BackwardShares by = backward_shares(launch.architecture, p);
      const auto parts = [&](int splits, int rows, int64_t tensors) { return floats(q, {splits > 1 ? tensors * splits : 0, p.B, p.H, rows, p.E}); };
      const Tensor of_queries = parts(by.keys.splits, p.M, 1), of_keys = parts(by.queries.splits, p.N, 2);
      g.dq_parts = data<float>(of_queries), g.dk_parts = data<float>(of_keys);
      if (by.queries.splits > 1) g.dv_parts = g.dk_parts + by.queries.splits * p.B * p.H * p.N * p.E;
      run_backward<T>(launch, p, g, by);
    });
  });
}

}  // namespace
}  // namespace fastdiff::attention

STABLE_TORCH_LIBRARY_FRAGMENT(fastdiff_cuda, m) {
  m.def(
      "attention(Tensor q, Tensor k, Tensor v, Tensor? bias, Tensor? key_lengths, bool causal, float? scale, Tensor(a!) out, "
      "Tensor(b!) out_low, Tensor(c!) lse, Tensor(d!) lse_low) -> ()");
  m.def(
      "attention_backward(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor? bias, Tensor? key_lengths, Tensor out, "
      "Tensor out_low, Tensor lse, Tensor lse_low, bool causal, float? scale, bool bias_grad, bool partial, Tensor(a!) dq, Tensor(b!) dk, "
      "Tensor(c!) dv, Tensor(d!) dbias) -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(fastdiff_cuda, CUDA, m) {
  m.impl("attention", TORCH_BOX(&fastdiff::attention::attend));
  m.impl("attention_backward", TORCH_BOX(&fastdiff::attention::attend_backward));
}
