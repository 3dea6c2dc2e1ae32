// What ops need of tensors. An eager entry `<op>_eager` computes and allocates in one call, for the plain case it can recognise in
// nanoseconds; it returns nothing when unsure, and the caller goes the long way, which checks everything and words every refusal.
// Include from op.cpp alone.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <unistd.h>

#if __has_include(<sys/mman.h>)
#include <sys/mman.h>
#endif

#include <algorithm>
#include <array>
#include <cstdint>
#include <initializer_list>
#include <optional>

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

// Whether a pass over `arrays` arrays of the result's size takes more than a quarter of the last-level cache (of 32 MiB where its size is not
// known): from there on writing past it is faster (1.2 times at 9 MB, 1.8 times at 19 MB, of 32 MB that other cores use too, on Zen 4).
inline bool past_caches(const torch::stable::Tensor& out, int64_t arrays) {
  static const int64_t share = [] {
    int64_t bytes = 0;
#ifdef _SC_LEVEL3_CACHE_SIZE
    bytes = sysconf(_SC_LEVEL3_CACHE_SIZE);
#endif
    return (bytes > 0 ? bytes : int64_t{32} << 20) / 4;
  }();
  return arrays * out.numel() * static_cast<int64_t>(out.element_size()) > share;
}

// Whether rows of `row` elements of a contiguous result are whole cache lines.
inline bool whole_lines(const torch::stable::Tensor& out, int64_t row) {
  return row * static_cast<int64_t>(out.element_size()) % 64 == 0 && reinterpret_cast<uintptr_t>(out.const_data_ptr()) % 64 == 0;
}

// Asks for huge pages under a large result that is about to be written, as torch does with THP_MEM_ALLOC_ENABLE=1 and numpy always. What glibc
// maps anew, and what it gave back at the last release, is faulted in page by page else, which costs more than the work (on a virtual Zen 4
// 9 MB take 5 ms, with huge pages 2; 40 MB 22 and 6).
inline void prepare(const torch::stable::Tensor& out) {
#ifdef MADV_HUGEPAGE
  const uintptr_t bytes = out.numel() * out.element_size(), begin = reinterpret_cast<uintptr_t>(out.const_data_ptr()), page = 4096;
  const uintptr_t first = (begin + page - 1) / page * page, end = (begin + bytes) / page * page;
  if (bytes >= uintptr_t{2} << 20) madvise(reinterpret_cast<void*>(first), end - first, MADV_HUGEPAGE);
#endif
}

constexpr size_t kRank = 8;  // most axes that an eager entry takes

inline int32_t torch_type(const torch::stable::Tensor& x) {
  int32_t type;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(x.get(), &type));
  return type;
}

inline torch::stable::Tensor empty_strided(int32_t type, size_t rank, const int64_t* size, const int64_t* stride) {
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(rank, size, stride, type, aoti_torch_device_type_cpu(), 0, &handle));
  const torch::stable::Tensor made(handle);
  prepare(made);
  return made;
}

// Contiguous and uninitialised, on the CPU; without the dispatcher, which would cost a microsecond. type: torch's number of a dtype.
inline torch::stable::Tensor empty(int32_t type, size_t rank, const int64_t* size) {
  int64_t stride[kRank], step = 1;
  for (size_t i = rank; i-- > 0; step *= size[i] > 1 ? size[i] : 1) stride[i] = step;
  return empty_strided(type, rank, size, stride);
}

template <size_t rank>
torch::stable::Tensor empty(int32_t type, const std::array<int64_t, rank>& size) {
  return empty(type, rank, size.data());
}

template <size_t rank>
torch::stable::Tensor empty_like_type(const torch::stable::Tensor& x, const std::array<int64_t, rank>& size) {
  return empty(torch_type(x), size);
}

template <size_t rank>
torch::stable::Tensor empty_floats(const std::array<int64_t, rank>& size) {
  return empty(aoti_torch_dtype_float32(), size);
}

// A tensor as x, in the memory order that a result has: contiguous or, of four axes, channels last; nothing where x is dense in neither.
inline std::optional<torch::stable::Tensor> empty_as(const torch::stable::Tensor& x) {
  const auto size = x.sizes(), stride = x.strides();
  const int64_t rank = x.dim();
  if (rank > static_cast<int64_t>(kRank)) return std::nullopt;
  if (x.is_contiguous()) return empty(torch_type(x), rank, size.data());
  if (rank != 4) return std::nullopt;
  int64_t step = 1, wanted[kRank];
  for (const int64_t axis : {1, 3, 2, 0}) {
    if (stride[axis] != step) return std::nullopt;
    wanted[axis] = step;
    step *= std::max<int64_t>(size[axis], 1);
  }
  return empty_strided(torch_type(x), rank, size.data(), wanted);
}

// Whether x is an operand (sizes ...) beside a tensor of native floats: of its dtype, or float32.
inline bool is_beside(const std::optional<torch::stable::Tensor>& x, const torch::stable::Tensor& beside, std::initializer_list<int64_t> sizes) {
  if (!x) return true;
  const bool alike = x->is_cpu() && (x->scalar_type() == beside.scalar_type() || x->scalar_type() == torch::headeronly::ScalarType::Float);
  return alike && x->dim() == static_cast<int64_t>(sizes.size()) && std::equal(sizes.begin(), sizes.end(), x->sizes().begin());
}

}  // namespace fastdiff
