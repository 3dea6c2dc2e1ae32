// Attention on tensor cores: what the forward and the gradients share.
//
// A block owns 64 rows of one side, 16 a warp, and steps through the other side's rows, which arrive in one half of a double buffer while it
// computes on the other. Products of a warp: of its 16 rows with a tile's rows (scores), and of scores, as they lie in registers, with a tile.
// Scores are in units of log 2 for half precision; natural for float, where the change of units would cost a rounding of the whole logit.
#pragma once

#include <algorithm>
#include <cmath>
#include <stdexcept>

#include "common/mma.cuh"
#include "common/pipeline.cuh"

namespace fastdiff::attention {

inline constexpr int kThreads = 128, kOwn = 64;
inline constexpr float kLog2E = 1.4426950408889634f, kLow = 2048.0f;  // as in op.h: what rounding leaves over stands 2^11 higher
inline constexpr double kLn2 = 0.6931471805599453;

template <class T>
constexpr bool kNatural = sizeof(T) == 4;
// Elements from row to row of a tile: 16 bytes more than the row, so that eight rows lie in different banks.
template <class T, int W>
constexpr int kPitch = W + 16 / static_cast<int>(sizeof(T));

// (B, H, rows, E) memory, last stride 1, rows 16-byte aligned.
template <class T>
struct Rows {
  Global<T> data;
  int64_t b, h, s;
};

template <class T>
struct Problem {
  int64_t B, H;
  int M, N, E;
  Rows<const T> q, k, v;
  Global<const T> bias;  // or null; broadcast axes have stride 0
  int64_t bias_stride[4];
  Global<const int64_t> lengths;  // or null
  int64_t lengths_stride;
  bool causal;
  float scale;
};

// How a side is shared: `splits` blocks step through `per` of its rows each. From sizes and architecture alone, so that the bits are too.
struct Shares {
  int splits, per;
};

inline Shares shares(int architecture, int64_t blocks, int64_t length, int step) {
  const int64_t fill = architecture >= 100 ? 148 : architecture >= 90 ? 132 : 108, least = 4;
  const int64_t steps = (length + step - 1) / step;
  const int64_t splits = blocks >= fill ? 1 : std::max<int64_t>(1, std::min((2 * fill + blocks - 1) / std::max<int64_t>(blocks, 1), steps / least));
  const int64_t per = std::max<int64_t>(1, (steps + splits - 1) / splits) * step;
  return {static_cast<int>(std::max<int64_t>(1, (length + per - 1) / per)), static_cast<int>(per)};
}

inline unsigned grid(int64_t blocks) {
  if (blocks > INT32_MAX) throw std::runtime_error("attention: too many blocks for one launch");
  return static_cast<unsigned>(blocks);
}

// A block's place on the grid B H splits blocks, blocks of rows innermost: neighbours step through the same rows.
struct Place {
  int start, split;
  int64_t bh, b, h;
  __device__ Place(int rows, int splits, int64_t H) {
    const unsigned blocks = (rows + kOwn - 1) / kOwn;
    start = static_cast<int>(blockIdx.x % blocks) * kOwn, split = static_cast<int>(blockIdx.x / blocks % splits);
    bh = blockIdx.x / blocks / splits, b = bh / H, h = bh % H;
  }
};

template <class T>
__device__ inline float exponential(float x) { return exp2_approx(kNatural<T> ? x * kLog2E : x); }

// Rows [first, first + count) of E elements into a tile; zeros from row `end` and column E on.
template <class T, int W>
__device__ inline void load_tile(Shared<T> tile, Global<const T> rows, int64_t stride, int first, int count, int end, int E) {
  constexpr int piece = 16 / sizeof(T), pieces = W / piece;
  for (int i = threadIdx.x; i < count * pieces; i += kThreads) {
    const int r = i / pieces, c = i % pieces * piece;
    copy_async<piece>(tile + r * kPitch<T, W> + c, rows + ((first + int64_t{r}) * stride + c), first + r < end && c < E);
  }
}

// A float as the sum of two tf32; three products of such pairs are as exact as float's.
__device__ inline void split(float x, uint32_t& high, uint32_t& low) {
  high = to_tf32(x);
  low = to_tf32(x - __uint_as_float(high));
}

// d += a b for one 16 x 8 x 8 product of floats. Tensor cores cut sums off instead of rounding them: each product starts from zero.
__device__ inline void multiply(float (&d)[4], const float (&a)[4], const float (&b)[2]) {
  uint32_t a_high[4], a_low[4], b_high[2], b_low[2];
#pragma unroll
  for (int i = 0; i < 4; ++i) split(a[i], a_high[i], a_low[i]);
#pragma unroll
  for (int i = 0; i < 2; ++i) split(b[i], b_high[i], b_low[i]);
  float product[4] = {};
  mma_tf32(product, a_low, b_high);
  mma_tf32(product, a_high, b_low);
  mma_tf32(product, a_high, b_high);
#pragma unroll
  for (int i = 0; i < 4; ++i) d[i] += product[i];
}

// acc += a b^T: 16 rows of a, 8 tiles rows of b, each W wide.
template <class T, int W, int tiles>
__device__ inline void scores(float (&acc)[tiles][4], Shared<T> a, Shared<T> b) {
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  constexpr int pitch = kPitch<T, W>;
  if constexpr (kNatural<T>) {
#pragma unroll 1
    for (int k = 0; k < W; k += 8) {
      const float x[4] = {a[g * pitch + k + t], a[(g + 8) * pitch + k + t], a[g * pitch + k + t + 4], a[(g + 8) * pitch + k + t + 4]};
#pragma unroll
      for (int j = 0; j < tiles; ++j) {
        const float y[2] = {b[(8 * j + g) * pitch + k + t], b[(8 * j + g) * pitch + k + t + 4]};
        multiply(acc[j], x, y);
      }
    }
  } else {
#pragma unroll
    for (int k = 0; k < W; k += 16) {
      uint32_t x[4];
      load_matrices(x, a + lane % 16 * pitch + k + lane / 16 * 8);
#pragma unroll
      for (int j = 0; j < tiles; j += 2) {
        uint32_t y[4];
        load_matrices(y, b + (8 * j + lane % 8 + lane / 16 * 8) * pitch + k + lane / 8 % 2 * 8);
        mma<T>(acc[j], x, {y[0], y[1]});
        mma<T>(acc[j + 1], x, {y[2], y[3]});
      }
    }
  }
}

// acc += p b: p 16 x 8 tiles as `scores` leaves it, rounded to T; b of 8 tiles rows.
template <class T, int W, int tiles>
__device__ inline void combine(float (&acc)[W / 8][4], const float (&p)[tiles][4], Shared<T> b) {
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  constexpr int pitch = kPitch<T, W>;
  if constexpr (kNatural<T>) {
#pragma unroll
    for (int k = 0; k < tiles; ++k) {  // rows 2 t and 2 t + 1 of b stand where mma wants t and t + 4: so lie the columns of p
      const float x[4] = {p[k][0], p[k][2], p[k][1], p[k][3]};
#pragma unroll
      for (int j = 0; j < W / 8; ++j) {
        const float y[2] = {b[(8 * k + 2 * t) * pitch + 8 * j + g], b[(8 * k + 2 * t + 1) * pitch + 8 * j + g]};
        multiply(acc[j], x, y);
      }
    }
  } else {
#pragma unroll
    for (int k = 0; k < tiles; k += 2) {
      const uint32_t x[4] = {pair<T>(p[k][0], p[k][1]), pair<T>(p[k][2], p[k][3]), pair<T>(p[k + 1][0], p[k + 1][1]),
                             pair<T>(p[k + 1][2], p[k + 1][3])};
#pragma unroll
      for (int j = 0; j < W / 8; j += 2) {
        uint32_t y[4];
        load_matrices_transposed(y, b + (8 * k + lane % 16) * pitch + 8 * j + lane / 16 * 8);
        mma<T>(acc[j], x, {y[0], y[1]});
        mma<T>(acc[j + 1], x, {y[2], y[3]});
      }
    }
  }
}

// A score's query and key: rows are queries (row + g, row + g + 8) and columns keys, or the other way round.
template <bool keys_are_rows>
struct Where {
  int m, n;
  __device__ Where(int row, int column, int j, int i) {
    const int lane = threadIdx.x % 32, r = row + lane / 4 + i / 2 * 8, c = column + 8 * j + lane % 4 * 2 + i % 2;
    m = keys_are_rows ? c : r, n = keys_are_rows ? r : c;
  }
};

// Products become logits: scaled, with their bias, -inf where the query may not see the key. whole: all of the block may be seen.
template <bool keys_are_rows, class T, int tiles>
__device__ inline void logits(float (&s)[tiles][4], const Problem<T>& p, int64_t b, int64_t h, int row, int column, int end, bool whole) {
  const float scale = kNatural<T> ? p.scale : p.scale * kLog2E;
  const auto bias = p.bias + (b * p.bias_stride[0] + h * p.bias_stride[1]);
#pragma unroll
  for (int j = 0; j < tiles; ++j)
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const Where<keys_are_rows> at(row, column, j, i);
      float x = s[j][i] * scale;
      if (p.bias && at.m < p.M && at.n < p.N) {
        const float y = to_float(bias[at.m * p.bias_stride[2] + at.n * p.bias_stride[3]]);
        x += kNatural<T> ? y : y * kLog2E;
      }
      if (!whole && (at.n >= end || (p.causal && at.n > at.m + (p.N - p.M)))) x = -INFINITY;
      s[j][i] = x;
    }
}

