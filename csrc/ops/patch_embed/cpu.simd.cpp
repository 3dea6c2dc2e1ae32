#include "ops/patch_embed/op.h"

#include "common/gemm.h"

namespace fastdiff::patch_embed::FASTDIFF_ISA {
namespace {

using namespace fastdiff::FASTDIFF_ISA;

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

// What an item has in scratch, in floats: rows of A; products; rows as they lie in the image, or on their way to A.
struct Layout {
  int64_t a_line, products, lines, total;
  Layout(const Problem& p, const Plan& plan) : a_line(line(by_pairs(p.type) ? pairs(p.K) : p.K)) {
    products = plan.rows() * a_line;
    lines = products + plan.rows() * line(p.N);
    total = lines + plan.rows() * line(p.K > p.N ? p.K : p.N);
  }
};

int64_t scratch(const Problem& p, const Plan& plan) { return Layout(p, plan).total; }

int64_t packed(const Problem& p, const Plan& plan) { return plan.packs(p) * padded(plan.columns) * p.K; }

void pack(const Problem& p, const Plan& plan, int64_t block, float* packed, float* scratch) {
  const int64_t n0 = block * plan.columns, columns = least(plan.columns, p.N - n0);
  float* out = packed + block * padded(plan.columns) * p.K;
  typed(p.type, [&]<class T>() {
    for (int64_t k = 0; k < p.K; k += plan.depth) {
      const int64_t depth = least(plan.depth, p.K - k);
      pack_factor(columns, depth, static_cast<const T*>(p.weight) + n0 * p.K + k, p.K, scratch, out);
      out += depth * padded(columns);
    }
  });
}

// A block of columns of A W^T.
template <class T>
void product(const Problem& p, const Plan& plan, int64_t rows, const float* a, int64_t a_line, const float* packed, int64_t block, float* y, int64_t stride) {
  using Math = typename Multiplied<T>::Math;
  const auto terms = [](int64_t k) { return Multiplied<T>::pairs ? pairs(k) : k; };
  const int64_t columns = least(plan.columns, p.N - block * plan.columns);
  const float* w = packed + block * padded(plan.columns) * p.K;
  gemm<A::rows, false, Math>(rows, columns, terms(least(plan.depth, p.K)), a, a_line, {w, 0}, y, stride);
  for (int64_t k = plan.depth; k < p.K; k += plan.depth)
    gemm<A::rows, true, Math>(rows, columns, terms(least(plan.depth, p.K - k)), a + terms(k), a_line, {w + k * padded(columns), 0}, y, stride);
}

template <class T>
void embed_typed(const Problem& p, const Plan& plan, const T* image, const float* packed, T* out, int64_t index, float* scratch) {
  const Layout at(p, plan);
  const Item item(p, plan, index);
  const int64_t rows = item.tokens * item.samples, all = p.shape.tokens();
  float *a = scratch, *y = scratch + at.products;
  constexpr bool as_they_are = sizeof(T) == 4 || Multiplied<T>::pairs;
  const int64_t stride = as_they_are ? at.a_line * 4 / static_cast<int64_t>(sizeof(T)) : line(p.K);
  T* patches = reinterpret_cast<T*>(as_they_are ? a : scratch + at.lines);
  if (Multiplied<T>::pairs && p.K % 2)
    for (int64_t i = 0; i < rows; ++i) patches[i * stride + p.K] = T{};
  for (int64_t s = 0; s < item.samples; ++s)
    move<T, true>(p.shape, const_cast<T*>(image), (item.sample + s) * all + item.token, item.tokens, patches + s * item.tokens * stride, stride);
  if constexpr (!as_they_are)
    for (int64_t i = 0; i < rows; ++i) pack_rows(1, p.K, patches + i * stride, 0, 1.0f, a + i * at.a_line);
  for (int64_t block = 0; block < plan.packs(p); ++block) {
    const int64_t n0 = block * plan.columns, columns = least(plan.columns, p.N - n0), width = padded(columns);
    product<T>(p, plan, rows, a, at.a_line, packed, block, y, width);
    const T* bias = p.bias ? static_cast<const T*>(p.bias) + n0 : nullptr;
    for (int64_t i = 0; i < rows; ++i) {
      const int64_t token = item.token + i % item.tokens;
      const T* position = p.position ? static_cast<const T*>(p.position) + token * p.N + n0 : nullptr;
      T* to = out + ((item.sample + i / item.tokens) * all + token) * p.N + n0;
      for_vectors(columns, [&](int64_t j, const auto& get, const auto& put, int) {
        f32 sum = load(y + i * width + j);
        if (bias) sum += get(bias + j);
        if (position) sum += get(position + j);
        put(to + j, sum);
      });
    }
  }
}

// Rows are those of one sample, or of whole samples: neighbours in any case.
template <class T>
void project_typed(const Problem& p, const Plan& plan, const T* tokens, const float* packed, T* image, int64_t index, float* scratch) {
  const Layout at(p, plan);
  const Item item(p, plan, index);
  const int64_t m0 = item.sample * p.shape.tokens() + item.token, rows = item.tokens * item.samples, stride = line(p.N);
  float *y = scratch + at.products, *lines = scratch + at.lines;
  const T* x = tokens + m0 * p.K;
  const float* a = sizeof(T) == 4 ? reinterpret_cast<const float*>(x) : scratch;
  for (int64_t i = 0; sizeof(T) != 4 && i < rows; ++i) {
    float* row = scratch + i * at.a_line;
    if constexpr (Multiplied<T>::pairs) pack_pairs(1, p.K, x + i * p.K, 0, row);
    else pack_rows(1, p.K, x + i * p.K, 0, 1.0f, row);
  }
  for (int64_t block = 0; block < plan.packs(p); ++block)
    product<T>(p, plan, rows, a, sizeof(T) == 4 ? p.K : at.a_line, packed, block, y + block * plan.columns, stride);
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

const Kernels kernels{scratch, packed, padded, pack, embed, project};

}  // namespace fastdiff::patch_embed::FASTDIFF_ISA
