#include "ops/analog_bits/op.h"

#include "common/vec.h"

namespace fastdiff::analog_bits::FASTDIFF_ISA {
namespace {

using namespace fastdiff::FASTDIFF_ISA;

typedef uint8_t u8 __attribute__((vector_size(kLanes)));
typedef uint64_t u64 __attribute__((vector_size(8 * kLanes)));

constexpr int kWord = 32;

template <class F>
auto with_integer(Integer integer, F&& f) {
  switch (integer) {
    case Integer::u8: return f.template operator()<uint8_t>();
    case Integer::i32: return f.template operator()<int32_t>();
    default: return f.template operator()<int64_t>();
  }
}

// f(plane, first element, elements) for each piece.
template <class F>
void each_piece(const Shape& s, int64_t begin, int64_t end, const F& f) {
  for (int64_t i = begin; i < end; ++i) {
    const int64_t start = i % s.pieces * kPiece, left = s.size - start;
    f(i / s.pieces, start, left < kPiece ? left : kPiece);
  }
}

// The low and the high word of n integers; returns their union, in which a bit beyond `bits` betrays one that is out of range.
template <class I>
uint64_t words(const I* x, int64_t stride, int64_t n, uint32_t* low, uint32_t* high) {
  uint64_t all = 0;
  for (int64_t j = 0; j < n; ++j) {
    const int64_t value = x[j * stride];
    low[j] = static_cast<uint32_t>(value);
    if (high) high[j] = static_cast<uint32_t>(value >> kWord);
    all |= static_cast<uint64_t>(value);
  }
  return all;
}

bool encode(const Shape& s, const Integers& x, float scale, void* y, int64_t begin, int64_t end) {
  alignas(64) uint32_t low[kPiece + kLanes] = {}, high[kPiece + kLanes] = {};
  uint64_t all = 0;
  typed(s.type, [&]<class T>() {
    each_piece(s, begin, end, [&](int64_t plane, int64_t start, int64_t n) {
      uint32_t* more = s.bits > kWord ? high : nullptr;
      all |= with_integer(s.integer, [&]<class I>() {
        const I* from = static_cast<const I*>(x.data) + plane / s.channels * x.b + plane % s.channels * x.c + start * x.s;
        return x.s == 1 ? words(from, 1, n, low, more) : words(from, x.s, n, low, more);
      });
      for (int i = 0; i < s.bits; ++i) {
        const int bit = s.msb ? s.bits - 1 - i : i, up = kWord - 1 - bit % kWord;
        const uint32_t* word = bit < kWord ? low : high;
        T* py = static_cast<T*>(y) + (plane * s.bits + i) * s.size + start;
        // -scale with its sign turned where the bit is 1.
        for_vectors(n, [&](int64_t j, const auto&, const auto& put, int) {
          put(py + j, from_bits(bits(splat(-scale)) ^ ((load_as<u32>(word + j) << up) & 0x80000000u)));
        });
      }
    });
  });
  return (all >> s.bits) == 0;
}

template <int fixed, class T>
void pack(const Shape& s, const T* x, void* y, int64_t n) {
  const int count = fixed ? fixed : s.bits;
  const auto packed = [&](int64_t j, const auto& get, int first, int last) {
    u32 word = {};
    for (int bit = first; bit < last; ++bit) {
      const f32 value = get(x + (s.msb ? count - 1 - bit : bit) * s.size + j);
      word |= (u32)(value > 0.0f) & (1u << (bit - first));
    }
    return word;
  };
  for_vectors(n, [&](int64_t j, const auto& get, const auto&, int m) {
    const u32 low = packed(j, get, 0, count < kWord ? count : kWord);
    if (s.integer == Integer::u8) {
      const u8 narrow = __builtin_convertvector(low, u8);
      std::memcpy(static_cast<uint8_t*>(y) + j, &narrow, m);
    } else if (s.integer == Integer::i32) {
      std::memcpy(static_cast<int32_t*>(y) + j, &low, 4 * m);
    } else {
      u64 wide = __builtin_convertvector(low, u64);
      if (count > kWord) wide |= __builtin_convertvector(packed(j, get, kWord, count), u64) << kWord;
      std::memcpy(static_cast<int64_t*>(y) + j, &wide, 8 * m);
    }
  });
}

void decode(const Shape& s, const void* x, void* y, int64_t begin, int64_t end) {
  const int64_t width = s.integer == Integer::u8 ? 1 : s.integer == Integer::i32 ? 4 : 8;
  typed(s.type, [&]<class T>() {
    each_piece(s, begin, end, [&](int64_t plane, int64_t start, int64_t n) {
      const T* px = static_cast<const T*>(x) + plane * s.bits * s.size + start;
      void* py = static_cast<char*>(y) + (plane * s.size + start) * width;
      if (s.bits == 8) pack<8>(s, px, py, n);
      else pack<0>(s, px, py, n);
    });
  });
}

}  // namespace

const Kernels kernels{encode, decode};

}  // namespace fastdiff::analog_bits::FASTDIFF_ISA
