// Group norm with weight and bias, scale and shift per sample, and SiLU; and its gradient.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "common/isa.h"

namespace fastdiff::group_norm_modulate {

// `last`: images lie as pixels of C channels, else as channels of P pixels.
struct Shape {
  Type type;
  int64_t B, C, P, groups;
  bool last;
};

// step: between channels, or, channels last, between pixels. What lies within is contiguous.
struct Image {
  const void* data;
  int64_t b, step;
};

// (B, C), or (C,) with b = 0; last stride 1; null: absent.
struct Operand {
  const void* data;
  int64_t b;
  bool wide;  // float32, whatever the shape's type
};

struct Gradient {
  void* data;
  bool wide;
};

// Of a group: mean + rest is the mean to twice float32's precision, rstd = 1 / sqrt(var + eps).
struct Statistics {
  float mean, rest, rstd;
};

struct Modulation {
  Operand weight, bias, scale, shift;
  float eps;
  bool silu;
};

struct Forward {
  Image x;
  Modulation m;
  Statistics* statistics;  // (B, groups)
  void* y;                 // dense, in the layout of the shape
  bool stream;             // y is stored past the caches
};

struct Backward {
  Image dy, x;
  Modulation m;
  const Statistics* statistics;
  void* dx;
  bool stream;
};

struct Gradients {
  Gradient weight, bias, scale, shift;
};

// Count, mean and sum of squared deviations of a part.
struct Moments {
  double n, mean, m2;
};

inline int64_t stride(const Shape& s) { return (s.C + 15) / 16 * 16; }
// Floats of scratch for one thread.
inline int64_t scratch_floats(const Shape& s) { return 7 * stride(s); }

// Sums over a sample's pixels, per channel: dy and dy normal, dy that of the norm's result before SiLU; (2, stride) floats.
struct Kernels {
  // Groups [begin, end) of the B groups; channels first.
  void (*forward)(const Shape&, const Forward&, int64_t begin, int64_t end, float* scratch);
  // sums: (B, 2, stride), the groups' channels are written.
  void (*backward)(const Shape&, const Backward&, float* sums, int64_t begin, int64_t end, float* scratch);
  // Pixels [begin, end) of sample b; channels last.
  void (*pixel_moments)(const Shape&, const Image& x, int64_t b, int64_t begin, int64_t end, Moments* groups, float* scratch);
  void (*pixel_forward)(const Shape&, const Forward&, int64_t b, int64_t begin, int64_t end, float* scratch);
  void (*pixel_sums)(const Shape&, const Backward&, int64_t b, int64_t begin, int64_t end, float* sums, float* scratch);
  void (*pixel_backward)(const Shape&, const Backward&, int64_t b, int64_t begin, int64_t end, const float* sums, float* scratch);
  // Of a sample, from those of its pieces (pieces, groups).
  void (*join)(const Shape&, float eps, int64_t pieces, const Moments* parts, Statistics* groups);
  // Gradients of weight, bias, scale and shift.
  void (*finish)(const Shape&, const Modulation&, const float* sums, const Gradients&);
};

FASTDIFF_PER_ISA(Kernels, kernels)

}  // namespace fastdiff::group_norm_modulate
