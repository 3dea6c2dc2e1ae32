#include "ops/fourier_cross_attend/op.h"

#include "common/vec.h"

namespace fastdiff::fourier_cross_attend::FASTDIFF_ISA {
namespace {

using namespace fastdiff::FASTDIFF_ISA;

constexpr float kInf = __builtin_inff();
// The base of the exponentials moves only when a score exceeds it by more: what is summed stays below e^16 times the number of pixels,
// and the sums so far are rarely scaled again.
constexpr float kSlack = 16.0f;

inline int64_t padded(int64_t n) { return (n + kLanes - 1) / kLanes * kLanes; }

// K planes beside that of the positions: known when compiled for common numbers of channels, so that their sums stay in registers.
template <int known, class F>
inline void each(int64_t K, const F& f) {
  if constexpr (known > 0) {
#pragma GCC unroll 8
    for (int k = 0; k < known; ++k) f(k);
  } else {
    for (int64_t k = 0; k < K; ++k) f(k);
  }
}

// f.template operator()<known>()
template <class F>
inline void with_planes(int64_t K, F&& f) {
  switch (K) {
    case 1: return f.template operator()<1>();
    case 3: return f.template operator()<3>();
    case 4: return f.template operator()<4>();
    default: return f.template operator()<0>();
  }
}

// One query against one row of the grid.
template <int known>
struct Line {
  const Problem& p;
  int64_t K, step;  // step: from plane to plane
  const float *first, *position, *u, *columns;
  float row;

  Line(const Problem& p, int64_t query, int64_t b, int64_t y)
      : p(p), K(p.K), step(p.R * p.W), first(p.plane(b, 0, y)), position(p.plane(b, p.K, y)), u(p.u + query * p.K),
        columns(p.columns + query * p.W), row(p.rows[query * p.R + y]) {}

  template <class Get>
  f32 score(int64_t x, const Get& get, int n) const {
    f32 s = (get(columns + x) + row) * get(position + x);
    each<known>(K, [&](auto k) { s += get(first + k * step + x) * u[k]; });
    return keep_n(s, n, -kInf);
  }
};

// K vectors: of registers where K is known, of scratch where it is not.
template <int known>
struct Vectors {
  f32 own[known > 0 ? known : 1];
  float* memory;
  Vectors(int64_t K, float* memory) : memory(memory) {
    each<known>(K, [&](auto k) { set(k, f32{}); });
  }
  f32 get(int64_t k) const {
    if constexpr (known > 0) return own[k];
    else return load(memory + k * kLanes);
  }
  void set(int64_t k, f32 x) {
    if constexpr (known > 0) own[k] = x;
    else store(memory + k * kLanes, x);
  }
  void add(int64_t k, f32 x) { set(k, get(k) + x); }
};

int64_t scratch(const Problem& p, int64_t queries) { return padded(p.W) * (queries + 1) + (p.K + 1) * kLanes * queries + p.K * kLanes; }

template <int known>
void forward_rows(const Problem& p, const Sums& out, int64_t begin, int64_t end, float* scratch) {
  const int64_t width = padded(p.W), K = p.K, n = end - begin, b = begin / (p.H * p.M);
  float *columns = scratch, *scores = columns + n * width, *totals = scores + width, *local = totals + n * (K + 1) * kLanes;
  for (float* x = columns; x < local; x += kLanes) store(x, f32{});
  for (int64_t i = begin; i < end; ++i) out.lse[i] = -kInf;  // the base, until the end
  for (int64_t y = 0; y < p.R; ++y)
    for (int64_t i = 0; i < n; ++i) {
      const Line<known> line(p, begin + i, b, y);
      float *mine = columns + i * width, *total = totals + i * (K + 1) * kLanes, *row_sums = out.row_sums + (begin + i) * p.R;
      float& base = out.lse[begin + i];
      f32 top = splat(-kInf);
      for_vectors(p.W, [&](int64_t x, const auto& get, const auto&, int lanes) {
        const f32 s = line.score(x, get, lanes);
        store(scores + x, s);
        top = max(top, s);
      });
      const float highest = reduce_max(top);
      if (highest > base + kSlack) {
        const float shrink = base == -kInf ? 0.0f : exp(splat(base - highest))[0];
        for (int64_t x = 0; x < width; x += kLanes) store(mine + x, load(mine + x) * shrink);
        for (int64_t k = 0; k <= K; ++k) store(total + k * kLanes, load(total + k * kLanes) * shrink);
        for (int64_t r = 0; r < y; ++r) row_sums[r] *= shrink;
        base = highest;
      }
      Vectors<known> sums(K, local);
      f32 all = {}, row = {};
      for_vectors(p.W, [&](int64_t x, const auto& get, const auto&, int) {
        const f32 e = exp(load(scores + x) - base), weight = e * get(line.position + x);
        store(mine + x, load(mine + x) + weight);
        all += e;
        row += weight;
        each<known>(K, [&](auto k) { sums.add(k, e * get(line.first + k * line.step + x)); });
      });
      // Sums of a row first, then of the rows: a long grid costs no digits.
      each<known>(K, [&](auto k) { store(total + k * kLanes, load(total + k * kLanes) + sums.get(k)); });
      store(total + K * kLanes, load(total + K * kLanes) + all);
      row_sums[y] = reduce_add(row);
    }
  for (int64_t i = 0; i < n; ++i) {
    const int64_t at = begin + i;
    const float* total = totals + i * (K + 1) * kLanes;
    const float sum = reduce_add(load(total + K * kLanes)), scale = 1.0f / sum;
    for (int64_t k = 0; k < K; ++k) out.sums[at * K + k] = reduce_add(load(total + k * kLanes)) * scale;
    for (int64_t y = 0; y < p.R; ++y) out.row_sums[at * p.R + y] *= scale;
    for (int64_t x = 0; x < p.W; ++x) out.column_sums[at * p.W + x] = columns[i * width + x] * scale;
    const double lse = out.lse[at] + __builtin_log(sum);
    out.lse[at] = static_cast<float>(lse);
    out.lse_low[at] = static_cast<float>(lse - static_cast<double>(out.lse[at]));
  }
}

void forward(const Problem& p, const Sums& out, int64_t begin, int64_t end, float* scratch) {
  with_planes(p.K, [&]<int known>() { forward_rows<known>(p, out, begin, end, scratch); });
}

// P and P (dP - delta) of one vector of pixels; dP = (drow + dcolumn) position + sum_k dsums[k] plane[k].
template <int known>
struct Gradients {
  const Line<known> line;
  const float *dsums, *dcolumns;
  float drow, lse, lse_low, delta;

