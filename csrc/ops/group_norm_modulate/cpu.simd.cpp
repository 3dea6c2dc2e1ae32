#include "ops/group_norm_modulate/op.h"

#include "common/vec.h"

namespace fastdiff::group_norm_modulate::FASTDIFF_ISA {
namespace {

using namespace fastdiff::FASTDIFF_ISA;

constexpr int64_t kBlock = 4096;  // elements that two passes find in the first-level cache

// f(p), p the operand's values from channel c of sample b on, in their own type; not called where there is no operand.
template <class F>
void with(const Operand& x, Type type, int64_t b, int64_t c, const F& f) {
  if (x.data) typed(x.wide ? Type::f32 : type, [&]<class T>() { f(static_cast<const T*>(x.data) + b * x.b + c); });
}

template <class T>
const T* row(const Image& x, int64_t b, int64_t i) {
  return static_cast<const T*>(x.data) + b * x.b + i * x.step;
}

f32 total(const f32 (&chain)[4]) { return (chain[0] + chain[1]) + (chain[2] + chain[3]); }

// Chan's rule: no cancellation, however far the means lie from zero.
void join_into(Moments& a, const Moments& b) {
  const double n = a.n + b.n, d = b.mean - a.mean;
  if (b.n == 0.0) return;
  a.mean += d * (b.n / n);
  a.m2 += b.m2 + d * d * (a.n * b.n / n);
  a.n = n;
}

Statistics statistics(const Moments& m, float eps) {
  const double var = m.m2 / m.n + eps;
  const float mean = static_cast<float>(m.mean);
  return {mean, static_cast<float>(m.mean - mean), static_cast<float>(1.0 / __builtin_sqrt(var))};
}

// Sums of x - from and its square.
template <class T>
void deviations(const T* x, int64_t n, float from, double& sum, double& squares) {
  f32 d1[4] = {}, d2[4] = {};
  for_chains(n, [&](int u, int64_t j, const auto& get, const auto&, int count) {
    const f32 d = keep_n(get(x + j) - from, count, 0.0f);
    d1[u] += d;
    d2[u] += d * d;
  });
  sum = reduce_add(total(d1)), squares = reduce_add(total(d2));
}

// Of at most kBlock elements, from their deviations from a guess of the mean; again from a better one if the guess is further off than the
// elements vary, so that the difference of squares costs a bit at most.
template <class T>
Moments moments(const T* x, int64_t n, float guess) {
  double sum, squares;
  deviations(x, n, guess, sum, squares);
  if (!(sum * sum <= 0.5 * squares * n)) {
    guess += static_cast<float>(sum / n);
    deviations(x, n, guess, sum, squares);
  }
  const double m2 = squares - sum * sum / n;
  return {static_cast<double>(n), guess + sum / n, m2 < 0.0 ? 0.0 : m2};
}

// Per channel: normal = (x - mean) rstd - rest, y = normal gain + offset.
struct Channels {
  float *mean, *rstd, *rest, *gain, *offset;

