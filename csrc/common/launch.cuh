// Kernel launches from stable-ABI ops: device guard, torch's current stream, launch check.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/tensor.h>

#include <array>
#include <atomic>

#include "common/device.cuh"

namespace fastdiff {

inline void cuda_check(cudaError_t status, const char* what) {
  if (status != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(status));
}

// 10 major + minor of a CUDA device, asked for once.
inline int architecture_of(int index) {
  static std::array<std::atomic<int>, 64> known{};
  const bool keeps = index < static_cast<int>(known.size());
  int value = keeps ? known[index].load(std::memory_order_relaxed) : 0;
  if (value == 0) {
    int major, minor;
    cuda_check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, index), "compute capability");
    cuda_check(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, index), "compute capability");
    value = 10 * major + minor;
    if (keeps) known[index].store(value, std::memory_order_relaxed);
  }
  return value;
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
  run(Launcher{static_cast<cudaStream_t>(stream), architecture_of(index)});
  cuda_check(cudaGetLastError(), op);
}

}  // namespace fastdiff
