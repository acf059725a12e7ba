// As much of CUDA's runtime as the kernels use, on a CPU: found in the place of CUDA's by -I.
//
// The threads of a block are fibers of one thread. One runs until it waits for its warp (a shuffle,
// a product of the warp) or its block (__syncthreads), then another is chosen at random, so that a
// missing barrier shows. A launch fails when threads wait for what never comes, or when lanes of a
// warp meet at different places. Shared memory is full of NaN when a block begins, and what is
// written beyond it is a segmentation fault.
#pragma once

#include <math.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <tuple>

#define __global__
#define __device__
#define __host__
#define __shared__ static
#define __grid_constant__
#define __launch_bounds__(...)

using std::max;
using std::min;

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3() = default;
  explicit dim3(unsigned x) : x(x) {}
};
struct float2 {
  float x, y;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
struct alignas(16) int4 {
  int x, y, z, w;
};

inline thread_local dim3 threadIdx, blockIdx, blockDim, gridDim;

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorLaunchFailure = 719 };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };
enum cudaDeviceAttr { cudaDevAttrMaxSharedMemoryPerBlockOptin = 97 };
using cudaStream_t = struct CUstream_st*;
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  void* attrs;
  unsigned numAttrs;
};

namespace emulated {

constexpr int kLanes = 32;

// What lanes of a warp bring when they meet, by lane.
using Records = void* const*;

// Waits until all lanes of the warp are here, with their records; the last one to come runs `meet`.
// `place` tells where they are.
void together(const void* place, void* record, void (*meet)(Records));

// Waits until all threads of the block are here.
void wait_for_block();

// Of the block that runs.
unsigned char* shared_memory();

// The launch fails where an address is no multiple of 16 bytes.
void must_be_aligned(const void* address, const char* what);

// Copies at the next wait_for_copies of this thread; `bytes` of 16, then zeros.
void copy_later(void* to, const void* from, int bytes);
void copy_now();

// Bytes of shared memory that a block can have.
extern int most_shared;

// Lets a kernel have so many bytes of dynamic shared memory.
cudaError_t allow(const void* kernel, int bytes);
cudaError_t launch(const void* kernel, const cudaLaunchConfig_t& config,
                   const std::function<void()>& thread);

// meet(lane's record, all records) for every lane.
template <class Record, class F>
Record exchange(Record mine, F) {
  static const char place = 0;
  together(&place, &mine, [](Records all) {
    Record before[kLanes];
    for (int lane = 0; lane < kLanes; ++lane) before[lane] = *static_cast<Record*>(all[lane]);
    for (int lane = 0; lane < kLanes; ++lane) F{}(lane, *static_cast<Record*>(all[lane]), before);
  });
  return mine;
}

}  // namespace emulated

inline void __syncthreads() { emulated::wait_for_block(); }
inline void __syncwarp() {
  emulated::exchange(0, [](int, int&, const int*) {});
}

// Of the mask only "all lanes" is known.
template <class T>
T __shfl_sync(unsigned, T value, int source) {
  struct Record {
    T value;
    int source;
  };
  return emulated::exchange(Record{value, source},
                            [](int, Record& mine, const Record* all) {
                              mine.value = all[mine.source % emulated::kLanes].value;
                            })
      .value;
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int other) {
  return __shfl_sync(mask, value, static_cast<int>(threadIdx.x % emulated::kLanes) ^ other);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, int distance) {
  const int lane = static_cast<int>(threadIdx.x % emulated::kLanes);
  return __shfl_sync(mask, value, lane < distance ? lane : lane - distance);
}
inline unsigned __ballot_sync(unsigned, bool vote) {
  struct Record {
    bool vote;
    unsigned votes;
  };
  return emulated::exchange(Record{vote, 0},
                            [](int, Record& mine, const Record* all) {
                              for (int lane = 0; lane < emulated::kLanes; ++lane)
                                mine.votes |= unsigned{all[lane].vote} << lane;
                            })
      .votes;
}

inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(unsigned x) { return __builtin_ffs(static_cast<int>(x)); }
inline int __clz(unsigned x) { return x ? __builtin_clz(x) : 32; }

inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  *value = emulated::most_shared;
  return cudaSuccess;
}

template <class... Parameters>
cudaError_t cudaFuncSetAttribute(void (*kernel)(Parameters...), cudaFuncAttribute, int value) {
  return emulated::allow(reinterpret_cast<const void*>(kernel), value);
}

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  const std::tuple<Parameters...> kept(arguments...);
  return emulated::launch(reinterpret_cast<const void*>(kernel), *config,
                          [&] { std::apply(kernel, kept); });
}
