// Layer norm with shift and scale, residual with gate, and both in one pass; and their gradients. Row by row.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "common/isa.h"

namespace fastdiff::layer_norm_modulate {

struct Sizes {
  Type type;
  int64_t B, N, D;
};

// (B, N, D) of the sizes' type, last stride 1. Null: absent.
struct Rows {
  const void* data;
  int64_t b, n;
};

// Shift, scale, gate, weight or bias: (B, N, D) if token, else (B, D) or, with stride 0, (D,). Last stride 1; null: absent.
struct Operand {
  const void* data;
  int64_t b, n;
  bool wide, token;  // wide: float32, whatever the sizes' type
};

// The contiguous gradient of an operand; null: not wanted.
struct Gradient {
  void* data;
  bool wide;
};

struct Modulation {
  Operand gate, shift, scale, weight, bias;
  float eps;
  // Whether a row's modulation is its own, not its sample's.
  bool token() const { return (gate.data && gate.token) || (shift.data && shift.token) || (scale.data && scale.token); }
};

// out = x + gate y where there is y; h = modulated norm of that where h is not null.
struct Forward {
  Rows x, y;
  Modulation m;
  void *out, *h;
  bool stream;  // results are stored past the caches: rows are whole cache lines
};

// dz = dout + the gradient that comes through the norm, if there is dh; dx = dz; dy = gate dz. x is what was normalised.
struct Backward {
  Rows dh, dout, x, y;
  Modulation m;
  void *dx, *dy;
  Gradient dgate, dshift, dscale, dweight, dbias;
  bool stream;
};

// The sums over the rows of a sample from which gradients are made; what is not needed is absent (-1), else its place.
struct Sums {
  int dh, dh_normal;        // dh, dh normal
  int inner, inner_normal;  // (1 + scale) dh and that times normal: weight's and bias' where scale is per token
  int dz_y;                 // dz y
  int count;
};

inline Sums sums(const Backward& a) {
  int n = 0;
  const auto place = [&](bool needed) { return needed ? n++ : -1; };
  const bool own = a.m.scale.data && a.m.scale.token;
  const bool dscale = a.dscale.data && !own;
  Sums s;
  s.dh = place((a.dshift.data && !a.m.shift.token) || dscale || (a.dbias.data && !own));
  s.dh_normal = place(dscale || (a.dweight.data && !own));
  s.inner = place(a.dbias.data && own);
  s.inner_normal = place(a.dweight.data && own);
  s.dz_y = place(a.dgate.data && !a.m.gate.token);
  s.count = n;
  return s;
}

// Floats of scratch for one thread.
inline int64_t forward_scratch(int64_t stride) { return 4 * stride; }
inline int64_t backward_scratch(int64_t stride) { return 3 * stride; }

// Whole cache lines of floats.
inline int64_t stride(const Sizes& n) { return (n.D + 15) / 16 * 16; }

struct Kernels {
  // Rows [begin, end) of the B N.
  void (*forward)(const Sizes&, const Forward&, int64_t begin, int64_t end, float* scratch);
  // Rows [begin, end) of one sample; their sums go to partial (sums(...).count, stride).
  void (*backward)(const Sizes&, const Backward&, int64_t b, int64_t begin, int64_t end, float* partial, float* scratch);
  // Columns [begin, end) of the gradients that are sums, from the partial sums (B, pieces, count, stride).
  void (*finish)(const Sizes&, const Backward&, int64_t pieces, const float* partial, int64_t begin, int64_t end);
};

FASTDIFF_PER_ISA(Kernels, kernels)

}  // namespace fastdiff::layer_norm_modulate
