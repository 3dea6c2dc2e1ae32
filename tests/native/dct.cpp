#include "ops/dct/kernel.cuh"

#include "bind.h"

using namespace fastdiff::dct;
using fastdiff::emulation::Array, fastdiff::emulation::Ints;

static Gain gain(const Array& x, const Ints& stride) { return {x.as<const float>(), stride[0], stride[1], stride[2], stride[3]}; }

template <class T>
static void transform(uint64_t seed, int64_t kind, int64_t n, int64_t channels, const Array& x, const Array& y, const Array& eps, const Array& noise,
                      const Array (&gains)[3], const Ints& strides, const Array (&separable)[4]) {
  Problem<T> p{};
  p.kind = static_cast<Kind>(kind), p.planes = x.size / (n * n), p.channels = static_cast<int>(channels);
  p.x = x.as<const T>(), p.y = y.as<T>(), p.eps = eps.as<const T>(), p.noise = noise.as<const T>();
  Gain* of[] = {&p.gain, &p.gain_eps, &p.gain_noise};
  for (int i = 0; i < 3; ++i) *of[i] = gain(gains[i], {strides.begin() + 4 * i, strides.begin() + 4 * i + 4});
  p.rows = separable[0].as<const float>(), p.columns = separable[1].as<const float>(), p.base = separable[2].as<const float>(), p.sigma = separable[3].as<const float>();
  run(fastdiff::Launcher{seed}, n, p);
}

// type: 0 float, 1 bfloat16, 2 float16; strides: four of each gain.
BIND(dct, +[](uint64_t seed, int64_t type, int64_t kind, int64_t n, int64_t channels, Array x, Array y, Array eps, Array noise, Array gain, Array gain_eps,
              Array gain_noise, Ints strides, Array rows, Array columns, Array base, Array sigma) {
  const auto f = type == 0 ? transform<float> : type == 1 ? transform<fastdiff::bf16> : transform<fastdiff::f16>;
  f(seed, kind, n, channels, x, y, eps, noise, {gain, gain_eps, gain_noise}, strides, {rows, columns, base, sigma});
})
