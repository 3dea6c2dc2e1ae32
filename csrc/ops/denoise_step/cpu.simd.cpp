#include "ops/denoise_step/op.h"

#include "common/vec.h"

namespace fastdiff::denoise_step::FASTDIFF_ISA {
namespace {

using namespace fastdiff::FASTDIFF_ISA;

template <class T>
const T* at(const Images& x, int64_t b, int64_t start) {
  return static_cast<const T*>(x.data) + b * x.stride + start;
}
float of(const PerSample& c, int64_t b) { return c.data[b * c.stride]; }

// f(sample, first element in the sample, first element in a dense result, elements) for each piece.
template <class F>
void each_piece(const Shape& s, int64_t begin, int64_t end, const F& f) {
  for (int64_t i = begin; i < end; ++i) {
    const int64_t b = i / s.pieces, start = i % s.pieces * kPiece, left = s.size - start;
    f(b, start, b * s.size + start, left < kPiece ? left : kPiece);
  }
}

void add_noise(const Shape& s, const Images& x, const Images& noise, const PerSample& signal, const PerSample& sigma, void* y, int64_t begin,
               int64_t end) {
  typed(s.type, [&]<class T>() {
    each_piece(s, begin, end, [&](int64_t b, int64_t start, int64_t first, int64_t n) {
      const T *px = at<T>(x, b, start), *pn = at<T>(noise, b, start);
      const float a = of(signal, b), c = of(sigma, b);
      T* py = static_cast<T*>(y) + first;
      fill(py, n, s.past, [&](int64_t j, const auto& get) { return get(px + j) * a + get(pn + j) * c; });
    });
  });
}

void guide(const Shape& s, const Images& cond, const Images& uncond, const PerSample& weight, const float* factors, void* y, int64_t begin,
           int64_t end) {
  typed(s.type, [&]<class T>() {
    each_piece(s, begin, end, [&](int64_t b, int64_t start, int64_t first, int64_t n) {
      const T *pc = at<T>(cond, b, start), *pu = at<T>(uncond, b, start);
      const float w = of(weight, b);
      T* py = static_cast<T*>(y) + first;
      const auto guided = [&](int64_t j, const auto& get) {
        const f32 u = get(pu + j);
        return u + (get(pc + j) - u) * w;
      };
      if (!factors) return fill(py, n, s.past, guided);
      const float factor = factors[b];
      fill(py, n, s.past, [&](int64_t j, const auto& get) { return guided(j, get) * factor; });
    });
  });
}

// The mean is found about the first element, and the squares are summed about the mean: neither cancels, and of equal elements both are exact.
template <class F>
Moments moments_of(int64_t count, const F& value) {
  f32 sum = {};
  float first = 0.0f;
  for_vectors(count, [&](int64_t j, const auto& get, const auto&, int n) {
    const f32 x = value(j, get);
    if (j == 0) first = x[0];
    sum += keep_n(x - first, n, 0.0f);
  });
  const float mean = first + reduce_add(sum) / static_cast<float>(count);
  f32 squares = {};
  for_vectors(count, [&](int64_t j, const auto& get, const auto&, int n) {
    const f32 d = keep_n(value(j, get) - mean, n, 0.0f);
    squares += d * d;
  });
  return {mean, reduce_add(squares)};
}

void moments(const Shape& s, const Images& cond, const Images& uncond, const PerSample& weight, Moments* found, int64_t begin, int64_t end) {
  typed(s.type, [&]<class T>() {
    for (int64_t i = begin; i < end; ++i)
      each_piece(s, i, i + 1, [&](int64_t b, int64_t start, int64_t, int64_t n) {
        const T *pc = at<T>(cond, b, start), *pu = at<T>(uncond, b, start);
        const float w = of(weight, b);
        found[2 * i] = moments_of(n, [&](int64_t j, const auto& get) { return get(pc + j); });
        found[2 * i + 1] = moments_of(n, [&](int64_t j, const auto& get) {
          const f32 u = get(pu + j);
          return u + (get(pc + j) - u) * w;
        });
      });
  });
}

// The step as y = x0_in_y x0 + x_in_y x + pred_in_y pred + noise_in_y noise, x0 being clamped. What x0 is the quotient of may cancel: it is
// divided only then.
struct Folded {
  float signal_, sigma_, per_power, x0_in_y, x_in_y, pred_in_y, noise_in_y = 0.0f, half_log = 0.0f;

