#include "segment_softmax.h"

#include <torch/csrc/stable/library.h>

#include "copy.h"
#include "segments.h"

namespace edt {
namespace {

const SegmentSoftmaxKernels& kernels_for(ScalarType dtype) {
  const SegmentSoftmaxTable& table = segment_softmax_kernels();
  if (dtype == ScalarType::Float) return table.float32;
  if (dtype == ScalarType::BFloat16) return table.bfloat16;
  if (dtype == ScalarType::Half) return table.float16;
  STD_TORCH_CHECK(dtype == ScalarType::Double, "segment_softmax: dtype");
  return table.float64;
}

// A new tensor like `like`, its segments written by `kernel`; 0 in the tail.
Tensor run(const Tensor& like, const Tensor& offsets, SegmentSoftmax s,
           SegmentSoftmaxKernels::Kernel kernel) {
  const Segments segments(offsets, like.size(0), row_size(like));
  const Tensor result = allocate_like(like);
  static_cast<SegmentRows&>(s) = segments.describe();
  s.result = result.data_ptr();
  segments.for_columns([&](const Share& share) { kernel(s, share); });
  const int64_t written = segments.used() * segments.dim();
  clear_bytes(at(result, written), (result.numel() - written) * result.element_size());
  return result;
}

Tensor segment_softmax(const Tensor& given, const Tensor& offsets) {
  STD_TORCH_CHECK(given.dim() > 0, "values: shape");
  const Tensor values = dense(given);
  SegmentSoftmax s{};
  s.values = values.data_ptr();
  return run(values, offsets, s, kernels_for(dtype_of(values)).forward);
}

Tensor segment_softmax_bwd(const Tensor& given_grad, const Tensor& given, const Tensor& offsets) {
  const Tensor grad = dense(given_grad), out = dense(given);
  STD_TORCH_CHECK(out.dim() > 0 && grad.numel() == out.numel(), "grad: shape");
  STD_TORCH_CHECK(dtype_of(grad) == dtype_of(out), "grad: dtype");
  SegmentSoftmax s{};
  s.grad = grad.data_ptr(), s.out = out.data_ptr();
  return run(out, offsets, s, kernels_for(dtype_of(out)).backward);
}

}  // namespace
}  // namespace edt

STABLE_TORCH_LIBRARY_IMPL(edt, CPU, m) {
  m.impl("segment_softmax", TORCH_BOX(&edt::segment_softmax));
  m.impl("segment_softmax_bwd", TORCH_BOX(&edt::segment_softmax_bwd));
}
