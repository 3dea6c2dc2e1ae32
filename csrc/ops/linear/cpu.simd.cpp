#include "ops/linear/op.h"

#include "common/gemm.h"

namespace fastdiff::linear::FASTDIFF_ISA {
namespace {

using namespace fastdiff::FASTDIFF_ISA;

template <class T>
const T* at(const Matrix& m, int64_t i, int64_t k) {
  return static_cast<const T*>(m.data) + i * m.row + k * m.column;
}

int64_t scratch(const Plan& plan) {
  const int64_t by_rows = plan.rows * line(plan.depth), by_columns = plan.depth * line(plan.rows);
  return plan.rows * padded(plan.columns) + (by_rows > by_columns ? by_rows : by_columns);
}

void pack(const Problem& p, const Plan& plan, int64_t k0, int64_t block, float* packed, float* scratch) {
  const int64_t n0 = block * plan.columns, columns = least(plan.columns, p.N - n0), end = least(p.K, k0 + plan.slab);
  float* out = packed + block * plan.slab * padded(plan.columns);
  typed(p.type, [&]<class T>() {
    for (int64_t k = k0; k < end; k += plan.depth, out += plan.depth * padded(columns)) {
      const int64_t depth = least(plan.depth, end - k);
      const T* weight = at<T>(p.weight, n0, k);
      if (p.weight.column != 1) {
        if (by_pairs(p.type)) pack_panels<true>(depth, columns, weight, p.weight.column, out);
        else pack_panels<false>(depth, columns, weight, p.weight.column, out);
      } else {
        pack_factor(columns, depth, weight, p.weight.row, scratch, out);
      }
    }
  });
}

template <class T>
void run_typed(const Problem& p, const Plan& plan, int64_t k0, const float* packed, float* sums, int64_t item, float* scratch) {
  const int64_t block = item / plan.row_blocks(p), m0 = item % plan.row_blocks(p) * plan.rows, n0 = block * plan.columns;
  const int64_t rows = least(plan.rows, p.M - m0), columns = least(plan.columns, p.N - n0), width = padded(columns);
  const int64_t end = least(p.K, k0 + plan.slab);
  float *y = sums ? sums + item * plan.rows * padded(plan.columns) : scratch, *lines = scratch + plan.rows * padded(plan.columns);
  if (k0 == 0) {
    if (p.bias) pack_rows(1, columns, static_cast<const T*>(p.bias) + n0, 0, 1.0f, y);
    else for (int64_t j = 0; j < width; j += kLanes) store(y + j, f32{});
    for (int64_t i = width; i < rows * width; i += kLanes) store(y + i, load(y + i - width));
    if (p.added)
      typed(p.y_type, [&]<class Y>() {
        for (int64_t i = 0; i < rows; ++i)
          for_vectors(columns, [&](int64_t j, const auto& get, const auto&, int) {
            float* at = y + i * width + j;
            store(at, load(at) + get(static_cast<const Y*>(p.added) + (m0 + i) * p.N + n0 + j));
          });
      });
  }
  const float* w = packed + block * plan.slab * padded(plan.columns);
  for (int64_t k = k0; k < end; k += plan.depth, w += plan.depth * width) {
    const int64_t depth = least(plan.depth, end - k);
    const bool by_rows = p.x.column == 1;
    if (by_pairs(p.type)) {
      if (by_rows) {
        pack_pairs(rows, depth, at<bf16>(p.x, m0, k), p.x.row, lines);
        gemm<A::rows, true, Pairs>(rows, columns, pairs(depth), lines, padded(pairs(depth)), {w, 0}, y, width);
      } else {
        pack_paired_rows(depth, rows, at<bf16>(p.x, m0, k), p.x.column, lines);
        gemm<A::columns, true, Pairs>(rows, columns, pairs(depth), lines, padded(rows), {w, 0}, y, width);
      }
      continue;
    }
    // x as lines that are contiguous, its rows or its columns; copied unless they are rows of floats, which are read as they lie.
    const T* x = at<T>(p.x, m0, k);
    const float* a = reinterpret_cast<const float*>(x);
    int64_t stride = by_rows ? p.x.row : p.x.column;
    if (sizeof(T) != 4 || !by_rows) {
      const int64_t length = by_rows ? depth : rows;
      for (int64_t i = 0; i < (by_rows ? rows : depth); ++i) pack_rows(1, length, x + i * stride, 0, 1.0f, lines + i * line(length));
      a = lines, stride = line(length);
    }
    if (by_rows) gemm<A::rows, true>(rows, columns, depth, a, stride, {w, 0}, y, width);
    else gemm<A::columns, true>(rows, columns, depth, a, stride, {w, 0}, y, width);
  }
  if (end == p.K)
    typed(p.y_type, [&]<class Y>() {
      for (int64_t i = 0; i < rows; ++i) unpack_row(columns, y + i * width, 1.0f, static_cast<Y*>(p.y) + (m0 + i) * p.N + n0);
    });
}

void run(const Problem& p, const Plan& plan, int64_t k0, const float* packed, float* sums, int64_t item, float* scratch) {
  typed(p.type, [&]<class T>() { run_typed<T>(p, plan, k0, packed, sums, item, scratch); });
}

}  // namespace

const Kernels kernels{scratch, padded, pack, run};

}  // namespace fastdiff::linear::FASTDIFF_ISA
