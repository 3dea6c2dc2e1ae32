#include "ops/patch_embed/patches.h"

namespace fastdiff::patch_embed::FASTDIFF_ISA {
namespace {

// What an item has in scratch, in floats: rows of A; products; rows as they lie in the image, or on their way to A.
struct Layout {
  int64_t a_line, products, lines, total;
  Layout(const Problem& p, const Plan& plan) : a_line(line(by_pairs(p.type) ? pairs(p.K) : p.K)) {
    products = plan.rows * a_line;
    lines = products + plan.rows * line(p.N);
    total = lines + plan.rows * line(p.K > p.N ? p.K : p.N);
  }
};

int64_t scratch(const Problem& p, const Plan& plan) { return Layout(p, plan).total; }

int64_t packed(const Problem& p, const Plan& plan) { return plan.packs(p) * padded(plan.columns) * p.K; }

void pack(const Problem& p, const Plan& plan, int64_t block, float* packed, float* scratch) {
  const int64_t n0 = block * plan.columns, columns = least(plan.columns, p.N - n0);
  float* out = packed + block * padded(plan.columns) * p.K;
  typed(p.type, [&]<class T>() {
    const T* weight = static_cast<const T*>(p.weight.data) + n0 * p.weight.row;
    if (p.weight.column == 1) pack_factor(columns, p.K, weight, p.weight.row, scratch, out);
    else pack_panels<Multiplied<T>::pairs>(p.K, columns, weight, p.weight.column, out);
  });
}

// Rows of y, and of the positions beside them, that a product's sums go to by way of a tile in L1.
struct Rows {
  const Problem& p;
  char* y;                      // the first row
  const char* const* position;  // every row's, if there are any
  int64_t rows, first;          // the column of y that the product's first one is
  float* stage;
  void (*finish)(const Rows&, int64_t i, int64_t j, int64_t rows, int64_t columns);

