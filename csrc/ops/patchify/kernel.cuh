// Elements between an image of any strides and contiguous rows of patches.
#pragma once

#include "common/device.cuh"
#include "ops/patchify/op.h"

namespace fastdiff::patchify {

// One thread an element of the contiguous side, in its order: that side is coalesced, the other moves in runs of a patch row.
template <class T, bool ToTokens>
__global__ void move(Shape s, Global<T> image, Global<T> tokens, int64_t n) {
  const int64_t step = int64_t{gridDim.x} * blockDim.x;
  for (int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < n; i += step) {
    int64_t rest = i, c, in[3], g[3];
    if (ToTokens) {
      if (s.channels_last) c = rest % s.channels, rest /= s.channels;
      for (int a = 2; a >= 0; --a) in[a] = rest % s.patch[a], rest /= s.patch[a];
      if (!s.channels_last) c = rest % s.channels, rest /= s.channels;
      for (int a = 2; a >= 0; --a) g[a] = rest % s.grid[a], rest /= s.grid[a];
    } else {
      for (int a = 2; a >= 0; --a) {
        const int64_t size = s.grid[a] * s.patch[a], x = rest % size;
        rest /= size, g[a] = x / s.patch[a], in[a] = x % s.patch[a];
      }
      c = rest % s.channels, rest /= s.channels;
    }
    const int64_t b = rest;
    int64_t image_at = b * s.stride[0] + c * s.stride[1];
    for (int a = 0; a < 3; ++a) image_at += (g[a] * s.patch[a] + in[a]) * s.stride[2 + a];
    const int64_t volume = s.patch[0] * s.patch[1] * s.patch[2];
    const int64_t pixel = (in[0] * s.patch[1] + in[1]) * s.patch[2] + in[2];
    const int64_t token = ((b * s.grid[0] + g[0]) * s.grid[1] + g[1]) * s.grid[2] + g[2];
    const int64_t token_at = token * volume * s.channels + (s.channels_last ? pixel * s.channels + c : c * volume + pixel);
    if (ToTokens) tokens[token_at] = image[image_at];
    else image[image_at] = tokens[token_at];
  }
}

template <class T, bool ToTokens>
void run(const Launcher& launch, const Shape& s, Global<T> image, Global<T> tokens, int64_t n) {
  constexpr int kThreads = 256;
  const int64_t blocks = (n + kThreads - 1) / kThreads;
  launch(move<T, ToTokens>, blocks < 1 << 20 ? blocks : 1 << 20, kThreads, 0, s, image, tokens, n);
}

}  // namespace fastdiff::patchify
