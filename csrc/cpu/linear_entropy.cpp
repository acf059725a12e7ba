#include "linear_entropy.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <optional>
#include <tuple>

#include "scratch.h"
#include "tensor.h"

namespace edt {
namespace {

constexpr int64_t kGrain = 1 << 18;  // multiply-adds that are worth a thread

const LinearEntropyKernels& kernels_for(ScalarType dtype) {
  const LinearEntropyTable& table = linear_entropy_kernels();
  if (dtype == ScalarType::Float) return table.float32;
  if (dtype == ScalarType::BFloat16) return table.bfloat16;
  if (dtype == ScalarType::Half) return table.float16;
  STD_TORCH_CHECK(dtype == ScalarType::Double, "linear_entropy: dtype");
  return table.float64;
}

ScalarType row_type(ScalarType dtype) {
  return dtype == ScalarType::Double ? dtype : ScalarType::Float;
}

void check_inputs(const Tensor& hidden, const Tensor& weight, const std::optional<Tensor>& bias) {
  STD_TORCH_CHECK(hidden.dim() > 0 && weight.dim() == 2 && weight.size(0) > 0 &&
                      hidden.size(hidden.dim() - 1) == weight.size(1) &&
                      (!bias || (bias->dim() == 1 && bias->size(0) == weight.size(0))),
                  "linear_entropy: shapes");
  STD_TORCH_CHECK(
      dtype_of(hidden) == dtype_of(weight) && (!bias || dtype_of(*bias) == dtype_of(weight)),
      "linear_entropy: dtypes");
}

LinearEntropy describe(const Tensor& hidden, const Tensor& weight,
                       const std::optional<Tensor>& bias, double scale, const Tensor& h,
                       const Tensor& top, const Tensor& log_total) {
  LinearEntropy x{};
  x.hidden = hidden.data_ptr(), x.weight = weight.data_ptr();
  x.bias = bias ? bias->data_ptr() : nullptr;
  x.width = weight.size(1), x.tokens = weight.size(0), x.scale = scale;
  x.h = h.data_ptr(), x.top = top.data_ptr(), x.log_total = log_total.data_ptr();
  return x;
}

// kernel(x, rows, scratch) on all rows.
void for_rows(const LinearEntropyKernels& kernels, LinearEntropyKernels::Rows kernel,
              const LinearEntropy& x, int64_t rows) {
  const int64_t grain = 1 + kGrain / (x.width * x.tokens + 1);
  torch::stable::parallel_for(0, rows, grain, [&](int64_t begin, int64_t end) {
    kernel(x, begin, end, thread_scratch(kernels.scratch_bytes(x)));
  });
}

std::tuple<Tensor, Tensor, Tensor> linear_entropy(Tensor hidden, Tensor weight,
                                                  std::optional<Tensor> bias, double scale) {
  check_inputs(hidden, weight, bias);
  const auto& kernels = kernels_for(dtype_of(hidden));
  hidden = dense(hidden), weight = dense(weight);
  if (bias) bias = dense(*bias);
  const auto shape = hidden.sizes().slice(0, hidden.dim() - 1);
  const ScalarType type = row_type(dtype_of(hidden));
  const Tensor h = allocate(shape, type), top = allocate(shape, type);
  const Tensor log_total = allocate(shape, type);
  const auto x = describe(hidden, weight, bias, scale, h, top, log_total);
  for_rows(kernels, kernels.forward, x, h.numel());
  return {h, top, log_total};
}

// Sums over rows for the weight and the bias: one task is a panel and a part of the rows. How many
// parts there are depends on shapes alone, so threads do not change the sums.
std::tuple<Tensor, Tensor> weight_gradients(const LinearEntropyKernels& kernels,
                                            const LinearEntropy& x, int64_t rows,
                                            ScalarType dtype) {
  constexpr int64_t kTasks = 16, kLeastRows = 1024;
  const int64_t panels = (x.tokens + kernels.panel - 1) / kernels.panel;
  const int64_t wanted = std::min((kTasks + panels - 1) / panels, rows / kLeastRows + 1);
  const int64_t part = (rows + wanted - 1) / wanted;
  const ScalarType type = row_type(dtype);
  const Tensor dweights = allocate({wanted, x.tokens, x.width}, type);
  const Tensor dbiases = allocate({wanted, x.tokens}, type);

  torch::stable::parallel_for(0, wanted * panels, 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t c = task / panels, token = task % panels * kernels.panel;
      kernels.backward_weight(x, token, std::min(c * part, rows), std::min((c + 1) * part, rows),
                              at(dweights, (c * x.tokens + token) * x.width),
                              at(dbiases, c * x.tokens + token),
                              thread_scratch(kernels.scratch_bytes(x)));
    }
  });

  const auto add = [&](const Tensor& parts, const Tensor& out) {
    torch::stable::parallel_for(0, out.numel(), kGrain / 16, [&](int64_t begin, int64_t end) {
      kernels.add_parts(parts.data_ptr(), wanted, out.numel(), begin, end, out.data_ptr());
    });
    return out;
  };
  return {add(dweights, allocate({x.tokens, x.width}, dtype)),
          add(dbiases, allocate({x.tokens}, dtype))};
}

std::tuple<Tensor, Tensor, Tensor> linear_entropy_bwd(Tensor grad, Tensor hidden, Tensor weight,
                                                      std::optional<Tensor> bias, Tensor h,
                                                      Tensor top, Tensor log_total, double scale,
                                                      bool need_hidden, bool need_weight) {
  check_inputs(hidden, weight, bias);
  const ScalarType dtype = dtype_of(hidden);
  const auto& kernels = kernels_for(dtype);
  hidden = dense(hidden), weight = dense(weight), grad = dense(grad);
  h = dense(h), top = dense(top), log_total = dense(log_total);
  if (bias) bias = dense(*bias);
  const int64_t rows = h.numel();
  STD_TORCH_CHECK(rows * weight.size(1) == hidden.numel(), "linear_entropy_bwd: rows");
  for (const Tensor& row : {grad, h, top, log_total})
    STD_TORCH_CHECK(row.numel() == rows && dtype_of(row) == row_type(dtype),
                    "linear_entropy_bwd: rows");

  auto x = describe(hidden, weight, bias, scale, h, top, log_total);
  x.grad = grad.data_ptr();
  const Tensor dhidden = need_hidden ? allocate_like(hidden) : allocate({0, x.width}, dtype);
  if (need_hidden) {
    x.dhidden = dhidden.data_ptr();
    for_rows(kernels, kernels.backward_hidden, x, rows);
  }
  if (!need_weight) return {dhidden, allocate({0, x.width}, dtype), allocate({0}, dtype)};
  const auto [dweight, dbias] = weight_gradients(kernels, x, rows, dtype);
  return {dhidden, dweight, dbias};
}

}  // namespace
}  // namespace edt

STABLE_TORCH_LIBRARY_IMPL(edt, CPU, m) {
  m.impl("linear_entropy", TORCH_BOX(&edt::linear_entropy));
  m.impl("linear_entropy_bwd", TORCH_BOX(&edt::linear_entropy_bwd));
}
