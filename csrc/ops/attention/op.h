// Attention forward and backward on raw pointers: what one work item computes. op.cpp cuts the work and calls.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "common/isa.h"

namespace fastdiff::attention {

// (B, H, S, E) memory; strides in elements, the last is 1.
struct View {
  void* data;
  int64_t b, h, s;
};

struct Problem {
  Type type;
  int64_t B, H, M, N, E, V;  // E: of queries and keys; V: of values and results (composed ops have their own)
  View q, k, v;
  const void* bias;  // or null; broadcast axes have stride 0
  int64_t bias_stride[4];
  const int64_t* key_lengths;  // or null
  bool causal;
  float scale;

  int64_t length(int64_t b) const { return key_lengths ? key_lengths[b] : N; }
  // Keys [0, seen) are visible to query m of batch b.
  int64_t seen(int64_t b, int64_t m) const {
    const int64_t n = length(b);
    if (!causal) return n;
    const int64_t limit = m + 1 + N - M;
    return limit < 0 ? 0 : limit < n ? limit : n;
  }
};

// How the work is cut: from sizes alone, so that results do not depend on the threads. Item = ((b, h), query split, key split).
struct Plan {
  int64_t query_rows, query_splits;  // queries per item
  int64_t key_chunk, key_splits;     // keys per item
  int64_t query_block, key_block;    // the block of scores held at a time
  int64_t items(const Problem& p) const { return p.B * p.H * query_splits * key_splits; }
};

struct Item {
  int64_t b, h, m0, m1, n0, n1, key_split, query_split;
  Item(const Problem& p, const Plan& plan, int64_t i) {
    key_split = i % plan.key_splits, i /= plan.key_splits;
    query_split = i % plan.query_splits, i /= plan.query_splits;
    h = i % p.H, b = i / p.H;
    m0 = query_split * plan.query_rows, m1 = m0 + plan.query_rows < p.M ? m0 + plan.query_rows : p.M;
    n0 = key_split * plan.key_chunk, n1 = n0 + plan.key_chunk < p.N ? n0 + plan.key_chunk : p.N;
  }
};

// float16 has as many digits for what rounding leaves over as for the rounded, whatever its size, when it stands 2^11 higher.
constexpr float kLowScale = 2048.0f;

// A row's maximum, its sum, and the sum before rounding.
constexpr int64_t kStats = 3;

struct ForwardOut {
  View out, out_low;     // out_low: what rounding to half precision left over of out, times kLowScale; or null
  float *lse, *lse_low;  // (B, H, M): natural log-sum-exp, and that of the weights as they were summed less it; each or both may be null
  // With more than one key split: unnormalised rows (items, query_rows, padded V), and (items, query_rows, kStats).
  float *partial, *partial_stats;
};

struct ForwardKernels {
  int64_t (*scratch)(const Problem&, const Plan&);  // floats an item needs
  int64_t (*padded)(int64_t E);
  void (*run)(const Problem&, const Plan&, const ForwardOut&, int64_t item, float* scratch);
  // Puts the key splits of one (b, h, query split) together, in the order of the splits.
  void (*merge)(const Problem&, const Plan&, const ForwardOut&, int64_t group);
};

struct BackwardIn {
  View out, out_low, dout;  // out_low as in ForwardOut
  const float *lse, *lse_low, *dlse;  // contiguous (B, H, M); dlse may be null
  bool partial;                       // the keys are some of those that out and lse are of
};

struct BackwardOut {
  View dq, dk, dv;
  void* dbias;      // contiguous (B, H, M, N), or null
  bool dbias_f32;   // it is float whatever the type: a buffer that will be summed over bias's broadcast axes
  // Float sums of one split each: dq (key_splits, B H, M, padded E) where keys are split; dk (query_splits, B H, N, padded E) and dv, padded V,
  // where queries are.
  float *dq_partial, *dk_partial, *dv_partial;
};

struct BackwardKernels {
  int64_t (*scratch)(const Problem&, const Plan&);
  int64_t (*padded)(int64_t E);
  void (*run)(const Problem&, const Plan&, const BackwardIn&, const BackwardOut&, int64_t item, float* scratch);
  // Adds the partial sums of `splits` slices (each slice floats apart) into rows [begin, end) of (B H, S) rows of x, `width` wide, in the
  // order of the splits.
  void (*sum)(const Problem&, const View& x, int64_t S, int64_t width, const float* partial, int64_t splits, int64_t begin, int64_t end);
  // Sums (B, H, M, columns) floats over bias's broadcast axes into rows [begin, end) of a contiguous gradient of bias's shape. columns is N, or 1
  // where bias is one number for all keys of a query.
  void (*sum_bias)(const Problem&, const int64_t (&bias_size)[4], const float* full, void* dbias, int64_t begin, int64_t end);
};

FASTDIFF_PER_ISA(ForwardKernels, forward)
FASTDIFF_PER_ISA(BackwardKernels, backward)

}  // namespace fastdiff::attention
