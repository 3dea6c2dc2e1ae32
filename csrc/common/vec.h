// SIMD vectors in the compiler's own vector types: one source for SSE2, AVX2, AVX-512 and what else GCC or Clang target.
// Include from *.simd.cpp alone: everything here lives in a namespace of its ISA.
#pragma once

#include <cstdint>
#include <cstring>
#include <utility>

#include "common/dtype.h"

#if defined(__F16C__)
#include <immintrin.h>
#endif

namespace fastdiff::FASTDIFF_ISA {

#if defined(__AVX512F__)
constexpr int kLanes = 16, kRegisters = 32;
#elif defined(__AVX2__)
constexpr int kLanes = 8, kRegisters = 16;
#else
constexpr int kLanes = 4, kRegisters = 16;
#endif

typedef float f32 __attribute__((vector_size(4 * kLanes)));
typedef int32_t i32 __attribute__((vector_size(4 * kLanes)));
typedef uint32_t u32 __attribute__((vector_size(4 * kLanes)));
typedef uint16_t u16 __attribute__((vector_size(2 * kLanes)));

// Storage types; arithmetic is in float32.
struct bf16 { uint16_t bits; };
struct f16 { uint16_t bits; };

// f<T>() with T the storage type.
template <class F>
inline void typed(Type type, F&& f) {
  switch (type) {
    case Type::f32: return f.template operator()<float>();
    case Type::bf16: return f.template operator()<bf16>();
    case Type::f16: return f.template operator()<f16>();
  }
}

inline f32 splat(float x) { return x - f32{}; }
inline u32 splat(uint32_t x) { return x - u32{}; }
inline u32 bits(f32 x) { return reinterpret_cast<u32>(x); }
inline f32 from_bits(u32 x) { return reinterpret_cast<f32>(x); }

// f(0), f(1), ... as a constant vector: written by a loop, GCC assembles it again at every use.
template <class F, size_t... lane>
constexpr u32 lanes(F f, std::index_sequence<lane...>) {
  return u32{static_cast<uint32_t>(f(static_cast<int>(lane)))...};
}
template <class F>
constexpr u32 lanes(F f) {
  return lanes(f, std::make_index_sequence<kLanes>());
}

template <class V, class T>
inline V load_as(const T* p) {
  V v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

inline f32 to_f32(u16 h, bf16) { return from_bits(__builtin_convertvector(h, u32) << 16); }

inline u16 nearest_bf16(f32 x) {
  const u32 b = bits(x);
  // Nearest even; a NaN keeps its top bits and is made quiet, since rounding could carry it into infinity.
  const u32 rounded = (b + 0x7fffu + ((b >> 16) & 1u)) >> 16;
  const u32 nan = (b >> 16) | 0x40u;
  return __builtin_convertvector(x != x ? nan : rounded, u16);
}

#if defined(__AVX512BF16__)
// The processor's own conversion gives the same bits, but takes subnormal numbers for 0.
inline u16 from_f32(f32 x, bf16) {
  if (__builtin_expect(_mm512_fpclass_ps_mask((__m512)x, 0x20) != 0, 0)) return nearest_bf16(x);
  return (u16)_mm512_cvtneps_pbh((__m512)x);
}
#else
inline u16 from_f32(f32 x, bf16) { return nearest_bf16(x); }
#endif

#if defined(__AVX512F__)
// The zero-masking forms: GCC 12 warns of the undefined merge operand inside the plain ones.
inline f32 to_f32(u16 h, f16) { return (f32)_mm512_maskz_cvtph_ps(0xffff, (__m256i)h); }
inline u16 from_f32(f32 x, f16) { return (u16)_mm512_maskz_cvtps_ph(0xffff, (__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
#elif defined(__F16C__)
inline f32 to_f32(u16 h, f16) { return (f32)_mm256_cvtph_ps((__m128i)h); }
inline u16 from_f32(f32 x, f16) { return (u16)_mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
#else
inline f32 to_f32(u16 h, f16) {
  const u32 b = __builtin_convertvector(h, u32);
  // Exponent and mantissa moved into place are the value times 2^-112, subnormals included; infinity and NaN get float32's exponent.
  f32 magnitude = from_bits((b & 0x7fffu) << 13) * 0x1p112f;
  magnitude = from_bits((b & 0x7c00u) == 0x7c00u ? (bits(magnitude) | 0x7f800000u) : bits(magnitude));
  return from_bits(bits(magnitude) | ((b & 0x8000u) << 16));
}

inline u16 from_f32(f32 x, f16) {
  const u32 b = bits(x), sign = (b >> 16) & 0x8000u, a = b & 0x7fffffffu;
  const u32 normal = (a - 0x38000000u + 0xfffu + ((a >> 13) & 1u)) >> 13;
  // Below 2^-14 the grid is fixed: adding 0.5 lets the float32 adder round to it, and the low bits of the sum are the subnormal.
  const u32 subnormal = bits(from_bits(a) + 0.5f) - 0x3f000000u;
  u32 h = a < 0x38800000u ? subnormal : normal;
  h = a >= 0x477ff000u ? splat(0x7c00u) : h;
  h = a > 0x7f800000u ? (0x7e00u | ((a >> 13) & 0x3ffu)) : h;
  return __builtin_convertvector(h | sign, u16);
}
#endif

// x, rounded where it stands: not part of a fused multiply-add.
inline f32 unfused(f32 x) {
#if defined(__x86_64__)
  asm("" : "+x"(x));
#elif defined(__aarch64__)
  asm("" : "+w"(x));
#endif
  return x;
}

inline f32 load(const float* p) { return load_as<f32>(p); }
inline f32 load(const bf16* p) { return to_f32(load_as<u16>(p), bf16{}); }
inline f32 load(const f16* p) { return to_f32(load_as<u16>(p), f16{}); }
inline void store(float* p, f32 x) { std::memcpy(p, &x, sizeof x); }
template <class T>
inline void store(T* p, f32 x) {
  const u16 h = from_f32(x, T{});
  std::memcpy(p, &h, sizeof h);
}

// The first n < kLanes elements; the other lanes read as zero and are not written.
template <class T>
inline f32 load_n(const T* p, int n) {
  T t[kLanes] = {};
  std::memcpy(t, p, n * sizeof(T));
  return load(t);
}
#if defined(__AVX512F__)
inline f32 load_n(const float* p, int n) { return (f32)_mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << n) - 1), p); }
#endif
template <class T>
inline void store_n(T* p, f32 x, int n) {
  T t[kLanes];
  store(t, x);
  std::memcpy(p, t, n * sizeof(T));
}

#if defined(__AVX512F__)
inline void store_n(float* p, f32 x, int n) { _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1u << n) - 1), (__m512)x); }
#endif

