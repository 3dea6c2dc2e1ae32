// What forward and backward share: access to heads, and the bias and masks of a block of scores.
#pragma once

#include "common/gemm.h"
#include "ops/attention/op.h"

namespace fastdiff::attention::FASTDIFF_ISA {

using namespace fastdiff::FASTDIFF_ISA;

constexpr float kInf = __builtin_inff();

template <class T>
inline T* row(const View& x, int64_t b, int64_t h, int64_t s) {
  return static_cast<T*>(x.data) + b * x.b + h * x.h + s * x.s;
}

inline int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

// The rows of bias below the block are fetched ahead: they lie pages apart, where no hardware looks for them.
template <class T>
inline void add_bias(const T* bias, int64_t step, int64_t n, const T* next, float* s) {
  int64_t j = 0;
  if (step == 1)
    for (; j + kLanes <= n; j += kLanes) {
      __builtin_prefetch(next + j, 0, 2);
      store(s + j, load(s + j) + load(bias + j));
    }
  for (; j < n; ++j) s[j] += load_one(bias + j * step);
}

// Rows of keys, or of values, transposed; `rows_of_pairs` has room for them.
inline void pack_keys(const Problem& p, int64_t rows, int64_t columns, const View& x, int64_t b, int64_t h, int64_t n, float* rows_of_pairs, float* out) {
  typed(p.type, [&]<class T>() { pack_factor(rows, columns, row<T>(x, b, h, n), x.s, rows_of_pairs, out); });
}

// Rows that are summed over in a product: as floats, scaled, or paired, unscaled.
inline void pack_summed(const Problem& p, int64_t rows, int64_t columns, const View& x, int64_t b, int64_t h, int64_t m, float scale, float* out) {
  if (by_pairs(p.type)) return pack_paired_rows(rows, columns, row<bf16>(x, b, h, m), x.s, out);
  typed(p.type, [&]<class T>() { pack_rows(rows, columns, row<T>(x, b, h, m), x.s, scale, out); });
}

// scale times the products of queries m on, or of rows of dout, and the first `wanted` of the transposed keys, or values. floats: the rows,
// scaled; as_pairs has room for them in pairs, which stand unscaled.
inline void multiply(const Problem& p, int64_t rows, int64_t columns, int64_t wanted, int64_t E, const View& x, int64_t b, int64_t h, int64_t m, float scale,
                     const float* floats, float* as_pairs, const float* keys, float* s, int64_t stride) {
  if (!by_pairs(p.type)) return gemm<A::rows, false>(rows, columns, E, floats, padded(E), {keys, 0}, s, stride, Unscaled{}, wanted);
  pack_pairs(rows, E, row<bf16>(x, b, h, m), x.s, as_pairs);
  gemm<A::rows, false, Pairs>(rows, columns, pairs(E), as_pairs, padded(pairs(E)), {keys, 0}, s, stride, scale, wanted);
}

// Adds bias to a block of scores of queries [m0, m0 + rows), keys [n0, n0 + keys), and puts -inf where a query may not
// see a key and into the padding of the last vector.
inline void mask(const Problem& p, const Item& item, int64_t m0, int64_t rows, int64_t n0, int64_t keys, float* s, int64_t stride) {
  const int64_t width = padded(keys), *step = p.bias_stride;
  if (p.bias)
    typed(p.type, [&]<class T>() {
      const T* bias = static_cast<const T*>(p.bias) + item.b * step[0] + item.h * step[1] + m0 * step[2] + n0 * step[3];
      for (int64_t i = 0; i < rows; ++i, bias += step[2]) add_bias(bias, step[3], keys, bias + rows * step[2], s + i * stride);
    });
  for (int64_t i = 0; i < rows; ++i, s += stride)
    for (int64_t j = most(0, least(keys, p.seen(item.b, m0 + i) - n0)); j < width; ++j) s[j] = -kInf;
}

// Of up to kLanes rows at a time: the latency of a row's reductions is then waited for once and not kLanes times. Lane i is row i's, the
// lanes beyond `rows` are -inf and 0.
inline f32 row_maxima(int64_t rows, int64_t width, const float* s, int64_t stride) {
  f32 line[kLanes];
  for (int i = 0; i < kLanes; ++i) {
    line[i] = splat(-kInf);
    if (i < rows)
      for (int64_t j = 0; j < width; j += kLanes) line[i] = max(line[i], load(s + i * stride + j));
  }
  return reduce_each(line, [](f32 a, f32 b) { return max(a, b); });
}

// Lane i: the sum over row i of f(i, j), for every vector j of columns.
template <class F>
inline f32 row_sums(int64_t rows, int64_t width, const F& f) {
  f32 line[kLanes];
  for (int i = 0; i < kLanes; ++i) {
    line[i] = f32{};
    if (i < rows)
      for (int64_t j = 0; j < width; j += kLanes) line[i] += f(i, j);
  }
  return reduce_each(line, [](f32 a, f32 b) { return a + b; });
}

// Scores to powers relative to the rows' maxima, 0 where a row has no key yet; returns their sums.
inline f32 powers(int64_t rows, int64_t width, float* s, int64_t stride, f32 maxima) {
  const f32 base = maxima == -kInf ? f32{} : maxima;
  return row_sums(rows, width, [&](int i, int64_t j) {
    const f32 e = exp(load(s + i * stride + j) - base[i]);
    store(s + i * stride + j, e);
    return e;
  });
}

// The same, rounded to bfloat16 where the row begins; the sums are of the rounded, since weights that add up to one keep a large mean of the
// values out of the rounding. exact: the sums before rounding.
inline f32 rounded_powers(int64_t rows, int64_t width, float* s, int64_t stride, f32 maxima, f32& exact) {
  const f32 base = maxima == -kInf ? f32{} : maxima;
  f32 line[kLanes] = {};
  const f32 sums = row_sums(rows, width, [&](int i, int64_t j) {
    bf16* out = reinterpret_cast<bf16*>(s + i * stride) + j;
    const f32 e = exp(load(s + i * stride + j) - base[i]);
    store(out, e);
    line[i] += e;
    return load(out);
  });
  exact = reduce_each(line, [](f32 a, f32 b) { return a + b; });
  return sums;
}

}  // namespace fastdiff::attention::FASTDIFF_ISA
