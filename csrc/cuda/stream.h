// Kernels on torch's current stream: the one place that knows how to find it.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>

namespace edt {

// The device of a tensor is the current one while this lives, and launches go to its stream.
class Launcher {
 public:
  explicit Launcher(const torch::stable::Tensor& x)
      : device_(x.get_device_index()), guard_(device_) {
    void* stream = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device_, &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }

  // Whether a block can have so many bytes of shared memory: GPUs of one generation differ.
  bool holds(int shared) const {
    int most = 0;
    STD_CUDA_CHECK(cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device_));
    return shared <= most;
  }

  // kernel<<<blocks, threads, shared bytes>>>(arguments); nothing for no blocks.
  template <class... Parameters>
  void operator()(void (*kernel)(Parameters...), int64_t blocks, int threads, size_t shared,
                  Parameters... arguments) const {
    if (blocks == 0) return;
    STD_TORCH_CHECK(blocks <= INT32_MAX, "a launch of ", blocks, " blocks");
    constexpr size_t kWithoutAsking = 48 << 10;
    if (shared > kWithoutAsking)
      STD_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                          static_cast<int>(shared)));
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(static_cast<unsigned>(blocks));
    config.blockDim = dim3(static_cast<unsigned>(threads));
    config.dynamicSmemBytes = shared;
    config.stream = stream_;
    STD_CUDA_CHECK(cudaLaunchKernelEx(&config, kernel, arguments...));
  }

 private:
  int32_t device_;
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_;
};

}  // namespace edt
