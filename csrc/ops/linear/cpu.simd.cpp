#include "ops/linear/op.h"

#include "common/gemm.h"

namespace fastdiff::linear::FASTDIFF_ISA {
namespace {

using namespace fastdiff::FASTDIFF_ISA;

inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

template <class T>
const T* at(const Matrix& m, int64_t i, int64_t k) {
  return static_cast<const T*>(m.data) + i * m.row + k * m.column;
}

// (depth, columns) in packed panels, from rows of it that are contiguous.
template <class T>
void pack_panels(int64_t depth, int64_t columns, const T* x, int64_t stride, float* out) {
  const Panels panels(vectors(columns));
  for (int p = 0; p < panels.count; ++p) {
    const int64_t first = panels.first(p) * kLanes, width = panels.width(p) * kLanes;
    for (int64_t k = 0; k < depth; ++k, out += width)
      for (int64_t j = 0; j < width; j += kLanes) {
        const int64_t left = columns - first - j;
        const T* source = x + k * stride + first + j;
        store(out + j, left >= kLanes ? load(source) : left > 0 ? load_n(source, static_cast<int>(left)) : f32{});
      }
  }
}

int64_t scratch(const Problem& p, const Plan& plan) {
  return plan.rows * padded(plan.columns) + plan.depth * padded(plan.columns) +
         (p.type == Type::f32 ? 0 : plan.rows * padded(plan.depth) + plan.depth * padded(plan.rows));
}

template <class T>
void run_typed(const Problem& p, const Plan& plan, int64_t item, float* scratch) {
  const int64_t across = (p.N + plan.columns - 1) / plan.columns;
  const int64_t m0 = item / across * plan.rows, n0 = item % across * plan.columns;
  const int64_t rows = least(plan.rows, p.M - m0), columns = least(plan.columns, p.N - n0), width = padded(columns);
  float *y = scratch, *w = y + plan.rows * padded(plan.columns), *converted = w + plan.depth * padded(plan.columns);
  for (int64_t i = 0; i < rows * width; i += kLanes) store(y + i, f32{});
  for (int64_t k0 = 0; k0 < p.K; k0 += plan.depth) {
    const int64_t depth = least(plan.depth, p.K - k0);
    if (p.weight.column == 1) pack_transposed(columns, depth, at<T>(p.weight, n0, k0), p.weight.row, 1.0f, w);
    else pack_panels(depth, columns, at<T>(p.weight, n0, k0), p.weight.column, w);
    // x as lines that are contiguous: its rows, or its columns.
    const bool by_rows = p.x.column == 1;
    const T* x = at<T>(p.x, m0, k0);
    const float* a = reinterpret_cast<const float*>(x);
    int64_t stride = by_rows ? p.x.row : p.x.column;
    if constexpr (sizeof(T) != 4) {
      const int64_t lines = by_rows ? rows : depth, length = by_rows ? depth : rows;
      pack_rows(lines, length, x, stride, 1.0f, converted);
      a = converted, stride = padded(length);
    }
    if (by_rows) gemm<A::rows, true>(rows, columns, depth, a, stride, {w, 0}, y, width);
    else gemm<A::columns, true>(rows, columns, depth, a, stride, {w, 0}, y, width);
  }
  for (int64_t i = 0; i < rows; ++i) unpack_row(columns, y + i * width, 1.0f, static_cast<T*>(p.y) + (m0 + i) * p.N + n0);
}

void run(const Problem& p, const Plan& plan, int64_t item, float* scratch) {
  typed(p.type, [&]<class T>() { run_typed<T>(p, plan, item, scratch); });
}

}  // namespace

const Kernels kernels{scratch, run};

}  // namespace fastdiff::linear::FASTDIFF_ISA