  Channels(const Shape& s, const Modulation& m, const Statistics* groups, int64_t b, int64_t begin, int64_t end, float* scratch) {
    const int64_t step = stride(s), width = s.C / s.groups;
    mean = scratch, rstd = mean + step, rest = rstd + step, gain = rest + step, offset = gain + step;
    for (int64_t first = begin; first < end; first += width) {
      const Statistics g = groups[b * s.groups + first / width];
      for (int64_t c = first; c < first + width; ++c) mean[c] = g.mean, rstd[c] = g.rstd, rest[c] = g.rest * g.rstd, gain[c] = 1.0f, offset[c] = 0.0f;
    }
    const auto each = [&](const Operand& x, int64_t b, const auto& f) {
      with(x, s.type, b, begin, [&](const auto* p) { for_vectors(end - begin, [&](int64_t j, const auto& get, const auto& put, int) { f(begin + j, get(p + j), get, put); }); });
    };
    each(m.scale, b, [&](int64_t c, f32 v, const auto&, const auto& put) { put(gain + c, 1.0f + v); });
    each(m.bias, 0, [&](int64_t c, f32 v, const auto& get, const auto& put) { put(offset + c, v * get(gain + c)); });
    each(m.shift, b, [&](int64_t c, f32 v, const auto& get, const auto& put) { put(offset + c, v + get(offset + c)); });
    each(m.weight, 0, [&](int64_t c, f32 v, const auto& get, const auto& put) { put(gain + c, v * get(gain + c)); });
  }
};

template <bool silu>
f32 activated(f32 y) {
  if constexpr (silu) return y * sigmoid(y);
  else return y;
}

// dy times the slope of SiLU at y.
template <bool silu>
f32 through(f32 dy, f32 y) {
  if constexpr (!silu) return dy;
  const f32 s = sigmoid(y);
  return dy * (s * (1.0f + y * (1.0f - s)));
}

// f<T, silu>() with both known at compile time.
template <class F>
void dispatch(const Shape& s, const Modulation& m, const F& f) {
  typed(s.type, [&]<class T>() {
    if (m.silu) f.template operator()<T, true>();
    else f.template operator()<T, false>();
  });
}

// Channels first: a group is width rows of P pixels, or one run of memory.
template <class T>
Moments group_moments(const Shape& s, const Image& x, int64_t b, int64_t first) {
  const int64_t width = s.C / s.groups;
  const bool run = x.step == s.P || width == 1;
  const int64_t rows = run ? 1 : width, length = run ? width * s.P : s.P;
  Moments all{};
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t p = 0; p < length; p += kBlock) {
      const T* block = row<T>(x, b, first + r) + p;
      const int64_t n = length - p < kBlock ? length - p : kBlock, few = n < kLanes ? n : kLanes;
      join_into(all, moments(block, n, all.n ? static_cast<float>(all.mean) : reduce_add(load_n(block, static_cast<int>(few))) / few));
    }
  return all;
}

void forward(const Shape& s, const Forward& a, int64_t begin, int64_t end, float* scratch) {
  const int64_t width = s.C / s.groups;
  dispatch(s, a.m, [&]<class T, bool silu>() {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t b = i / s.groups, first = i % s.groups * width;
      a.statistics[i] = statistics(group_moments<T>(s, a.x, b, first), a.m.eps);
      const Channels k(s, a.m, a.statistics, b, first, first + width, scratch);
      for (int64_t c = first; c < first + width; ++c) {
        const T* x = row<T>(a.x, b, c);
        T* y = static_cast<T*>(a.y) + (b * s.C + c) * s.P;
        const float mean = k.mean[c], rstd = k.rstd[c], rest = k.rest[c], gain = k.gain[c], offset = k.offset[c];
        for_vectors(s.P, [&](int64_t j, const auto& get, const auto&, int n) {
          store_n(y + j, activated<silu>(((get(x + j) - mean) * rstd - rest) * gain + offset), n, a.stream);
        });
      }
    }
  });
  if (a.stream) stream_end();
}

