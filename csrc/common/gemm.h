// Matrix products C (+)= A B of blocks that lie in cache, in float32: register tiles of kRows rows and up to kPanel vectors of columns.
// Include from *.simd.cpp alone.
#pragma once

#include "common/vec.h"

namespace fastdiff::FASTDIFF_ISA {

// A tile of 6 x 4 vectors is 24 accumulators of 32 registers and does 24 FMAs for 4 loads and 6 broadcasts: the FMA units are the limit.
// With 16 registers it is 6 x 2.
constexpr int kRows = 6, kPanel = kRegisters == 32 ? 4 : 2;

inline int vectors(int64_t columns) { return static_cast<int>((columns + kLanes - 1) / kLanes); }
inline int64_t padded(int64_t columns) { return int64_t{vectors(columns)} * kLanes; }
// A row in scratch: one vector more than whole ones, so that the rows of a column do not fall onto the same cache sets.
inline int64_t line(int64_t n) { return padded(n) + kLanes; }
inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// Columns in panels of at most kPanel vectors, as even as they go: 17 vectors are 4 + 4 + 3 + 3 + 3.
struct Panels {
  int count, least, wider;  // the first `wider` panels have one vector more than `least`
  explicit Panels(int vectors) : count((vectors + kPanel - 1) / kPanel), least(count ? vectors / count : 0), wider(count ? vectors % count : 0) {}
  int width(int p) const { return least + (p < wider); }
  int first(int p) const { return p * least + (p < wider ? p : wider); }
};

// B as panels that lie one after the other, each (K, width), or as rows of `stride` elements.
struct Matrix {
  const float* data;
  int64_t stride;  // 0: packed panels
};

// Element (i, k) at i * stride + k; at k * stride + i; or in slivers of kRows rows, each (K, kRows), which are read from end to end.
enum class A { rows, columns, slivers };

// Columns that end in the first half of a vector are computed in half a vector where it has 512 bits: cores that run those in two halves
// save one, and the others lose nothing.
typedef float half_f32 __attribute__((vector_size(2 * kLanes)));
inline bool ends_in_half(int64_t columns) { return kLanes == 16 && (columns - 1) % kLanes < kLanes / 2; }

// What multiplies: a and B hold floats, or pairs of bfloat16 in a float's bits, where the processor multiplies those. A product of two bfloat16
// is exact in float32, so that the sums are those of the same numbers as floats.
struct Floats {
  template <class V>
  static V add_product(V acc, float x, V row) { return acc + x * row; }
};
#if defined(__AVX512BF16__)
constexpr bool kPairs = true;
struct Pairs {
  static f32 add_product(f32 acc, float x, f32 row) { return (f32)_mm512_dpbf16_ps((__m512)acc, (__m512bh)_mm512_set1_ps(x), (__m512bh)row); }
  static half_f32 add_product(half_f32 acc, float x, half_f32 row) {
    return (half_f32)_mm256_dpbf16_ps((__m256)acc, (__m256bh)_mm256_set1_ps(x), (__m256bh)row);
  }
};
#else
constexpr bool kPairs = false;
using Pairs = Floats;
#endif
inline int64_t pairs(int64_t n) { return (n + 1) / 2; }
// Numbers of T are multiplied as floats, bfloat16 in pairs as they are where that can be.
template <class T>
struct Multiplied { using Math = Floats; static constexpr bool pairs = false; };
template <>
struct Multiplied<bf16> { using Math = Pairs; static constexpr bool pairs = kPairs; };
inline bool by_pairs(Type type) { return kPairs && type == Type::bf16; }

struct Unscaled {
  template <class V>
  friend V operator*(V x, Unscaled) { return x; }
};

// Where the sums of a product go: vector v, or half a vector, of row r of the tile at row i and column j. A sink that is staged is told with
// done() that a tile of (R, V) vectors is complete; and with fetch() of one after the other of them, n of R V, all through the tile before.
template <bool add, class Scale>
struct Stored {
  float* c;
  int64_t stride;
  Scale scale;
  static constexpr bool staged = false;
  template <class V>
  [[gnu::always_inline]] void operator()(int64_t i, int64_t j, int r, int v, V sum) const {
    float* out = c + (i + r) * stride + j + v * kLanes;
    sum = add ? load_as<V>(out) + sum : sum * scale;
    if constexpr (!add && sizeof(V) < sizeof(f32)) store(out, f32{});
    std::memcpy(out, &sum, sizeof sum);
  }
};

// V vectors of columns, the last one a half with `half`. Every element is one chain of FMAs over k from zero, whatever the tile: equal rows
// and columns give equal bits. Adding C last keeps the chain, and with it the rounding error, to the length of one block; so does `depth`, if
// it is not 0: the sums of so many k are added up.
template <int R, int V, bool half, A order, class Math, int depth, class Sink>
inline void tile(int64_t K, const float* a, int64_t a_stride, const float* b, int64_t b_stride, const Sink& sink, int64_t i, int64_t j) {
  constexpr int whole = V - half;
  f32 acc[R][V], part[R][V];
  half_f32 tail[R], part_tail[R];
  [[maybe_unused]] int64_t fetch = 0, fetched = 0;
  for (int64_t k = 0, end; ; k = end) {
    // Every loop over r and v is unrolled by name: left to itself, GCC keeps acc on the stack before and after the loop over k.
#pragma GCC unroll 6
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
      for (int v = 0; v < whole; ++v) acc[r][v] = f32{};
      tail[r] = half_f32{};
    }
    const int64_t begin = k;
    end = depth && k + depth < K ? k + depth : K;
    for (; k < end; ++k) {
      if constexpr (Sink::staged)
        if (k == fetch && fetched < R * V) {
          sink.template fetch<R, V>(i, j, fetched++);
          fetch += K < 2 * R * V ? 1 : K / (R * V);
        }
      f32 row[V];
      half_f32 last;
#pragma GCC unroll 4
      for (int v = 0; v < whole; ++v) row[v] = load(b + k * b_stride + v * kLanes);
      if constexpr (half) last = load_as<half_f32>(b + k * b_stride + whole * kLanes);
#pragma GCC unroll 6
      for (int r = 0; r < R; ++r) {
        const float x = order == A::rows ? a[r * a_stride + k] : a[k * (order == A::slivers ? kRows : a_stride) + r];
#pragma GCC unroll 4
        for (int v = 0; v < whole; ++v) acc[r][v] = Math::add_product(acc[r][v], x, row[v]);
        if constexpr (half) tail[r] = Math::add_product(tail[r], x, last);
      }
    }
    if constexpr (depth) {
      if (begin) {
#pragma GCC unroll 6
        for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
          for (int v = 0; v < whole; ++v) acc[r][v] += part[r][v];
          if constexpr (half) tail[r] += part_tail[r];
        }
      }
      if (end < K) {
#pragma GCC unroll 6
        for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
          for (int v = 0; v < whole; ++v) part[r][v] = acc[r][v];
          if constexpr (half) part_tail[r] = tail[r];
        }
        continue;
      }
    }
    break;
  }
