#include "ops/patch_embed/patches.h"

namespace fastdiff::patch_embed::FASTDIFF_ISA {
namespace {

int64_t pixels(const Gradient& p) { return p.shape.patch[0] * p.shape.patch[1] * p.shape.patch[2]; }

// A slab's sums, in floats: blocks of patches^T tokens, rows of blocks one after the other; then those of the tokens and of the patches.
struct Slab {
  int64_t rows, columns, block, token_sums, patch_sums, total;
  Slab(const Gradient& p, const GradientPlan& plan) : rows(plan.channels * pixels(p)), columns(padded(plan.columns)), block(rows * columns) {
    token_sums = plan.row_blocks(p) * plan.column_blocks(p) * block;
    patch_sums = token_sums + plan.column_blocks(p) * columns;
    total = patch_sums + plan.row_blocks(p) * padded(rows);
  }
};

// What an item has in scratch, in floats: patches as a factor; their rows, in floats or pairs; as they lie in the image; tokens as a factor; sums
// of a few rows.
struct Layout {
  int64_t a_line, rows, lines, b, sums, total;
  Layout(const Slab& slab, const GradientPlan& plan) : a_line(line(slab.rows)) {
    rows = plan.depth * a_line;
    lines = rows + plan.depth * a_line;
    b = lines + plan.depth * a_line;
    sums = b + plan.depth * slab.columns;
    total = sums + (slab.columns > padded(slab.rows) ? slab.columns : padded(slab.rows));
  }
};

// A product's sums, added to what is there. It is fetched ahead: between two blocks of depth it may have left the L2.
struct Added : Stored<true, Unscaled> {
  static constexpr bool staged = true;
  template <int R, int V>
  [[gnu::always_inline]] void fetch(int64_t i, int64_t j, int64_t n) const {
    __builtin_prefetch(c + (i + R + n / V) * stride + j + n % V * kLanes, 1);
  }
  void done(int64_t, int64_t, int, int) const {}
};

int64_t partial(const Gradient& p, const GradientPlan& plan) { return Slab(p, plan).total; }
int64_t scratch(const Gradient& p, const GradientPlan& plan) { return Layout(Slab(p, plan), plan).total; }

// sums (+)= the sum of the rows: few rows at a time, so that rounding errors do not grow with all of them. room: a row.
template <class T>
void add_rows(int64_t rows, int64_t columns, const T* x, int64_t stride, bool first, float* room, float* sums) {
  for (int64_t i = 0; i < rows; ++i, x += stride)
    for_vectors(columns, [&](int64_t j, const auto& get, const auto&, int) { store(room + j, i ? load(room + j) + get(x + j) : get(x + j)); });
  for (int64_t j = 0; j < columns; j += kLanes) store(sums + j, first ? load(room + j) : load(sums + j) + load(room + j));
}

template <class T>
void sum_typed(const Gradient& p, const GradientPlan& plan, const Slab& slab, float* partials, int64_t item, float* scratch) {
  using Math = typename Multiplied<T>::Math;
  constexpr bool in_pairs = Multiplied<T>::pairs;
  const Layout at(slab, plan);
  const int64_t column_block = item % plan.column_blocks(p), rest = item / plan.column_blocks(p), row_block = rest % plan.row_blocks(p);
  const int64_t n0 = column_block * plan.columns, columns = least(plan.columns, p.N - n0), width = padded(columns);
  const int64_t c0 = row_block * plan.channels, channels = least(plan.channels, p.shape.channels - c0), K = channels * pixels(p);
  const int64_t begin = rest / plan.row_blocks(p) * plan.tokens, end = least(p.M, begin + plan.tokens);
  float* sums = partials + rest / plan.row_blocks(p) * slab.total;
  float* c = sums + (row_block * plan.column_blocks(p) + column_block) * slab.block;
  float *a = scratch, *rows = scratch + at.rows, *b = scratch + at.b, *room = scratch + at.sums;
  T* patches = reinterpret_cast<T*>(sizeof(T) == 4 ? rows : scratch + at.lines);
  for (int64_t m = begin; m < end; m += plan.depth) {
    const int64_t depth = least(plan.depth, end - m);
    const T* tokens = static_cast<const T*>(p.tokens) + m * p.N + n0;
    if (row_block == 0) add_rows(depth, columns, tokens, p.N, m == begin, room, sums + slab.token_sums + column_block * slab.columns);
    pack_panels<in_pairs>(depth, columns, tokens, p.N, b);
    move<T, true>(p.shape, c0, channels, static_cast<T*>(const_cast<void*>(p.image)), m, depth, patches, at.a_line);
    if (column_block == 0) add_rows(depth, K, patches, at.a_line, m == begin, room, sums + slab.patch_sums + row_block * padded(slab.rows));
    if constexpr (in_pairs) pack_paired_rows(depth, K, patches, at.a_line, rows);
    else if constexpr (sizeof(T) != 4)
      for (int64_t i = 0; i < depth; ++i) pack_rows(1, K, patches + i * at.a_line, 0, 1.0f, rows + i * at.a_line);
    const int64_t terms = in_pairs ? pairs(depth) : depth;
    pack_slivers(terms, K, rows, in_pairs ? padded(K) : at.a_line, a);
    if (m == begin) gemm<A::slivers, false, Math>(K, columns, terms, a, 0, {b, 0}, c, width);
    else multiply<A::slivers, Math, 0>(K, columns, terms, a, 0, {b, 0}, Added{{c, width, {}}}, columns);
  }
}

// The sum over slabs of a vector of each.
f32 total(const float* x, int64_t slabs, int64_t stride) {
  f32 sum = load(x);
  for (int64_t s = 1; s < slabs; ++s) sum += load(x + s * stride);
  return sum;
}

template <class T>
void write_sums(int64_t count, const float* x, int64_t slabs, int64_t stride, T* out) {
  for_vectors(count, [&](int64_t j, const auto&, const auto& put, int) { put(out + j, total(x + j, slabs, stride)); });
}

template <class T>
void write_typed(const Gradient& p, const GradientPlan& plan, const Slab& slab, const float* partials, int64_t strip) {
  const int64_t n0 = strip * plan.kStrip, count = least(plan.kStrip, p.N - n0), slabs = plan.slabs(p);
  const int64_t column_block = n0 / plan.columns, inside = n0 % plan.columns, width = padded(least(plan.columns, p.N - column_block * plan.columns));
  write_sums(count, partials + slab.token_sums + column_block * slab.columns + inside, slabs, slab.total, static_cast<T*>(p.token_sums) + n0);
  for (int64_t row_block = 0; row_block < plan.row_blocks(p); ++row_block) {
    const int64_t k0 = row_block * slab.rows, rows = least(slab.rows, p.K - k0);
    if (strip == 0) write_sums(rows, partials + slab.patch_sums + row_block * padded(slab.rows), slabs, slab.total, static_cast<T*>(p.patch_sums) + k0);
    const float* c = partials + (row_block * plan.column_blocks(p) + column_block) * slab.block + inside;
    if (!p.by_tokens) {
      for (int64_t i = 0; i < rows; ++i) write_sums(count, c + i * width, slabs, slab.total, static_cast<T*>(p.weight) + (k0 + i) * p.N + n0);
      continue;
    }
    for (int64_t j = 0; j < count; j += kLanes)
      for (int64_t i = 0; i < rows; i += kLanes) {
        f32 v[kLanes];
        for (int e = 0; e < kLanes; ++e) v[e] = i + e < rows ? total(c + (i + e) * width + j, slabs, slab.total) : f32{};
        transpose(v);
        T* out = static_cast<T*>(p.weight) + (n0 + j) * p.K + k0 + i;
        const int n = static_cast<int>(least(kLanes, rows - i));
        for (int e = 0; e < kLanes && j + e < count; ++e) store_n(out + e * p.K, v[e], n, false);
      }
  }
}

void sum(const Gradient& p, const GradientPlan& plan, float* partials, int64_t item, float* scratch) {
  const Slab slab(p, plan);
  typed(p.type, [&]<class T>() { sum_typed<T>(p, plan, slab, partials, item, scratch); });
}

void write(const Gradient& p, const GradientPlan& plan, const float* partials, int64_t strip) {
  const Slab slab(p, plan);
  typed(p.type, [&]<class T>() { write_typed<T>(p, plan, slab, partials, strip); });
}

}  // namespace

const Backward backward{partial, scratch, sum, write};

}  // namespace fastdiff::patch_embed::FASTDIFF_ISA
