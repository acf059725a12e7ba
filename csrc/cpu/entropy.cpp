#include <torch/csrc/stable/library.h>

#include <optional>
#include <tuple>

#include "copy.h"
#include "entropy_rows.h"

namespace edt {
namespace {

std::tuple<Tensor, Tensor, Tensor> entropy(const Tensor& given, double scale) {
  STD_TORCH_CHECK(given.dim() > 0 && given.size(given.dim() - 1) > 0, "logits: shape");
  const Tensor logits = dense(given);
  const int64_t v = logits.size(logits.dim() - 1);
  const auto shape = logits.sizes().slice(0, logits.dim() - 1);
  const ScalarType type = row_type(dtype_of(logits));
  Tensor h = allocate(shape, type);
  Tensor top = allocate(shape, type);
  Tensor log_total = allocate(shape, type);
  torch::stable::parallel_for(0, h.numel(), row_grain(v), [&](int64_t begin, int64_t end) {
    entropy_rows(logits, v, scale, begin, end, h, top, log_total);
  });
  return {h, top, log_total};
}

Tensor entropy_bwd(const Tensor& given_grad, const Tensor& given, const Tensor& given_h,
                   const Tensor& given_top, const Tensor& given_log_total, double scale,
                   const std::optional<Tensor>& offsets) {
  STD_TORCH_CHECK(given.dim() > 0 && given.size(given.dim() - 1) > 0, "logits: shape");
  const Tensor logits = dense(given);
  const int64_t v = logits.size(logits.dim() - 1), rows = logits.numel() / v;
  const Tensor grad = dense(given_grad), h = dense(given_h);
  const Tensor top = dense(given_top), log_total = dense(given_log_total);
  for (const Tensor& x : {grad, h, top, log_total})
    STD_TORCH_CHECK(x.numel() == rows && dtype_of(x) == row_type(dtype_of(logits)),
                    "rows: shape or dtype");

  Tensor dlogits = allocate_like(logits);
  const int64_t used = offsets ? read_offsets(*offsets, rows).back() : rows;
  const auto kernel = entropy_kernels().backward[float_index(dtype_of(logits))];
  torch::stable::parallel_for(0, used, row_grain(v), [&](int64_t begin, int64_t end) {
    kernel(at(grad, begin), at(logits, begin * v), at(h, begin), at(top, begin),
           at(log_total, begin), end - begin, v, scale, at(dlogits, begin * v));
  });
  clear_bytes(at(dlogits, used * v), (rows - used) * v * dlogits.element_size());
  return dlogits;
}

}  // namespace
}  // namespace edt

STABLE_TORCH_LIBRARY_IMPL(edt, CPU, m) {
  m.impl("entropy", TORCH_BOX(&edt::entropy));
  m.impl("entropy_bwd", TORCH_BOX(&edt::entropy_bwd));
}
