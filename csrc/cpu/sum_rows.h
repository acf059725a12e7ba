// Sums of rows, on raw pointers.
#pragma once

#include <cstdint>

#include "isa.h"

namespace edt {

struct SumRowsKernels {
  // out[j] = the sum of the `count` rows' numbers j, in the order of the rows, begin <= j < end.
  // Half types are summed in float and rounded once.
  using Sum = void (*)(const void* const* rows, int64_t count, int64_t begin, int64_t end,
                       void* out);
  // By dtype: float, double, bfloat16, half.
  Sum sum[4];
};

EDT_KERNEL_TABLE(SumRowsKernels, sum_rows_kernels)

}  // namespace edt
