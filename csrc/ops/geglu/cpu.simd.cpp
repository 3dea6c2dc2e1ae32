#include "ops/geglu/op.h"

#include "common/vec.h"

namespace fastdiff::geglu::FASTDIFF_ISA {
namespace {

using namespace fastdiff::FASTDIFF_ISA;

// The share of x that gelu lets through, and its slope: d gelu / dx = share + x slope.
struct Gate {
  f32 share, slope;
};

// The normal distribution, Phi(x), and its density. Phi(-t) e^(t^2/2) is a polynomial of u = 1 / (1 + 0.21 t) times u, to 2e-8 of itself up to t = 14,
// where Phi is below the smallest float32.
inline Gate exact(f32 x) {
  const f32 t = x < 0.0f ? -x : x, density = exp(-0.5f * t * t), u = reciprocal(1.0f + 0.21f * (t < 14.0f ? t : splat(14.0f)));
  f32 p = u * -0x1.2582c6p-4f + 0x1.22671cp-2f;
  p = p * u + -0x1.52324ep-2f;
  p = p * u + 0x1.65ce80p-2f;
  p = p * u + -0x1.80c65ep-4f;
  p = p * u + 0x1.ff8112p-4f;
  p = p * u + 0x1.1b677cp-4f;
  p = p * u + 0x1.5c716ep-4f;
  p = p * u + 0x1.56e1eep-4f;
  const f32 tail = p * u * density;
  return {x < 0.0f ? tail : 1.0f - tail, density * 0x1.988454p-2f};
}

// (1 + tanh v) / 2 = sigmoid(2 v), v = sqrt(2 / pi) (x + 0.044715 x^3).
inline Gate tanh(f32 x) {
  constexpr float root = 0x1.988454p+0f, cubic = 0.044715f;  // 2 sqrt(2 / pi)
  const f32 v = -root * (x + cubic * x * x * x), e = exp(v < 87.9f ? v : splat(87.9f)), share = v > 87.9f ? f32{} : reciprocal(1.0f + e);
  return {share, share * e * share * root * (1.0f + 3.0f * cubic * x * x)};  // 1 - share = e share, without cancellation
}

// f<T>(gate), the gate known at compile time.
template <class F>
void dispatch(const Sizes& s, const F& f) {
  typed(s.type, [&]<class T>() {
    if (s.tanh) f.template operator()<T>([](f32 x) { return tanh(x); });
    else f.template operator()<T>([](f32 x) { return exact(x); });
  });
  if (s.stream) stream_end();
}

void forward(const Sizes& s, const void* x, void* y, int64_t begin, int64_t end) {
  dispatch(s, [&]<class T>(const auto& gate) {
    for (int64_t i = begin; i < end; ++i) {
      const T* a = static_cast<const T*>(x) + i * s.stride;
      T* out = static_cast<T*>(y) + i * s.F;
      for_vectors(s.F, [&](int64_t j, const auto& get, const auto&, int n) {
        const f32 b = get(a + s.F + j);
        store_n(out + j, get(a + j) * (b * gate(b).share), n, s.stream);
      });
    }
  });
}

void backward(const Sizes& s, const void* dy, const void* x, void* dx, int64_t begin, int64_t end) {
  dispatch(s, [&]<class T>(const auto& gate) {
    for (int64_t i = begin; i < end; ++i) {
      const T *a = static_cast<const T*>(x) + i * s.stride, *d = static_cast<const T*>(dy) + i * s.F;
      T* out = static_cast<T*>(dx) + 2 * i * s.F;
      for_vectors(s.F, [&](int64_t j, const auto& get, const auto&, int n) {
        const f32 b = get(a + s.F + j), dyj = get(d + j);
        const Gate g = gate(b);
        store_n(out + j, dyj * (b * g.share), n, s.stream);
        store_n(out + s.F + j, dyj * get(a + j) * (g.share + b * g.slope), n, s.stream);
      });
    }
  });
}

}  // namespace

const Kernels kernels{forward, backward};

}  // namespace fastdiff::geglu::FASTDIFF_ISA
