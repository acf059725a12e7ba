// Softmax within segments, on raw pointers.
#pragma once

#include <cstdint>

#include "isa.h"

namespace edt {

// Columns [begin, end) of segments [first, last) of rows [N, dim].
struct SoftmaxPart {
  const int64_t* offsets;  // [P + 1]
  int64_t dim, first, last, begin, end;
};

struct SegmentSoftmaxKernels {
  using Forward = void (*)(const SoftmaxPart&, const void* values, void* out);
  using Backward = void (*)(const SoftmaxPart&, const void* grad, const void* out, void* dvalues);
  // By dtype: float, double, bfloat16, half.
  Forward forward[4];
  Backward backward[4];
};

EDT_KERNEL_TABLE(SegmentSoftmaxKernels, segment_softmax_kernels)

}  // namespace edt
