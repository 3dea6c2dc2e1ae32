// Cosine transforms of kLanes columns at once: one vector per element. Lengths are halved while they are even, down to a base that is
// computed in registers or, of odd length, by parts or by a product with a matrix. Include from *.simd.cpp alone.
//
// Type 2: X_k = sum x_n cos(pi (2 n + 1) k / (2 N)). Even k are the type-2 transform of x_n + x_{N-1-n}, odd k the type-4 transform of
// x_n - x_{N-1-n}, n < N / 2.
// Type 4: X_k = sum x_n cos(pi (2 n + 1) (2 k + 1) / (4 M)). With t_n = pi (2 n + 1) / (4 M), the type-2 transforms C of
// x_n cos t_n + x_{M-1-n} sin t_n and V of (-1)^n (x_{M-1-n} cos t_n - x_n sin t_n) give X_0 = C_0, X_{2j} = C_j + V_{M/2-j},
// X_{2j-1} = C_j - V_{M/2-j}, X_{M-1} = -V_0. Every step is a rotation or a sum and difference: errors grow with the number of levels.
// Parts (Yang and Narasimha 1985): for coprime odd P and Q, 2 cos a cos b = cos(a + b) + cos(a - b) makes of the type-2 transform Y of a P x Q
// grid, whose element (i, j) is x_n where n comes to i and j going back and forth along the grid, that of all N = P Q:
// 2 Y_ij = X_{Q i + P j} + X_{|Q i - P j|}, and as X_{2 N - k} = -X_k, its mirror image 2 Y_{P-i,Q-j} = X_{|Q i - P j|} - X_{Q i + P j}.
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

// Elements of x lie xs floats apart, those of y ys. Stores are twice as dear as loads, so that sums, differences and rotations are made
// where a transform in registers loads its elements, and what follows it where it stores them: no pass of their own.
struct Plain {
  const float* x;
  int64_t xs;
  f32 operator()(int64_t n) const { return load(x + n * xs); }
};

template <bool difference>
struct Folded {
  const float* x;
  int64_t xs, last;
  f32 operator()(int64_t n) const {
    const f32 u = load(x + n * xs), v = load(x + (last - n) * xs);
    return difference ? u - v : u + v;
  }
};

template <bool second>
struct Turned {
  const float* x;
  int64_t xs, last;
  const float *cos, *sin;
  f32 operator()(int64_t n) const {
    const f32 u = load(x + n * xs), v = load(x + (last - n) * xs);
    return second ? v * cos[n] - u * sin[n] : u * cos[n] + v * sin[n];
  }
};

struct Stored {
  float* y;
  int64_t ys;
  void operator()(int64_t k, f32 v) const { store(y + k * ys, v); }
};

// The last step of type 4, from C and V.
struct Joined {
  const float* first;
  float* y;
  int64_t ys, half;
  void operator()(int64_t k, f32 v) const {
    if (k == 0) {
      store(y, load(first));
      store(y + (2 * half - 1) * ys, -v);
    } else {
      const int64_t j = half - k;
      const f32 u = load(first + j * kLanes);
      store(y + 2 * j * ys, u + v);
      store(y + (2 * j - 1) * ys, u - v);
    }
  }
};

struct Unfolded {
  const float* sums;
  float* y;
  int64_t ys, last;
  void operator()(int64_t n, f32 v) const {
    const f32 u = load(sums + n * kLanes);
    store(y + n * ys, u + v);
    store(y + (last - n) * ys, u - v);
  }
};

enum class Step { two, back, four };

template <int N, Step step, class In, class Out>
inline void in_registers(const In& in, const Out& out) {
  f32 v[N];
#pragma GCC unroll 32
  for (int n = 0; n < N; ++n) v[n] = in(n);
  if constexpr (step == Step::two) two<N>(v);
  else if constexpr (step == Step::back) back<N>(v);
  else four<N>(v);
#pragma GCC unroll 32
  for (int n = 0; n < N; ++n) out(n, v[n]);
}

// A base in registers: any of these as a whole length, one of more than 8 below another level.
template <Step step, class In, class Out>
__attribute__((noinline)) void half(int64_t n, In in, Out out) {
  switch (n) {
    case 10: return in_registers<10, step>(in, out);
    case 12: return in_registers<12, step>(in, out);
    case 14: return in_registers<14, step>(in, out);
    case 16: return in_registers<16, step>(in, out);
  }
}

