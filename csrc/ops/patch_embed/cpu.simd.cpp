#include "ops/patch_embed/op.h"

#include "common/gemm.h"

namespace fastdiff::patch_embed::FASTDIFF_ISA {
namespace {

using namespace fastdiff::FASTDIFF_ISA;

inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// A row of patches or of sums: one vector more than whole ones, so that the rows of a column do not fall onto the same cache sets.
inline int64_t line(int64_t n) { return padded(n) + kLanes; }

// Elements of `q` pixels of `patches` neighbours, between a row of the image and their places in rows of patches.
template <class T, bool ToRows, int q>
void runs(int64_t patches, T* image, T* rows, int64_t stride) {
  for (int64_t g = 0; g < patches; ++g) {
    if constexpr (ToRows) std::memcpy(rows + g * stride, image + g * q, q * sizeof(T));
    else std::memcpy(image + g * q, rows + g * stride, q * sizeof(T));
  }
}

template <class T, bool ToRows>
void runs(int64_t patches, int64_t q, T* image, int64_t pixel, T* rows, int64_t stride) {
  if (pixel == 1) switch (q) {
    case 2: return runs<T, ToRows, 2>(patches, image, rows, stride);
    case 4: return runs<T, ToRows, 4>(patches, image, rows, stride);
    case 8: return runs<T, ToRows, 8>(patches, image, rows, stride);
    case 16: return runs<T, ToRows, 16>(patches, image, rows, stride);
  }
  for (int64_t g = 0; g < patches; ++g)
    for (int64_t j = 0; j < q; ++j) {
      if constexpr (ToRows) rows[g * stride + j] = image[(g * q + j) * pixel];
      else image[(g * q + j) * pixel] = rows[g * stride + j];
    }
}

// Patches [first, first + count), counted over all samples, between the image and rows of `stride` elements.
template <class T, bool ToRows>
void move(const Shape& s, T* image, int64_t first, int64_t count, T* rows, int64_t stride) {
  const auto& p = s.patch;
  for (int64_t end = first + count, n; first < end; first += n, rows += n * stride) {
    const int64_t g2 = first % s.grid[2], rest = first / s.grid[2], g1 = rest % s.grid[1], g0 = rest / s.grid[1] % s.grid[0];
    n = least(end - first, s.grid[2] - g2);
    const int64_t b = rest / s.grid[1] / s.grid[0];
    T* corner = image + b * s.stride[0] + g0 * p[0] * s.stride[2] + g1 * p[1] * s.stride[3] + g2 * p[2] * s.stride[4];
    T* row = rows;
    for (int64_t c = 0; c < s.channels; ++c)
      for (int64_t i0 = 0; i0 < p[0]; ++i0)
        for (int64_t i1 = 0; i1 < p[1]; ++i1, row += p[2])
          runs<T, ToRows>(n, p[2], corner + c * s.stride[1] + i0 * s.stride[2] + i1 * s.stride[3], s.stride[4], row, stride);
  }
}

int64_t scratch(const Problem& p, const Plan& plan) {
  // A's rows as floats, the products, and for types of 16 bits a row's or all rows' elements as they lie in the image.
  return plan.rows * (2 * line(p.K) + 2 * line(p.N));
}

int64_t packed(const Problem& p, const Plan& plan) { return plan.packs(p) * padded(plan.columns) * p.K; }

void pack(const Problem& p, const Plan& plan, int64_t block, float* packed) {
  const int64_t n0 = block * plan.columns, columns = least(plan.columns, p.N - n0);
  float* out = packed + block * padded(plan.columns) * p.K;
  typed(p.type, [&]<class T>() {
    for (int64_t k = 0; k < p.K; k += plan.depth) {
      const int64_t depth = least(plan.depth, p.K - k);
      pack_transposed(columns, depth, static_cast<const T*>(p.weight) + n0 * p.K + k, p.K, 1.0f, out);
      out += depth * padded(columns);
    }
  });
}

// A block of columns of A W^T.
void product(const Problem& p, const Plan& plan, int64_t rows, const float* a, int64_t a_stride, const float* packed, int64_t block,
             float* y, int64_t stride) {
  const int64_t columns = least(plan.columns, p.N - block * plan.columns);
  const float* w = packed + block * padded(plan.columns) * p.K;
  gemm<A::rows, false>(rows, columns, least(plan.depth, p.K), a, a_stride, {w, 0}, y, stride);
  for (int64_t k = plan.depth; k < p.K; k += plan.depth)
    gemm<A::rows, true>(rows, columns, least(plan.depth, p.K - k), a + k, a_stride, {w + k * padded(columns), 0}, y, stride);
}

template <class T>
void embed_typed(const Problem& p, const Plan& plan, const T* image, const float* packed, T* out, int64_t item, float* scratch) {
  const int64_t m0 = item * plan.rows, rows = least(plan.rows, p.M - m0), stride = line(p.K);
  float *a = scratch, *y = a + plan.rows * stride;
  T* patches = reinterpret_cast<T*>(sizeof(T) == 4 ? a : y + plan.rows * line(p.N));
  move<T, true>(p.shape, const_cast<T*>(image), m0, rows, patches, stride);
  if constexpr (sizeof(T) != 4)
    for (int64_t i = 0; i < rows; ++i) pack_rows(1, p.K, patches + i * stride, 0, 1.0f, a + i * stride);
  for (int64_t block = 0; block < plan.packs(p); ++block) {
    const int64_t n0 = block * plan.columns, columns = least(plan.columns, p.N - n0), width = padded(columns);
    product(p, plan, rows, a, stride, packed, block, y, width);
    for (int64_t i = 0; i < rows; ++i) {
      const T* bias = p.bias ? static_cast<const T*>(p.bias) + n0 : nullptr;
      const T* position = p.position ? static_cast<const T*>(p.position) + (m0 + i) % p.shape.tokens() * p.N + n0 : nullptr;
      for_vectors(columns, [&](int64_t j, const auto& get, const auto& put, int) {
        f32 sum = load(y + i * width + j);
        if (bias) sum += get(bias + j);
        if (position) sum += get(position + j);
        put(out + (m0 + i) * p.N + n0 + j, sum);
      });
    }
  }
}

template <class T>
void project_typed(const Problem& p, const Plan& plan, const T* tokens, const float* packed, T* image, int64_t item, float* scratch) {
  const int64_t m0 = item * plan.rows, rows = least(plan.rows, p.M - m0), stride = line(p.N);
  float *y = scratch, *lines = y + plan.rows * stride;
  const T* x = tokens + m0 * p.K;
  const float* a = reinterpret_cast<const float*>(x);
  int64_t a_stride = p.K;
  if constexpr (sizeof(T) != 4) {
    a = lines, a_stride = line(p.K);
    for (int64_t i = 0; i < rows; ++i) pack_rows(1, p.K, x + i * p.K, 0, 1.0f, lines + i * a_stride);
  }
  for (int64_t block = 0; block < plan.packs(p); ++block)
    product(p, plan, rows, a, a_stride, packed, block, y + block * plan.columns, stride);
  T* patches = reinterpret_cast<T*>(sizeof(T) == 4 ? y : lines);
  if (sizeof(T) != 4 || p.bias)
    for (int64_t i = 0; i < rows; ++i)
      for_vectors(p.N, [&](int64_t j, const auto& get, const auto& put, int) {
        f32 sum = load(y + i * stride + j);
        if (p.bias) sum += get(static_cast<const T*>(p.bias) + j);
        put(patches + i * stride + j, sum);
      });
  move<T, false>(p.shape, image, m0, rows, patches, stride);
}

void embed(const Problem& p, const Plan& plan, const void* image, const float* packed, void* y, int64_t item, float* scratch) {
  typed(p.type, [&]<class T>() { embed_typed(p, plan, static_cast<const T*>(image), packed, static_cast<T*>(y), item, scratch); });
}

void project(const Problem& p, const Plan& plan, const void* tokens, const float* packed, void* image, int64_t item, float* scratch) {
  typed(p.type, [&]<class T>() { project_typed(p, plan, static_cast<const T*>(tokens), packed, static_cast<T*>(image), item, scratch); });
}

}  // namespace

const Kernels kernels{scratch, packed, pack, embed, project};

}  // namespace fastdiff::patch_embed::FASTDIFF_ISA
