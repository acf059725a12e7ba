#include "linear_entropy.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <optional>
#include <tuple>

#include "copy.h"
#include "scratch.h"
#include "tensor.h"

namespace edt {
namespace {

constexpr int64_t kGrain = 1 << 18;  // multiply-adds that are worth a thread
constexpr int64_t kTasks = 32;       // that sums over rows and over tokens are cut into, about

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

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
                       const Tensor& top, const Tensor& log_total, const Tensor& kept) {
  LinearEntropy x{};
  x.hidden = hidden.data_ptr(), x.weight = weight.data_ptr();
  x.bias = bias ? bias->data_ptr() : nullptr;
  x.rows = h.numel(), x.width = weight.size(1), x.tokens = weight.size(0), x.scale = scale;
  x.h = h.data_ptr(), x.top = top.data_ptr(), x.log_total = log_total.data_ptr();
  x.logits = kept.size(0) ? kept.data_ptr() : nullptr, x.logit_stride = kept.size(1);
  return x;
}

// Tokens go in spans of whole panels, whose number depends on V alone: threads share many tokens
// like many rows, and what a row gets depends on neither.
struct Spans {
  int64_t tokens, size, count;

  Spans(const LinearEntropyKernels& kernels, const LinearEntropy& x) : tokens(x.tokens) {
    const int64_t panels = divide_up(tokens, kernels.panel);
    size = divide_up(panels, kTasks) * kernels.panel;
    count = divide_up(tokens, size);
  }

