// Orthonormal cosine transforms of planes and rows, and gains between a transform and its inverse.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "common/isa.h"

namespace fastdiff::dct {

// The splitting of a transform of n = base << levels elements: level l has transforms of n >> l. Tables are cosines, without scale.
constexpr int kLevels = 48;
struct Axis {
  int64_t n, base;
  int levels;
  // Level l >= 1: for a transform of type 4 of M = n >> l elements, cos of pi (2 i + 1) / (4 M) for i < M / 2, and then sin.
  const float* turns[kLevels];
  // At the base, unless it is 1, 2, 4, 7, 8, 14, 16, 28 or 32: the type-2 transform's matrices of sums and of
  // differences, and the type-4 transform's.
  const float *sums, *differences, *fourth;
};

enum class Kind { forward, inverse, gain, separable };

// Contiguous planes of gains (rows, where rows alone are transformed), shared between those that begin at the same element.
struct Gain {
  const float* data;
  const int64_t* begins;
};

// `planes` of h x w elements, contiguous. With columns false only rows are transformed, and the planes share h * planes >= rows of them.
struct Problem {
  Type type;
  Kind kind;
  bool columns;
  int64_t planes, rows, h, w;
  Axis along_h, along_w;
  const void *x, *eps, *noise;  // the last two are null where there are none
  void* y;
  Gain gain, gain_eps, gain_noise;  // kind gain
  // Kind separable: per sample of `channels` planes.
  int64_t channels;
  const float *gain_h, *gain_w, *base, *sigma;
};

struct Kernels {
  int64_t (*scratch)(const Problem&);  // floats an item needs
  void (*run)(const Problem&, int64_t plane, float* scratch);
};

FASTDIFF_PER_ISA(Kernels, kernels)

}  // namespace fastdiff::dct
