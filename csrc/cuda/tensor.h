// Making and reading CUDA tensors through the stable ABI.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <initializer_list>
#include <instructions.cuh>
#include <vector>

#include "../check.h"
#include "segments.cuh"

namespace edt {

// Fresh memory beside `like`; the aten op behind stable::new_empty costs more.
inline Tensor allocate(const Tensor& like, std::initializer_list<int64_t> sizes, ScalarType dtype) {
  std::vector<int64_t> strides(sizes.size());
  int64_t next = 1;
  for (size_t i = sizes.size(); i-- > 0;) {
    strides[i] = next;
    next *= std::max<int64_t>(sizes.begin()[i], 1);
  }
  int32_t device_type;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  const auto type = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.begin(), strides.data(),
                               type, device_type, like.get_device_index(), &handle));
  return Tensor(handle);
}

inline Tensor dense(const Tensor& x) {
  return x.is_contiguous() ? x : torch::stable::contiguous(x);
}

// Of contiguous offsets [B + 1] that cut `rows` rows; their contents are read on the device.
inline Offsets offsets_of(const Tensor& offsets, int64_t rows) {
  STD_TORCH_CHECK(offsets.dim() == 1 && offsets.size(0) > 0, "offsets: shape");
  const bool wide = offsets.scalar_type() == ScalarType::Long;
  STD_TORCH_CHECK(wide || offsets.scalar_type() == ScalarType::Int, "offsets: dtype");
  return {offsets.data_ptr(), wide, rows};
}

// f(T{}) with the type T that kernels know a dtype of 32 or 16 bits by.
template <class F>
void with_type(ScalarType dtype, F f) {
  switch (dtype) {
    case ScalarType::Float:
      return f(float{});
    case ScalarType::BFloat16:
      return f(BFloat16{});
    case ScalarType::Half:
      return f(Half{});
    default:
      STD_TORCH_CHECK(false, "dtype");
  }
}

}  // namespace edt
