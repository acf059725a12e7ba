#include "segment_softmax.h"

#include <torch/csrc/stable/library.h>

#include <cstring>

#include "segments.h"

namespace edt {
namespace {

int dtype_index(ScalarType type) {
  switch (type) {
    case ScalarType::Float:
      return 0;
    case ScalarType::Double:
      return 1;
    case ScalarType::BFloat16:
      return 2;
    case ScalarType::Half:
      return 3;
    default:
      STD_TORCH_CHECK(false, "segment_softmax: dtype");
  }
}

// A new tensor like `x`, its rows written by `kernel(part, out)`, 0 in the tail.
template <class F>
Tensor map_segments(const Tensor& x, const Tensor& offsets, F kernel) {
  const Segments segments(offsets, x.size(0), row_size(x));
  const Tensor out = allocate_like(x);
  segments.for_columns([&](int64_t first, int64_t last, int64_t begin, int64_t end) {
    kernel(SoftmaxPart{segments.offsets(), segments.dim(), first, last, begin, end},
           out.data_ptr());
  });
  const int64_t end = segments.used() * segments.dim();
  std::memset(at(out, end), 0, (x.numel() - end) * x.element_size());
  return out;
}

Tensor segment_softmax(const Tensor& given, const Tensor& offsets) {
  STD_TORCH_CHECK(given.dim() > 0, "values: shape");
  const Tensor values = dense(given);
  const auto kernel = segment_softmax_kernels().forward[dtype_index(values.scalar_type())];
  return map_segments(values, offsets, [&](const SoftmaxPart& part, void* out) {
    kernel(part, values.data_ptr(), out);
  });
}

Tensor segment_softmax_bwd(const Tensor& given_grad, const Tensor& given, const Tensor& offsets) {
  STD_TORCH_CHECK(given.dim() > 0, "out: shape");
  const Tensor grad = dense(given_grad), y = dense(given);
  STD_TORCH_CHECK(grad.scalar_type() == y.scalar_type() && grad.numel() == y.numel(), "grad");
  const auto kernel = segment_softmax_kernels().backward[dtype_index(y.scalar_type())];
  return map_segments(y, offsets, [&](const SoftmaxPart& part, void* dvalues) {
    kernel(part, grad.data_ptr(), y.data_ptr(), dvalues);
  });
}

}  // namespace
}  // namespace edt

STABLE_TORCH_LIBRARY_IMPL(edt, CPU, m) {
  m.impl("segment_softmax", TORCH_BOX(&edt::segment_softmax));
  m.impl("segment_softmax_bwd", TORCH_BOX(&edt::segment_softmax_bwd));
}