  static constexpr bool staged = true;
  template <class V>
  [[gnu::always_inline]] void operator()(int64_t, int64_t, int r, int v, V sum) const {
    std::memcpy(stage + (r * kPanel + v) * kLanes, &sum, sizeof sum);
  }
  template <int R, int V>
  [[gnu::always_inline]] void fetch(int64_t i, int64_t j, int64_t n) const {
    int64_t row = i + R + n / V, column = first + j + n % V * kLanes;
    if (row >= rows) row -= rows, column += V * kLanes;
    const int64_t size = p.type == Type::f32 ? 4 : 2;
    if (p.position) __builtin_prefetch(position[row] + column * size);
    if (!p.past_caches) __builtin_prefetch(y + (row * p.N + column) * size, 1);
  }
  void done(int64_t i, int64_t j, int R, int V) const { finish(*this, i, first + j, R, least(V * kLanes, p.N - first - j)); }
};

template <class T, bool placed, bool past_caches>
void finish_panel(const float* sums, int64_t rows, const T* bias, const char* const* position, int64_t j, T* y, int64_t stride) {
  f32 b[kPanel];
#pragma GCC unroll 4
  for (int v = 0; v < kPanel; ++v) b[v] = bias ? load(bias + v * kLanes) : f32{};
  for (int64_t r = 0; r < rows; ++r, sums += kPanel * kLanes, y += stride) {
#pragma GCC unroll 4
    for (int v = 0; v < kPanel; ++v) {
      f32 sum = load(sums + v * kLanes) + b[v];
      if constexpr (placed) sum += load(reinterpret_cast<const T*>(position[r]) + j + v * kLanes);
      if constexpr (past_caches) stream(y + v * kLanes, sum);
      else store(y + v * kLanes, sum);
    }
  }
}

template <class T>
void finish(const Rows& to, int64_t i, int64_t j, int64_t rows, int64_t columns) {
  const T* bias = to.p.bias ? static_cast<const T*>(to.p.bias) + j : nullptr;
  const char* const* position = to.position + i;
  T* y = reinterpret_cast<T*>(to.y) + i * to.p.N + j;
  if (columns == kPanel * kLanes) {
    const auto run = to.p.position ? to.p.past_caches ? finish_panel<T, true, true> : finish_panel<T, true, false>
                     : to.p.past_caches ? finish_panel<T, false, true> : finish_panel<T, false, false>;
    return run(to.stage, rows, bias, position, j, y, to.p.N);
  }
  for (int64_t r = 0; r < rows; ++r)
    for_vectors(columns, [&](int64_t v, const auto& get, const auto&, int n) {
      f32 sum = load(to.stage + r * kPanel * kLanes + v);
      if (bias) sum += get(bias + v);
      if (to.p.position) sum += get(reinterpret_cast<const T*>(position[r]) + j + v);
      store_n(y + r * to.p.N + v, sum, n, to.p.past_caches);
    });
}

// Sums are made so many terms at a time.
constexpr int kDepth = 256;

// A W^T by blocks of columns: sink(n0) takes those from n0 on.
template <class T, class Sink>
void product(const Problem& p, const Plan& plan, int64_t rows, const float* a, int64_t a_line, const float* packed, const Sink& sink) {
  for (int64_t n0 = 0; n0 < p.N; n0 += plan.columns, packed += padded(plan.columns) * p.K) {
    const int64_t columns = least(plan.columns, p.N - n0), terms = Multiplied<T>::pairs ? pairs(p.K) : p.K;
    multiply<A::rows, typename Multiplied<T>::Math, kDepth>(rows, columns, terms, a, a_line, {packed, 0}, sink(n0), columns);
  }
}

template <class T>
void embed_typed(const Problem& p, const Plan& plan, const T* image, const float* packed, T* y, int64_t item, float* scratch) {
  const Layout at(p, plan);
  const int64_t m0 = item * plan.rows, rows = least(plan.rows, p.M - m0), tokens = p.shape.tokens();
  constexpr bool as_they_are = sizeof(T) == 4 || Multiplied<T>::pairs;
  const int64_t stride = as_they_are ? at.a_line * 4 / static_cast<int64_t>(sizeof(T)) : line(p.K);
  T* patches = reinterpret_cast<T*>(as_they_are ? scratch : scratch + at.lines);
  if (Multiplied<T>::pairs && p.K % 2)
    for (int64_t i = 0; i < rows; ++i) patches[i * stride + p.K] = T{};
  move<T, true>(p.shape, 0, p.shape.channels, const_cast<T*>(image), m0, rows, patches, stride);
  if constexpr (!as_they_are)
    for (int64_t i = 0; i < rows; ++i) pack_rows(1, p.K, patches + i * stride, 0, 1.0f, scratch + i * at.a_line);
  const char* position[kRowsAtMost];
  for (int64_t i = 0; p.position && i < rows; ++i) position[i] = reinterpret_cast<const char*>(static_cast<const T*>(p.position) + (m0 + i) % tokens * p.N);
  alignas(64) float stage[kRows * kPanel * kLanes];
  char* first = reinterpret_cast<char*>(y + m0 * p.N);
  product<T>(p, plan, rows, scratch, at.a_line, packed, [&](int64_t n0) { return Rows{p, first, position, rows, n0, stage, finish<T>}; });
  if (p.past_caches) stream_end();
}

template <class T>
void project_typed(const Problem& p, const Plan& plan, const T* tokens, const float* packed, T* image, int64_t item, float* scratch) {
  const Layout at(p, plan);
  const int64_t m0 = item * plan.rows, rows = least(plan.rows, p.M - m0), stride = line(p.N);
  const T* x = tokens + m0 * p.K;
  const float* a = sizeof(T) == 4 ? reinterpret_cast<const float*>(x) : scratch;
  for (int64_t i = 0; sizeof(T) != 4 && i < rows; ++i) {
    float* row = scratch + i * at.a_line;
    if constexpr (Multiplied<T>::pairs) pack_pairs(1, p.K, x + i * p.K, 0, row);
    else pack_rows(1, p.K, x + i * p.K, 0, 1.0f, row);
  }
  float* y = scratch + at.products;
  product<T>(p, plan, rows, a, sizeof(T) == 4 ? p.K : at.a_line, packed,
             [&](int64_t n0) { return Stored<false, Unscaled>{y + n0, stride, {}}; });
  T* patches = reinterpret_cast<T*>(sizeof(T) == 4 ? y : scratch + at.lines);
  if (sizeof(T) != 4 || p.bias)
    for (int64_t i = 0; i < rows; ++i)
      for_vectors(p.N, [&](int64_t j, const auto& get, const auto& put, int) {
        f32 sum = load(y + i * stride + j);
        if (p.bias) sum += get(static_cast<const T*>(p.bias) + j);
        put(patches + i * stride + j, sum);
      });
  move<T, false>(p.shape, 0, p.shape.channels, image, m0, rows, patches, stride);
}

void embed(const Problem& p, const Plan& plan, const void* image, const float* packed, void* y, int64_t item, float* scratch) {
  typed(p.type, [&]<class T>() { embed_typed(p, plan, static_cast<const T*>(image), packed, static_cast<T*>(y), item, scratch); });
}

void project(const Problem& p, const Plan& plan, const void* tokens, const float* packed, void* image, int64_t item, float* scratch) {
  typed(p.type, [&]<class T>() { project_typed(p, plan, static_cast<const T*>(tokens), packed, static_cast<T*>(image), item, scratch); });
}

}  // namespace

const Forward forward{scratch, packed, padded, pack, embed, project};

}  // namespace fastdiff::patch_embed::FASTDIFF_ISA
