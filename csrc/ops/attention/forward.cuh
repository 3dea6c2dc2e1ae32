// Attention forward on tensor cores. Few queries and many keys: blocks share the keys, and a second kernel merges their parts in order.
#pragma once

#include "ops/attention/kernel.cuh"

namespace fastdiff::attention {

template <class T>
struct ForwardOut {
  Rows<T> out;
  Global<T> low;          // contiguous (B, H, M, E), or null: what rounding left over of out
  Global<float> lse[2];   // contiguous (B, H, M): rounded, and what rounding left over
  Global<float> parts, tops, totals;  // contiguous (splits, B, H, M, E) and (splits, B, H, M), where blocks share the keys: parts unnormalised
};

template <class T>
constexpr int kKeyStep = kNatural<T> ? 32 : 64;

template <class T, int W>
constexpr size_t forward_shared() { return arena_bytes<T>(kOwn * kPitch<T, W>) + 4 * arena_bytes<T>(kKeyStep<T> * kPitch<T, W>); }

template <class T, int W>
__global__ void __launch_bounds__(kThreads, kNatural<T> ? 0 : W == 128 ? 2 : 3) forward(Problem<T> p, ForwardOut<T> o, int splits, int per) {
  constexpr int step = kKeyStep<T>, tiles = step / 8, tile = step * kPitch<T, W>;
  Arena arena;
  const Shared<T> q = arena.take<T>(kOwn * kPitch<T, W>), k = arena.take<T>(2 * tile), v = arena.take<T>(2 * tile);
  const Place at(p.M, splits, p.H);
  const int lane = threadIdx.x % 32, mine = threadIdx.x / 32 * 16, row = at.start + mine;
  const auto q_rows = p.q.data + (at.b * p.q.b + at.h * p.q.h), k_rows = p.k.data + (at.b * p.k.b + at.h * p.k.h),
             v_rows = p.v.data + (at.b * p.v.b + at.h * p.v.h);
  const int begin = at.split * per, end = min(begin + per, keys_end(p, at.b, at.start + kOwn));

  float acc[W / 8][4] = {}, top[2] = {-INFINITY, -INFINITY}, total[2] = {};
  load_tile<T, W>(q, q_rows, p.q.s, at.start, kOwn, p.M, p.E);
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
    float s[tiles][4] = {};
    scores<T, W, tiles>(s, q + mine * kPitch<T, W>, k + stage * tile);
    logits<false>(s, p, at.b, at.h, row, n, end, n + step <= end && (!p.causal || n + step - 1 <= row + (p.N - p.M)));
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float most = top[r];
#pragma unroll
      for (int j = 0; j < tiles; ++j) most = fmaxf(most, fmaxf(s[j][2 * r], s[j][2 * r + 1]));
      most = fmaxf(most, __shfl_xor_sync(0xffffffff, most, 1));
      most = fmaxf(most, __shfl_xor_sync(0xffffffff, most, 2));
      const float shift = most == -INFINITY ? 0.0f : most, fade = exponential<T>(top[r] - shift);
      top[r] = most, total[r] *= fade;
#pragma unroll
      for (int j = 0; j < tiles; ++j)
#pragma unroll
        for (int i = 2 * r; i < 2 * r + 2; ++i) total[r] += s[j][i] = exponential<T>(s[j][i] - shift);
#pragma unroll
      for (int j = 0; j < W / 8; ++j) acc[j][2 * r] *= fade, acc[j][2 * r + 1] *= fade;
    }
    combine<T, W, tiles>(acc, s, v + stage * tile);
  }

  float factor[2] = {1.0f, 1.0f};
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    total[r] += __shfl_xor_sync(0xffffffff, total[r], 1);
    total[r] += __shfl_xor_sync(0xffffffff, total[r], 2);
    const int m = row + lane / 4 + 8 * r;
    if (splits == 1) factor[r] = total[r] == 0 ? 0.0f : 1.0f / total[r];
    if (lane % 4 || m >= p.M) continue;
    if (splits > 1) {
      const int64_t i = (at.split * p.B * p.H + at.bh) * p.M + m;
      o.tops[i] = top[r], o.totals[i] = total[r];
    } else {
      float high, low;
      log_sum_exp<T>(top[r], total[r], &high, &low);
      o.lse[0][at.bh * p.M + m] = high, o.lse[1][at.bh * p.M + m] = low;
    }
  }
  if (splits > 1) {
    store_rows<W, float>(acc, factor, o.parts + (at.split * p.B * p.H + at.bh) * p.M * p.E, p.E, row, p.M, p.E);
    return;
  }
  store_rows<W, T>(acc, factor, o.out.data + (at.b * o.out.b + at.h * o.out.h), o.out.s, row, p.M, p.E);
  if (!o.low) return;
