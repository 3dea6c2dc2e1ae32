#include "ops/patchify/kernel.cuh"

#include "bind.h"

using namespace fastdiff::patchify;
using fastdiff::emulation::Array, fastdiff::emulation::Ints;

template <class T>
static void move(bool to_tokens, uint64_t seed, const Shape& s, Array image, int64_t offset, Array tokens, fastdiff::emulation::Counts* counts = nullptr) {
  const fastdiff::Launcher launch{seed, 80, counts};
  const Plan p = plan_of(s, sizeof(T), static_cast<T*>(image.data) + offset, tokens.data);
  if (to_tokens) run<T, true>(launch, s, p, image.as<T>() + offset, tokens.as<T>());
  else run<T, false>(launch, s, p, image.as<T>() + offset, tokens.as<T>());
}

static Shape shape(const Ints& stride, const Ints& grid, const Ints& patch, int64_t batch, int64_t channels, bool channels_last, bool columns) {
  Shape s{batch, channels, {}, {}, {}, channels_last, columns};
  std::copy(grid.begin(), grid.end(), s.grid), std::copy(patch.begin(), patch.end(), s.patch), std::copy(stride.begin(), stride.end(), s.stride);
  return s;
}

// offset, stride: of the image in its array, in elements.
BIND(patchify, +[](bool to_tokens, uint64_t seed, Array image, int64_t offset, Array tokens, Ints stride, Ints grid, Ints patch, int64_t batch,
                   int64_t channels, bool channels_last, bool columns) {
  const Shape s = shape(stride, grid, patch, batch, channels, channels_last, columns);
  if (image.itemsize == 4) move<uint32_t>(to_tokens, seed, s, image, offset, tokens);
  else move<uint16_t>(to_tokens, seed, s, image, offset, tokens);
})

// counts: wavefronts and sectors with their least, each way.
BIND(patchify_counts, +[](Array counts, Array image, Array tokens, Ints stride, Ints grid, Ints patch, int64_t batch, int64_t channels,
                          bool channels_last, bool columns) {
  const Shape s = shape(stride, grid, patch, batch, channels, channels_last, columns);
  for (int way = 0; way < 2; ++way) {
    auto* into = static_cast<fastdiff::emulation::Counts*>(counts.data) + way;
    if (image.itemsize == 4) move<uint32_t>(way == 0, 0, s, image, 0, tokens, into);
    else move<uint16_t>(way == 0, 0, s, image, 0, tokens, into);
  }
})

// widths: elements of one access, on the image's and on the tokens' side, and the tile: patches of a row, rows of patches.
BIND(patchify_plan, +[](Array out, int64_t size, Array image, Array tokens, Ints stride, Ints grid, Ints patch, int64_t batch, int64_t channels,
                        bool channels_last, bool columns) {
  const Plan p = plan_of(shape(stride, grid, patch, batch, channels, channels_last, columns), size, image.data, tokens.data);
  const int64_t facts[] = {p.image_wide, p.tokens_wide, p.part, p.group};
  std::copy(std::begin(facts), std::end(facts), static_cast<int64_t*>(out.data));
})
