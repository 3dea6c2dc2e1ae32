// Integers to analog bits along the channels, and back by sign.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "common/isa.h"

namespace fastdiff::analog_bits {

enum class Integer { u8, i32, i64 };

constexpr int64_t kPiece = 2048;

// Planes of `size` elements, one per sample and channel of the integers, each worked on in pieces of kPiece; every one has `bits` planes of
// analog bits, which are dense. msb: the most significant bit comes first.
struct Shape {
  Type type;
  Integer integer;
  int64_t planes, channels, size, pieces;
  int bits;
  bool msb;
};

// Integers of any strides over samples, channels and elements of a plane.
struct Integers {
  const void* data;
  int64_t b, c, s;
};

struct Kernels {
  // Pieces [begin, end) of the planes * pieces. Returns whether every integer is in [0, 2^bits).
  bool (*encode)(const Shape&, const Integers& x, float scale, void* y, int64_t begin, int64_t end);
  // Integers are dense here.
  void (*decode)(const Shape&, const void* x, void* y, int64_t begin, int64_t end);
};

FASTDIFF_PER_ISA(Kernels, kernels)

}  // namespace fastdiff::analog_bits