template <Step step>
__attribute__((noinline)) void whole(int64_t n, Plain in, Stored out) {
  if constexpr (step != Step::four) {
    if (n == 28) return in_registers<28, step>(in, out);
    if (n == 32) return in_registers<32, step>(in, out);
  }
  switch (n) {
    case 1: return in_registers<1, step>(in, out);
    case 2: return in_registers<2, step>(in, out);
    case 3: return in_registers<3, step>(in, out);
    case 4: return in_registers<4, step>(in, out);
    case 5: return in_registers<5, step>(in, out);
    case 6: return in_registers<6, step>(in, out);
    case 7: return in_registers<7, step>(in, out);
    case 8: return in_registers<8, step>(in, out);
    default: return half<step>(n, in, out);
  }
}

// y = m x, or m^T x, for vectors x xs floats apart. Sums are made of pieces: in one chain over a long base their rounding would show.
template <A order>
inline void product(int64_t size, const float* m, const float* x, int64_t xs, float* y, int64_t ys) {
  constexpr int64_t piece = 32;
  const auto part = [&]<bool add>(int64_t k) {
    gemm<order, add>(size, kLanes, size - k < piece ? size - k : piece, m + (order == A::rows ? k : k * size), size, {x + k * xs, xs}, y, ys);
  };
  part.template operator()<false>(0);
  for (int64_t k = piece; k < size; k += piece) part.template operator()<true>(k);
}

// Transforms of a.n >> level elements, from x to y, which do not overlap. work: 2 vectors for each element.
inline void two(const Axis& a, int level, const float* x, int64_t xs, float* y, int64_t ys, float* work);
inline void back(const Axis& a, int level, const float* x, int64_t xs, float* y, int64_t ys, float* work);
inline void four(const Axis& a, int level, const float* x, int64_t xs, float* y, int64_t ys, float* work);

// f(n, where n comes to in a grid of P x Q).
template <class F>
inline void back_and_forth(int64_t P, int64_t Q, const F& f) {
  for (int64_t n = 0, i = 0, j = 0, down = 1, along = 1; n < P * Q; ++n) {
    f(n, i * Q + j);
    if (i += down; i < 0 || i == P) down = -down, i += down;
    if (j += along; j < 0 || j == Q) along = -along, j += along;
  }
}

// f(place of Y_ij and of its mirror image in the grid, Q i + P j, |Q i - P j|), the sum turned to below N, with the sign that it then has.
template <class F>
inline void mirrored(int64_t P, int64_t Q, const F& f) {
  const int64_t N = P * Q;
  for (int64_t i = 1; i < P; ++i)
    for (int64_t j = 1; j <= Q / 2; ++j) {
      const int64_t u = Q * i, v = P * j, sum = u + v;
      f(u + j, N + Q - u - j, sum < N ? sum : 2 * N - sum, u < v ? v - u : u - v, sum < N ? 1.0f : -1.0f);
    }
}

// The type-2 transform of a grid, rows and then columns, from x to itself through y, whose vectors are ys floats apart; or its transpose.
template <bool transposed>
inline void grid(const Axis& p, const Axis& q, float* x, float* y, int64_t ys, float* work) {
  const auto transform = [work](const Axis& a, const float* from, int64_t step, float* to, int64_t to_step) {
    transposed ? back(a, 0, from, step, to, to_step, work) : two(a, 0, from, step, to, to_step, work);
  };
  const int64_t P = p.n, Q = q.n;
  for (int64_t i = 0; i < P; ++i) transform(q, x + i * Q * kLanes, kLanes, y + i * Q * ys, ys);
  for (int64_t j = 0; j < Q; ++j) transform(p, y + j * ys, Q * ys, x + j * kLanes, Q * kLanes);
}

