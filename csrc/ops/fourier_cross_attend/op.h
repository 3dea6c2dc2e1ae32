// Attention of queries over the pixels of a grid, where the score of a pixel is that of its row, of its column and of a few planes.
#pragma once

#include <cstdint>

#include "common/isa.h"

namespace fastdiff::fourier_cross_attend {

// Contiguous float32. Score of pixel (y, x): (rows[y] + columns[x]) planes[K][y][x] + sum_k u[k] planes[k][y][x].
struct Problem {
  int64_t B, H, M, K, R, W;
  const float *u, *rows, *columns, *planes;  // (B, H, M, K), (B, H, M, R), (B, H, M, W), (B, K + 1, R, W)

  int64_t queries() const { return B * H * M; }
  const float* plane(int64_t b, int64_t k, int64_t y) const { return planes + ((b * (K + 1) + k) * R + y) * W; }
};

struct Sums {
  float *sums, *row_sums, *column_sums;  // (B, H, M, K): of P planes[k]; (B, H, M, R) and (B, H, M, W): of P planes[K]
  float *lse, *lse_low;                  // (B, H, M)
};

struct Gradient {
  Sums results;
  const float *sums, *row_sums, *column_sums;  // of the results
  float* delta;                                // (B, H, M): sum of P dP, left by backward for backward_planes
  float *u, *rows, *columns;                   // of the arguments
  float* planes;                               // or null
};

struct Kernels {
  int64_t (*scratch)(const Problem&, int64_t queries);  // floats, for an item of that many queries
  // Queries [begin, end) of the B H M, which all belong to one sample.
  void (*forward)(const Problem&, const Sums&, int64_t begin, int64_t end, float* scratch);
  void (*backward)(const Problem&, const Gradient&, int64_t begin, int64_t end, float* scratch);
  // The planes' gradient in rows [begin, end) of the B R.
  void (*backward_planes)(const Problem&, const Gradient&, int64_t begin, int64_t end);
};

FASTDIFF_PER_ISA(Kernels, kernels)

}  // namespace fastdiff::fourier_cross_attend
