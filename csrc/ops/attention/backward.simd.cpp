#include "ops/attention/block.h"

namespace fastdiff::attention::FASTDIFF_ISA {
namespace {

// Scratch of an item, in floats. dq, dk, dv: sums while the item runs, used where they do not go to a partial buffer.
struct Layout {
  int64_t width, v_width, stride, stats, kt, vt, rows_of_pairs, k, q, dout, as_pairs, s, ds, ds_pairs, dq, dk, dv, total;
  Layout(const Problem& p, const Plan& plan) : width(padded(p.E)), v_width(padded(p.V)), stride(line(plan.key_block)) {
    const int64_t keys = plan.key_block, rows = plan.query_block, columns = padded(keys);
    stats = 0;
    kt = stats + padded(plan.query_rows * 5);
    vt = kt + most(p.E, p.V) * columns;  // row_stats has transposed rows of V there
    const int64_t paired = by_pairs(p.type) ? padded(pairs(most(p.E, p.V))) : 0;
    rows_of_pairs = vt + p.V * columns;
    k = rows_of_pairs + keys * paired;
    q = k + keys * width;
    dout = q + rows * width;
    as_pairs = dout + rows * v_width;
    s = as_pairs + rows * paired;
    ds = s + rows * stride;
    ds_pairs = ds + rows * stride;
    dk = ds_pairs + (paired ? rows * stride : 0);
    dv = dk + keys * width;
    dq = dv + keys * v_width;
    total = dq + (plan.key_splits == 1 ? plan.query_rows * width : 0);
  }
};

// sum_e x[e] y[e] in each lane: in one chain over e, and in eight, whose rounding is a third.
struct Dots { f32 chain, eight; };
inline Dots dots(int64_t n, const float* x, const float* y) {
  Dots sum = {};
  f32 part[8] = {};
  for (int64_t e = 0; e < n; ++e) {
    sum.chain += load(x + e * kLanes) * load(y + e * kLanes);
    part[e % 8] += load(x + e * kLanes) * load(y + e * kLanes);
  }
  sum.eight = ((part[0] + part[1]) + (part[2] + part[3])) + ((part[4] + part[5]) + (part[6] + part[7]));
  return sum;
}

// Five floats of each query: its log-sum-exp in two floats (+inf where it sees no key, so that every probability is 0); what the softmax takes
// off its row of dP, sum(dout * out), twice; and dlse. A query with nearly all its weight on one key takes the sum that runs over V in one
// chain as dP's products do, so that the two cancel, exactly if it sees that key alone. Where many keys share the weight their
// roundings average out and that of the sum stays, times every key: they take the more exact. kLanes queries at a time, transposed into
// `x` and `y`.
void row_stats(const Problem& p, const BackwardIn& in, const Item& item, float* x, float* y, float* stats) {
  for (int64_t m = item.m0; m < item.m1; m += kLanes) {
    const int64_t n = least(kLanes, item.m1 - m), first = (item.b * p.H + item.h) * p.M + m;
    typed(p.type, [&]<class T>() {
      pack_transposed(n, p.V, row<T>(in.dout, item.b, item.h, m), in.dout.s, 1.0f, x);
      pack_transposed(n, p.V, row<T>(in.out, item.b, item.h, m), in.out.s, 1.0f, y);
    });
    Dots sum = dots(p.V, x, y);
    if (in.out_low.data) {
      typed(p.type, [&]<class T>() { pack_transposed(n, p.V, row<T>(in.out_low, item.b, item.h, m), in.out_low.s, 1.0f / kLowScale, y); });
      const f32 low = dots(p.V, x, y).eight;
      sum.chain += low, sum.eight += low;
    }
    for (int64_t i = 0; i < n; ++i, stats += 5) {
      stats[0] = in.lse[first + i] == -kInf ? kInf : in.lse[first + i];
      stats[1] = in.lse_low[first + i];
      stats[2] = sum.chain[i];
      stats[3] = sum.eight[i];
      stats[4] = in.dlse ? in.dlse[first + i] : 0.0f;
    }
  }
}

// s: scores to probabilities; ds: dP to the gradient of the scores, P (dP - sum(P dP) + dlse).
inline void probabilities(int64_t rows, int64_t width, float* s, float* ds, int64_t stride, const float* stats) {
  for (int64_t r = 0; r < rows; r += kLanes) {
    const int64_t n = least(kLanes, rows - r);
    const f32 top = row_maxima(n, width, s, stride);
    for (int64_t i = 0; i < n; ++i, s += stride, ds += stride, stats += 5) {
      const float lse = stats[0], lse_low = stats[1], taken = top[i] - lse > -0.7f ? stats[2] : stats[3], dlse = stats[4];
      for (int64_t j = 0; j < width; j += kLanes) {
        const f32 e = exp((load(s + j) - lse) - lse_low);
        store(s + j, e);
        store(ds + j, e * ((load(ds + j) - taken) + dlse));
      }
    }
  }
}

// The same from rows that hold all their keys, which need neither log-sum-exp nor output: softmax and sum(P dP) from the numbers
// at hand, so that dS cancels as exactly as the formula does even where one key has nearly all the weight.
inline void whole_probabilities(int64_t rows, int64_t width, float* s, float* ds, int64_t stride, const float* dlse) {
  for (int64_t r = 0; r < rows; r += kLanes, s += kLanes * stride, ds += kLanes * stride) {
    const int64_t n = least(kLanes, rows - r);
    const f32 sum = powers(n, width, s, stride, row_maxima(n, width, s, stride)), scale = sum == 0.0f ? f32{} : 1.0f / sum;
    const f32 taken = row_sums(n, width, [&](int i, int64_t j) {
      const f32 p = load(s + i * stride + j) * scale[i];
      store(s + i * stride + j, p);
      return p * load(ds + i * stride + j);
    });
    for (int64_t i = 0; i < n; ++i)
      for (int64_t j = i * stride; j < i * stride + width; j += kLanes)
        store(ds + j, load(s + j) * ((load(ds + j) - taken[i]) + (dlse ? dlse[r + i] : 0.0f)));
  }
}

void keep_dbias(const Problem& p, const BackwardOut& o, const Item& item, int64_t m, int64_t n0, int64_t keys, const float* ds) {
  const int64_t at = ((item.b * p.H + item.h) * p.M + m) * p.N + n0;
  if (o.dbias_f32) return unpack_row(keys, ds, 1.0f, static_cast<float*>(o.dbias) + at);
  typed(p.type, [&]<class T>() {
    unpack_row(keys, ds, 1.0f, static_cast<T*>(o.dbias) + at);
  });
}

inline void clear(float* x, int64_t n) {
  for (int64_t i = 0; i < n; i += kLanes) store(x + i, f32{});
}

void keep(const Problem& p, const View& x, const Item& item, int64_t begin, int64_t rows, const float* sums, int64_t width) {
  typed(p.type, [&]<class T>() {
    for (int64_t i = 0; i < rows; ++i) unpack_row(width, sums + i * padded(width), 1.0f, row<T>(x, item.b, item.h, begin + i));
  });
}

// dv += P^T dout, dk += dS^T q, dq += dS k. In pairs of bfloat16, P and dS are rounded to it, as PyTorch's are; s and ds are used up, and dk
// comes without the scale that stands in the floats of q.
void add_products(const Problem& p, int64_t rows, int64_t keys, float* s, float* ds, int64_t stride, float* ds_pairs, const float* q, const float* k,
                  const float* dout, float* dq, float* dk, float* dv) {
  const int64_t w = padded(p.E), vw = padded(p.V);
  if (!by_pairs(p.type)) {
    gemm<A::columns, true>(keys, p.V, rows, s, stride, {dout, vw}, dv, vw);
    gemm<A::columns, true>(keys, p.E, rows, ds, stride, {q, w}, dk, w);
    gemm<A::rows, true>(rows, p.E, keys, ds, stride, {k, w}, dq, w);
    return;
  }
  pair_columns(rows, padded(keys), ds, stride, ds_pairs);
  pair_rows(rows, padded(keys), s, stride);
  pair_rows(rows, padded(keys), ds, stride);
  gemm<A::columns, true, Pairs>(keys, p.V, pairs(rows), s, 2 * stride, {dout, vw}, dv, vw);
  gemm<A::columns, true, Pairs>(keys, p.E, pairs(rows), ds, 2 * stride, {q, w}, dk, w);
  gemm<A::rows, true, Pairs>(rows, p.E, pairs(keys), ds_pairs, stride, {k, w}, dq, w);
}

// Scales finished sums where they lie, for the pass that adds the splits.
inline void scale_rows(float* x, int64_t n, float scale) {
  for (int64_t i = 0; i < n; i += kLanes) store(x + i, load(x + i) * scale);
}

void run(const Problem& p, const Plan& plan, const BackwardIn& in, const BackwardOut& o, int64_t index, float* scratch) {
  const Item item(p, plan, index);
  const Layout at(p, plan);
  const int64_t w = at.width, vw = at.v_width, stride = at.stride, bh = item.b * p.H + item.h;
  float *stats = scratch + at.stats, *kt = scratch + at.kt, *vt = scratch + at.vt, *k = scratch + at.k, *q = scratch + at.q,
        *dout = scratch + at.dout, *s = scratch + at.s, *ds = scratch + at.ds;
  const bool own_q = plan.key_splits == 1, own_k = plan.query_splits == 1;
  float* dq = own_q ? scratch + at.dq : o.dq_partial + ((item.key_split * p.B * p.H + bh) * p.M + item.m0) * w;
  const int64_t rows = item.m1 - item.m0;
  const bool whole = plan.key_block >= p.N && !in.partial;
  const float* dlse = in.dlse ? in.dlse + bh * p.M + item.m0 : nullptr;
  clear(dq, rows * w);
  if (!whole) row_stats(p, in, item, kt, vt, stats);

  for (int64_t n0 = item.n0; n0 < item.n1; n0 += plan.key_block) {
    const int64_t keys = least(plan.key_block, item.n1 - n0);
    const int64_t split = (item.query_split * p.B * p.H + bh) * p.N + n0;
    float* dk = own_k ? scratch + at.dk : o.dk_partial + split * w;
    float* dv = own_k ? scratch + at.dv : o.dv_partial + split * vw;
    clear(dk, keys * w);
    clear(dv, keys * vw);
    const int64_t packed = least(keys, p.seen(item.b, item.m1 - 1) - n0);
    if (packed > 0) {
      pack_keys(p, packed, p.E, p.k, item.b, item.h, n0, scratch + at.rows_of_pairs, kt);
      pack_keys(p, packed, p.V, p.v, item.b, item.h, n0, scratch + at.rows_of_pairs, vt);
      pack_summed(p, packed, p.E, p.k, item.b, item.h, n0, 1.0f, k);
    }
    // Queries before the first that sees a key of the block have nothing but zeros in dbias.
    const int64_t first = p.causal && !o.dbias ? least(rows, most(0, n0 - (p.N - p.M) - item.m0)) : 0;
    for (int64_t r = first; r < rows; r += plan.query_block) {
      const int64_t n = least(plan.query_block, rows - r), m = item.m0 + r;
      const int64_t visible = least(keys, p.seen(item.b, m + n - 1) - n0), width = padded(visible);
      const bool hidden = visible <= 0;
      if (!hidden) {
        pack_summed(p, n, p.E, p.q, item.b, item.h, m, p.scale, q);
        pack_summed(p, n, p.V, in.dout, item.b, item.h, m, 1.0f, dout);
        multiply(p, n, packed, visible, p.E, p.q, item.b, item.h, m, p.scale, q, scratch + at.as_pairs, kt, s, stride);
        if (p.bias || visible != width || p.seen(item.b, m) < n0 + visible) mask(p, item, m, n, n0, visible, s, stride);
        multiply(p, n, packed, visible, p.V, in.dout, item.b, item.h, m, 1.0f, dout, scratch + at.as_pairs, vt, ds, stride);
        if (whole) whole_probabilities(n, width, s, ds, stride, dlse ? dlse + r : nullptr);
        else probabilities(n, width, s, ds, stride, stats + 5 * r);
      }
      if (o.dbias)
        for (int64_t i = 0; i < n; ++i) {
          float* line = ds + i * stride;
          clear(line + (hidden ? 0 : width), padded(keys) - (hidden ? 0 : width));
          keep_dbias(p, o, item, m + i, n0, keys, line);
        }
      if (!hidden) add_products(p, n, visible, s, ds, stride, scratch + at.ds_pairs, q, k, dout, dq + r * w, dk, dv);
    }
    if (by_pairs(p.type)) scale_rows(dk, keys * w, p.scale);
    if (own_k) {
      keep(p, o.dk, item, n0, keys, dk, p.E);
      keep(p, o.dv, item, n0, keys, dv, p.V);
    }
  }
  scale_rows(dq, rows * w, p.scale);
  if (own_q) keep(p, o.dq, item, item.m0, rows, dq, p.E);
}

void sum(const Problem& p, const View& x, int64_t S, int64_t width, const float* partial, int64_t splits, int64_t begin, int64_t end) {
  const int64_t w = padded(width), slice = p.B * p.H * S * w;
  for (int64_t i = begin; i < end; ++i) {
    const int64_t bh = i / S;
    typed(p.type, [&]<class T>() {
      T* out = row<T>(x, bh / p.H, bh % p.H, i % S);
      for (int64_t j = 0; j < width; j += kLanes) {
        f32 total = load(partial + i * w + j);
        for (int64_t k = 1; k < splits; ++k) total += load(partial + k * slice + i * w + j);
        if (j + kLanes <= width) store(out + j, total);
        else store_n(out + j, total, static_cast<int>(width - j));
      }
    });
  }
}

void sum_bias(const Problem& p, const int64_t (&own)[4], const float* full, void* dbias, int64_t begin, int64_t end) {
  const int64_t summed[3] = {p.B / own[0], p.H / own[1], p.M / own[2]}, columns = own[3];
  constexpr int64_t kColumns = 512;
  double sums[kColumns];  // float64: one may be the sum of a million
  for (int64_t r = begin; r < end; ++r) {
    const int64_t b0 = r / (own[1] * own[2]), h0 = r / own[2] % own[1], m0 = r % own[2];
    for (int64_t n0 = 0; n0 < columns; n0 += kColumns) {
      const int64_t n = least(kColumns, columns - n0);
      for (int64_t j = 0; j < n; ++j) sums[j] = 0.0;
      for (int64_t b = b0; b < b0 + summed[0]; ++b)
        for (int64_t h = h0; h < h0 + summed[1]; ++h)
          for (int64_t m = m0; m < m0 + summed[2]; ++m) {
            const float* x = full + ((b * p.H + h) * p.M + m) * columns + n0;
            for (int64_t j = 0; j < n; ++j) sums[j] += x[j];
          }
      typed(p.type, [&]<class T>() {
        for (int64_t j = 0; j < n; ++j) store_n(static_cast<T*>(dbias) + r * columns + n0 + j, splat(static_cast<float>(sums[j])), 1);
      });
    }
  }
}

int64_t scratch(const Problem& p, const Plan& plan) { return Layout(p, plan).total; }

}  // namespace

const BackwardKernels backward{scratch, padded, run, sum, sum_bias};

}  // namespace fastdiff::attention::FASTDIFF_ISA