void backward(const Shape& s, const Backward& a, float* sums, int64_t begin, int64_t end, float* scratch) {
  const int64_t width = s.C / s.groups;
  dispatch(s, a.m, [&]<class T, bool silu>() {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t b = i / s.groups, first = i % s.groups * width;
      const Channels k(s, a.m, a.statistics, b, first, first + width, scratch);
      float *sum = sums + b * 2 * stride(s), *sum_normal = sum + stride(s);
      double mean_g = 0.0, mean_gn = 0.0;  // of g = dy gain, the gradient of normal, and of g normal
      for (int64_t c = first; c < first + width; ++c) {
        const float mean = k.mean[c], rstd = k.rstd[c], rest = k.rest[c], gain = k.gain[c], offset = k.offset[c];
        double all = 0.0, all_normal = 0.0;
        for (int64_t p = 0; p < s.P; p += kBlock) {
          const T *x = row<T>(a.x, b, c) + p, *dy = row<T>(a.dy, b, c) + p;
          f32 g[4] = {}, gn[4] = {};
          for_chains(s.P - p < kBlock ? s.P - p : kBlock, [&](int u, int64_t j, const auto& get, const auto&, int) {
            const f32 normal = (get(x + j) - mean) * rstd - rest, d = through<silu>(get(dy + j), normal * gain + offset);
            g[u] += d;
            gn[u] += d * normal;
          });
          all += reduce_add(total(g));
          all_normal += reduce_add(total(gn));
        }
        sum[c] = static_cast<float>(all), sum_normal[c] = static_cast<float>(all_normal);
        mean_g += gain * all, mean_gn += gain * all_normal;
      }
      const float m = static_cast<float>(mean_g / (width * s.P)), mn = static_cast<float>(mean_gn / (width * s.P));
      for (int64_t c = first; c < first + width; ++c) {
        const T *x = row<T>(a.x, b, c), *dy = row<T>(a.dy, b, c);
        T* dx = static_cast<T*>(a.dx) + (b * s.C + c) * s.P;
        const float mean = k.mean[c], rstd = k.rstd[c], rest = k.rest[c], gain = k.gain[c], offset = k.offset[c];
        for_vectors(s.P, [&](int64_t j, const auto& get, const auto&, int n) {
          const f32 normal = (get(x + j) - mean) * rstd - rest, d = through<silu>(get(dy + j), normal * gain + offset);
          store_n(dx + j, (unfused(d * gain) - m - normal * mn) * rstd, n, a.stream);
        });
      }
    }
  });
  if (a.stream) stream_end();
}

// Channels last. Pixels taken at once: what belongs to a channel is loaded once for them.
constexpr int kTogether = 4;

// f<pixels>(p): of all pixels in [begin, end), `pixels` from p on.
template <class F>
void for_pixels(int64_t begin, int64_t end, const F& f) {
  for (; begin + kTogether <= end; begin += kTogether) f.template operator()<kTogether>(begin);
  for (; begin < end; ++begin) f.template operator()<1>(begin);
}

// Deviations are from a guess of each group's mean, as in `moments`; a block stays in cache for another pass.
void pixel_moments(const Shape& s, const Image& x, int64_t b, int64_t begin, int64_t end, Moments* groups, float* scratch) {
  const int64_t step = stride(s), width = s.C / s.groups, fit = 4 * kBlock / s.C, least = fit < 8 ? 8 : fit;
  float *guess = scratch, *sum = guess + step, *squares = sum + step;
  for (int64_t g = 0; g < s.groups; ++g) groups[g] = {};
  const auto total_of = [&](const float* p, int64_t g) {
    double all = 0.0;
    for (int64_t c = g * width; c < (g + 1) * width; ++c) all += p[c];
    return all;
  };
  const auto move_guess = [&](int64_t g, float by) {
    for (int64_t c = g * width; c < (g + 1) * width; ++c) guess[c] += by;
  };
  typed(s.type, [&]<class T>() {
    // Enough of the first pixels' elements that the guess is nearly always near enough.
    const int64_t wanted = width < 16 ? 64 / width : 4, few = end - begin < wanted ? end - begin : wanted;
    std::memset(guess, 0, 2 * step * sizeof(float));
    for (int64_t p = begin; p < begin + few; ++p)
      for_vectors(s.C, [&](int64_t j, const auto& get, const auto& put, int) { put(sum + j, get(sum + j) + get(row<T>(x, b, p) + j)); });
    for (int64_t g = 0; g < s.groups; ++g) move_guess(g, static_cast<float>(total_of(sum, g) / (few * width)));
    for (int64_t first = begin; first < end; first += least) {
      const int64_t n = end - first < least ? end - first : least;
      const double count = static_cast<double>(n * width);
      for (bool again = false;; again = true) {
        std::memset(sum, 0, 2 * step * sizeof(float));
        for_pixels(first, first + n, [&]<int pixels>(int64_t p) {
          for_vectors(s.C, [&](int64_t j, const auto& get, const auto& put, int) {
            f32 all = get(sum + j), all_squares = get(squares + j);
            const f32 from = get(guess + j);
#pragma GCC unroll 4
            for (int i = 0; i < pixels; ++i) {
              const f32 d = get(row<T>(x, b, p + i) + j) - from;
              all += d;
              all_squares += d * d;
            }
            put(sum + j, all);
            put(squares + j, all_squares);
          });
        });
        bool near = true;
        for (int64_t g = 0; g < s.groups; ++g) {
          const double all = total_of(sum, g);
          near &= all * all <= 0.5 * total_of(squares, g) * count;
        }
        if (again || near) break;
        for (int64_t g = 0; g < s.groups; ++g) move_guess(g, static_cast<float>(total_of(sum, g) / count));
      }
      for (int64_t g = 0; g < s.groups; ++g) {
        const double all = total_of(sum, g), m2 = total_of(squares, g) - all * all / count;
        join_into(groups[g], {count, guess[g * width] + all / count, m2 < 0.0 ? 0.0 : m2});
      }
    }
  });
}

