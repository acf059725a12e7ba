// Making and reading CPU tensors through the stable ABI.
#pragma once

#ifdef __linux__
#include <sys/mman.h>
#endif

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/ops.h>

#include <cstdint>
#include <initializer_list>

#include "../check.h"
#include "poison.h"

namespace edt {

using Sizes = torch::headeronly::IntHeaderOnlyArrayRef;

// Asks for large pages where there is much memory, as numpy does: of small ones, the page faults of
// a fresh output take longer than most kernels.
inline void use_huge_pages(void* memory, int64_t bytes) {
#ifdef __linux__
  constexpr int64_t kLeast = 4 << 20, kPage = 4096;
  if (bytes < kLeast) return;
  const auto begin = (reinterpret_cast<uintptr_t>(memory) + kPage - 1) / kPage * kPage;
  const auto end = (reinterpret_cast<uintptr_t>(memory) + bytes) / kPage * kPage;
  madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
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
  use_huge_pages(out.data_ptr(), out.numel() * static_cast<int64_t>(out.element_size()));
  if (poison_memory) poison(out.data_ptr(), out.numel() * out.element_size());
  return out;
}

inline Tensor allocate(std::initializer_list<int64_t> sizes, ScalarType dtype) {
  return allocate(Sizes(sizes.begin(), sizes.size()), dtype);
}

inline Tensor allocate_like(const Tensor& x) { return allocate(x.sizes(), x.scalar_type()); }

inline Tensor dense(const Tensor& x) {
  return x.is_contiguous() ? x : torch::stable::contiguous(x);
}

inline char* at(const Tensor& x, int64_t element) {
  return static_cast<char*>(x.data_ptr()) + element * static_cast<int64_t>(x.element_size());
}

}  // namespace edt
