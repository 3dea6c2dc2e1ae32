#include "ops/attention/block.h"

namespace fastdiff::attention::FASTDIFF_ISA {
namespace {

// Scratch of an item, in floats.
struct Layout {
  int64_t q_width, width, stride, q, out, maxima, sums, exact, k, rows_of_pairs, v, s, total;
  Layout(const Problem& p, const Plan& plan) : q_width(padded(p.E)), width(padded(p.V)), stride(line(plan.key_block)) {
    q = 0;
    out = q + plan.query_rows * q_width;
    maxima = out + plan.query_rows * width;
    sums = maxima + padded(plan.query_rows) + kLanes;
    exact = sums + padded(plan.query_rows) + kLanes;
    k = exact + padded(plan.query_rows) + kLanes;
    rows_of_pairs = k + p.E * padded(plan.key_block);
    v = rows_of_pairs + (by_pairs(p.type) ? plan.key_block * padded(pairs(p.E)) : 0);
    s = v + plan.key_block * width;
    total = s + plan.query_block * stride;
  }
};

// Scores of `rows` queries to unnormalised probabilities relative to their running maxima, which may rise: then the sums so far shrink. `paired`:
// to bfloat16, and `exact` has the sums before that. Those beyond `rows` come out as they were.
template <bool paired>
inline void online_softmax(int64_t rows, int64_t width, float* s, int64_t stride, float* maxima, float* sums, float* exact, float* out, int64_t out_width) {
  for (int64_t r = 0; r < rows; r += kLanes, s += kLanes * stride, out += kLanes * out_width) {
    const int64_t n = least(kLanes, rows - r);
    const f32 before = load(maxima + r), now = max(row_maxima(n, width, s, stride), before);
    const f32 shrink = exp(before - (now == -kInf ? f32{} : now));
    store(maxima + r, now);
    if constexpr (paired) {
      f32 added;
      store(sums + r, load(sums + r) * shrink + rounded_powers(n, width, s, stride, now, added));
      store(exact + r, load(exact + r) * shrink + added);
    } else {
      store(sums + r, load(sums + r) * shrink + powers(n, width, s, stride, now));
    }
    for (int64_t i = 0; i < n; ++i)
      if (const float by = shrink[i]; by != 1.0f)
        for (int64_t j = 0; j < out_width; j += kLanes) store(out + i * out_width + j, load(out + i * out_width + j) * by);
  }
}

// What rounding left over of x * scale beside its rounded values, times kLowScale; 0 where they are not finite.
template <class T>
void keep_low(int64_t n, const float* x, float scale, const T* rounded, T* low) {
  for (int64_t j = 0; j < n; j += kLanes) {
    const int rest = static_cast<int>(least(kLanes, n - j));
    const f32 over = load(x + j) * scale - load_n(rounded + j, rest);
    store_n(low + j, over - over == 0.0f ? over * kLowScale : f32{}, rest);
  }
}

// One finished row, its sums relative to `maximum`. The log-sum-exp is the first of two floats. Both together are that of the weights as
// they were summed: rounded; and of scores near 1e6 one float is off by a tenth, and the backward's probabilities with it.
void finish(const Problem& p, const ForwardOut& o, int64_t b, int64_t h, int64_t m, const float* sums, float maximum, float sum, float exact) {
  if (o.lse) {
    const int64_t at = (b * p.H + h) * p.M + m;
    o.lse[at] = sum == 0.0f ? -kInf : static_cast<float>(maximum + __builtin_log(exact));
    if (o.lse_low) {
      const float low = static_cast<float>(maximum + __builtin_log(sum) - static_cast<double>(o.lse[at]));
      o.lse_low[at] = __builtin_isfinite(low) ? low : 0.0f;
    }
  }
  const float scale = sum == 0.0f ? 0.0f : 1.0f / sum;
  typed(p.type, [&]<class T>() {
    T* out = row<T>(o.out, b, h, m);
    unpack_row(p.V, sums, scale, out);
    if (o.out_low.data) keep_low(p.V, sums, scale, out, row<T>(o.out_low, b, h, m));
  });
}

void run(const Problem& p, const Plan& plan, const ForwardOut& o, int64_t index, float* scratch) {
  const Item item(p, plan, index);
  const Layout at(p, plan);
  float *q = scratch + at.q, *maxima = scratch + at.maxima, *sums = scratch + at.sums,
        *exact = by_pairs(p.type) ? scratch + at.exact : sums, *kt = scratch + at.k, *v = scratch + at.v, *s = scratch + at.s;
  const int64_t rows = item.m1 - item.m0;
  const bool whole = plan.key_splits == 1;
  float* out = whole ? scratch + at.out : o.partial + index * plan.query_rows * at.width;
  for (int64_t i = 0; i < rows * at.width; i += kLanes) store(out + i, f32{});
  for (int64_t i = 0; i < padded(rows) + kLanes; i += kLanes) store(maxima + i, splat(-kInf)), store(sums + i, f32{}), store(exact + i, f32{});
  if (!by_pairs(p.type))
    typed(p.type, [&]<class T>() {
      pack_rows(rows, p.E, row<T>(p.q, item.b, item.h, item.m0), p.q.s, p.scale, q);
    });

  const int64_t last = least(item.n1, p.seen(item.b, item.m1 - 1));
  for (int64_t n0 = item.n0; n0 < last; n0 += plan.key_block) {
    const int64_t keys = least(plan.key_block, last - n0);
    pack_keys(p, keys, p.E, p.k, item.b, item.h, n0, scratch + at.rows_of_pairs, kt);
    pack_summed(p, keys, p.V, p.v, item.b, item.h, n0, 1.0f, v);
    for (int64_t r = 0; r < rows; r += plan.query_block) {
      const int64_t n = least(plan.query_block, rows - r);
      const int64_t visible = least(keys, p.seen(item.b, item.m0 + r + n - 1) - n0), width = padded(visible);
      if (visible <= 0) continue;
      multiply(p, n, keys, visible, p.E, p.q, item.b, item.h, item.m0 + r, p.scale, q + r * at.q_width, q, kt, s, at.stride);
      if (p.bias || visible != width || p.seen(item.b, item.m0 + r) < n0 + visible) mask(p, item, item.m0 + r, n, n0, visible, s, at.stride);
      float* to = out + r * at.width;
      if (by_pairs(p.type)) {
        online_softmax<true>(n, width, s, at.stride, maxima + r, sums + r, exact + r, to, at.width);
        gemm<A::rows, true, Pairs>(n, p.V, pairs(visible), s, at.stride, {v, at.width}, to, at.width);
      } else {
        online_softmax<false>(n, width, s, at.stride, maxima + r, sums + r, exact + r, to, at.width);
        gemm<A::rows, true>(n, p.V, visible, s, at.stride, {v, at.width}, to, at.width);
      }
    }
  }
  for (int64_t i = 0; i < rows; ++i)
    if (whole) {
      finish(p, o, item.b, item.h, item.m0 + i, out + i * at.width, maxima[i], sums[i], exact[i]);
    } else {
      float* stats = o.partial_stats + (index * plan.query_rows + i) * kStats;
      stats[0] = maxima[i], stats[1] = sums[i], stats[2] = exact[i];
    }
}

void merge(const Problem& p, const Plan& plan, const ForwardOut& o, int64_t group) {
  const Item item(p, plan, group * plan.key_splits);
  const int64_t width = padded(p.V), slice = plan.query_rows;
  float* sums = o.partial + group * plan.key_splits * slice * width;
  float* stats = o.partial_stats + group * plan.key_splits * slice * kStats;
  for (int64_t i = 0; i < item.m1 - item.m0; ++i) {
    float maximum = stats[kStats * i];
    for (int64_t k = 1; k < plan.key_splits; ++k) {
      const float m = stats[kStats * (k * slice + i)];
      maximum = maximum > m ? maximum : m;
    }
    const float base = maximum == -kInf ? 0.0f : maximum;
    float total = 0.0f, exact = 0.0f;
    for (int64_t k = 0; k < plan.key_splits; ++k) {
      const float* part = stats + kStats * (k * slice + i);
      const float weight = exp(splat(part[0] - base))[0];
      total += weight * part[1], exact += weight * part[2];
      for (int64_t j = 0; j < width; j += kLanes) {
        const f32 x = load(sums + (k * slice + i) * width + j) * weight;
        store(sums + i * width + j, k ? load(sums + i * width + j) + x : x);
      }
    }
    finish(p, o, item.b, item.h, item.m0 + i, sums + i * width, base, total, exact);
  }
}

int64_t scratch(const Problem& p, const Plan& plan) { return Layout(p, plan).total; }

}  // namespace

const ForwardKernels forward{scratch, padded, run, merge};

}  // namespace fastdiff::attention::FASTDIFF_ISA