inline void two_by_parts(const Axis& p, const Axis& q, const float* x, int64_t xs, float* y, int64_t ys, float* work) {
  const int64_t P = p.n, Q = q.n;
  back_and_forth(P, Q, [=](int64_t n, int64_t at) { store(work + at * kLanes, load(x + n * xs)); });
  grid<false>(p, q, work, y, ys, work + P * Q * kLanes);
  for (int64_t j = 0; j < Q; ++j) store(y + P * j * ys, load(work + j * kLanes));
  for (int64_t i = 1; i < P; ++i) store(y + Q * i * ys, load(work + Q * i * kLanes));
  mirrored(P, Q, [=](int64_t at, int64_t image, int64_t sum, int64_t difference, float sign) {
    const f32 u = load(work + at * kLanes), v = load(work + image * kLanes);
    store(y + sum * ys, (u - v) * sign);
    store(y + difference * ys, u + v);
  });
}

inline void back_by_parts(const Axis& p, const Axis& q, const float* x, int64_t xs, float* y, int64_t ys, float* work) {
  const int64_t P = p.n, Q = q.n;
  for (int64_t j = 0; j < Q; ++j) store(work + j * kLanes, load(x + P * j * xs));
  for (int64_t i = 1; i < P; ++i) store(work + Q * i * kLanes, load(x + Q * i * xs));
  mirrored(P, Q, [=](int64_t at, int64_t image, int64_t sum, int64_t difference, float sign) {
    const f32 u = load(x + difference * xs), v = load(x + sum * xs) * sign;
    store(work + at * kLanes, u + v);
    store(work + image * kLanes, u - v);
  });
  grid<true>(p, q, work, y, ys, work + P * Q * kLanes);
  back_and_forth(P, Q, [=](int64_t n, int64_t at) { store(y + n * ys, load(work + at * kLanes)); });
}

inline void two(const Axis& a, int level, const float* x, int64_t xs, float* y, int64_t ys, float* work) {
  const int64_t N = a.n >> level, h = N / 2, c = N - h;
  if (level == a.levels) {
    if (a.small) return whole<Step::two>(N, Plain{x, xs}, Stored{y, ys});
    if (a.parts) return two_by_parts(a.parts[0], a.parts[1], x, xs, y, ys, work);
    float *s = work, *d = work + c * kLanes;
    for (int64_t n = 0; n < h; ++n) {
      const f32 u = load(x + n * xs), v = load(x + (N - 1 - n) * xs);
      store(s + n * kLanes, u + v);
      store(d + n * kLanes, u - v);
    }
    store(s + h * kLanes, load(x + h * xs));
    product<A::rows>(c, a.sums, s, kLanes, y, 2 * ys);
    product<A::rows>(h, a.differences, d, kLanes, y + ys, 2 * ys);
  } else if (level + 1 == a.levels && a.small) {
    half<Step::two>(h, Folded<false>{x, xs, N - 1}, Stored{y, 2 * ys});
    half<Step::four>(h, Folded<true>{x, xs, N - 1}, Stored{y + ys, 2 * ys});
  } else if (level + 1 == a.levels) {
    float *s = work, *d = s + h * kLanes, *rest = d + h * kLanes;
    for (int64_t n = 0; n < h; ++n) {
      const f32 u = load(x + n * xs), v = load(x + (N - 1 - n) * xs);
      store(s + n * kLanes, u + v);
      store(d + n * kLanes, u - v);
    }
    two(a, level + 1, s, kLanes, y, 2 * ys, rest);
    four(a, level + 1, d, kLanes, y + ys, 2 * ys, rest);
  } else {  // two levels in one pass
    const int64_t q = h / 2;
    float *d = work, *s = d + h * kLanes, *sd = s + q * kLanes, *rest = sd + q * kLanes;
    for (int64_t n = 0; n < q; ++n) {
      const f32 x0 = load(x + n * xs), x1 = load(x + (h - 1 - n) * xs), x2 = load(x + (h + n) * xs), x3 = load(x + (N - 1 - n) * xs);
      const f32 s0 = x0 + x3, s1 = x1 + x2;
      store(d + n * kLanes, x0 - x3);
      store(d + (h - 1 - n) * kLanes, x1 - x2);
      store(s + n * kLanes, s0 + s1);
      store(sd + n * kLanes, s0 - s1);
    }
    two(a, level + 2, s, kLanes, y, 4 * ys, rest);
    four(a, level + 2, sd, kLanes, y + 2 * ys, 4 * ys, rest);
    four(a, level + 1, d, kLanes, y + ys, 2 * ys, s);
  }
}

