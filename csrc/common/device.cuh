// What kernels use of CUDA, under names that a test can replace: kernel.cuh files include this and other common/*.cuh, nothing of torch or
// CUDA. Without nvcc (tests/native) the same names come from its emulation.h, which runs kernels on the CPU and checks what they do.
//
//   Shared<T>, Global<T>     pointers to shared and to global memory: T*, checked when emulated. p[i], *p, p + i, p - q, p += i, null.
//                            s[i] of shared memory is a reference when emulated that converts to T: write `float x = s[i]`, never `auto`.
//                            Shared<T> turns into Shared<const T> where no template argument is to be deduced from it.
//   as<U>(p)                 the same memory as elements of U
//   Pack<T, n>, load<n>(p), store(p, pack)    n elements in one access, n sizeof(T) a power of two of at most 16 bytes, p aligned to it;
//                            pack[i] are elements
//   Arena                    shared memory of a block, taken from the front: Arena arena; Shared<T> s = arena.take<T>(n). A copy of an
//                            arena takes the same memory again. All shared memory is taken so: no __shared__ arrays.
//   arena_bytes<T>(n)        what take<T>(n) uses: a launch's shared memory is the sum
//   Launcher                 launcher(kernel, blocks, threads, shared bytes, arguments...): kernel.cuh launches through one that it is given;
//                            launcher.architecture: 80, 90, 100, for launch tables
//   bf16, f16, to_float(x), from_float<T>(x) (nearest even), pair<T>(low, high): two floats as the 32 bits of a fragment's register;
//   split<T>(bits, low, high): and back
//   exp2_approx(x), to_tf32(x): bits for mma (nearest, ties away)
//   barrier(id, threads)     bar.sync of some of a block's warps, id 1 to 15
//
// CUDA's own names that are emulated: threadIdx blockIdx blockDim gridDim dim3; __syncthreads(), _or _and _count; __syncwarp;
// __shfl[_up|_down|_xor]_sync, __ballot_sync, __any_sync, __all_sync; atomicAdd atomicMax atomicMin atomicExch atomicCAS on &p[i];
// __threadfence, _block; min max fminf fmaxf fmaf rsqrtf __expf exp2f __fdividef __ldg __float_as_uint __uint_as_float __popc __clz __ffs
// sincospif; #pragma unroll. Masks must name the lanes that take part, and __syncthreads wants every thread of the block.
#pragma once

#include <cstddef>
#include <cstdint>

#ifdef __CUDACC__

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

namespace fastdiff {

using bf16 = __nv_bfloat16;
using f16 = __half;

template <class T>
using Shared = T*;
template <class T>
using Global = T* __restrict__;

template <class U, class T>
__device__ __forceinline__ U* as(T* p) { return reinterpret_cast<U*>(p); }

template <class T, int n>
struct alignas(sizeof(T) * n) Pack {
  T value[n];
  __device__ __forceinline__ T& operator[](int i) { return value[i]; }
  __device__ __forceinline__ const T& operator[](int i) const { return value[i]; }
};

template <int n, class T>
__device__ __forceinline__ Pack<std::remove_const_t<T>, n> load(T* p) {
  return *reinterpret_cast<const Pack<std::remove_const_t<T>, n>*>(p);
}

template <class T, int n>
__device__ __forceinline__ void store(T* p, const Pack<T, n>& x) { *reinterpret_cast<Pack<T, n>*>(p) = x; }

template <class T>
constexpr __host__ __device__ size_t arena_bytes(size_t n) { return (n * sizeof(T) + 15) / 16 * 16; }

class Arena {
 public:
  __device__ __forceinline__ Arena() {
    extern __shared__ __align__(16) unsigned char memory[];
    next_ = memory;
  }
  template <class T>
  __device__ __forceinline__ Shared<T> take(size_t n) {
    T* taken = reinterpret_cast<T*>(next_);
    next_ += arena_bytes<T>(n);
    return taken;
  }

 private:
  unsigned char* next_;
};

struct Launcher {
  cudaStream_t stream;
  int architecture;

  template <class... P, class... A>
  void operator()(void (*kernel)(P...), dim3 blocks, dim3 threads, size_t shared, A... arguments) const {
    if (shared > 48 << 10) {
      const cudaError_t status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared));
      if (status != cudaSuccess) throw std::runtime_error(std::string("shared memory: ") + cudaGetErrorString(status));
    }
    kernel<<<blocks, threads, shared, stream>>>(arguments...);
  }
};

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(bf16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float to_float(f16 x) { return __half2float(x); }

template <class T>
__device__ __forceinline__ T from_float(float x) {
  if constexpr (std::is_same_v<T, bf16>) return __float2bfloat16_rn(x);
  else if constexpr (std::is_same_v<T, f16>) return __float2half_rn(x);
  else return x;
}

template <class T>
__device__ __forceinline__ uint32_t pair(float low, float high) {
  uint32_t bits;
  if constexpr (std::is_same_v<T, bf16>) asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
  else asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
  return bits;
}

template <class T>
__device__ __forceinline__ void split(uint32_t bits, float& low, float& high) {
  if constexpr (std::is_same_v<T, bf16>) {
    low = __uint_as_float(bits << 16), high = __uint_as_float(bits & 0xffff0000);
  } else {
    const float2 both = __half22float2(*reinterpret_cast<const __half2*>(&bits));
    low = both.x, high = both.y;
  }
}

__device__ __forceinline__ float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ uint32_t to_tf32(float x) {
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(x));
  return bits;
}

__device__ __forceinline__ void barrier(int id, int threads) { asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory"); }

}  // namespace fastdiff

#else
#include <emulation.h>
#endif
