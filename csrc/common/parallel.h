// Work items over torch's own threads, each thread with scratch of its own. Include from op.cpp alone.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <memory>
#include <new>

namespace fastdiff {

struct Free {
  void operator()(float* p) const { std::free(p); }
};
using Buffer = std::unique_ptr<float[], Free>;

// Floats aligned to cache lines, null for none; throws std::bad_alloc.
inline Buffer allocate(int64_t floats) {
  if (floats == 0) return nullptr;
  const size_t bytes = (static_cast<size_t>(floats) * sizeof(float) + 63) / 64 * 64;
  Buffer buffer(static_cast<float*>(std::aligned_alloc(64, bytes)));
  if (!buffer) throw std::bad_alloc();
  return buffer;
}

// f(item, scratch) for every item, taken by whichever thread is free: what an item computes must not depend on its thread. Scratch is
// allocated before any thread starts, so that running out of memory is an exception in the caller.
template <class F>
void for_items(int64_t items, int64_t scratch_floats, const F& f) {
  const int64_t slots = std::min<int64_t>(items, torch::stable::get_num_threads());
  const int64_t stride = (scratch_floats + 15) / 16 * 16;
  const Buffer scratch = allocate(slots * stride);
  if (slots == 1) {
    for (int64_t item = 0; item < items; ++item) f(item, scratch.get());
    return;
  }
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, slots, 1, [&](int64_t begin, int64_t end) {
    for (int64_t slot = begin; slot < end; ++slot)
      for (int64_t item = next++; item < items; item = next++) f(item, scratch.get() + slot * stride);
  });
}

}  // namespace fastdiff