  int64_t begin(int64_t span) const { return span * size; }
  int64_t end(int64_t span) const { return std::min(tokens, (span + 1) * size); }
};

std::tuple<Tensor, Tensor, Tensor, Tensor> linear_entropy(Tensor hidden, Tensor weight,
                                                          std::optional<Tensor> bias, double scale,
                                                          bool keep) {
  check_inputs(hidden, weight, bias);
  const auto& kernels = kernels_for(dtype_of(hidden));
  hidden = dense(hidden), weight = dense(weight);
  if (bias) bias = dense(*bias);
  const auto shape = hidden.sizes().slice(0, hidden.dim() - 1);
  const ScalarType type = row_type(dtype_of(hidden));
  const Tensor h = allocate(shape, type), top = allocate(shape, type);
  const Tensor log_total = allocate(shape, type);
  const Tensor kept = allocate(
      {keep ? h.numel() : 0, divide_up(weight.size(0), kKeptMultiple) * kKeptMultiple}, type);
  const auto x = describe(hidden, weight, bias, scale, h, top, log_total, kept);
  const Spans spans(kernels, x);
  const Tensor sums = allocate({spans.count, 3, x.rows}, type);
  const int64_t grain = 1 + kGrain / (x.width * spans.size + 1);
  // Rows of the first span, rows of the second, ...
  torch::stable::parallel_for(0, spans.count * x.rows, grain, [&](int64_t begin, int64_t end) {
    void* scratch = thread_scratch(kernels.scratch_bytes(x));
    while (begin < end) {
      const int64_t s = begin / x.rows, row = begin - s * x.rows;
      const int64_t last = std::min(x.rows, row + end - begin);
      kernels.forward(x, spans.begin(s), spans.end(s), row, last, at(sums, 3 * s * x.rows),
                      scratch);
      begin += last - row;
    }
  });
  torch::stable::parallel_for(0, x.rows, kGrain / 16, [&](int64_t begin, int64_t end) {
    kernels.finish(x, sums.data_ptr(), spans.count, begin, end);
  });
  return {h, top, log_total, kept};
}

// Writes dhidden where x has it, and dweight and dbias if they are `wanted`. One task is some
// tokens and some rows; the sums over tokens, for dhidden, and over rows, for the others, are added
// up from the parts of the tasks. How many there are depends on shapes alone.
void gradients(const LinearEntropyKernels& kernels, const LinearEntropy& x, bool wanted,
               const Tensor& dhidden, const Tensor& dweight, const Tensor& dbias) {
  constexpr int64_t kLeastRows = 480;
  const ScalarType dtype = dhidden.scalar_type(), type = row_type(dtype);
  const auto padded = [&](int64_t n) { return divide_up(n, kernels.lanes) * kernels.lanes; };
  const int64_t width = padded(x.width), tokens = padded(x.tokens);
  const Spans spans(kernels, x);
  const bool by_spans = x.dhidden && spans.count > 1;

  const int64_t most = std::min(divide_up(kTasks, spans.count), divide_up(x.rows, kLeastRows));
  int64_t part = divide_up(divide_up(x.rows, most), kernels.tile_rows) * kernels.tile_rows;
  if (by_spans) part = std::min(part, kernels.chunk(x));  // then a step is not all rows
  const int64_t parts = std::min(most, divide_up(x.rows, part)), step = parts * part;

  // One part is the sum if it can be.
  const auto allocate_parts = [&](const Tensor& sum, int64_t rows, int64_t row,
                                  int64_t padded_row) {
    if (parts == 1 && dtype == type && row == padded_row) return sum;
    return allocate({wanted ? parts : 0, rows, padded_row}, type);
  };
  const Tensor dweights = allocate_parts(dweight, x.tokens, x.width, width);
  const Tensor dbiases = allocate_parts(dbias, 1, x.tokens, tokens);
  const Tensor dhiddens =
      allocate({by_spans ? spans.count : 0, std::min(step, x.rows), width}, type);
  const auto add = [&](const Tensor& sums, int64_t count, int64_t rows, int64_t row, char* to) {
    if (sums.data_ptr() == to) return;
    torch::stable::parallel_for(
        0, rows, 1 + kGrain / (16 * row + 1), [&](int64_t begin, int64_t end) {
          kernels.add_parts(sums.data_ptr(), count, rows, row, begin, end, to);
        });
  };

  for (int64_t first = 0; first < x.rows; first += step) {
    const int64_t rows = std::min(step, x.rows - first);
    torch::stable::parallel_for(0, parts * spans.count, 1, [&](int64_t begin, int64_t end) {
      void* scratch = thread_scratch(kernels.scratch_bytes(x));
      for (int64_t task = begin; task < end; ++task) {
        const int64_t c = task / spans.count, s = task % spans.count;
        const int64_t row = std::min(rows, c * part);
        LinearEntropyShare share{};
        share.begin = first + row, share.end = first + std::min(rows, row + part);
        share.first = spans.begin(s), share.last = spans.end(s);
        if (by_spans) share.dhidden_sums = at(dhiddens, (s * rows + row) * width);
        if (wanted) share.dweight_sums = at(dweights, c * x.tokens * width);
        if (wanted) share.dbias_sums = at(dbiases, c * tokens);
        share.add = first > 0;
        kernels.backward(x, share, scratch);
      }
    });
    if (by_spans) add(dhiddens, spans.count, rows, x.width, at(dhidden, first * x.width));
  }
  if (!wanted) return;
  add(dweights, parts, x.tokens, x.width, at(dweight, 0));
  add(dbiases, parts, 1, x.tokens, at(dbias, 0));
}

std::tuple<Tensor, Tensor, Tensor> linear_entropy_bwd(Tensor grad, Tensor hidden, Tensor weight,
                                                      std::optional<Tensor> bias, Tensor h,
                                                      Tensor top, Tensor log_total, Tensor kept,
                                                      double scale, bool need_hidden,
                                                      bool need_weight) {
  check_inputs(hidden, weight, bias);
  const ScalarType dtype = dtype_of(hidden);
  const auto& kernels = kernels_for(dtype);
  hidden = dense(hidden), weight = dense(weight), grad = dense(grad);
  h = dense(h), top = dense(top), log_total = dense(log_total), kept = dense(kept);
  if (bias) bias = dense(*bias);
  const int64_t rows = h.numel();
  STD_TORCH_CHECK(rows * weight.size(1) == hidden.numel(), "linear_entropy_bwd: rows");
  for (const Tensor& row : {grad, h, top, log_total})
    STD_TORCH_CHECK(row.numel() == rows && dtype_of(row) == row_type(dtype),
                    "linear_entropy_bwd: rows");
  STD_TORCH_CHECK(kept.dim() == 2 && dtype_of(kept) == row_type(dtype) &&
                      (kept.size(0) == 0 || kept.size(0) == rows) &&
                      kept.size(1) >= weight.size(0) && kept.size(1) % kKeptMultiple == 0,
                  "linear_entropy_bwd: kept logits");

  auto x = describe(hidden, weight, bias, scale, h, top, log_total, kept);
  x.grad = grad.data_ptr();
  const Tensor dhidden = need_hidden ? allocate_like(hidden) : allocate({0, x.width}, dtype);
  const Tensor dweight = allocate({need_weight ? x.tokens : 0, x.width}, dtype);
  const Tensor dbias = allocate({need_weight ? x.tokens : 0}, dtype);
  if (need_hidden) x.dhidden = dhidden.data_ptr();
  if (rows > 0) {
    gradients(kernels, x, need_weight, dhidden, dweight, dbias);
  } else {
    for (const Tensor& sum : {dweight, dbias})
      clear_bytes(at(sum, 0), sum.numel() * sum.element_size());
  }
  return {dhidden, dweight, dbias};
}

}  // namespace
}  // namespace edt

STABLE_TORCH_LIBRARY_IMPL(edt, CPU, m) {
  m.impl("linear_entropy", TORCH_BOX(&edt::linear_entropy));
  m.impl("linear_entropy_bwd", TORCH_BOX(&edt::linear_entropy_bwd));
}
