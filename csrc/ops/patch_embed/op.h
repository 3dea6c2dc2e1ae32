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

// A (M, K) W^T, W (N, K) contiguous; M tokens over all samples.
struct Problem {
  Type type;
  Shape shape;
  int64_t M, N, K;
  const void* weight;
  const void* bias;      // (N,), or null
  const void* position;  // (tokens of a sample, N) contiguous, or null
};

// An item is `tokens` neighbours in each of `samples` samples: one of the two is all of it, or samples share the positions they are beside.
// W is packed once for all items, by blocks of `columns` of its rows; sums are made `depth` terms at a time.
struct Plan {
  int64_t tokens, samples, columns, depth;
  int64_t rows() const { return tokens * samples; }
  int64_t items(const Problem& p) const { return ceil_div(p.shape.tokens(), tokens) * ceil_div(p.shape.batch, samples); }
  int64_t packs(const Problem& p) const { return ceil_div(p.N, columns); }
  static int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
};

// What an item is of: tokens [token, token + tokens) of samples [sample, sample + samples).
struct Item {
  int64_t token, tokens, sample, samples;
  Item(const Problem& p, const Plan& plan, int64_t i) {
    const int64_t blocks = Plan::ceil_div(p.shape.batch, plan.samples), T = p.shape.tokens(), B = p.shape.batch;
    token = i / blocks * plan.tokens, sample = i % blocks * plan.samples;
    tokens = plan.tokens < T - token ? plan.tokens : T - token;
    samples = plan.samples < B - sample ? plan.samples : B - sample;
  }
};

struct Kernels {
  int64_t (*scratch)(const Problem&, const Plan&);  // floats an item needs
  int64_t (*packed)(const Problem&, const Plan&);   // floats W takes
  int64_t (*padded)(int64_t n);
  // scratch: columns x depth floats.
  void (*pack)(const Problem&, const Plan&, int64_t block, float* packed, float* scratch);
  // y (M, N) = patches of the image (any strides) W^T + bias + position.
  void (*embed)(const Problem&, const Plan&, const void* image, const float* packed, void* y, int64_t item, float* scratch);
  // Image patches = tokens (M, K) W^T + bias.
  void (*project)(const Problem&, const Plan&, const void* tokens, const float* packed, void* image, int64_t item, float* scratch);
};

FASTDIFF_PER_ISA(Kernels, kernels)

}  // namespace fastdiff::patch_embed