// Stores past the caches, for results that do not fit there: the line is not read first. p is a multiple of the vector's size;
// stream_end() orders them before what the thread writes next.
#if defined(__AVX512F__)
inline void stream(float* p, f32 x) { _mm512_stream_ps(p, (__m512)x); }
template <class T>
inline void stream(T* p, f32 x) { _mm256_stream_si256(reinterpret_cast<__m256i*>(p), (__m256i)from_f32(x, T{})); }
inline void stream_end() { _mm_sfence(); }
#elif defined(__AVX2__)
inline void stream(float* p, f32 x) { _mm256_stream_ps(p, (__m256)x); }
template <class T>
inline void stream(T* p, f32 x) { _mm_stream_si128(reinterpret_cast<__m128i*>(p), (__m128i)from_f32(x, T{})); }
inline void stream_end() { _mm_sfence(); }
#else
template <class T>
inline void stream(T* p, f32 x) { store(p, x); }
inline void stream_end() {}
#endif

// The first n elements; past the caches if that is so, and then they are a whole vector.
template <class T>
inline void store_n(T* p, f32 x, int n, bool past_caches) {
  if (past_caches) stream(p, x);
  else if (n == kLanes) store(p, x);
  else store_n(p, x, n);
}

// f(j, load, store, n) for every vector of `count` elements from j on, n of them: kLanes, and in the last what remains.
template <class F>
inline void for_vectors(int64_t count, const F& f) {
  int64_t j = 0;
  for (; j + kLanes <= count; j += kLanes) f(j, [](const auto* p) { return load(p); }, [](auto* p, f32 x) { store(p, x); }, kLanes);
  if (const int n = static_cast<int>(count - j))
    f(j, [n](const auto* p) { return load_n(p, n); }, [n](auto* p, f32 x) { store_n(p, x, n); }, n);
}

// The same with f(chain, j, load, store, n): neighbouring vectors belong to different ones of 4 chains, so that a sum kept per chain does
// not wait for itself.
template <class F>
inline void for_chains(int64_t count, const F& f) {
  int64_t j = 0;
  for (; j + 4 * kLanes <= count; j += 4 * kLanes)
#pragma GCC unroll 4
    for (int u = 0; u < 4; ++u) f(u, j + u * kLanes, [](const auto* p) { return load(p); }, [](auto* p, f32 x) { store(p, x); }, kLanes);
  for_vectors(count - j, [&](int64_t k, const auto& get, const auto& put, int n) { f(0, j + k, get, put, n); });
}

// p[j] = f(j, load) for `count` elements, a vector at a time. past: written past the cache where p is aligned.
template <class T, class F>
inline void fill(T* p, int64_t count, bool past, const F& f) {
  int64_t j = 0;
  if (past && reinterpret_cast<uintptr_t>(p) % (kLanes * sizeof(T)) == 0) {
    for (; j + kLanes <= count; j += kLanes) stream(p + j, f(j, [](const auto* q) { return load(q); }));
    stream_end();
  }
  for_vectors(count - j, [&](int64_t i, const auto& get, const auto& put, int) { put(p + j + i, f(j + i, get)); });
}

