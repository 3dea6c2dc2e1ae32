#include "ops/patchify/kernel.cuh"

#include "bind.h"

using namespace fastdiff::patchify;
using fastdiff::emulation::Array, fastdiff::emulation::Ints;

template <class T>
static void move(bool to_tokens, uint64_t seed, const Shape& s, Array image, int64_t offset, Array tokens) {
  const fastdiff::Launcher launch{seed};
  if (to_tokens) run<T, true>(launch, s, image.as<T>() + offset, tokens.as<T>(), tokens.size);
  else run<T, false>(launch, s, image.as<T>() + offset, tokens.as<T>(), tokens.size);
}

BIND(patchify, +[](bool to_tokens, uint64_t seed, Array image, int64_t offset, Ints stride, Array tokens, Ints grid, Ints patch, Ints batch_channels,
                   bool channels_last) {
  Shape s{batch_channels[0], batch_channels[1], {}, {}, {}, channels_last};
  std::copy(grid.begin(), grid.end(), s.grid), std::copy(patch.begin(), patch.end(), s.patch), std::copy(stride.begin(), stride.end(), s.stride);
  if (image.itemsize == 4) move<uint32_t>(to_tokens, seed, s, image, offset, tokens);
  else move<uint16_t>(to_tokens, seed, s, image, offset, tokens);
})
