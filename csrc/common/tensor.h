// What ops need of tensors. An eager entry `<op>_eager` computes and allocates in one call, for the plain case it can recognise in
// nanoseconds; it returns nothing when unsure, and the caller goes the long way, which checks everything and words every refusal.
// Include from op.cpp alone.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#if __has_include(<sys/mman.h>)
#include <sys/mman.h>
#endif

#include <array>
#include <cstdint>

#include "common/dtype.h"

namespace fastdiff {

inline Type type_of(const torch::stable::Tensor& x) {
  using torch::headeronly::ScalarType;
  switch (x.scalar_type()) {
    case ScalarType::BFloat16: return Type::bf16;
    case ScalarType::Half: return Type::f16;
    default: return Type::f32;
  }
}

// (B, H, S, E) with last stride 1: x, or one copy of it.
inline torch::stable::Tensor with_rows(const torch::stable::Tensor& x) {
  return x.stride(3) == 1 || x.size(3) == 1 ? x : torch::stable::contiguous(x);
}

inline bool is_native_float(const torch::stable::Tensor& x) {
  using torch::headeronly::ScalarType;
  const ScalarType type = x.scalar_type();
  return x.is_cpu() && (type == ScalarType::Float || type == ScalarType::BFloat16 || type == ScalarType::Half);
}

// Whether a contiguous result with rows of `row` elements is stored past the caches: it is larger than what a few cores share of the last of
// them, and its rows are whole cache lines.
inline bool past_caches(const torch::stable::Tensor& out, int64_t row) {
  const int64_t size = out.element_size();
  return out.numel() * size > int64_t{16} << 20 && row * size % 64 == 0 && reinterpret_cast<uintptr_t>(out.const_data_ptr()) % 64 == 0;
}

// Asks for huge pages under a large result that is about to be written, as torch does with THP_MEM_ALLOC_ENABLE=1 and numpy always. glibc maps
// 32 MiB and more anew at every allocation, and faulting that in page by page costs more than the work (32 MiB on a virtual Zen 4: 12 ms, with
// huge pages 4).
inline void prepare(const torch::stable::Tensor& out) {
#ifdef MADV_HUGEPAGE
  const uintptr_t bytes = out.numel() * out.element_size(), begin = reinterpret_cast<uintptr_t>(out.const_data_ptr()), page = 4096;
  const uintptr_t first = (begin + page - 1) / page * page, end = (begin + bytes) / page * page;
  if (bytes >= uintptr_t{32} << 20) madvise(reinterpret_cast<void*>(first), end - first, MADV_HUGEPAGE);
#endif
}

// Contiguous and uninitialised, on the CPU; without the dispatcher, which would cost a microsecond. type: torch's number of a dtype.
template <size_t rank>
torch::stable::Tensor empty(int32_t type, const std::array<int64_t, rank>& size) {
  std::array<int64_t, rank> stride;
  int64_t step = 1;
  for (size_t i = rank; i-- > 0; step *= size[i] > 1 ? size[i] : 1) stride[i] = step;
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(rank, size.data(), stride.data(), type, aoti_torch_device_type_cpu(), 0, &handle));
  const torch::stable::Tensor made(handle);
  prepare(made);
  return made;
}

template <size_t rank>
torch::stable::Tensor empty_like_type(const torch::stable::Tensor& x, const std::array<int64_t, rank>& size) {
  int32_t type;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(x.get(), &type));
  return empty(type, size);
}

template <size_t rank>
torch::stable::Tensor empty_floats(const std::array<int64_t, rank>& size) {
  return empty(aoti_torch_dtype_float32(), size);
}

}  // namespace fastdiff
