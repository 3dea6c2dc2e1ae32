// Kernel launches from stable-ABI ops: device guard, torch's current stream, launch check.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/tensor.h>

#include "common/device.cuh"

namespace fastdiff {

inline void cuda_check(cudaError_t status, const char* what) {
  if (status != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(status));
}

template <class T>
T* data(const torch::stable::Tensor& x) { return static_cast<T*>(x.data_ptr()); }

// Makes the tensor's device current and calls run(launcher) with torch's current stream there.
template <class F>
void on_stream_of(const torch::stable::Tensor& x, const char* op, const F& run) {
  const int index = x.get_device();
  const torch::stable::accelerator::DeviceGuard guard(index);
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(index, &stream));
  run(Launcher{static_cast<cudaStream_t>(stream)});
  cuda_check(cudaGetLastError(), op);
}

}  // namespace fastdiff
