// Softmax within segments, on raw pointers.
#pragma once

#include "isa.h"
#include "segment_rows.h"

namespace edt {

struct SegmentSoftmax : SegmentRows {
  const void *values, *out;  // [N, dim]; `out` is read by the backward
  const void* grad;          // [N, dim]
  void* result;              // [N, dim], what a kernel writes
};

// Kernels of one element type. Each takes some columns of its segments. Arguments are values, so
// that no store can change them.
struct SegmentSoftmaxKernels {
  using Kernel = void (*)(SegmentSoftmax, Share);
  Kernel forward, backward;
};

struct SegmentSoftmaxTable {
  SegmentSoftmaxKernels float32, bfloat16, float16, float64;
};

EDT_KERNEL_TABLE(SegmentSoftmaxTable, segment_softmax_kernels)

}  // namespace edt
