// Checks that keep memory safe. Their messages are for developers: the public functions find out
// what was wrong and raise it in the user's words.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <vector>

namespace edt {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// x.scalar_type() asks torch for the code of every dtype until one fits; these are asked once.
inline ScalarType dtype_of(const Tensor& x) {
  struct Known {
    int32_t code;
    ScalarType dtype;
  };
  static const Known known[] = {{aoti_torch_dtype_float32(), ScalarType::Float},
                                {aoti_torch_dtype_int64(), ScalarType::Long},
                                {aoti_torch_dtype_int32(), ScalarType::Int},
                                {aoti_torch_dtype_bfloat16(), ScalarType::BFloat16},
                                {aoti_torch_dtype_float16(), ScalarType::Half},
                                {aoti_torch_dtype_float64(), ScalarType::Double},
                                {aoti_torch_dtype_bool(), ScalarType::Bool}};
  int32_t code;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(x.get(), &code));
  for (const Known& k : known)
    if (k.code == code) return k.dtype;
  return x.scalar_type();
}

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
  const ScalarType dtype = dtype_of(offsets);
  std::vector<int64_t> out(count);
  if (dtype == ScalarType::Int) {
    const auto* data = static_cast<const int32_t*>(offsets.data_ptr());
    for (int64_t i = 0; i < count; ++i) out[i] = data[i * stride];
  } else {
    STD_TORCH_CHECK(dtype == ScalarType::Long, "offsets: dtype");
    const auto* data = static_cast<const int64_t*>(offsets.data_ptr());
    for (int64_t i = 0; i < count; ++i) out[i] = data[i * stride];
  }
  bool valid = out[0] == 0 && out[count - 1] <= rows;
  for (int64_t i = 1; i < count; ++i) valid &= out[i - 1] <= out[i];
  STD_TORCH_CHECK(valid, "offsets: content");
  return out;
}

}  // namespace edt
