// A thread's part of the segments of a batch.
#pragma once

#include <cstdint>

namespace edt {

// Of segments [first, last) those columns and those places that lie in the ranges; a place is an
// entry of the order of rows, place i is row i without one.
struct Share {
  int64_t first, last;
  int64_t column_begin, column_end;
  int64_t place_begin, place_end;
};

}  // namespace edt