void join(const Shape& s, float eps, int64_t pieces, const Moments* parts, Statistics* groups) {
  for (int64_t g = 0; g < s.groups; ++g) {
    Moments all{};
    for (int64_t p = 0; p < pieces; ++p) join_into(all, parts[p * s.groups + g]);
    groups[g] = statistics(all, eps);
  }
}

void pixel_forward(const Shape& s, const Forward& a, int64_t b, int64_t begin, int64_t end, float* scratch) {
  const Channels k(s, a.m, a.statistics, b, 0, s.C, scratch);
  dispatch(s, a.m, [&]<class T, bool silu>() {
    for_pixels(begin, end, [&]<int pixels>(int64_t p) {
      T* y = static_cast<T*>(a.y) + (b * s.P + p) * s.C;
      for_vectors(s.C, [&](int64_t j, const auto& get, const auto&, int n) {
        const f32 mean = get(k.mean + j), rstd = get(k.rstd + j), rest = get(k.rest + j), gain = get(k.gain + j), offset = get(k.offset + j);
#pragma GCC unroll 4
        for (int i = 0; i < pixels; ++i) {
          const f32 normal = (get(row<T>(a.x, b, p + i) + j) - mean) * rstd - rest;
          store_n(y + i * s.C + j, activated<silu>(normal * gain + offset), n, a.stream);
        }
      });
    });
  });
  if (a.stream) stream_end();
}

void pixel_sums(const Shape& s, const Backward& a, int64_t b, int64_t begin, int64_t end, float* sums, float* scratch) {
  const Channels k(s, a.m, a.statistics, b, 0, s.C, scratch);
  float *sum = sums, *sum_normal = sums + stride(s);
  std::memset(sums, 0, 2 * stride(s) * sizeof(float));
  dispatch(s, a.m, [&]<class T, bool silu>() {
    for_pixels(begin, end, [&]<int pixels>(int64_t p) {
      for_vectors(s.C, [&](int64_t j, const auto& get, const auto& put, int) {
        const f32 mean = get(k.mean + j), rstd = get(k.rstd + j), rest = get(k.rest + j), gain = get(k.gain + j), offset = get(k.offset + j);
        f32 all = {}, all_normal = {};
#pragma GCC unroll 4
        for (int i = 0; i < pixels; ++i) {
          const f32 normal = (get(row<T>(a.x, b, p + i) + j) - mean) * rstd - rest;
          const f32 d = through<silu>(get(row<T>(a.dy, b, p + i) + j), normal * gain + offset);
          all += d;
          all_normal += d * normal;
        }
        put(sum + j, get(sum + j) + all);
        put(sum_normal + j, get(sum_normal + j) + all_normal);
      });
    });
  });
}