  Gradients(const Problem& p, const Gradient& g, int64_t query, int64_t b, int64_t y)
      : line(p, query, b, y), dsums(g.sums + query * p.K), dcolumns(g.column_sums + query * p.W), drow(g.row_sums[query * p.R + y]),
        lse(g.results.lse[query]), lse_low(g.results.lse_low[query]), delta(g.delta[query]) {}

  template <class Get>
  void at(int64_t x, const Get& get, int n, f32& probability, f32& ds) const {
    probability = exp((line.score(x, get, n) - lse) - lse_low);
    f32 d = (get(dcolumns + x) + drow) * get(line.position + x);
    each<known>(line.K, [&](auto k) { d += get(line.first + k * line.step + x) * dsums[k]; });
    ds = probability * (d - delta);
  }
};

float dot(const float* a, const float* b, int64_t n) {
  double sum = 0.0;
  for (int64_t i = 0; i < n; ++i) sum += double{a[i]} * b[i];
  return static_cast<float>(sum);
}

// a - b c with the product rounded: an FMA would leave its rounding behind where the two are equal.
inline float less(float a, float b, float c) {
  const volatile float product = b * c;
  return a - product;
}

// The softmax takes sum(P dP) off dP. From the results that sum is off by the rounding of them all, which is much where one pixel has
// nearly all the weight; but then every gradient is off by what is left, sum(P (dP - delta)), times a result, and is put right by it.
template <int known>
void backward_rows(const Problem& p, const Gradient& g, int64_t begin, int64_t end, float* scratch) {
  const int64_t width = padded(p.W), K = p.K, n = end - begin, b = begin / (p.H * p.M);
  float *columns = scratch, *totals = columns + (n + 1) * width, *local = totals + n * (K + 1) * kLanes;
  for (float* x = columns; x < local; x += kLanes) store(x, f32{});
  for (int64_t i = begin; i < end; ++i)
    g.delta[i] = dot(g.sums + i * K, g.results.sums + i * K, K) + dot(g.row_sums + i * p.R, g.results.row_sums + i * p.R, p.R) +
                 dot(g.column_sums + i * p.W, g.results.column_sums + i * p.W, p.W);
  for (int64_t y = 0; y < p.R; ++y)
    for (int64_t i = 0; i < n; ++i) {
      const Gradients<known> one(p, g, begin + i, b, y);
      float *mine = columns + i * width, *total = totals + i * (K + 1) * kLanes;
      Vectors<known> sums(K, local);
      f32 row = {}, rest = {};
      for_vectors(p.W, [&](int64_t x, const auto& get, const auto&, int lanes) {
        f32 probability, ds;
        one.at(x, get, lanes, probability, ds);
        const f32 d = ds * get(one.line.position + x);
        store(mine + x, load(mine + x) + d);
        row += d;
        rest += ds;
        each<known>(K, [&](auto k) { sums.add(k, ds * get(one.line.first + k * one.line.step + x)); });
      });
      each<known>(K, [&](auto k) { store(total + k * kLanes, load(total + k * kLanes) + sums.get(k)); });
      store(total + K * kLanes, load(total + K * kLanes) + rest);
      g.rows[(begin + i) * p.R + y] = reduce_add(row);
    }
  for (int64_t i = 0; i < n; ++i) {
    const int64_t at = begin + i;
    const float *total = totals + i * (K + 1) * kLanes, rest = reduce_add(load(total + K * kLanes));
    for (int64_t k = 0; k < K; ++k) g.u[at * K + k] = less(reduce_add(load(total + k * kLanes)), rest, g.results.sums[at * K + k]);
    for (int64_t y = 0; y < p.R; ++y) g.rows[at * p.R + y] = less(g.rows[at * p.R + y], rest, g.results.row_sums[at * p.R + y]);
    for (int64_t x = 0; x < p.W; ++x)
      g.columns[at * p.W + x] = less(columns[i * width + x], rest, g.results.column_sums[at * p.W + x]);
    g.delta[at] += rest;
  }
}

void backward(const Problem& p, const Gradient& g, int64_t begin, int64_t end, float* scratch) {
  with_planes(p.K, [&]<int known>() { backward_rows<known>(p, g, begin, end, scratch); });
}

template <int known>
void planes_rows(const Problem& p, const Gradient& g, int64_t begin, int64_t end) {
  constexpr int64_t kBlock = 16;  // queries whose tables stay in L1 while the row is walked
  const int64_t K = p.K, step = p.R * p.W, heads = p.H * p.M;
  for (int64_t line = begin; line < end; ++line) {
    const int64_t b = line / p.R, y = line % p.R;
    float* out = g.planes + (b * (K + 1) * p.R + y) * p.W;
    for (int64_t k = 0; k <= K; ++k)
      for (int64_t x = 0; x < p.W; ++x) out[k * step + x] = 0.0f;
    for (int64_t q0 = b * heads; q0 < (b + 1) * heads; q0 += kBlock) {
      const int64_t q1 = q0 + kBlock < (b + 1) * heads ? q0 + kBlock : (b + 1) * heads;
      for_vectors(p.W, [&](int64_t x, const auto& get, const auto& put, int lanes) {
        f32 position = {};
        // In memory, not in registers, where K is unknown: a plane at a time would compute the exponentials again.
        f32 own[known > 0 ? known : 1] = {};
        for (int64_t q = q0; q < q1; ++q) {
          const Gradients<known> one(p, g, q, b, y);
          f32 probability, ds;
          one.at(x, get, lanes, probability, ds);
          position += ds * (get(one.line.columns + x) + one.line.row) + probability * (get(one.dcolumns + x) + one.drow);
          each<known>(K, [&](auto k) {
            const f32 d = ds * one.line.u[k] + probability * one.dsums[k];
            if constexpr (known > 0) own[k] += d;
            else put(out + k * step + x, get(out + k * step + x) + d);
          });
        }
        if constexpr (known > 0) each<known>(K, [&](auto k) { put(out + k * step + x, get(out + k * step + x) + own[k]); });
        put(out + K * step + x, get(out + K * step + x) + position);
      });
    }
  }
}

void backward_planes(const Problem& p, const Gradient& g, int64_t begin, int64_t end) {
  with_planes(p.K, [&]<int known>() { planes_rows<known>(p, g, begin, end); });
}

}  // namespace

const Kernels kernels{scratch, forward, backward, backward_planes};

}  // namespace fastdiff::fourier_cross_attend::FASTDIFF_ISA
