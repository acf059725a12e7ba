// Where molecules lie, read on the device. Offsets that make no sense never lead out of bounds.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace edt {

// [B + 1], int64 or int32.
struct Offsets {
  const void* data;
  bool wide;
  int64_t rows;  // of what they cut

  __device__ int64_t operator[](int64_t i) const {
    const int64_t offset =
        wide ? static_cast<const int64_t*>(data)[i] : static_cast<const int32_t*>(data)[i];
    return offset < 0 ? 0 : offset < rows ? offset : rows;
  }
};

struct Segment {
  int64_t begin;
  int count;

  __device__ Segment(const Offsets& offsets, int64_t i) : begin(offsets[i]) {
    const int64_t end = offsets[i + 1];
    count = end > begin ? static_cast<int>(end - begin) : 0;
  }
};

}  // namespace edt
