// Gradients of attention on tensor cores, scores computed anew. Where one side is short, blocks share the other, and a last kernel adds their
// parts in order.
#pragma once

#include "ops/attention/kernel.cuh"

namespace fastdiff::attention {

template <class T>
struct Backward {
  Rows<const T> dout, out, low;             // low: out_low, or null data
  Global<const float> lse, lse_low, dlse;   // contiguous (B, H, M); dlse may be null
  Global<float> stats;                      // (4, B, H, M): the log-sum-exp in the logits' units (inf without a key), its low part, delta, dlse
  Rows<T> dq, dk, dv;
  Global<float> dq_parts, dk_parts, dv_parts;  // contiguous (splits, B, H, rows, E), where blocks share the other side
};

template <class T>
constexpr int kQueryGradientStep = kNatural<T> ? 32 : 64;
template <class T, int W>
constexpr int kKeyGradientStep = W == 128 ? 16 : kNatural<T> ? 32 : 64;

template <class T, int W>
constexpr size_t backward_shared(int step) { return 2 * arena_bytes<T>(kOwn * kPitch<T, W>) + 2 * arena_bytes<T>(2 * step * kPitch<T, W>); }

// Adds the diagonal of the warp's 16 x 16 products, as `scores` leaves them.
__device__ inline void add_diagonal(const float (&s)[2][4], float factor, float (&delta)[2]) {
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
#pragma unroll
  for (int r = 0; r < 2; ++r)
    if (g / 2 == t) delta[r] += factor * (g % 2 ? s[r][2 * r + 1] : s[r][2 * r]);
}

// delta = sum_e dout out, by a product like dP's: for a query that sees one key they are equal, and dS is 0.
template <class T, int W>
__global__ void __launch_bounds__(kThreads) statistics(Problem<T> p, Backward<T> g) {
  Arena arena;
  const Shared<T> dout = arena.take<T>(kOwn * kPitch<T, W>), out = arena.take<T>(kOwn * kPitch<T, W>);
  const Place at(p.M, 1, p.H);
  const int lane = threadIdx.x % 32, mine = threadIdx.x / 32 * 16;
  float delta[2] = {}, s[2][4] = {};
  load_tile<T, W>(dout, g.dout.data + (at.b * g.dout.b + at.h * g.dout.h), g.dout.s, at.start, kOwn, p.M, p.E);
  if (g.low.data) {
    load_tile<T, W>(out, g.low.data + (at.b * g.low.b + at.h * g.low.h), g.low.s, at.start, kOwn, p.M, p.E);
    copy_async_commit();
    copy_async_wait<0>();
    __syncthreads();
    scores<T, W, 2>(s, dout + mine * kPitch<T, W>, out + mine * kPitch<T, W>);
    __syncthreads();
#pragma unroll
    for (int j = 0; j < 2; ++j)
#pragma unroll
      for (int i = 0; i < 4; ++i) s[j][i] *= 1 / kLow;
  }
  load_tile<T, W>(out, g.out.data + (at.b * g.out.b + at.h * g.out.h), g.out.s, at.start, kOwn, p.M, p.E);
  copy_async_commit();
  copy_async_wait<0>();
  __syncthreads();
  scores<T, W, 2>(s, dout + mine * kPitch<T, W>, out + mine * kPitch<T, W>);
  add_diagonal(s, 1, delta);
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int m = at.start + mine + lane / 4 + 8 * r;
    if (lane / 4 / 2 != lane % 4 || m >= p.M) continue;
    const int64_t i = at.bh * p.M + m, rows = p.B * p.H * p.M;
    double lse = double{g.lse[i]} + double{g.lse_low[i]};
    if (!kNatural<T>) lse /= kLn2;
    if (lse == -INFINITY) lse = INFINITY;
    const float high = static_cast<float>(lse);
    g.stats[i] = high, g.stats[rows + i] = fabsf(high) < INFINITY ? static_cast<float>(lse - high) : 0.0f;
    g.stats[2 * rows + i] = delta[r], g.stats[3 * rows + i] = g.dlse ? g.dlse[i] : 0.0f;
  }
}