#pragma unroll
  for (int j = 0; j < W / 8; ++j)
#pragma unroll
    for (int i = 0; i < 4; ++i) acc[j][i] = left_over<T>(acc[j][i] * factor[i / 2]);
  store_rows<W, T>(acc, {1.0f, 1.0f}, o.low + at.bh * p.M * p.E, p.E, row, p.M, p.E);
}

// out = sum_s w_s part_s / total, total = sum_s w_s total_s, w_s = exp(top_s - top), first split to last. A warp a row.
template <class T>
__global__ void __launch_bounds__(kThreads) merge(Problem<T> p, ForwardOut<T> o, int splits) {
  const int64_t rows = p.B * p.H * p.M, i = int64_t{blockIdx.x} * (kThreads / 32) + threadIdx.x / 32;
  if (i >= rows) return;
  const int lane = threadIdx.x % 32;
  float top = -INFINITY, total = 0;
  for (int s = lane; s < splits; s += 32) top = fmaxf(top, o.tops[s * rows + i]);
#pragma unroll
  for (int x = 16; x > 0; x /= 2) top = fmaxf(top, __shfl_xor_sync(0xffffffff, top, x));
  const float shift = top == -INFINITY ? 0.0f : top;
  for (int s = lane; s < splits; s += 32) total += o.totals[s * rows + i] * exponential<T>(o.tops[s * rows + i] - shift);
#pragma unroll
  for (int x = 16; x > 0; x /= 2) total += __shfl_xor_sync(0xffffffff, total, x);
  if (lane == 0) {
    float high, low;
    log_sum_exp<T>(top, total, &high, &low);
    o.lse[0][i] = high, o.lse[1][i] = low;
  }
  const float factor = total == 0 ? 0.0f : 1.0f / total;
  const int64_t bh = i / p.M;
  const auto out = o.out.data + (bh / p.H * o.out.b + bh % p.H * o.out.h + i % p.M * o.out.s);
  for (int c = 2 * lane; c < p.E; c += 64) {
    float x = 0, y = 0;
#pragma unroll 4
    for (int s = 0; s < splits; ++s) {
      const float weight = exponential<T>(o.tops[s * rows + i] - shift);
      const auto part = load<2>(o.parts + ((s * rows + i) * p.E + c));
      x += weight * part[0], y += weight * part[1];
    }
    x *= factor, y *= factor;
    store(out + c, Pack<T, 2>{{from_float<T>(x), from_float<T>(y)}});
    if (o.low) store(o.low + (i * p.E + c), Pack<T, 2>{{from_float<T>(left_over<T>(x)), from_float<T>(left_over<T>(y))}});
  }
}

template <class T>
Shares forward_shares(int architecture, const Problem<T>& p) {
  return shares(architecture, p.B * p.H * ((p.M + kOwn - 1) / kOwn), p.N, kKeyStep<T>);
}

template <class T, int W>
void run_forward(const Launcher& launch, const Problem<T>& p, const ForwardOut<T>& o, Shares by) {
  launch(forward<T, W>, grid(p.B * p.H * by.splits * ((p.M + kOwn - 1) / kOwn)), kThreads, forward_shared<T, W>(), p, o, by.splits, by.per);
  if (by.splits > 1) launch(merge<T>, grid((p.B * p.H * p.M + kThreads / 32 - 1) / (kThreads / 32)), kThreads, 0, p, o, by.splits);
}

// B H M > 0, 1 <= E <= 128, rows of whole 16 bytes.
template <class T>
void run_forward(const Launcher& launch, const Problem<T>& p, const ForwardOut<T>& o, Shares by) {
  if (p.E <= 32) run_forward<T, 32>(launch, p, o, by);
  else if (p.E <= 64) run_forward<T, 64>(launch, p, o, by);
  else run_forward<T, 128>(launch, p, o, by);
}

}  // namespace fastdiff::attention