#pragma GCC unroll 6
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < whole; ++v) sink(i, j, r, v, acc[r][v]);
    if constexpr (half) sink(i, j, r, whole, tail[r]);
  }
  if constexpr (Sink::staged) sink.done(i, j, R, V);
}

template <int V, bool half, A order, class Math, int depth, class Sink>
inline void panel(int64_t M, int64_t K, const float* a, int64_t a_stride, const float* b, int64_t b_stride, const Sink& sink, int64_t j) {
  const int64_t step = order == A::rows ? a_stride : order == A::slivers ? K : 1;
  int64_t i = 0;
  for (; i + kRows <= M; i += kRows) tile<kRows, V, half, order, Math, depth>(K, a + i * step, a_stride, b, b_stride, sink, i, j);
  a += i * step;
  switch (M - i) {
    case 1: return tile<1, V, half, order, Math, depth>(K, a, a_stride, b, b_stride, sink, i, j);
    case 2: return tile<2, V, half, order, Math, depth>(K, a, a_stride, b, b_stride, sink, i, j);
    case 3: return tile<3, V, half, order, Math, depth>(K, a, a_stride, b, b_stride, sink, i, j);
    case 4: return tile<4, V, half, order, Math, depth>(K, a, a_stride, b, b_stride, sink, i, j);
    case 5: return tile<5, V, half, order, Math, depth>(K, a, a_stride, b, b_stride, sink, i, j);
  }
}

