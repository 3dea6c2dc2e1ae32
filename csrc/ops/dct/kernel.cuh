// The cosine transform of square planes of 16 to 128 elements a side, and gains between it and its inverse, on a GPU.
//
// A block holds whole planes in shared memory and reads and writes each once. A thread transforms a row, then a column, in its registers: N log N
// operations, so that memory is the limit. Gains meet a column where its transform ends and its inverse begins.
#pragma once

#include <algorithm>
#include <stdexcept>
#include <utility>

#include "common/device.cuh"

namespace fastdiff::dct {

enum class Kind { forward, inverse, mix, separable };

// Gains of samples and channels; an axis that is shared has stride 0.
struct Gain {
  Global<const float> data;
  int64_t sample, channel, row, column;
};

// mix: IDCT(gain DCT(x) + gain_eps DCT(eps) + gain_noise noise). separable: IDCT((rows columns^T + base) DCT(x)) + sigma noise. Absent: null.
// Images are contiguous (planes, N, N).
template <class T>
struct Problem {
  using Element = T;
  Kind kind;
  int64_t planes;
  int channels;
  Global<const T> x, eps, noise;
  Global<T> y;
  Gain gain, gain_eps, gain_noise;
  Global<const float> rows, columns, base, sigma;
};

// By their series, at compile time; 0 <= x <= pi / 2.
constexpr double series(double x, int first) {
  double term = first ? x : 1.0, sum = term;
  for (int k = first + 1; k < 28; k += 2) {
    term *= -x * x / (k * (k + 1));
    sum += term;
  }
  return sum;
}
constexpr double kPi = 3.14159265358979323846;
constexpr float kHalf = 0.70710678118654752440;
template <int N, int n>
constexpr float kCosine = series(kPi * (2 * n + 1) / (4 * N), 0);
template <int N, int n>
constexpr float kSine = series(kPi * (2 * n + 1) / (4 * N), 1);

template <int N>
__device__ __forceinline__ void four(float (&x)[N]);

// DCT-II: even frequencies are the DCT-II of sums of mirrored elements, odd ones the DCT-IV of their differences (Plonka & Tasche 2005).
template <int N>
__device__ __forceinline__ void two(float (&x)[N]) {
  if constexpr (N > 1) {
    float a[N / 2], b[N / 2];
#pragma unroll
    for (int n = 0; n < N / 2; ++n) a[n] = (x[n] + x[N - 1 - n]) * kHalf, b[n] = (x[n] - x[N - 1 - n]) * kHalf;
    two(a), four(b);
#pragma unroll
    for (int k = 0; k < N / 2; ++k) x[2 * k] = a[k], x[2 * k + 1] = b[k];
  }
}

// Its transpose, which is its inverse.
template <int N>
__device__ __forceinline__ void back(float (&x)[N]) {
  if constexpr (N > 1) {
    float a[N / 2], b[N / 2];
#pragma unroll
    for (int k = 0; k < N / 2; ++k) a[k] = x[2 * k], b[k] = x[2 * k + 1];
    back(a), four(b);
#pragma unroll
    for (int n = 0; n < N / 2; ++n) x[n] = (a[n] + b[n]) * kHalf, x[N - 1 - n] = (a[n] - b[n]) * kHalf;
  }
}

// Mirrored elements turned by (2 n + 1) pi / (4 N); the signs of the second alternate.
template <int N, int... n>
__device__ __forceinline__ void rotate(const float (&x)[N], float (&u)[N / 2], float (&w)[N / 2], std::integer_sequence<int, n...>) {
  ((u[n] = kCosine<N, n> * x[n] + kSine<N, n> * x[N - 1 - n],
    w[n] = (n % 2 ? -1.0f : 1.0f) * (kCosine<N, n> * x[N - 1 - n] - kSine<N, n> * x[n])), ...);
}

// DCT-IV, its own transpose, by two DCT-II of half its length.
template <int N>
__device__ __forceinline__ void four(float (&x)[N]) {
  if constexpr (N > 1) {
    float u[N / 2], w[N / 2];
    rotate<N>(x, u, w, std::make_integer_sequence<int, N / 2>());
    two(u), two(w);
    x[0] = u[0], x[N - 1] = -w[0];
#pragma unroll
    for (int j = 1; j < N / 2; ++j) x[2 * j] = (u[j] + w[N / 2 - j]) * kHalf, x[2 * j - 1] = (u[j] - w[N / 2 - j]) * kHalf;
  }
}

template <int N>
inline constexpr int kPlanes = N < 128 ? 128 / N : 1;  // of a block
template <int N>
inline constexpr int kThreads = N * kPlanes<N>;
template <int N>
inline constexpr int kPitch = N + 1;  // rows and columns then both lie on 32 banks

// The first N elements of x through a thread's registers.
template <int N, class F>
__device__ __forceinline__ void in_registers(Shared<float> x, int step, const F& f) {
  float v[N];
#pragma unroll
  for (int k = 0; k < N; ++k) v[k] = x[k * step];
  f(v);
#pragma unroll
  for (int k = 0; k < N; ++k) x[k * step] = v[k];
}

// 128 elements are too many for the registers of an sm_80: there the outermost step of `two` and `back` is done in shared memory, and frequency
// 2 k stays at k, 2 k + 1 at N - 1 - k.
template <int N>
inline constexpr bool kByHalves = N > 64;
template <int N>
__device__ __forceinline__ int place(int frequency) { return !kByHalves<N> ? frequency : frequency % 2 ? N - 1 - frequency / 2 : frequency / 2; }
template <int N>
__device__ __forceinline__ int frequency(int place) { return !kByHalves<N> ? place : place < N / 2 ? 2 * place : 2 * (N - 1 - place) + 1; }

// A row or a column of shared memory to its transform, or back.
template <int N, bool inverse>
__device__ __forceinline__ void line_to(Shared<float> x, int step) {
  const auto half = [](auto& v) {
    if constexpr (inverse) back(v);
    else two(v);
  };
  if constexpr (!kByHalves<N>) return in_registers<N>(x, step, half);
  const auto sums_and_differences = [&] {
#pragma unroll 8
    for (int n = 0; n < N / 2; ++n) {
      const float a = x[n * step], b = x[(N - 1 - n) * step];
      x[n * step] = (a + b) * kHalf, x[(N - 1 - n) * step] = (a - b) * kHalf;
    }
  };
  if (!inverse) sums_and_differences();
  in_registers<N / 2>(x, step, half);
  in_registers<N / 2>(x + (N - 1) * step, -step, [](auto& v) { four(v); });
  if (inverse) sums_and_differences();
}

// The images' elements i of a block's planes, in memory and in shared memory, where rows and columns may be in the order of `place`.
template <int N, class F>
__device__ __forceinline__ void each(int64_t first, int count, bool frequencies, const F& f) {
#pragma unroll 8
  for (int i = threadIdx.x; i < count * N * N; i += kThreads<N>) {
    const int row = i / N % N, column = i % N, top = i / (N * N) * N;
    f(first * N * N + i, frequencies ? (top + place<N>(row)) * kPitch<N> + place<N>(column) : (top + row) * kPitch<N> + column);
  }
}

template <class T, int N>
__global__ void __launch_bounds__(kThreads<N>) transform(Problem<T> p) {
  Arena arena;
  const Shared<float> tile = arena.take<float>(kPlanes<N> * N * kPitch<N>);
  const Shared<float> sum = arena.take<float>(p.eps ? kPlanes<N> * N * kPitch<N> : 0);
  const int64_t first = int64_t{blockIdx.x} * kPlanes<N>;
  const int count = static_cast<int>(min(int64_t{kPlanes<N>}, p.planes - first)), plane = threadIdx.x / N, line = threadIdx.x % N;
  const int64_t b = (first + plane) / p.channels, c = (first + plane) % p.channels;
  const bool mixing = p.kind == Kind::mix, between = mixing || p.kind == Kind::separable, inverse = p.kind == Kind::inverse;
  const int column = frequency<N>(line);
  const auto at = [&](const Gain& gain, int row) -> float { return gain.data[b * gain.sample + c * gain.channel + row * gain.row + column * gain.column]; };
  // Element k of the thread's column of a transform, as it goes into the inverse.
  const auto gained = [&](int image, int k, float u) {
    const int row = frequency<N>(k);
    if (!mixing) return u * (p.rows[b * N + row] * p.columns[b * N + column] + p.base[b]);
    u *= at(image ? p.gain : p.gain_eps, row);
    if (image && p.eps) u += sum[plane * N * kPitch<N> + line + k * kPitch<N>];
    if (image && p.noise) u += to_float(p.noise[((first + plane) * N + row) * N + column]) * at(p.gain_noise, row);
    return u;
  };

  // eps, of which the gained transform stays in `sum`, then x.
  for (int image = p.eps ? 0 : 1; image < 2; ++image) {
    const auto source = image ? p.x : p.eps;
    each<N>(first, count, inverse, [&](int64_t i, int at) { tile[at] = to_float(source[i]); });
    __syncthreads();
    const int passes = between && image ? 3 : 2;
#pragma unroll 1
    for (int pass = 0; pass < passes; ++pass) {  // rows, columns, rows
      if (plane < count) {
        const int step = pass == 1 ? kPitch<N> : 1;
        const Shared<float> mine = tile + (plane * N * kPitch<N> + (pass == 1 ? line : line * kPitch<N>));
        if (pass < 2 && !inverse) line_to<N, false>(mine, step);
        if (pass == 1 && between) {
          const Shared<float> to = image ? mine : sum + (plane * N * kPitch<N> + line);
#pragma unroll 8
          for (int k = 0; k < N; ++k) to[k * step] = gained(image, k, mine[k * step]);
        }
        if (inverse || (between && image && pass > 0)) line_to<N, true>(mine, step);
      }
      __syncthreads();
    }
  }
  const bool noisy = p.kind == Kind::separable && p.noise;
  each<N>(first, count, p.kind == Kind::forward, [&](int64_t i, int at) {
    const float added = noisy ? p.sigma[i / (N * N) / p.channels] * to_float(p.noise[i]) : 0.0f;
    p.y[i] = from_float<T>(tile[at] + added);
  });
}

template <class T, int N>
void run(const Launcher& launch, const Problem<T>& p) {
  const int64_t blocks = (p.planes + kPlanes<N> - 1) / kPlanes<N>;
  if (blocks > INT32_MAX) throw std::runtime_error("dct: too many planes for one launch");
  const size_t tile = arena_bytes<float>(kPlanes<N> * N * kPitch<N>);
  launch(transform<T, N>, static_cast<unsigned>(blocks), kThreads<N>, p.eps ? 2 * tile : tile, p);
}

template <class T>
void run(const Launcher& launch, int64_t n, const Problem<T>& p) {
  switch (n) {
    case 16: return run<T, 16>(launch, p);
    case 32: return run<T, 32>(launch, p);
    case 64: return run<T, 64>(launch, p);
    case 128: return run<T, 128>(launch, p);
  }
  throw std::runtime_error("dct: the CUDA kernel takes planes of 16, 32, 64 or 128 elements a side");
}

}  // namespace fastdiff::dct