// dq = scale dS k, dS = P (dout v^T - delta + dlse), P = exp(S - lse).
template <class T, int W>
__global__ void __launch_bounds__(kThreads) query_gradients(Problem<T> p, Backward<T> g, int splits, int per) {
  constexpr int step = kQueryGradientStep<T>, tiles = step / 8, tile = step * kPitch<T, W>;
  Arena arena;
  const Shared<T> q = arena.take<T>(kOwn * kPitch<T, W>), dout = arena.take<T>(kOwn * kPitch<T, W>), k = arena.take<T>(2 * tile),
                  v = arena.take<T>(2 * tile);
  const Place at(p.M, splits, p.H);
  const int lane = threadIdx.x % 32, mine = threadIdx.x / 32 * 16, row = at.start + mine;
  const auto k_rows = p.k.data + (at.b * p.k.b + at.h * p.k.h), v_rows = p.v.data + (at.b * p.v.b + at.h * p.v.h);
  const int begin = at.split * per, end = min(begin + per, keys_end(p, at.b, at.start + kOwn));
  float of[4][2];  // the statistics of the lane's two queries; a log-sum-exp of inf makes P 0
#pragma unroll
  for (int r = 0; r < 2; ++r)
#pragma unroll
    for (int x = 0; x < 4; ++x) {
      const int m = row + lane / 4 + 8 * r;
      of[x][r] = m < p.M ? g.stats[(x * p.B * p.H + at.bh) * p.M + m] : x == 0 ? INFINITY : 0.0f;
    }

  float dq[W / 8][4] = {};
  load_tile<T, W>(q, p.q.data + (at.b * p.q.b + at.h * p.q.h), p.q.s, at.start, kOwn, p.M, p.E);
  load_tile<T, W>(dout, g.dout.data + (at.b * g.dout.b + at.h * g.dout.h), g.dout.s, at.start, kOwn, p.M, p.E);
  load_tile<T, W>(k, k_rows, p.k.s, begin, step, end, p.E);
  load_tile<T, W>(v, v_rows, p.v.s, begin, step, end, p.E);
  copy_async_commit();
  for (int n = begin, stage = 0; n < end; n += step, stage = 1 - stage) {
    copy_async_wait<0>();
    __syncthreads();
    if (n + step < end) {
      load_tile<T, W>(k + (1 - stage) * tile, k_rows, p.k.s, n + step, step, end, p.E);
      load_tile<T, W>(v + (1 - stage) * tile, v_rows, p.v.s, n + step, step, end, p.E);
      copy_async_commit();
    }
    float s[tiles][4] = {}, dp[tiles][4] = {};
    scores<T, W, tiles>(s, q + mine * kPitch<T, W>, k + stage * tile);
    scores<T, W, tiles>(dp, dout + mine * kPitch<T, W>, v + stage * tile);
    logits<false>(s, p, at.b, at.h, row, n, end, n + step <= end && (!p.causal || n + step - 1 <= row + (p.N - p.M)));
#pragma unroll
    for (int j = 0; j < tiles; ++j)
#pragma unroll
      for (int i = 0; i < 4; ++i) s[j][i] = exponential<T>((s[j][i] - of[0][i / 2]) - of[1][i / 2]) * ((dp[j][i] - of[2][i / 2]) + of[3][i / 2]);
    combine<T, W, tiles>(dq, s, k + stage * tile);
  }
  const float factor[2] = {p.scale, p.scale};
  if (splits > 1) store_rows<W, float>(dq, factor, g.dq_parts + (at.split * p.B * p.H + at.bh) * p.M * p.E, p.E, row, p.M, p.E);
  else store_rows<W, T>(dq, factor, g.dq.data + (at.b * g.dq.b + at.h * g.dq.h), g.dq.s, row, p.M, p.E);
}