// The sums of A (M, K) B (K, columns) to a sink; K counts floats or pairs. Panels beyond the first `wanted` columns are left out.
template <A order, class Math, int depth, class Sink>
void multiply(int64_t M, int64_t columns, int64_t K, const float* a, int64_t a_stride, Matrix b, const Sink& sink, int64_t wanted) {
  const Panels panels(vectors(columns));
  for (int p = 0; p < panels.count && panels.first(p) * kLanes < wanted; ++p) {
    const int width = panels.width(p), first = panels.first(p) * kLanes;
    const float* source = b.data + (b.stride ? first : first * K);
    const int64_t stride = b.stride ? b.stride : width * kLanes;
    const auto run = [&]<int V>() {
      if (p + 1 == panels.count && ends_in_half(columns)) panel<V, true, order, Math, depth>(M, K, a, a_stride, source, stride, sink, first);
      else panel<V, false, order, Math, depth>(M, K, a, a_stride, source, stride, sink, first);
    };
    switch (width) {
      case 1: run.template operator()<1>(); break;
      case 2: run.template operator()<2>(); break;
      case 3: if constexpr (kPanel > 2) run.template operator()<3>(); break;
      case 4: if constexpr (kPanel > 2) run.template operator()<4>(); break;
    }
  }
}

// C (M, columns) = scale A B, or += A B with add. C's columns beyond, up to a whole vector, become 0 if B's are.
template <A order, bool add, class Math = Floats, class Scale = Unscaled>
void gemm(int64_t M, int64_t columns, int64_t K, const float* a, int64_t a_stride, Matrix b, float* c, int64_t c_stride, Scale scale, int64_t wanted) {
  multiply<order, Math, 0>(M, columns, K, a, a_stride, b, Stored<add, Scale>{c, c_stride, scale}, wanted);
}

template <A order, bool add, class Math = Floats>
void gemm(int64_t M, int64_t columns, int64_t K, const float* a, int64_t a_stride, Matrix b, float* c, int64_t c_stride) {
  gemm<order, add, Math>(M, columns, K, a, a_stride, b, c, c_stride, Unscaled{}, columns);
}

// Rows of T to rows of float, scaled, padded with zeros to whole vectors: (rows, padded(columns)).
template <class T>
void pack_rows(int64_t rows, int64_t columns, const T* x, int64_t stride, float scale, float* out) {
  const int64_t width = padded(columns);
  for (int64_t i = 0; i < rows; ++i, x += stride, out += width) {
    int64_t j = 0;
    for (; j + kLanes <= columns; j += kLanes) store(out + j, load(x + j) * scale);
    if (j < columns) store(out + j, load_n(x + j, static_cast<int>(columns - j)) * scale);
  }
}

// Rows of T to packed panels of their transpose, scaled: B of K = columns, with the rows for its columns, padded with zeros.
template <class T, class Scale>
void pack_transposed(int64_t rows, int64_t columns, const T* x, int64_t stride, Scale scale, float* out) {
  const Panels panels(vectors(rows));
  for (int p = 0; p < panels.count; ++p) {
    const int width = panels.width(p) * kLanes;
    float* block = out + panels.first(p) * kLanes * columns;
    for (int r0 = 0; r0 < width; r0 += kLanes)
      for (int64_t j = 0; j < columns; j += kLanes) {
        const int n = static_cast<int>(columns - j < kLanes ? columns - j : kLanes);
        const int64_t row = panels.first(p) * kLanes + r0;
        f32 v[kLanes];
        for (int r = 0; r < kLanes; ++r) {
          const T* source = x + (row + r) * stride + j;
          __builtin_prefetch(source + kLanes * stride);
          v[r] = row + r >= rows ? f32{} : (n == kLanes ? load(source) : load_n(source, n)) * scale;
        }
        transpose(v);
        for (int e = 0; e < n; ++e) store(block + (j + e) * width + r0, v[e]);
      }
  }
}

// Rows of bfloat16 to rows of pairs, (rows, padded(pairs(columns))), padded with zeros.
inline void pack_pairs(int64_t rows, int64_t columns, const bf16* x, int64_t stride, float* out) {
  const int64_t width = padded(pairs(columns));
  for (int64_t i = 0; i < rows; ++i, x += stride, out += width) {
    if (2 * width != columns) store(out + width - kLanes, f32{});
    std::memcpy(out, x, columns * sizeof(bf16));
  }
}

