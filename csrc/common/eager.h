// What the eager entries of ops share. An eager entry `<op>_eager` computes and allocates in one call, for the plain case it can recognise in
// nanoseconds; it returns nothing when unsure, and the caller goes the long way, which checks everything and words every refusal.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/tensor.h>

#include <array>

namespace fastdiff {

inline bool is_native_float(const torch::stable::Tensor& x) {
  using torch::headeronly::ScalarType;
  const ScalarType type = x.scalar_type();
  return x.is_cpu() && (type == ScalarType::Float || type == ScalarType::BFloat16 || type == ScalarType::Half);
}

// Contiguous and uninitialised, of x's dtype, on the CPU; without the dispatcher, which would cost a microsecond.
template <size_t rank>
torch::stable::Tensor empty_like_type(const torch::stable::Tensor& x, const std::array<int64_t, rank>& size) {
  std::array<int64_t, rank> stride;
  int64_t step = 1;
  for (size_t i = rank; i-- > 0; step *= size[i] > 1 ? size[i] : 1) stride[i] = step;
  int32_t type;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(x.get(), &type));
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(rank, size.data(), stride.data(), type, aoti_torch_device_type_cpu(), 0, &handle));
  return torch::stable::Tensor(handle);
}

}  // namespace fastdiff