  Folded(const Step& p, int64_t b) {
    const double signal = of(p.signal, b), sigma = of(p.sigma, b), to_x0 = of(p.to_x0, b), to_eps = of(p.to_eps, b);
    double x0[2], eps[2];  // in terms of x and of pred
    if (p.prediction == Prediction::eps) {
      x0[0] = 1 / signal, x0[1] = -sigma / signal;
      eps[0] = 0, eps[1] = 1;
    } else if (p.prediction == Prediction::x0) {
      x0[0] = 0, x0[1] = 1;
      eps[0] = 1 / sigma, eps[1] = -signal / sigma;
    } else {
      const double power = signal * signal + sigma * sigma;
      x0[0] = signal / power, x0[1] = -sigma / power;
      eps[0] = sigma / power, eps[1] = signal / power;
    }
    const bool rederived = p.clipped && p.rederive;
    const double kept = p.clipped ? (rederived ? to_x0 - to_eps * (signal / sigma) : to_x0) : 0.0, open = p.clipped ? 0.0 : to_x0;
    signal_ = of(p.signal, b), sigma_ = of(p.sigma, b);
    per_power = static_cast<float>(1 / (signal * signal + sigma * sigma));
    x0_in_y = static_cast<float>(kept);
    x_in_y = static_cast<float>(rederived ? to_eps / sigma : open * x0[0] + to_eps * eps[0]);
    pred_in_y = static_cast<float>(rederived ? 0.0 : open * x0[1] + to_eps * eps[1]);
    if (p.noise.data) noise_in_y = of(p.to_noise, b);
    if (p.v.data) half_log = of(p.log_ratio, b) * 0.125f;
  }
};

// e^(2 x): a square of what cannot overflow, so that it overflows to infinity.
f32 exp_twice(f32 x) {
  const f32 root = exp(x > 80.0f ? splat(80.0f) : x);
  return root * root;
}

template <class T, Prediction prediction, bool clipped, bool noisy, bool learned>
void step_piece(const Shape& s, const Step& p, const Folded& c, int64_t b, int64_t start, int64_t n, T* y, T* x0) {
  const T *px = at<T>(p.x, b, start), *pp = at<T>(p.pred, b, start), *pn = nullptr, *pv = nullptr;
  if constexpr (noisy) pn = at<T>(p.noise, b, start);
  if constexpr (learned) pv = at<T>(p.v, b, start);
  // At a signal of 0.006, a step that adds to_eps pred and the next one that takes off sigma pred (the same number, as in DDIM) cancel only if
  // both are rounded, as they are in plain PyTorch: a trajectory is 4 times nearer to the exact one.
  const auto next = [&](int64_t j, const auto& get, f32 x, f32 pred, f32 clean) {
    f32 sum = unfused(x * c.x_in_y) + unfused(pred * c.pred_in_y);
    if constexpr (clipped) sum += unfused(clean * c.x0_in_y);
    if constexpr (learned) sum += unfused(get(pn + j) * (exp_twice((get(pv + j) + 1.0f) * c.half_log) * c.noise_in_y));
    else if constexpr (noisy) sum += unfused(get(pn + j) * c.noise_in_y);
    return sum;
  };
  const auto found = [&](f32 x, f32 pred) {
    f32 clean = pred;
    if constexpr (prediction == Prediction::eps) clean = (x - unfused(pred * c.sigma_)) / c.signal_;
    if constexpr (prediction == Prediction::v) clean = (x * c.signal_ - pred * c.sigma_) * c.per_power;
    if constexpr (clipped) {
      clean = clean > p.clip ? splat(p.clip) : clean;
      clean = clean < -p.clip ? splat(-p.clip) : clean;
    }
    return clean;
  };
  if (!x0)
    return fill(y, n, s.past, [&](int64_t j, const auto& get) {
      const f32 x = get(px + j), pred = get(pp + j);
      return next(j, get, x, pred, found(x, pred));
    });
  for_vectors(n, [&](int64_t j, const auto& get, const auto& put, int) {
    const f32 x = get(px + j), pred = get(pp + j), clean = found(x, pred);
    put(y + j, next(j, get, x, pred, clean));
    put(x0 + j, clean);
  });
}

void step(const Shape& s, const Step& p, void* y, void* x0, int64_t begin, int64_t end) {
  typed(s.type, [&]<class T>() {
    each_piece(s, begin, end, [&](int64_t b, int64_t start, int64_t first, int64_t n) {
      const Folded c(p, b);
      T *py = static_cast<T*>(y) + first, *px0 = x0 ? static_cast<T*>(x0) + first : nullptr;
      const auto run = [&]<Prediction prediction, bool clipped>() {
        if (p.v.data) return step_piece<T, prediction, clipped, true, true>(s, p, c, b, start, n, py, px0);
        if (p.noise.data) return step_piece<T, prediction, clipped, true, false>(s, p, c, b, start, n, py, px0);
        step_piece<T, prediction, clipped, false, false>(s, p, c, b, start, n, py, px0);
      };
      const auto predicted = [&]<Prediction prediction>() {
        if (p.clipped) run.template operator()<prediction, true>();
        else run.template operator()<prediction, false>();
      };
      if (p.prediction == Prediction::eps) predicted.template operator()<Prediction::eps>();
      else if (p.prediction == Prediction::x0) predicted.template operator()<Prediction::x0>();
      else predicted.template operator()<Prediction::v>();
    });
  });
}

}  // namespace

const Kernels kernels{add_noise, guide, moments, step};

}  // namespace fastdiff::denoise_step::FASTDIFF_ISA