void pixel_backward(const Shape& s, const Backward& a, int64_t b, int64_t begin, int64_t end, const float* sums, float* scratch) {
  const int64_t step = stride(s), width = s.C / s.groups;
  const Channels k(s, a.m, a.statistics, b, 0, s.C, scratch);
  float *mean_g = scratch + 5 * step, *mean_gn = mean_g + step;
  for (int64_t g = 0; g < s.groups; ++g) {
    double all = 0.0, all_normal = 0.0;
    for (int64_t c = g * width; c < (g + 1) * width; ++c) all += k.gain[c] * static_cast<double>(sums[c]), all_normal += k.gain[c] * static_cast<double>(sums[step + c]);
    const float mean = static_cast<float>(all / (width * s.P)), mean_normal = static_cast<float>(all_normal / (width * s.P));
    for (int64_t c = g * width; c < (g + 1) * width; ++c) mean_g[c] = mean, mean_gn[c] = mean_normal;
  }
  dispatch(s, a.m, [&]<class T, bool silu>() {
    for_pixels(begin, end, [&]<int pixels>(int64_t p) {
      T* dx = static_cast<T*>(a.dx) + (b * s.P + p) * s.C;
      for_vectors(s.C, [&](int64_t j, const auto& get, const auto&, int n) {
        const f32 mean = get(k.mean + j), rstd = get(k.rstd + j), rest = get(k.rest + j), gain = get(k.gain + j), offset = get(k.offset + j);
        const f32 g = get(mean_g + j), gn = get(mean_gn + j);
#pragma GCC unroll 4
        for (int i = 0; i < pixels; ++i) {
          const f32 normal = (get(row<T>(a.x, b, p + i) + j) - mean) * rstd - rest;
          const f32 d = through<silu>(get(row<T>(a.dy, b, p + i) + j), normal * gain + offset);
          store_n(dx + i * s.C + j, (unfused(d * gain) - g - normal * gn) * rstd, n, a.stream);
        }
      });
    });
  });
  if (a.stream) stream_end();
}

void put(const Gradient& g, Type type, int64_t at, f32 x, int n) {
  if (g.data) typed(g.wide ? Type::f32 : type, [&]<class T>() { store_n(static_cast<T*>(g.data) + at, x, n, false); });
}

void finish(const Shape& s, const Modulation& m, const float* sums, const Gradients& g) {
  const int64_t step = stride(s);
  for_vectors(s.C, [&](int64_t c, const auto& get, const auto&, int n) {
    const auto read = [&](const Operand& x, int64_t b, float absent) {
      f32 v = splat(absent);
      with(x, s.type, b, c, [&](const auto* p) { v = get(p); });
      return v;
    };
    const f32 weight = read(m.weight, 0, 1.0f), bias = read(m.bias, 0, 0.0f);
    f32 dweight = {}, dbias = {};
    for (int64_t b = 0; b < s.B; ++b) {
      const f32 dy = get(sums + b * 2 * step + c), dy_normal = get(sums + (b * 2 + 1) * step + c), scale = 1.0f + read(m.scale, b, 0.0f);
      put(g.scale, s.type, b * s.C + c, dy_normal * weight + dy * bias, n);
      put(g.shift, s.type, b * s.C + c, dy, n);
      dweight += dy_normal * scale;
      dbias += dy * scale;
    }
    put(g.weight, s.type, c, dweight, n);
    put(g.bias, s.type, c, dbias, n);
  });
}

}  // namespace

const Kernels kernels{forward, backward, pixel_moments, pixel_forward, pixel_sums, pixel_backward, join, finish};

}  // namespace fastdiff::group_norm_modulate::FASTDIFF_ISA
