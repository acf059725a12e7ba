// Kernels with one mistake each: the emulation must find them.
#include <cuda_runtime.h>

#include <instructions.cuh>

namespace {

__global__ void no_barrier(int* out) {
  __shared__ int box[64];
  box[threadIdx.x] = static_cast<int>(threadIdx.x);
  out[threadIdx.x] = box[63 - threadIdx.x];
}

__global__ void half_a_barrier(int* out) {
  if (threadIdx.x < 32) __syncthreads();
  out[threadIdx.x] = 0;
}

__global__ void half_a_shuffle(int* out) {
  int lane = static_cast<int>(threadIdx.x);
  if (lane % 2) lane = __shfl_sync(~0u, lane, 0);
  out[threadIdx.x] = lane;
}

__global__ void two_places(int* out) {
  if (threadIdx.x % 2)
    out[threadIdx.x] = __shfl_sync(~0u, 1, 0);
  else
    out[threadIdx.x] = static_cast<int>(__ballot_sync(~0u, true));
}

__global__ void no_wait(int* out) {
  edt::copy_async(edt::dynamic_shared() + 16 * threadIdx.x, out, 16);
}

__global__ void not_aligned(int* out) {
  edt::copy_async(edt::dynamic_shared(), reinterpret_cast<char*>(out) + 4, 16);
  edt::wait_for_copies();
}

__global__ void matrix_not_aligned(int* out) {
  uint32_t found[2];
  edt::load_matrices<false>(found, edt::dynamic_shared() + 20 * (threadIdx.x % 16));
  out[threadIdx.x] = static_cast<int>(found[0]);
}

__global__ void uninitialised(int* out) {
  out[threadIdx.x] = reinterpret_cast<int*>(edt::dynamic_shared())[threadIdx.x];
}

using Kernel = void (*)(int*);
constexpr Kernel kernels[] = {no_barrier, half_a_barrier, half_a_shuffle,     two_places,
                              no_wait,    not_aligned,    matrix_not_aligned, uninitialised};

}  // namespace

// Runs one kernel in a block of 64 threads with so much shared memory.
extern "C" __attribute__((visibility("default"))) int edt_fault(int which, int* out, int shared) {
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(1);
  config.blockDim = dim3(64);
  config.dynamicSmemBytes = static_cast<size_t>(shared);
  return cudaLaunchKernelEx(&config, kernels[which], out);
}