inline void back(const Axis& a, int level, const float* x, int64_t xs, float* y, int64_t ys, float* work) {
  const int64_t N = a.n >> level, h = N / 2, c = N - h;
  if (level == a.levels) {
    if (a.small) return whole<Step::back>(N, Plain{x, xs}, Stored{y, ys});
    if (a.parts) return back_by_parts(a.parts[0], a.parts[1], x, xs, y, ys, work);
    float *s = work, *d = work + c * kLanes;
    product<A::columns>(c, a.sums, x, 2 * xs, s, kLanes);
    product<A::columns>(h, a.differences, x + xs, 2 * xs, d, kLanes);
    for (int64_t n = 0; n < h; ++n) {
      const f32 u = load(s + n * kLanes), v = load(d + n * kLanes);
      store(y + n * ys, u + v);
      store(y + (N - 1 - n) * ys, u - v);
    }
    store(y + h * ys, load(s + h * kLanes));
  } else if (level + 1 == a.levels && a.small) {
    half<Step::back>(h, Plain{x, 2 * xs}, Stored{work, kLanes});
    half<Step::four>(h, Plain{x + xs, 2 * xs}, Unfolded{work, y, ys, N - 1});
  } else if (level + 1 == a.levels) {
    float *s = work, *d = s + h * kLanes, *rest = d + h * kLanes;
    back(a, level + 1, x, 2 * xs, s, kLanes, rest);
    four(a, level + 1, x + xs, 2 * xs, d, kLanes, rest);
    for (int64_t n = 0; n < h; ++n) {
      const f32 u = load(s + n * kLanes), v = load(d + n * kLanes);
      store(y + n * ys, u + v);
      store(y + (N - 1 - n) * ys, u - v);
    }
  } else {
    const int64_t q = h / 2;
    float *d = work, *s = d + h * kLanes, *sd = s + q * kLanes, *rest = sd + q * kLanes;
    four(a, level + 1, x + xs, 2 * xs, d, kLanes, s);
    four(a, level + 2, x + 2 * xs, 4 * xs, sd, kLanes, rest);
    back(a, level + 2, x, 4 * xs, s, kLanes, rest);
    for (int64_t n = 0; n < q; ++n) {
      const f32 u = load(s + n * kLanes), v = load(sd + n * kLanes), s0 = u + v, s1 = u - v;
      const f32 d0 = load(d + n * kLanes), d1 = load(d + (h - 1 - n) * kLanes);
      store(y + n * ys, s0 + d0);
      store(y + (h - 1 - n) * ys, s1 + d1);
      store(y + (h + n) * ys, s1 - d1);
      store(y + (N - 1 - n) * ys, s0 - d0);
    }
  }
}

inline void four(const Axis& a, int level, const float* x, int64_t xs, float* y, int64_t ys, float* work) {
  const int64_t M = a.n >> level, h = M / 2;
  if (level == a.levels) {
    if (a.small) half<Step::four>(M, Plain{x, xs}, Stored{y, ys});
    else product<A::rows>(M, a.fourth, x, xs, y, ys);
    return;
  }
  const float* turns = a.turns[level];
  const Turned<false> first{x, xs, M - 1, turns, turns + h};
  const Turned<true> second{x, xs, M - 1, turns + 2 * h, turns + 3 * h};
  float *c = work, *v = c + h * kLanes, *done = v + h * kLanes, *rest = done + h * kLanes;
  const Joined join{done, y, ys, h};
  if (level + 1 == a.levels && a.small) {
    half<Step::two>(h, first, Stored{done, kLanes});
    return half<Step::two>(h, second, join);
  }
  for (int64_t n = 0; n < h; ++n) {
    store(c + n * kLanes, first(n));
    store(v + n * kLanes, second(n));
  }
  two(a, level + 1, c, kLanes, done, kLanes, rest);
  two(a, level + 1, v, kLanes, c, kLanes, rest);
  for (int64_t k = 0; k < h; ++k) join(k, load(c + k * kLanes));
}

}  // namespace fastdiff::dct::FASTDIFF_ISA
