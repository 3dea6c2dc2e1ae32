#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>

#include "common/launch.cuh"
#include "ops/patchify/shape.h"

namespace fastdiff::patchify {
namespace {

// One thread an element of the contiguous side, in its order: that side is coalesced, the other moves in runs of a patch row.
template <class T, bool ToTokens>
__global__ void move(Shape s, T* __restrict__ image, T* __restrict__ tokens, int64_t n) {
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

template <bool ToTokens>
void launch(const char* op, const Tensor& image, const Tensor& tokens, const Shape& s) {
  const int64_t n = tokens.numel();
  if (n == 0) return;
  constexpr int kThreads = 256;
  const auto blocks = static_cast<unsigned>(std::min<int64_t>((n + kThreads - 1) / kThreads, 1 << 20));
  on_stream_of(tokens, op, [&](cudaStream_t stream) {
    if (tokens.element_size() == 4)
      move<uint32_t, ToTokens><<<blocks, kThreads, 0, stream>>>(s, static_cast<uint32_t*>(image.data_ptr()), static_cast<uint32_t*>(tokens.data_ptr()), n);
    else
      move<uint16_t, ToTokens><<<blocks, kThreads, 0, stream>>>(s, static_cast<uint16_t*>(image.data_ptr()), static_cast<uint16_t*>(tokens.data_ptr()), n);
  });
}

void patchify(const Tensor& x, std::vector<int64_t> patch, std::string order, const Tensor& out) {
  launch<true>("patchify", x, out, shape_of(x, patch, order));
}

void unpatchify(const Tensor& tokens, std::vector<int64_t> patch, std::vector<int64_t>, std::string order, const Tensor& out) {
  launch<false>("unpatchify", out, torch::stable::contiguous(tokens), shape_of(out, patch, order));
}

}  // namespace
}  // namespace fastdiff::patchify

STABLE_TORCH_LIBRARY_FRAGMENT(fastdiff_cuda, m) {
  m.def("patchify(Tensor x, int[] patch, str order, Tensor(a!) out) -> ()");
  m.def("unpatchify(Tensor tokens, int[] patch, int[] grid, str order, Tensor(a!) out) -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(fastdiff_cuda, CUDA, m) {
  m.impl("patchify", TORCH_BOX(&fastdiff::patchify::patchify));
  m.impl("unpatchify", TORCH_BOX(&fastdiff::patchify::unpatchify));
}
