// Between an image and rows of patches in scratch. Include from *.simd.cpp alone.
#pragma once

#include "common/gemm.h"
#include "ops/patch_embed/op.h"

namespace fastdiff::patch_embed::FASTDIFF_ISA {
namespace {

using namespace fastdiff::FASTDIFF_ISA;

// Elements of `q` pixels of `patches` neighbours, between a row of the image and their places in rows of patches.
template <class T, bool ToRows, int q>
inline void runs(int64_t patches, T* image, T* rows, int64_t stride) {
  for (int64_t g = 0; g < patches; ++g) {
    if constexpr (ToRows) std::memcpy(rows + g * stride, image + g * q, q * sizeof(T));
    else std::memcpy(image + g * q, rows + g * stride, q * sizeof(T));
  }
}

template <class T, bool ToRows>
inline void runs(int64_t patches, int64_t q, T* image, int64_t pixel, T* rows, int64_t stride) {
  if (pixel == 1) switch (q) {
    case 2: return runs<T, ToRows, 2>(patches, image, rows, stride);
    case 4: return runs<T, ToRows, 4>(patches, image, rows, stride);
    case 8: return runs<T, ToRows, 8>(patches, image, rows, stride);
    case 16: return runs<T, ToRows, 16>(patches, image, rows, stride);
  }
  for (int64_t g = 0; g < patches; ++g)
    for (int64_t j = 0; j < q; ++j) {
      if constexpr (ToRows) rows[g * stride + j] = image[(g * q + j) * pixel];
      else image[(g * q + j) * pixel] = rows[g * stride + j];
    }
}

// Patches [first, first + count), counted over all samples, between the image and rows of `stride` elements; of `channels` channels from c0 on.
template <class T, bool ToRows>
inline void move(const Shape& s, int64_t c0, int64_t channels, T* image, int64_t first, int64_t count, T* rows, int64_t stride) {
  const auto& p = s.patch;
  for (int64_t end = first + count, n; first < end; first += n, rows += n * stride) {
    const int64_t g2 = first % s.grid[2], rest = first / s.grid[2], g1 = rest % s.grid[1], g0 = rest / s.grid[1] % s.grid[0];
    n = least(end - first, s.grid[2] - g2);
    const int64_t b = rest / s.grid[1] / s.grid[0];
    T* corner = image + b * s.stride[0] + g0 * p[0] * s.stride[2] + g1 * p[1] * s.stride[3] + g2 * p[2] * s.stride[4];
    T* row = rows;
    for (int64_t c = c0; c < c0 + channels; ++c)
      for (int64_t i0 = 0; i0 < p[0]; ++i0)
        for (int64_t i1 = 0; i1 < p[1]; ++i1, row += p[2])
          runs<T, ToRows>(n, p[2], corner + c * s.stride[1] + i0 * s.stride[2] + i1 * s.stride[3], s.stride[4], row, stride);
  }
}

}  // namespace
}  // namespace fastdiff::patch_embed::FASTDIFF_ISA
