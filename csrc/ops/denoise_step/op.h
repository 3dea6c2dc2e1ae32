// Noise added, guidance and one step of a sampler: sums of images with coefficients per sample, element by element.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "common/isa.h"

namespace fastdiff::denoise_step {

// An image per sample, `stride` elements apart; the elements of a sample lie together, those of all images in one order. data is null for none.
struct Images {
  const void* data = nullptr;
  int64_t stride = 0;
};

// A number per sample; data is null for none.
struct PerSample {
  const float* data = nullptr;
  int64_t stride = 0;
};

constexpr int64_t kPiece = 8192;

// `size` elements per sample, worked on in pieces of kPiece. past: results are written past the cache.
struct Shape {
  Type type;
  int64_t batch, size, pieces;
  bool past;
};

enum class Prediction { eps, x0, v };

struct Step {
  Images x, pred, noise, v;
  PerSample signal, sigma, to_x0, to_eps, to_noise, log_ratio;
  Prediction prediction;
  bool clipped, rederive;
  float clip;
};

// Over n elements: their mean, and the sum of squares about it.
struct Moments {
  float mean, squares;
};

// Each works on pieces [begin, end) of the batch * pieces; results are dense.
struct Kernels {
  void (*add_noise)(const Shape&, const Images& x, const Images& noise, const PerSample& signal, const PerSample& sigma, void* y, int64_t begin,
                    int64_t end);
  // factors: one per sample that the result is multiplied by, or null.
  void (*guide)(const Shape&, const Images& cond, const Images& uncond, const PerSample& weight, const float* factors, void* y, int64_t begin,
                int64_t end);
  // Of cond and of the guided prediction: two for each piece.
  void (*moments)(const Shape&, const Images& cond, const Images& uncond, const PerSample& weight, Moments* found, int64_t begin, int64_t end);
  // x0 may be null.
  void (*step)(const Shape&, const Step&, void* y, void* x0, int64_t begin, int64_t end);
};

FASTDIFF_PER_ISA(Kernels, kernels)

}  // namespace fastdiff::denoise_step
