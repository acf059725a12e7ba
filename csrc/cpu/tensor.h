// Making and reading CPU tensors through the stable ABI.
#pragma once

#ifdef __linux__
#include <sys/mman.h>
#endif

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <vector>

#include "../check.h"
#include "poison.h"

namespace edt {

using Sizes = torch::headeronly::IntHeaderOnlyArrayRef;

// Fresh memory of some size is mapped anew, and the page faults of its first write cost more than
// most kernels; huge pages are 512 times fewer. NumPy asks likewise.
inline void ask_for_huge_pages(const Tensor& x) {
#ifdef __linux__
  constexpr int64_t kLeast = 4 << 20, kPage = 4096;
  const int64_t bytes = x.numel() * static_cast<int64_t>(x.element_size());
  if (bytes < kLeast) return;
  char* const data = static_cast<char*>(x.data_ptr());
  const int64_t skip = -reinterpret_cast<intptr_t>(data) & (kPage - 1);
  madvise(data + skip, bytes - skip, MADV_HUGEPAGE);  // a system without them may refuse
#endif
}

// The aten op behind stable::new_empty costs a microsecond more.
inline Tensor allocate(Sizes sizes, ScalarType dtype) {
  constexpr int64_t kMostDims = 64;  // of a torch tensor
  const auto dims = static_cast<int64_t>(sizes.size());
  STD_TORCH_CHECK(dims <= kMostDims, "dimensions");
  int64_t strides[kMostDims], next = 1;
  for (int64_t i = dims - 1; i >= 0; --i) {
    strides[i] = next;
    next *= sizes[i] > 0 ? sizes[i] : 1;
  }
  const auto type = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(dims, sizes.data(), strides, type,
                                                         aoti_torch_device_type_cpu(), 0, &handle));
  const Tensor out(handle);
  ask_for_huge_pages(out);
  if (poison_memory) poison(out.data_ptr(), out.numel() * out.element_size());
  return out;
}

inline Tensor allocate(std::initializer_list<int64_t> sizes, ScalarType dtype) {
  return allocate(Sizes(sizes.begin(), sizes.size()), dtype);
}

inline Tensor allocate_like(const Tensor& x) { return allocate(x.sizes(), dtype_of(x)); }

// Offsets [B + 1] of a dtype that holds offsets.
inline Tensor make_offsets(const std::vector<int64_t>& from, ScalarType dtype) {
  const Tensor out = allocate({static_cast<int64_t>(from.size())}, dtype);
  if (dtype == ScalarType::Int) {
    STD_TORCH_CHECK(from.back() <= INT32_MAX, "offsets must be int64 to count ", from.back(),
                    " rows, got int32");
    std::copy(from.begin(), from.end(), static_cast<int32_t*>(out.data_ptr()));
  } else {
    std::copy(from.begin(), from.end(), static_cast<int64_t*>(out.data_ptr()));
  }
  return out;
}

inline Tensor dense(const Tensor& x) {
  return x.is_contiguous() ? x : torch::stable::contiguous(x);
}

inline char* at(const Tensor& x, int64_t element) {
  return static_cast<char*>(x.data_ptr()) + element * static_cast<int64_t>(x.element_size());
}

}  // namespace edt
