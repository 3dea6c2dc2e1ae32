// Products whose rows are patches of an image: patches W^T, and tokens W^T put back as patches. Patches lie in scratch alone.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "common/isa.h"

namespace fastdiff::patch_embed {

// A 1-D to 3-D image in patches, padded to 3-D with leading axes of size 1. A patch's elements are (channel, axes of space).
struct Shape {
  int64_t batch, channels;
  int64_t grid[3], patch[3];
  int64_t stride[5];  // in elements: batch, channel, three of space
  int64_t tokens() const { return grid[0] * grid[1] * grid[2]; }
};

// Element (n, k) at n * row + k * column; one of the two is 1.
struct Weight {
  const void* data;
  int64_t row, column;
};

// A (M, K) W^T; M tokens over all samples.
struct Problem {
  Type type;
  Shape shape;
  int64_t M, N, K;
  Weight weight;         // (N, K)
  const void* bias;      // (N,), or null
  const void* position;  // (tokens of a sample, N) contiguous, or null
  bool past_caches;      // y is written past the caches: its rows are whole cache lines then
};

constexpr int64_t kRowsAtMost = 96;

// An item is `rows` neighbouring tokens, at most kRowsAtMost. W is packed once for all items, by blocks of `columns` of its rows.
struct Plan {
  int64_t rows, columns;
  int64_t items(const Problem& p) const { return ceil_div(p.M, rows); }
  int64_t packs(const Problem& p) const { return ceil_div(p.N, columns); }
  static int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
};

struct Forward {
  int64_t (*scratch)(const Problem&, const Plan&);  // floats an item needs
  int64_t (*packed)(const Problem&, const Plan&);   // floats W takes
  int64_t (*padded)(int64_t n);
  // scratch: columns x padded(K) floats.
  void (*pack)(const Problem&, const Plan&, int64_t block, float* packed, float* scratch);
  // y (M, N) = patches of the image (any strides) W^T + bias + position.
  void (*embed)(const Problem&, const Plan&, const void* image, const float* packed, void* y, int64_t item, float* scratch);
  // Image patches = tokens (M, K) W^T + bias.
  void (*project)(const Problem&, const Plan&, const void* tokens, const float* packed, void* image, int64_t item, float* scratch);
};

// The gradient of W and its bias: patches^T tokens, and the sums of the tokens and of the patches.
struct Gradient {
  Type type;
  Shape shape;
  int64_t M, N, K;  // tokens over all samples, their width, a patch's
  const void *tokens, *image;
  bool by_tokens;  // (N, K) is wanted, else (K, N)
  void *weight, *token_sums, *patch_sums;
};

// An item makes a block of patches^T tokens, of some channels of the patches and `columns` of the tokens, over a slab of `tokens` tokens, `depth`
// at a time. Slabs are added up in their order.
struct GradientPlan {
  int64_t tokens, depth, channels, columns;
  int64_t slabs(const Gradient& p) const { return Plan::ceil_div(p.M, tokens); }
  int64_t row_blocks(const Gradient& p) const { return blocks(p.shape.channels, channels); }
  int64_t column_blocks(const Gradient& p) const { return blocks(p.N, columns); }
  int64_t items(const Gradient& p) const { return slabs(p) * row_blocks(p) * column_blocks(p); }
  // The last pass writes so many columns at a time.
  static constexpr int64_t kStrip = 64;
  int64_t strips(const Gradient& p) const { return blocks(p.N, kStrip); }
  static int64_t blocks(int64_t n, int64_t each) { return n ? Plan::ceil_div(n, each) : 1; }  // where there is nothing, the other sums are left
};

struct Backward {
  int64_t (*partial)(const Gradient&, const GradientPlan&);  // floats of a slab's sums
  int64_t (*scratch)(const Gradient&, const GradientPlan&);  // floats an item needs
  void (*sum)(const Gradient&, const GradientPlan&, float* partials, int64_t item, float* scratch);
  void (*write)(const Gradient&, const GradientPlan&, const float* partials, int64_t strip);
};

FASTDIFF_PER_ISA(Forward, forward)
FASTDIFF_PER_ISA(Backward, backward)

}  // namespace fastdiff::patch_embed
