#include "ops/denoise_step/op.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "common/parallel.h"
#include "common/tensor.h"

namespace fastdiff::denoise_step {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Pieces per thread worth waking one for, in elements.
constexpr int64_t kGrain = 32768;

Shape shape_of(const Tensor& y, int images) {
  const int64_t batch = y.size(0), size = batch ? y.numel() / batch : 0;
  return {type_of(y), batch, size, (size + kPiece - 1) / kPiece, past_caches(y, images)};
}

template <class F>
void over_pieces(const Shape& s, const F& f) {
  const int64_t grain = std::max<int64_t>(1, kGrain / std::max<int64_t>(1, std::min(s.size, kPiece)));
  torch::stable::parallel_for(0, s.batch * s.pieces, grain, f);
}

// Whether the elements of each sample of x lie as those of y.
bool in_order(const Tensor& x, const Tensor& y) {
  for (int64_t i = 1; i < y.dim(); ++i)
    if (y.size(i) > 1 && x.stride(i) != y.stride(i)) return false;
  return true;
}

// The images of a tensor in the order of the result y, copied where they lie in another one.
class Ordered {
 public:
  Ordered(const Tensor& x, const Tensor& y) : kept_(x) {
    if (!in_order(x, y)) {
      kept_ = torch::stable::empty_like(y);
      torch::stable::copy_(kept_, x);
    }
  }
  Images images() const { return {kept_.const_data_ptr(), kept_.stride(0)}; }

