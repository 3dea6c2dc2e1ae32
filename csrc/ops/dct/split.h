// Cosine transforms of kLanes columns at once: one vector per element. Lengths are halved while they are even, down to a base that is
// computed in registers or, of odd length, by a product with a matrix. Include from *.simd.cpp alone.
//
// Type 2: X_k = sum x_n cos(pi (2 n + 1) k / (2 N)). Even k are the type-2 transform of x_n + x_{N-1-n}, odd k the type-4 transform of
// x_n - x_{N-1-n}, n < N / 2.
// Type 4: X_k = sum x_n cos(pi (2 n + 1) (2 k + 1) / (4 M)). With t_n = pi (2 n + 1) / (4 M), the type-2 transforms C of
// x_n cos t_n + x_{M-1-n} sin t_n and V of (-1)^n (x_{M-1-n} cos t_n - x_n sin t_n) give X_0 = C_0, X_{2j} = C_j + V_{M/2-j},
// X_{2j-1} = C_j - V_{M/2-j}, X_{M-1} = -V_0. Every step is a rotation or a sum and difference: errors grow with the number of levels.
#pragma once

#include "common/gemm.h"
#include "ops/dct/op.h"

namespace fastdiff::dct::FASTDIFF_ISA {

using namespace fastdiff::FASTDIFF_ISA;

constexpr double pi = 3.14159265358979323846;

// cos x for |x| <= pi / 2, at compile time.
constexpr double cosine(double x) {
  double term = 1, sum = 1;
  for (int i = 1; i < 16; ++i) term *= -x * x / (2 * i * (2 * i - 1)), sum += term;
  return sum;
}

// cos(pi j / (2 n))
constexpr double quarter(int j, int n) {
  j %= 4 * n;
  j = j > 2 * n ? 4 * n - j : j;
  return j > n ? -cosine(pi * (2 * n - j) / (2 * n)) : cosine(pi * j / (2 * n));
}

// A matrix of odd size in registers: cos(pi (2 i + 1) (first + step k) / (2 n)) in row k, column i; transposed, y_i sums over k.
template <int size>
struct Dense {
  float at[size][size];
  constexpr Dense(int first, int step, int n) : at() {
    for (int k = 0; k < size; ++k)
      for (int i = 0; i < size; ++i) at[k][i] = static_cast<float>(quarter((2 * i + 1) * (first + step * k), n));
  }
};

template <bool transposed, int size>
__attribute__((always_inline)) inline void multiply(const Dense<size>& m, f32 (&x)[size]) {
  f32 y[size];
#pragma GCC unroll 32
  for (int k = 0; k < size; ++k) {
    y[k] = x[0] * (transposed ? m.at[0][k] : m.at[k][0]);
#pragma GCC unroll 32
    for (int i = 1; i < size; ++i) y[k] += x[i] * (transposed ? m.at[i][k] : m.at[k][i]);
  }
#pragma GCC unroll 32
  for (int k = 0; k < size; ++k) x[k] = y[k];
}

template <int M>
struct Turns {
  float cos[M / 2], sin[M / 2];
  constexpr Turns() : cos(), sin() {
    for (int n = 0; n < M / 2; ++n) {
      cos[n] = static_cast<float>(cosine(pi * (2 * n + 1) / (4 * M)));
      sin[n] = static_cast<float>(cosine(pi / 2 - pi * (2 * n + 1) / (4 * M)));
    }
  }
};

template <int M>
__attribute__((always_inline)) inline void four(f32 (&x)[M]);

template <int N>
__attribute__((always_inline)) inline void two(f32 (&x)[N]) {
  constexpr int h = N / 2;
  if constexpr (N > 1 && N % 2) {
    static constexpr Dense<h + 1> sums(0, 2, N);
    static constexpr Dense<h> differences(1, 2, N);
    f32 s[h + 1], d[h];
#pragma GCC unroll 32
    for (int n = 0; n < h; ++n) s[n] = x[n] + x[N - 1 - n], d[n] = x[n] - x[N - 1 - n];
    s[h] = x[h];
    multiply<false>(sums, s);
    multiply<false>(differences, d);
#pragma GCC unroll 32
    for (int n = 0; n < h; ++n) x[2 * n] = s[n], x[2 * n + 1] = d[n];
    x[N - 1] = s[h];
  } else if constexpr (N > 1) {
    f32 s[h], d[h];
#pragma GCC unroll 32
    for (int n = 0; n < h; ++n) s[n] = x[n] + x[N - 1 - n], d[n] = x[n] - x[N - 1 - n];
    two<h>(s);
    four<h>(d);
#pragma GCC unroll 32
    for (int n = 0; n < h; ++n) x[2 * n] = s[n], x[2 * n + 1] = d[n];
  }
}

// The transpose of `two`.
template <int N>
__attribute__((always_inline)) inline void back(f32 (&x)[N]) {
  constexpr int h = N / 2;
  if constexpr (N > 1 && N % 2) {
    static constexpr Dense<h + 1> sums(0, 2, N);
    static constexpr Dense<h> differences(1, 2, N);
    f32 s[h + 1], d[h];
#pragma GCC unroll 32
    for (int n = 0; n < h; ++n) s[n] = x[2 * n], d[n] = x[2 * n + 1];
    s[h] = x[N - 1];
    multiply<true>(sums, s);
    multiply<true>(differences, d);
#pragma GCC unroll 32
    for (int n = 0; n < h; ++n) x[n] = s[n] + d[n], x[N - 1 - n] = s[n] - d[n];
    x[h] = s[h];
  } else if constexpr (N > 1) {
    f32 s[h], d[h];
#pragma GCC unroll 32
    for (int n = 0; n < h; ++n) s[n] = x[2 * n], d[n] = x[2 * n + 1];
    back<h>(s);
    four<h>(d);
#pragma GCC unroll 32
    for (int n = 0; n < h; ++n) x[n] = s[n] + d[n], x[N - 1 - n] = s[n] - d[n];
  }
}

template <int M>
__attribute__((always_inline)) inline void four(f32 (&x)[M]) {
  if constexpr (M == 1) {
    x[0] *= 0x1.6a09e6p-1f;
  } else if constexpr (M % 2) {
    // cos(pi (2 n + 1) (2 k + 1) / (4 M)) is that of a transform of 2 M elements, at its odd frequencies.
    static constexpr Dense<M> matrix(1, 2, 2 * M);
    multiply<false>(matrix, x);
  } else {
    constexpr int h = M / 2;
    constexpr Turns<M> turn;
    f32 c[h], v[h];
#pragma GCC unroll 32
    for (int n = 0; n < h; ++n) {
      c[n] = x[n] * turn.cos[n] + x[M - 1 - n] * turn.sin[n];
      v[n] = n % 2 ? x[n] * turn.sin[n] - x[M - 1 - n] * turn.cos[n] : x[M - 1 - n] * turn.cos[n] - x[n] * turn.sin[n];
    }
    two<h>(c);
    two<h>(v);
    x[0] = c[0];
    x[M - 1] = -v[0];
#pragma GCC unroll 32
    for (int j = 1; j < h; ++j) x[2 * j] = c[j] + v[h - j], x[2 * j - 1] = c[j] - v[h - j];
  }
}

enum class Step { two, back, four };

template <int N, Step step>
inline void in_registers(const float* x, int64_t xs, float* y, int64_t ys) {
  f32 v[N];
#pragma GCC unroll 32
  for (int n = 0; n < N; ++n) v[n] = load(x + n * xs);
  if constexpr (step == Step::two) two<N>(v);
  else if constexpr (step == Step::back) back<N>(v);
  else four<N>(v);
#pragma GCC unroll 32
  for (int n = 0; n < N; ++n) store(y + n * ys, v[n]);
}

// True where the length is one of those that are computed in registers.
template <Step step>
bool small(int64_t n, const float* x, int64_t xs, float* y, int64_t ys) {
  switch (n) {
    case 1: in_registers<1, step>(x, xs, y, ys); return true;
    case 2: in_registers<2, step>(x, xs, y, ys); return true;
    case 4: in_registers<4, step>(x, xs, y, ys); return true;
    case 8: in_registers<8, step>(x, xs, y, ys); return true;
    case 7: in_registers<7, step>(x, xs, y, ys); return true;
    case 14: in_registers<14, step>(x, xs, y, ys); return true;
    case 28: in_registers<28, step>(x, xs, y, ys); return true;
    case 16: in_registers<16, step>(x, xs, y, ys); return true;
    case 32: in_registers<32, step>(x, xs, y, ys); return true;
  }
  return false;
}

// Elements of x lie xs floats apart, those of y ys; y may be x. work: 2 n vectors for a transform of n.
inline void four(const Axis& a, int level, const float* x, int64_t xs, float* y, int64_t ys, float* work);

inline void two(const Axis& a, int level, const float* x, int64_t xs, float* y, int64_t ys, float* work) {
  const int64_t N = a.n >> level, h = N / 2, c = N - h;
  if (level == a.levels && small<Step::two>(N, x, xs, y, ys)) return;
  float *s = work, *d = work + c * kLanes, *rest = work + N * kLanes;
  for (int64_t n = 0; n < h; ++n) {
    const f32 u = load(x + n * xs), v = load(x + (N - 1 - n) * xs);
    store(s + n * kLanes, u + v);
    store(d + n * kLanes, u - v);
  }
  if (c > h) store(s + h * kLanes, load(x + h * xs));
  if (level < a.levels) {
    two(a, level + 1, s, kLanes, y, 2 * ys, rest);
    four(a, level + 1, d, kLanes, y + ys, 2 * ys, rest);
  } else {
    gemm<A::rows, false>(c, kLanes, c, a.sums, c, {s, kLanes}, y, 2 * ys);
    gemm<A::rows, false>(h, kLanes, h, a.differences, h, {d, kLanes}, y + ys, 2 * ys);
  }
}

inline void back(const Axis& a, int level, const float* x, int64_t xs, float* y, int64_t ys, float* work) {
  const int64_t N = a.n >> level, h = N / 2, c = N - h;
  if (level == a.levels && small<Step::back>(N, x, xs, y, ys)) return;
  float *s = work, *d = work + c * kLanes, *rest = work + N * kLanes;
  if (level < a.levels) {
    back(a, level + 1, x, 2 * xs, s, kLanes, rest);
    four(a, level + 1, x + xs, 2 * xs, d, kLanes, rest);
  } else {
    gemm<A::columns, false>(c, kLanes, c, a.sums, c, {x, 2 * xs}, s, kLanes);
    gemm<A::columns, false>(h, kLanes, h, a.differences, h, {x + xs, 2 * xs}, d, kLanes);
  }
  for (int64_t n = 0; n < h; ++n) {
    const f32 u = load(s + n * kLanes), v = load(d + n * kLanes);
    store(y + n * ys, u + v);
    store(y + (N - 1 - n) * ys, u - v);
  }
  if (c > h) store(y + h * ys, load(s + h * kLanes));
}

inline void four(const Axis& a, int level, const float* x, int64_t xs, float* y, int64_t ys, float* work) {
  const int64_t M = a.n >> level, h = M / 2;
  if (level == a.levels) {
    if (!small<Step::four>(M, x, xs, y, ys)) gemm<A::rows, false>(M, kLanes, M, a.fourth, M, {x, xs}, y, ys);
    return;
  }
  const float *cos = a.turns[level], *sin = cos + h;
  float *c = work, *v = work + h * kLanes, *rest = work + M * kLanes;
  for (int64_t n = 0; n < h; ++n) {
    const f32 u = load(x + n * xs), w = load(x + (M - 1 - n) * xs);
    const f32 turned = w * cos[n] - u * sin[n];
    store(c + n * kLanes, u * cos[n] + w * sin[n]);
    store(v + n * kLanes, n % 2 ? -turned : turned);
  }
  two(a, level + 1, c, kLanes, c, kLanes, rest);
  two(a, level + 1, v, kLanes, v, kLanes, rest);
  store(y, load(c));
  store(y + (M - 1) * ys, -load(v));
  for (int64_t j = 1; j < h; ++j) {
    const f32 u = load(c + j * kLanes), w = load(v + (h - j) * kLanes);
    store(y + 2 * j * ys, u + w);
    store(y + (2 * j - 1) * ys, u - w);
  }
}

}  // namespace fastdiff::dct::FASTDIFF_ISA
