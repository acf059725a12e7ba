// What kernels over segments see of a batch: pointers, no tensors.
#pragma once

#include <cstdint>

namespace edt {

// Rows [rows, dim] and their segments [P]. Segment p owns places offsets[p] to offsets[p + 1];
// place i holds row order[i], or row i without an order.
struct SegmentRows {
  const int64_t* offsets;
  const int64_t* order;
  int64_t rows, dim;
  int64_t used;  // places of segments
};

// A thread's part: of segments [first, last) those columns and those places that lie in the ranges.
struct Share {
  int64_t first, last;
  int64_t column_begin, column_end;
  int64_t place_begin, place_end;
};

}  // namespace edt