 private:
  Tensor kept_;
};

PerSample per_sample(const Tensor& c) { return {static_cast<const float*>(c.const_data_ptr()), c.stride(0)}; }

void add_noise(const Tensor& x, const Tensor& noise, const Tensor& signal, const Tensor& sigma, const Tensor& y) {
  if (y.numel() == 0) return;
  const Shape s = shape_of(y, 3);
  const Ordered a(x, y), b(noise, y);
  const Images images[2] = {a.images(), b.images()};
  void* out = y.mutable_data_ptr();
  over_pieces(s, [&](int64_t begin, int64_t end) {
    pick_kernels().add_noise(s, images[0], images[1], per_sample(signal), per_sample(sigma), out, begin, end);
  });
}

// What rescales each guided sample: rescale std(cond) / std(guided) + 1 - rescale. Pieces are joined in order (Chan et al. 1983).
std::vector<float> factors_of(const Shape& s, const Moments* found, double rescale) {
  std::vector<float> factors(s.batch);
  for (int64_t b = 0; b < s.batch; ++b) {
    double mean[2] = {}, squares[2] = {}, count = 0;
    for (int64_t i = 0; i < s.pieces; ++i) {
      const double n = static_cast<double>(std::min(kPiece, s.size - i * kPiece)), total = count + n;
      for (int side = 0; side < 2; ++side) {
        const Moments& piece = found[2 * (b * s.pieces + i) + side];
        const double apart = piece.mean - mean[side];
        squares[side] += piece.squares + apart * apart * (count * n / total);
        mean[side] += apart * (n / total);
      }
      count = total;
    }
    factors[b] = static_cast<float>(rescale * (std::sqrt(squares[0] / (count - 1)) / std::sqrt(squares[1] / (count - 1))) + (1 - rescale));
  }
  return factors;
}

void guide(const Tensor& cond, const Tensor& uncond, const Tensor& weight, double rescale, const Tensor& y) {
  if (y.numel() == 0) return;
  const Shape s = shape_of(y, 3);
  const Ordered a(cond, y), b(uncond, y);
  const Images images[2] = {a.images(), b.images()};
  const PerSample w = per_sample(weight);
  std::vector<float> factors;
  if (rescale != 0) {
    std::vector<Moments> found(2 * s.batch * s.pieces);
    over_pieces(s, [&](int64_t begin, int64_t end) { pick_kernels().moments(s, images[0], images[1], w, found.data(), begin, end); });
    factors = factors_of(s, found.data(), rescale);
  }
  void* out = y.mutable_data_ptr();
  over_pieces(s, [&](int64_t begin, int64_t end) {
    pick_kernels().guide(s, images[0], images[1], w, factors.empty() ? nullptr : factors.data(), out, begin, end);
  });
}

using Maybe = std::optional<Tensor>;

void run_step(const Tensor& x, const Tensor& pred, const Tensor& signal, const Tensor& sigma, const Tensor& to_x0, const Tensor& to_eps,
              const Maybe& to_noise, const Maybe& noise, const Maybe& v, const Maybe& log_ratio, const std::string& prediction,
              std::optional<double> clip, bool rederive, const Tensor& y, void* x0) {
  if (y.numel() == 0) return;
  const Shape s = shape_of(y, 3 + noise.has_value() + v.has_value());
  const Ordered a(x, y), b(pred, y);
  const std::optional<Ordered> n = noise ? std::optional<Ordered>(std::in_place, *noise, y) : std::nullopt;
  const std::optional<Ordered> w = v ? std::optional<Ordered>(std::in_place, *v, y) : std::nullopt;
  Step step{};
  step.x = a.images(), step.pred = b.images();
  if (n) step.noise = n->images(), step.to_noise = per_sample(*to_noise);
  if (w) step.v = w->images(), step.log_ratio = per_sample(*log_ratio);
  step.signal = per_sample(signal), step.sigma = per_sample(sigma), step.to_x0 = per_sample(to_x0), step.to_eps = per_sample(to_eps);
  step.prediction = prediction == "eps" ? Prediction::eps : prediction == "x0" ? Prediction::x0 : Prediction::v;
  step.clipped = clip.has_value(), step.clip = static_cast<float>(clip.value_or(0.0)), step.rederive = rederive;
  void* out = y.mutable_data_ptr();
  over_pieces(s, [&](int64_t begin, int64_t end) { pick_kernels().step(s, step, out, x0, begin, end); });
}

void denoise_step(const Tensor& x, const Tensor& pred, const Tensor& signal, const Tensor& sigma, const Tensor& to_x0, const Tensor& to_eps,
                  const Maybe& to_noise, const Maybe& noise, const Maybe& v, const Maybe& log_ratio, std::string prediction,
                  std::optional<double> clip, bool rederive, const Tensor& y) {
  run_step(x, pred, signal, sigma, to_x0, to_eps, to_noise, noise, v, log_ratio, prediction, clip, rederive, y, nullptr);
}

void denoise_step_with_x0(const Tensor& x, const Tensor& pred, const Tensor& signal, const Tensor& sigma, const Tensor& to_x0,
                          const Tensor& to_eps, const Maybe& to_noise, const Maybe& noise, const Maybe& v, const Maybe& log_ratio,
                          std::string prediction, std::optional<double> clip, bool rederive, const Tensor& y, const Tensor& x0) {
  run_step(x, pred, signal, sigma, to_x0, to_eps, to_noise, noise, v, log_ratio, prediction, clip, rederive, y, x0.mutable_data_ptr());
}

// Eager entries: x contiguous or channels-last, the other images of its shape and dtype, one float32 number per sample.

bool is_image(const Tensor& x, const Tensor& like) {
  if (!x.is_cpu() || x.scalar_type() != like.scalar_type() || x.dim() != like.dim()) return false;
  for (int64_t i = 0; i < like.dim(); ++i)
    if (x.size(i) != like.size(i)) return false;
  return true;
}
bool is_image(const Maybe& x, const Tensor& like) { return !x || is_image(*x, like); }

bool is_per_sample(const Tensor& c, const Tensor& x) {
  return c.is_cpu() && c.scalar_type() == ScalarType::Float && c.dim() == 1 && c.size(0) == x.size(0);
}
bool is_per_sample(const Maybe& c, const Tensor& x) { return !c || is_per_sample(*c, x); }

// A result beside x, where x is as the kernels take it.
Maybe like(const Tensor& x) { return is_native_float(x) && x.dim() > 0 ? empty_as(x) : std::nullopt; }

Maybe add_noise_eager(const Tensor& x, const Tensor& noise, const Tensor& signal, const Tensor& sigma) {
  const Maybe y = like(x);
  if (!y || !is_image(noise, x) || !is_per_sample(signal, x) || !is_per_sample(sigma, x)) return std::nullopt;
  add_noise(x, noise, signal, sigma, *y);
  return y;
}

Maybe guide_eager(const Tensor& cond, const Tensor& uncond, const Tensor& weight, double rescale) {
  const Maybe y = like(cond);
  if (!y || !is_image(uncond, cond) || !is_per_sample(weight, cond) || !(rescale >= 0 && rescale <= 1)) return std::nullopt;
  guide(cond, uncond, weight, rescale, *y);
  return y;
}

bool is_plain(const Tensor& x, const Tensor& pred, const Tensor& signal, const Tensor& sigma, const Tensor& to_x0, const Tensor& to_eps,
              const Maybe& to_noise, const Maybe& noise, const Maybe& v, const Maybe& log_ratio, const std::string& prediction,
              std::optional<double> clip) {
  return is_image(pred, x) && is_image(noise, x) && is_image(v, x) && is_per_sample(signal, x) && is_per_sample(sigma, x) &&
         is_per_sample(to_x0, x) && is_per_sample(to_eps, x) && is_per_sample(to_noise, x) && is_per_sample(log_ratio, x) &&
         noise.has_value() == to_noise.has_value() && v.has_value() == log_ratio.has_value() && (!v || noise) && (!clip || *clip > 0) &&
         (prediction == "eps" || prediction == "x0" || prediction == "v");
}

Maybe denoise_step_eager(const Tensor& x, const Tensor& pred, const Tensor& signal, const Tensor& sigma, const Tensor& to_x0,
                         const Tensor& to_eps, const Maybe& to_noise, const Maybe& noise, const Maybe& v, const Maybe& log_ratio,
                         std::string prediction, std::optional<double> clip, bool rederive) {
  const Maybe y = like(x);
  if (!y || !is_plain(x, pred, signal, sigma, to_x0, to_eps, to_noise, noise, v, log_ratio, prediction, clip)) return std::nullopt;
  run_step(x, pred, signal, sigma, to_x0, to_eps, to_noise, noise, v, log_ratio, prediction, clip, rederive, *y, nullptr);
  return y;
}

std::tuple<Maybe, Maybe> denoise_step_with_x0_eager(const Tensor& x, const Tensor& pred, const Tensor& signal, const Tensor& sigma,
                                                    const Tensor& to_x0, const Tensor& to_eps, const Maybe& to_noise, const Maybe& noise,
                                                    const Maybe& v, const Maybe& log_ratio, std::string prediction, std::optional<double> clip,
                                                    bool rederive) {
  const Maybe y = like(x);
  if (!y || !is_plain(x, pred, signal, sigma, to_x0, to_eps, to_noise, noise, v, log_ratio, prediction, clip)) return {};
  const Maybe x0 = like(x);
  run_step(x, pred, signal, sigma, to_x0, to_eps, to_noise, noise, v, log_ratio, prediction, clip, rederive, *y, x0->mutable_data_ptr());
  return {y, x0};
}

}  // namespace
}  // namespace fastdiff::denoise_step

