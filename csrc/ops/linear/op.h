// y = x W^T + bias + added, with one order of addition, whatever the threads.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "common/isa.h"

namespace fastdiff::linear {

// Element (i, k) at i * row + k * column; one of the two is 1.
struct Matrix {
  const void* data;
  int64_t row, column;
};

struct Problem {
  Type type, y_type;  // of x, weight, bias; of added, y
  int64_t M, N, K;
  Matrix x, weight;  // (M, K), (N, K)
  const void* bias;   // (N,), or null
  const void* added;  // (M, N) contiguous, or null; may be y
  void* y;            // (M, N) contiguous
};

// y in blocks of rows x columns, an item each. W is packed once for all of them, `slab` of its K columns at a time, and the sums over a
// slab are made `depth` at a time, so that what a row block multiplies lies in a core's L2.
struct Plan {
  int64_t rows, columns, depth, slab;
  int64_t row_blocks(const Problem& p) const { return (p.M + rows - 1) / rows; }
  int64_t items(const Problem& p) const { return row_blocks(p) * ((p.N + columns - 1) / columns); }
  int64_t packs(const Problem& p) const { return (p.N + columns - 1) / columns; }
};

struct Kernels {
  int64_t (*scratch)(const Plan&);  // floats an item needs
  int64_t (*padded)(int64_t columns);
  // Block `block` of W's rows, y's columns, over the slab from k0 on, into its place in `packed`: (packs, slab, padded(columns)). scratch: columns x
  // depth floats.
  void (*pack)(const Problem&, const Plan&, int64_t k0, int64_t block, float* packed, float* scratch);
  // One block of y over one slab. sums: (items, rows, padded(columns)) where there are several slabs, else null.
  void (*run)(const Problem&, const Plan&, int64_t k0, const float* packed, float* sums, int64_t item, float* scratch);
};

FASTDIFF_PER_ISA(Kernels, kernels)

}  // namespace fastdiff::linear