// Keys [0, last) that batch b has and that some query below m sees.
template <class T>
__device__ inline int keys_end(const Problem<T>& p, int64_t b, int m) {
  int end = p.N;
  if (p.lengths) end = min(end, static_cast<int>(p.lengths[b * p.lengths_stride]));
  return p.causal ? min(end, m + (p.N - p.M)) : end;
}

// y's natural log-sum-exp of the greatest logit and the sum of exponentials relative to it, as two floats.
template <class T>
__device__ inline void log_sum_exp(float top, float total, float* high, float* low) {
  const double log = log2f(total), y = kNatural<T> ? top + log * kLn2 : (top + log) * kLn2;
  *high = static_cast<float>(y);
  *low = fabsf(*high) < INFINITY ? static_cast<float>(y - *high) : 0.0f;
}

template <class T>
__device__ inline float left_over(float y) {
  const float low = (y - to_float(from_float<T>(y))) * kLow;
  return fabsf(low) < INFINITY ? low : 0.0f;
}

// A warp's 16 rows, W wide, from row `row` on: columns below E of rows below `end`, times factor[i / 2].
template <int W, class T>
__device__ inline void store_rows(const float (&acc)[W / 8][4], const float (&factor)[2], Global<T> out, int64_t stride, int row, int end, int E) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int at = row + lane / 4 + 8 * r;
    if (at >= end) continue;
#pragma unroll
    for (int j = 0; j < W / 8; ++j) {
      const int c = 8 * j + lane % 4 * 2;
      if (c >= E) continue;
      store(out + (at * stride + c), Pack<T, 2>{{from_float<T>(acc[j][2 * r] * factor[r]), from_float<T>(acc[j][2 * r + 1] * factor[r])}});
    }
  }
}

}  // namespace fastdiff::attention