#define FASTDIFF_STEP                                                                                                                   \
  "(Tensor x, Tensor pred, Tensor signal, Tensor sigma, Tensor to_x0, Tensor to_eps, Tensor? to_noise, Tensor? noise, Tensor? v, " \
  "Tensor? log_ratio, str prediction, float? clip, bool rederive"

STABLE_TORCH_LIBRARY_FRAGMENT(fastdiff_cpu, m) {
  m.def("add_noise(Tensor x, Tensor noise, Tensor signal, Tensor sigma, Tensor(a!) y) -> ()");
  m.def("add_noise_eager(Tensor x, Tensor noise, Tensor signal, Tensor sigma) -> Tensor?");
  m.def("guide(Tensor cond, Tensor uncond, Tensor weight, float rescale, Tensor(a!) y) -> ()");
  m.def("guide_eager(Tensor cond, Tensor uncond, Tensor weight, float rescale) -> Tensor?");
  m.def("denoise_step" FASTDIFF_STEP ", Tensor(a!) y) -> ()");
  m.def("denoise_step_eager" FASTDIFF_STEP ") -> Tensor?");
  m.def("denoise_step_with_x0" FASTDIFF_STEP ", Tensor(a!) y, Tensor(b!) x0) -> ()");
  m.def("denoise_step_with_x0_eager" FASTDIFF_STEP ") -> (Tensor?, Tensor?)");
}
STABLE_TORCH_LIBRARY_IMPL(fastdiff_cpu, CPU, m) {
  m.impl("add_noise", TORCH_BOX(&fastdiff::denoise_step::add_noise));
  m.impl("add_noise_eager", TORCH_BOX(&fastdiff::denoise_step::add_noise_eager));
  m.impl("guide", TORCH_BOX(&fastdiff::denoise_step::guide));
  m.impl("guide_eager", TORCH_BOX(&fastdiff::denoise_step::guide_eager));
  m.impl("denoise_step", TORCH_BOX(&fastdiff::denoise_step::denoise_step));
  m.impl("denoise_step_eager", TORCH_BOX(&fastdiff::denoise_step::denoise_step_eager));
  m.impl("denoise_step_with_x0", TORCH_BOX(&fastdiff::denoise_step::denoise_step_with_x0));
  m.impl("denoise_step_with_x0_eager", TORCH_BOX(&fastdiff::denoise_step::denoise_step_with_x0_eager));
}
