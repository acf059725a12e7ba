// Checks that keep memory safe. Their messages are for developers: the public functions find out
// what was wrong and raise it in the user's words.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <vector>

namespace edt {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Where a float dtype stands in tables of kernels.
inline int float_index(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float:
      return 0;
    case ScalarType::Double:
      return 1;
    case ScalarType::BFloat16:
      return 2;
    case ScalarType::Half:
      return 3;
    default:
      STD_TORCH_CHECK(false, "dtype");
  }
}

// The offsets [B + 1], widened to 64 bits: offsets[0] = 0, non-decreasing, none beyond `rows`.
inline std::vector<int64_t> read_offsets(const Tensor& offsets, int64_t rows) {
  STD_TORCH_CHECK(offsets.dim() == 1 && offsets.size(0) > 0, "offsets: shape");
  const int64_t count = offsets.size(0), stride = offsets.stride(0);
  std::vector<int64_t> out(count);
  if (offsets.scalar_type() == ScalarType::Int) {
    const auto* data = static_cast<const int32_t*>(offsets.data_ptr());
    for (int64_t i = 0; i < count; ++i) out[i] = data[i * stride];
  } else {
    STD_TORCH_CHECK(offsets.scalar_type() == ScalarType::Long, "offsets: dtype");
    const auto* data = static_cast<const int64_t*>(offsets.data_ptr());
    for (int64_t i = 0; i < count; ++i) out[i] = data[i * stride];
  }
  bool valid = out[0] == 0 && out[count - 1] <= rows;
  for (int64_t i = 1; i < count; ++i) valid &= out[i - 1] <= out[i];
  STD_TORCH_CHECK(valid, "offsets: content");
  return out;
}

}  // namespace edt