// Rows of T, as they are, to packed panels of their transpose: B of a product over their columns, in pairs where the type's are multiplied.
// `room` is for the rows in pairs.
template <class T>
inline void pack_factor(int64_t rows, int64_t columns, const T* x, int64_t stride, float* room, float* out) {
  if constexpr (Multiplied<T>::pairs) {
    pack_pairs(rows, columns, x, stride, room);
    pack_transposed(rows, pairs(columns), room, padded(pairs(columns)), Unscaled{}, out);
  } else {
    pack_transposed(rows, columns, x, stride, Unscaled{}, out);
  }
}

// (depth, columns) in packed panels, from rows of it that are contiguous; with `paired`, rows 2 k and 2 k + 1 in one row of pairs.
template <bool paired, class T>
void pack_panels(int64_t depth, int64_t columns, const T* x, int64_t stride, float* out) {
  const Panels panels(vectors(columns));
  for (int p = 0; p < panels.count; ++p) {
    const int64_t first = panels.first(p) * kLanes, width = panels.width(p) * kLanes;
    for (int64_t k = 0; k < depth; k += 1 + paired, out += width)
      for (int64_t j = 0; j < width; j += kLanes) {
        const int64_t left = columns - first - j;
        const auto get = [&](const T* source) { return left >= kLanes ? load(source) : left > 0 ? load_n(source, static_cast<int>(left)) : f32{}; };
        const T* source = x + k * stride + first + j;
        if constexpr (paired) store(out + j, from_bits((bits(get(source)) >> 16) | bits(k + 1 < depth ? get(source + stride) : f32{})));
        else store(out + j, get(source));
      }
  }
}

// Columns of floats to slivers: A of a product over rows, whose rows are the columns.
inline void pack_slivers(int64_t rows, int64_t columns, const float* x, int64_t stride, float* out) {
  for (int64_t j = 0; j < columns; j += kRows, out += rows * kRows)
    for (int64_t i = 0; i < rows; ++i) std::memcpy(out + i * kRows, x + i * stride + j, kRows * sizeof(float));
}

// Two vectors of floats to pairs: lane l has a[l] and, in its upper half, b[l], rounded to nearest even.
inline f32 paired(f32 a, f32 b) {
#if defined(__AVX512BF16__)
  const u32 low = __builtin_convertvector((u16)_mm512_cvtneps_pbh((__m512)a), u32), high = __builtin_convertvector((u16)_mm512_cvtneps_pbh((__m512)b), u32);
#else
  const u32 low = __builtin_convertvector(from_f32(a, bf16{}), u32), high = __builtin_convertvector(from_f32(b, bf16{}), u32);
#endif
  return from_bits(low | (high << 16));
}

// Rows 2 i and 2 i + 1 of floats to row 2 i of pairs, in place: A or B of a product over rows. An odd last row is paired with zeros.
inline void pair_rows(int64_t rows, int64_t width, float* x, int64_t stride) {
  for (int64_t i = 0; i < rows; i += 2, x += 2 * stride)
    for (int64_t j = 0; j < width; j += kLanes) store(x + j, paired(load(x + j), i + 1 < rows ? load(x + stride + j) : f32{}));
}

// The same from rows of bfloat16: (pairs(rows), padded(columns)).
inline void pack_paired_rows(int64_t rows, int64_t columns, const bf16* x, int64_t stride, float* out) {
  const bf16 zeros[kLanes] = {};
  for (int64_t i = 0; i < rows; i += 2, x += 2 * stride, out += padded(columns))
    for_vectors(columns, [&](int64_t j, const auto& get, const auto&, int) {
      const f32 a = get(x + j), b = i + 1 < rows ? get(x + stride + j) : load(zeros);
      store(out + j, from_bits((bits(a) >> 16) | bits(b)));
    });
}

// Rows of float to rows of pairs of neighbours, of the same stride.
inline void pair_columns(int64_t rows, int64_t width, const float* x, int64_t stride, float* out) {
  for (int64_t i = 0; i < rows; ++i, x += stride, out += stride) {
    bf16* line = reinterpret_cast<bf16*>(out);
    for (int64_t j = 0; j < width; j += kLanes) store(line + j, load(x + j));
  }
}

// Rows of float to rows of T, each scaled by a number of its own.
template <class T>
inline void unpack_row(int64_t columns, const float* x, float scale, T* out) {
  int64_t j = 0;
  for (; j + kLanes <= columns; j += kLanes) store(out + j, load(x + j) * scale);
  if (j < columns) store_n(out + j, load(x + j) * scale, static_cast<int>(columns - j));
}

}  // namespace fastdiff::FASTDIFF_ISA
