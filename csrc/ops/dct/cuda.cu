#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <optional>

#include "common/launch.cuh"
#include "ops/dct/kernel.cuh"

namespace fastdiff::dct {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

std::optional<Tensor> dense(const std::optional<Tensor>& x) { return x ? std::optional(torch::stable::contiguous(*x)) : std::nullopt; }

// Axis -4 to -1 of x, which may have fewer.
int64_t size(const Tensor& x, int axis) { return x.dim() + axis < 0 ? 1 : x.size(x.dim() + axis); }

Gain gain_of(const std::optional<Tensor>& x) {
  if (!x) return {};
  const auto stride = [&](int axis) { return size(*x, axis) == 1 ? 0 : x->stride(x->dim() + axis); };
  return {data<const float>(*x), stride(-4), stride(-3), stride(-2), stride(-1)};
}

template <class P>
using element_of = typename std::remove_reference_t<P>::Element;

template <class T>
const T* data_of(const std::optional<Tensor>& x) { return x ? data<const T>(*x) : nullptr; }

// Calls fill(problem) for what differs between the ops, and runs.
template <class F>
void run(const char* op, Kind kind, const Tensor& x_, const Tensor& y, const F& fill) {
  if (y.numel() == 0) return;
  const Tensor x = torch::stable::contiguous(x_);
  const int64_t n = size(x, -1);
  on_stream_of(x, op, [&](const Launcher& launch) {
    const auto typed = [&](auto zero) {
      using T = decltype(zero);
      Problem<T> p{};
      p.kind = kind, p.planes = x.numel() / (n * n), p.channels = static_cast<int>(size(x, -3)), p.x = data<const T>(x), p.y = data<T>(y);
      fill(p);
      run(launch, n, p);
    };
    if (x.scalar_type() == ScalarType::Float) typed(float{});
    else if (x.scalar_type() == ScalarType::BFloat16) typed(bf16{});
    else typed(f16{});
  });
}

void dct(const Tensor& x, int64_t, bool inverse, const Tensor& y) {
  run("dct", inverse ? Kind::inverse : Kind::forward, x, y, [](auto&) {});
}

void frequency_mix(const Tensor& x, const Tensor& gain, const std::optional<Tensor>& eps_, const std::optional<Tensor>& gain_eps,
                   const std::optional<Tensor>& noise_, const std::optional<Tensor>& gain_noise, int64_t, const Tensor& y) {
  const auto eps = dense(eps_), noise = dense(noise_);
  run("frequency_mix", Kind::mix, x, y, [&](auto& p) {
    using T = element_of<decltype(p)>;
    p.eps = data_of<T>(eps), p.noise = data_of<T>(noise);
    p.gain = gain_of(gain), p.gain_eps = gain_of(gain_eps), p.gain_noise = gain_of(gain_noise);
  });
}

void separable_gain(const Tensor& x, const Tensor& rows_, const Tensor& columns_, const Tensor& base_, const std::optional<Tensor>& noise_,
                    const std::optional<Tensor>& sigma_, const Tensor& y) {
  const auto rows = dense(rows_), columns = dense(columns_), base = dense(base_), noise = dense(noise_), sigma = dense(sigma_);
  run("separable_gain", Kind::separable, x, y, [&](auto& p) {
    p.noise = data_of<element_of<decltype(p)>>(noise);
    p.rows = data_of<float>(rows), p.columns = data_of<float>(columns), p.base = data_of<float>(base), p.sigma = data_of<float>(sigma);
  });
}

}  // namespace
}  // namespace fastdiff::dct

STABLE_TORCH_LIBRARY_FRAGMENT(fastdiff_cuda, m) {
  m.def("dct(Tensor x, int dims, bool inverse, Tensor(a!) y) -> ()");
  m.def("frequency_mix(Tensor x, Tensor gain, Tensor? eps, Tensor? gain_eps, Tensor? noise, Tensor? gain_noise, int dims, Tensor(a!) y) -> ()");
  m.def("separable_gain(Tensor x, Tensor rows, Tensor columns, Tensor base, Tensor? noise, Tensor? sigma, Tensor(a!) y) -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(fastdiff_cuda, CUDA, m) {
  m.impl("dct", TORCH_BOX(&fastdiff::dct::dct));
  m.impl("frequency_mix", TORCH_BOX(&fastdiff::dct::frequency_mix));
  m.impl("separable_gain", TORCH_BOX(&fastdiff::dct::separable_gain));
}
