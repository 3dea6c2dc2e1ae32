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
  bool small;         // the base is one of those that are computed in registers
  const Axis* parts;  // null, or two of coprime odd lengths, whose product is the base
  // Level l: for a transform of type 4 of M = n >> l elements, M / 2 each of cos t_n, sin t_n, (-1)^n cos t_n, (-1)^n sin t_n.
  const float* turns[kLevels];
  // A base that is not small: without parts the type-2 transform's matrices of sums and of differences; with levels the type-4 transform's.
  const float *sums, *differences, *fourth;
};

// Lengths that are computed in registers: small ones, and those that are left when longer ones are halved.
inline bool in_registers(int64_t n) { return n <= 8 || n == 10 || n == 12 || n == 14 || n == 16; }
// And whole lengths that are computed there without being halved first.
inline bool alone_in_registers(int64_t n) { return n == 28 || n == 32; }

enum class Kind { forward, inverse, gain, blur };

// Contiguous planes of gains (rows, where rows alone are transformed), shared between those that begin at the same element; or one
// for all planes, arranged as blocks of columns.
struct Gain {
  const float* data;
  const int64_t* begins;
  const float* arranged;
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
  // Kind blur: per sample of `channels` planes signal (rows columns^T + floor), then sigma noise; without signal it is 1.
  int64_t channels;
  const float *blur_h, *blur_w, *signal, *sigma;
  float floor;
  // Beside the gradient of a result in x, and in eps what the gain was applied to, the gain's: u = DCT(x) DCT(eps) for every frequency, or
  // of a blur, for every block of rows, the sums of u, of u rows columns^T, and of this times the square of the angular frequency.
  float *product, *sums;  // planes x h x w, planes x blocks x 3
};

// Columns are transformed into an image, rows from there and into it again, columns out of it: in one item if the plane is small, else
// strip by strip and block by block.
enum class Phase { enter, rows, leave };

struct Kernels {
  // Strips of columns and blocks of rows; floats of an image, and of what an item needs beside it.
  int64_t (*strips)(const Problem&), (*blocks)(const Problem&), (*image)(const Problem&), (*scratch)(const Problem&);
  void (*arrange)(const Problem&, const float* gain, float* arranged);  // padded rows x padded columns
  // factor exp(-(pi i / n)^2 width^2 / 2) for i < n of every sample.
  void (*decay)(int64_t samples, const float* width, int64_t n, float factor, float* to);
  void (*run)(const Problem&, int64_t plane, Phase, int64_t begin, int64_t end, float* image, float* scratch);
};

FASTDIFF_PER_ISA(Kernels, kernels)

}  // namespace fastdiff::dct