// dv = P^T dout, dk = scale dS^T q, from S^T = k q^T and dP^T = v dout^T, so that neither is transposed.
template <class T, int W>
__global__ void __launch_bounds__(kThreads) key_gradients(Problem<T> p, Backward<T> g, int splits, int per) {
  constexpr int step = kKeyGradientStep<T, W>, tiles = step / 8, tile = step * kPitch<T, W>;
  Arena arena;
  const Shared<T> k = arena.take<T>(kOwn * kPitch<T, W>), v = arena.take<T>(kOwn * kPitch<T, W>), q = arena.take<T>(2 * tile),
                  dout = arena.take<T>(2 * tile);
  const Shared<float> stats = arena.take<float>(2 * 4 * step);
  const Place at(p.N, splits, p.H);
  const int lane = threadIdx.x % 32, mine = threadIdx.x / 32 * 16, row = at.start + mine;
  const auto q_rows = p.q.data + (at.b * p.q.b + at.h * p.q.h), dout_rows = g.dout.data + (at.b * g.dout.b + at.h * g.dout.h);
  const Global<const float> given = g.stats + at.bh * p.M;
  int begin = at.split * per, last = min(begin + per, p.M), end = p.N;
  if (p.lengths) end = min(end, static_cast<int>(p.lengths[at.b * p.lengths_stride]));
  if (at.start >= end) last = begin;
  if (p.causal) begin = max(begin, max(0, at.start - (p.N - p.M)) / step * step);  // the first query that sees key n is n - (N - M)

  const auto load_queries = [&](int stage, int m) {  // beyond the last query all is 0, and so is what comes of it
    load_tile<T, W>(q + stage * tile, q_rows, p.q.s, m, step, last, p.E);
    load_tile<T, W>(dout + stage * tile, dout_rows, g.dout.s, m, step, last, p.E);
    for (int i = threadIdx.x; i < 4 * step; i += kThreads)
      copy_async<1>(stats + (stage * 4 * step + i), given + (i / step * p.B * p.H * p.M + m + i % step), m + i % step < last);
    copy_async_commit();
  };
  const auto column = [&](int j, int i) { return 8 * j + lane % 4 * 2 + i % 2; };

  float dk[W / 8][4] = {}, dv[W / 8][4] = {};
  load_tile<T, W>(k, p.k.data + (at.b * p.k.b + at.h * p.k.h), p.k.s, at.start, kOwn, end, p.E);
  load_tile<T, W>(v, p.v.data + (at.b * p.v.b + at.h * p.v.h), p.v.s, at.start, kOwn, end, p.E);
  load_queries(0, begin);
  for (int m = begin, stage = 0; m < last; m += step, stage = 1 - stage) {
    copy_async_wait<0>();
    __syncthreads();
    if (m + step < last) load_queries(1 - stage, m + step);
    float s[tiles][4] = {}, dp[tiles][4] = {};
    scores<T, W, tiles>(s, k + mine * kPitch<T, W>, q + stage * tile);
    logits<true>(s, p, at.b, at.h, row, m, end, row + 16 <= end && (!p.causal || row + 15 <= m + (p.N - p.M)));
#pragma unroll
    for (int j = 0; j < tiles; ++j)
#pragma unroll
      for (int i = 0; i < 4; ++i)
        s[j][i] = exponential<T>((s[j][i] - stats[stage * 4 * step + column(j, i)]) - stats[(stage * 4 + 1) * step + column(j, i)]);
    combine<T, W, tiles>(dv, s, dout + stage * tile);
    scores<T, W, tiles>(dp, v + mine * kPitch<T, W>, dout + stage * tile);
#pragma unroll
    for (int j = 0; j < tiles; ++j)
#pragma unroll
      for (int i = 0; i < 4; ++i)
        dp[j][i] = s[j][i] * ((dp[j][i] - stats[(stage * 4 + 2) * step + column(j, i)]) + stats[(stage * 4 + 3) * step + column(j, i)]);
    combine<T, W, tiles>(dk, dp, q + stage * tile);
  }
  const float factor[2] = {p.scale, p.scale};
  if (splits > 1) {
    const int64_t part = (at.split * p.B * p.H + at.bh) * p.N * p.E;
    store_rows<W, float>(dk, factor, g.dk_parts + part, p.E, row, p.N, p.E);
    store_rows<W, float>(dv, {1.0f, 1.0f}, g.dv_parts + part, p.E, row, p.N, p.E);
  } else {
    store_rows<W, T>(dk, factor, g.dk.data + (at.b * g.dk.b + at.h * g.dk.h), g.dk.s, row, p.N, p.E);
    store_rows<W, T>(dv, {1.0f, 1.0f}, g.dv.data + (at.b * g.dv.b + at.h * g.dv.h), g.dv.s, row, p.N, p.E);
  }
}