// x in the first n lanes, `other` beyond.
inline f32 keep_n(f32 x, int n, float other) {
  constexpr u32 lane = lanes([](int l) { return l; });
  return lane < static_cast<uint32_t>(n) ? x : splat(other);
}

template <class T>
inline float load_one(const T* p) {
  if constexpr (sizeof(T) == 4) return *p;
  else return load_n(p, 1)[0];
}

inline f32 max(f32 a, f32 b) { return a > b ? a : b; }

// Lane 0 after halving the vector onto itself; the order of the operations is that of the lanes' tree.
template <int half = kLanes / 2, class Op>
inline float reduce(f32 v, Op op) {
  constexpr u32 other = lanes([](int l) { return (l + half) % kLanes; });
  v = op(v, __builtin_shuffle(v, other));
  if constexpr (half > 1) return reduce<half / 2>(v, op);
  else return v[0];
}
inline float reduce_max(f32 v) { return reduce(v, [](f32 a, f32 b) { return max(a, b); }); }
inline float reduce_add(f32 v) { return reduce(v, [](f32 a, f32 b) { return a + b; }); }

// e^x for x < 88; 0 below -104 at the latest; NaN stays. Relative error 1e-7 (1 + |x| / 2). x log2(e) is split into the nearest integer n and
// a remainder in [-1/2, 1/2]; the remainder's power of 2 is the minimax polynomial of degree 6 (relative error 2e-9), n goes into the exponent.
inline f32 exp(f32 x) {
  x *= 0x1.715476p+0f;
#if defined(__AVX512F__)
  const f32 n = (f32)_mm512_maskz_roundscale_ps(0xffff, (__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
  x = x < -127.0f ? splat(-127.0f) : x;
  const f32 shifted = x + 0x1.8p23f, n = shifted - 0x1.8p23f;  // rounds, and leaves the integer in the low bits
#endif
  const f32 r = x - n;
  f32 p = r * 0x1.41d334p-13f + 0x1.5f456ap-10f;
  p = p * r + 0x1.3b2dbcp-7f;
  p = p * r + 0x1.c6aed4p-5f;
  p = p * r + 0x1.ebfbdap-3f;
  p = p * r + 0x1.62e430p-1f;
  p = p * r + 1.0f;
#if defined(__AVX512F__)
  return (f32)_mm512_maskz_scalef_ps(0xffff, (__m512)p, (__m512)n);  // p = NaN, n = -inf: 0
#else
  return p * from_bits((bits(shifted) << 23) + 0x3f800000u);
#endif
}

// 1 / x of a normal x, to a rounding or two.
inline f32 reciprocal(f32 x) {
#if defined(__AVX512F__)
  const f32 r = (f32)_mm512_maskz_rcp14_ps(0xffff, (__m512)x);
  return r * (2.0f - x * r);  // a division would take three times as long
#else
  return 1.0f / x;
#endif
}

// 1 / (1 + e^-x); 0 below -87.9, and a number for NaN.
inline f32 sigmoid(f32 x) { return x < -87.9f ? f32{} : reciprocal(1.0f + exp(-x < 87.9f ? -x : splat(87.9f))); }

// Round h of a transposition of kLanes vectors exchanges the off-diagonal blocks of size h of each pair a = v[i], b = v[i + h].
template <int h>
inline f32 upper(f32 a, f32 b) {
  constexpr u32 from = lanes([](int l) { return l & h ? kLanes + l - h : l; });
  return __builtin_shuffle(a, b, from);
}
template <int h>
inline f32 lower(f32 a, f32 b) {
  constexpr u32 from = lanes([](int l) { return l & h ? kLanes + l : l + h; });
  return __builtin_shuffle(a, b, from);
}

// v[i][j] -> v[j][i] in registers.
template <int h = 1>
inline void transpose(f32 (&v)[kLanes]) {
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i)
    if (!(i & h)) {
      const f32 a = v[i], b = v[i + h];
      v[i] = upper<h>(a, b);
      v[i + h] = lower<h>(a, b);
    }
  if constexpr (2 * h < kLanes) transpose<2 * h>(v);
}

// Lane i of the result is v[i] reduced over its lanes: a transposition whose pairs are joined at once. v is used up.
template <int h = 1, class Op>
inline f32 reduce_each(f32 (&v)[kLanes], Op op) {
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; i += 2 * h) v[i] = op(upper<h>(v[i], v[i + h]), lower<h>(v[i], v[i + h]));
  if constexpr (2 * h < kLanes) return reduce_each<2 * h>(v, op);
  else return v[0];
}

}  // namespace fastdiff::FASTDIFF_ISA
