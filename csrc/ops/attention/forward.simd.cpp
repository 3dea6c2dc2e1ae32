#include "ops/attention/block.h"

namespace fastdiff::attention::FASTDIFF_ISA {
namespace {

// Scratch of an item, in floats.
struct Layout {
  int64_t width, stride, q, out, stats, k, v, s, total;
  Layout(const Problem& p, const Plan& plan) : width(padded(p.E)), stride(score_stride(plan)) {
    q = 0;
    out = q + plan.query_rows * width;
    stats = out + plan.query_rows * width;
    k = stats + (plan.query_rows * 2 + 15) / 16 * 16;
    v = k + p.E * padded(plan.key_block);
    s = v + plan.key_block * width;
    total = s + plan.query_block * stride;
  }
};

// Scores to unnormalised probabilities relative to the running maximum, which may rise: then the row of sums so far shrinks. stats = (maximum, sum).
inline void online_softmax(float* s, int64_t width, float* stats, float* out, int64_t out_width) {
  f32 top = load(s);
  for (int64_t j = kLanes; j < width; j += kLanes) top = max(top, load(s + j));
  const float before = stats[0], highest = reduce_max(top), now = before > highest ? before : highest;
  const float base = now == -kInf ? 0.0f : now;  // no key yet: every power below is e^-inf = 0
  f32 sum = {};
  for (int64_t j = 0; j < width; j += kLanes) {
    const f32 e = exp(load(s + j) - base);
    store(s + j, e);
    sum += e;
  }
  const float shrink = now == before ? 1.0f : exp(splat(before - base))[0];
  stats[0] = now;
  stats[1] = stats[1] * shrink + reduce_add(sum);
  if (shrink != 1.0f)
    for (int64_t j = 0; j < out_width; j += kLanes) store(out + j, load(out + j) * shrink);
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

// One finished row, its sums relative to `maximum`. The log-sum-exp is kept in two floats: of scores near 1e6 one float is off by
// a tenth, and the backward's probabilities with it.
void finish(const Problem& p, const ForwardOut& o, int64_t b, int64_t h, int64_t m, const float* sums, float maximum, float sum) {
  if (o.lse) {
    const int64_t at = (b * p.H + h) * p.M + m;
    const double lse = maximum + __builtin_log(sum);
    o.lse[at] = sum == 0.0f ? -kInf : static_cast<float>(lse);
    if (o.lse_low) {
      const float low = static_cast<float>(lse - static_cast<double>(o.lse[at]));
      o.lse_low[at] = __builtin_isfinite(low) ? low : 0.0f;
    }
  }
  const float scale = sum == 0.0f ? 0.0f : 1.0f / sum;
  typed(p.type, [&]<class T>() {
    T* out = row<T>(o.out, b, h, m);
    unpack_row(p.E, sums, scale, out);
    if (o.out_low.data) keep_low(p.E, sums, scale, out, row<T>(o.out_low, b, h, m));
  });
}

void run(const Problem& p, const Plan& plan, const ForwardOut& o, int64_t index, float* scratch) {
  const Item item(p, plan, index);
  const Layout at(p, plan);
  float *q = scratch + at.q, *stats = scratch + at.stats, *kt = scratch + at.k, *v = scratch + at.v, *s = scratch + at.s;
  const int64_t rows = item.m1 - item.m0;
  const bool whole = plan.key_splits == 1;
  float* out = whole ? scratch + at.out : o.partial + index * plan.query_rows * at.width;
  if (!whole) stats = o.partial_stats + index * plan.query_rows * 2;

  for (int64_t i = 0; i < rows * at.width; i += kLanes) store(out + i, f32{});
  for (int64_t i = 0; i < rows; ++i) stats[2 * i] = -kInf, stats[2 * i + 1] = 0.0f;
  typed(p.type, [&]<class T>() {
    pack_rows(rows, p.E, row<T>(p.q, item.b, item.h, item.m0), p.q.s, p.scale, q);
  });

  const int64_t last = least(item.n1, p.seen(item.b, item.m1 - 1));
  for (int64_t n0 = item.n0; n0 < last; n0 += plan.key_block) {
    const int64_t keys = least(plan.key_block, last - n0), width = padded(keys);
    typed(p.type, [&]<class T>() {
      pack_transposed(keys, p.E, row<T>(p.k, item.b, item.h, n0), p.k.s, 1.0f, kt);
      pack_rows(keys, p.E, row<T>(p.v, item.b, item.h, n0), p.v.s, 1.0f, v);
    });
    for (int64_t r = 0; r < rows; r += plan.query_block) {
      const int64_t n = least(plan.query_block, rows - r);
      if (p.seen(item.b, item.m0 + r + n - 1) <= n0) continue;
      gemm<A::rows, false>(n, vectors(keys), p.E, q + r * at.width, at.width, {kt, 0}, s, at.stride);
      if (p.bias || keys != width || p.seen(item.b, item.m0 + r) < n0 + keys) mask(p, item, item.m0 + r, n, n0, keys, s, at.stride);
      for (int64_t i = 0; i < n; ++i)
        online_softmax(s + i * at.stride, width, stats + 2 * (r + i), out + (r + i) * at.width, at.width);
      gemm<A::rows, true>(n, vectors(p.E), keys, s, at.stride, {v, at.width}, out + r * at.width, at.width);
    }
  }
  if (whole)
    for (int64_t i = 0; i < rows; ++i)
      finish(p, o, item.b, item.h, item.m0 + i, out + i * at.width, stats[2 * i], stats[2 * i + 1]);
}

void merge(const Problem& p, const Plan& plan, const ForwardOut& o, int64_t group) {
  const Item item(p, plan, group * plan.key_splits);
  const int64_t width = padded(p.E), slice = plan.query_rows;
  float* sums = o.partial + group * plan.key_splits * slice * width;
  float* stats = o.partial_stats + group * plan.key_splits * slice * 2;
  for (int64_t i = 0; i < item.m1 - item.m0; ++i) {
    float maximum = stats[2 * i];
    for (int64_t k = 1; k < plan.key_splits; ++k) {
      const float m = stats[2 * (k * slice + i)];
      maximum = maximum > m ? maximum : m;
    }
    const float base = maximum == -kInf ? 0.0f : maximum;
    float total = 0.0f;
    for (int64_t k = 0; k < plan.key_splits; ++k) {
      const float* part = stats + 2 * (k * slice + i);
      const float weight = exp(splat(part[0] - base))[0];
      total += weight * part[1];
      for (int64_t j = 0; j < width; j += kLanes) {
        const f32 x = load(sums + (k * slice + i) * width + j) * weight;
        store(sums + i * width + j, k ? load(sums + i * width + j) + x : x);
      }
    }
    finish(p, o, item.b, item.h, item.m0 + i, sums + i * width, base, total);
  }
}

int64_t scratch(const Problem& p, const Plan& plan) { return Layout(p, plan).total; }

}  // namespace

const ForwardKernels forward{scratch, padded, run, merge};

}  // namespace fastdiff::attention::FASTDIFF_ISA