// y (B, H, rows, E) = parts (splits, B, H, rows, E) added from the first to the last; two elements a thread.
template <class T>
__global__ void __launch_bounds__(kThreads) add(Global<const float> parts, Rows<T> y, int64_t H, int64_t rows, int E, int64_t size, int splits) {
  const int64_t i = 2 * (int64_t{blockIdx.x} * kThreads + threadIdx.x);
  if (i >= size) return;
  float a = 0, b = 0;
#pragma unroll 4
  for (int s = 0; s < splits; ++s) {
    const auto part = load<2>(parts + (s * size + i));
    a += part[0], b += part[1];
  }
  const int64_t row = i / E, bh = row / rows;
  store(y.data + (bh / H * y.b + bh % H * y.h + row % rows * y.s + i % E), Pack<T, 2>{{from_float<T>(a), from_float<T>(b)}});
}

struct BackwardShares {
  Shares keys, queries;  // of the query gradients' and of the key gradients' blocks
};

template <class T>
BackwardShares backward_shares(int architecture, const Problem<T>& p) {
  const int by_query = kQueryGradientStep<T>, by_key = p.E > 64 ? kKeyGradientStep<T, 128> : kKeyGradientStep<T, 64>;
  return {shares(architecture, p.B * p.H * ((p.M + kOwn - 1) / kOwn), p.N, by_query),
          shares(architecture, p.B * p.H * ((p.N + kOwn - 1) / kOwn), p.M, by_key)};
}

template <class T, int W>
void run_backward(const Launcher& launch, const Problem<T>& p, const Backward<T>& g, BackwardShares by) {
  const int64_t heads = p.B * p.H;
  const auto sum = [&](Global<const float> parts, const Rows<T>& y, int rows, int splits) {
    const int64_t size = heads * rows * p.E;
    launch(add<T>, grid((size + 2 * kThreads - 1) / (2 * kThreads)), kThreads, 0, parts, y, p.H, int64_t{rows}, p.E, size, splits);
  };
  const int64_t query_blocks = heads * ((p.M + kOwn - 1) / kOwn), key_blocks = heads * ((p.N + kOwn - 1) / kOwn);
  if (query_blocks > 0) {
    launch(statistics<T, W>, grid(query_blocks), kThreads, 2 * arena_bytes<T>(kOwn * kPitch<T, W>), p, g);
    launch(query_gradients<T, W>, grid(query_blocks * by.keys.splits), kThreads, backward_shared<T, W>(kQueryGradientStep<T>), p, g, by.keys.splits,
           by.keys.per);
    if (by.keys.splits > 1) sum(g.dq_parts, g.dq, p.M, by.keys.splits);
  }
  if (key_blocks > 0) {
    constexpr int step = kKeyGradientStep<T, W>;
    launch(key_gradients<T, W>, grid(key_blocks * by.queries.splits), kThreads, backward_shared<T, W>(step) + arena_bytes<float>(8 * step), p, g,
           by.queries.splits, by.queries.per);
    if (by.queries.splits > 1) sum(g.dk_parts, g.dk, p.N, by.queries.splits), sum(g.dv_parts, g.dv, p.N, by.queries.splits);
  }
}

// 1 <= E <= 128, of float 64: both accumulators of a wider head and the halves of its operands are more than the registers hold.
template <class T>
void run_backward(const Launcher& launch, const Problem<T>& p, const Backward<T>& g, BackwardShares by) {
  if (p.E <= 32) run_backward<T, 32>(launch, p, g, by);
  else if (p.E <= 64) run_backward<T, 64>(launch, p, g, by);
  else if constexpr (kNatural<T>) throw std::runtime_error("attention_backward: heads wider than 64 in float32 are not for this kernel");
  else run_backward<T, 128>(launch, p, g, by);
}

}  // namespace fastdiff::attention
