// Pooling of segments, on raw pointers.
#pragma once

#include "isa.h"
#include "segment_rows.h"

namespace edt {

struct Pool : SegmentRows {
  bool mean;                    // of sums
  bool largest;                 // of extremes: maximum, or minimum
  const void *values, *weight;  // [N, dim]; [N] or null
  const void* grad;             // [P, dim]
  void* out;                    // [P, dim] of a forward, [N, dim] or [N] of a backward
  // [P, dim], the row that an extreme came from, N in an empty segment: int32, int64 for double.
  void* source;
};

// Kernels of one element type. A forward takes some columns of its segments, a backward some
// places. Arguments are values, so that no store can change them.
struct PoolKernels {
  using Kernel = void (*)(Pool, Share);
  Kernel sum, sum_bwd, extreme, extreme_bwd;
  // Gradient of the weight. `scratch` has room for a double per place of the share.
  void (*weight_bwd)(Pool, Share, void* scratch);
};

struct PoolTable {
  PoolKernels float32, bfloat16, float16, float64;
};

EDT_KERNEL_TABLE(PoolTable, pool_kernels)

}  // namespace edt
