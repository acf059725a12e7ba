// Instructions of sm_80 that CUDA C++ has no functions for, and the numbers that they read.
// Included with <>, found by -I: tests/csrc/instructions.cuh plays them on a CPU.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace edt {

struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

__device__ inline float widen(float x) { return x; }
__device__ inline double widen(double x) { return x; }
__device__ inline float widen(BFloat16 x) { return __uint_as_float(uint32_t{x.bits} << 16); }
__device__ inline float widen(Half x) {
  float out;
  asm("cvt.f32.f16 %0, %1;" : "=f"(out) : "h"(x.bits));
  return out;
}

// Two numbers rounded to nearest even, `low` in the lower half: the one that comes first in memory.
template <class T>
__device__ uint32_t pack(float low, float high);
template <>
__device__ inline uint32_t pack<BFloat16>(float low, float high) {
  uint32_t out;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(out) : "f"(high), "f"(low));
  return out;
}
template <>
__device__ inline uint32_t pack<Half>(float low, float high) {
  uint32_t out;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(out) : "f"(high), "f"(low));
  return out;
}

// c += A B of a warp, A [16, 16], B [16, 8]. With g = lane / 4 and t = 2 (lane % 4) a lane holds
//   a: A[g][t, t+1]  A[g+8][t, t+1]  A[g][t+8, t+9]  A[g+8][t+8, t+9]
//   b: B[t, t+1][g]  B[t+8, t+9][g]
//   c: C[g][t]  C[g][t+1]  C[g+8][t]  C[g+8][t+1]
template <class T>
__device__ void multiply_add(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);
template <>
__device__ inline void multiply_add<BFloat16>(float (&c)[4], const uint32_t (&a)[4],
                                              const uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
template <>
__device__ inline void multiply_add<Half>(float (&c)[4], const uint32_t (&a)[4],
                                          const uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

__device__ inline uint32_t shared_address(const void* shared) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(shared));
}

// Loads N = 2 or 4 matrices [8, 8] of 16-bit numbers from shared memory: lane 8 i + r names row r
// of matrix i (of two, lanes from 16 on are not asked), and gets its numbers [lane / 4][t, t+1], t
// = 2 (lane % 4), of each; TRANSPOSED [t, t+1][lane / 4].
template <bool TRANSPOSED>
__device__ inline void load_matrices(uint32_t (&out)[4], const void* row) {
  const uint32_t at = shared_address(row);
  if constexpr (TRANSPOSED)
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
                 : "r"(at)
                 : "memory");
  else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
                 : "r"(at)
                 : "memory");
}
template <bool TRANSPOSED>
__device__ inline void load_matrices(uint32_t (&out)[2], const void* row) {
  const uint32_t at = shared_address(row);
  if constexpr (TRANSPOSED)
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
                 : "=r"(out[0]), "=r"(out[1])
                 : "r"(at)
                 : "memory");
  else
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
                 : "=r"(out[0]), "=r"(out[1])
                 : "r"(at)
                 : "memory");
}

// 16 bytes of shared memory: `bytes` of them from global memory, the rest 0. Both are aligned to
// 16. They are there after `wait_for_copies` of the thread that copies.
__device__ inline void copy_async(void* shared, const void* global, int bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)),
               "l"(global), "r"(bytes)
               : "memory");
}
__device__ inline void wait_for_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// What the launch gives a block beside its static shared memory.
__device__ inline unsigned char* dynamic_shared() {
  extern __shared__ __align__(16) unsigned char memory[];
  return memory;
}

}  // namespace edt
