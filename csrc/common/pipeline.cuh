// Asynchronous copies from global to shared memory (cp.async), by each thread for itself.
//
//   copy_async<n>(to, from, valid = true)    n elements, 4, 8 or 16 bytes, both sides aligned to that; zeros, and `from` is not read, if not valid
//   copy_async_commit()                      closes the group of copies begun since the last commit
//   copy_async_wait<n>()                     all but this thread's n latest groups have arrived; other threads see them after a barrier
#pragma once

#include "common/device.cuh"

#ifdef __CUDACC__

namespace fastdiff {

template <int n, class T>
__device__ __forceinline__ void copy_async(T* to, const T* from, bool valid = true) {
  constexpr int bytes = n * sizeof(T);
  static_assert(bytes == 4 || bytes == 8 || bytes == 16);
  const auto at = static_cast<uint32_t>(__cvta_generic_to_shared(to));
  const int read = valid ? bytes : 0;
  if constexpr (bytes == 16)  // past the first cache: it is read once by a block
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(at), "l"(from), "r"(read) : "memory");
  else
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(at), "l"(from), "n"(bytes), "r"(read) : "memory");
}

__device__ __forceinline__ void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

template <int n>
__device__ __forceinline__ void copy_async_wait() { asm volatile("cp.async.wait_group %0;" ::"n"(n) : "memory"); }

}  // namespace fastdiff

#else
#include <emulation_pipeline.h>
#endif
