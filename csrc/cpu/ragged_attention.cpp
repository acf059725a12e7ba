#include "ragged_attention.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cmath>
#include <initializer_list>
#include <optional>
#include <tuple>
#include <vector>

#include "scratch.h"
#include "tensor.h"

namespace edt {
namespace {

constexpr int64_t kGrain = 1 << 18;       // multiply-adds that are worth a thread
constexpr int64_t kPrefetch = 512 << 10;  // bytes of one operand that the L2 cache holds for sure

// Only the last dimension must be contiguous: heads of a packed projection are read in place.
Tensor readable(const Tensor& x) {
  return x.size(2) == 1 || x.stride(2) == 1 ? x : torch::stable::contiguous(x);
}

AttentionRows rows_of(const Tensor& x) { return {x.data_ptr(), x.stride(0), x.stride(1)}; }

const AttentionKernels& kernels_for(ScalarType dtype) {
  const AttentionTable& table = attention_kernels();
  if (dtype == ScalarType::Float) return table.float32;
  if (dtype == ScalarType::BFloat16) return table.bfloat16;
  if (dtype == ScalarType::Half) return table.float16;
  STD_TORCH_CHECK(dtype == ScalarType::Double, "ragged_attention: dtype");
  return table.float64;
}

int64_t element_bytes(ScalarType dtype) {
  return dtype == ScalarType::Double ? 8 : dtype == ScalarType::Float ? 4 : 2;
}

ScalarType lse_dtype(ScalarType dtype) {
  return dtype == ScalarType::Double ? dtype : ScalarType::Float;
}

void check_inputs(const Tensor& q, const Tensor& k, const Tensor& v) {
  STD_TORCH_CHECK(q.dim() == 3 && k.dim() == 3 && v.dim() == 3, "ragged_attention: dimensions");
  const bool shapes = k.size(0) == v.size(0) && k.size(1) == v.size(1) && k.size(2) == v.size(2) &&
                      q.size(2) == k.size(2) && q.size(2) > 0 && k.size(1) > 0 &&
                      q.size(1) % k.size(1) == 0;
  STD_TORCH_CHECK(shapes, "ragged_attention: shapes");
  const ScalarType dtype = q.scalar_type();
  STD_TORCH_CHECK(dtype == k.scalar_type() && dtype == v.scalar_type(), "ragged_attention: dtypes");
}

// The molecules of a batch, one after the other on an axis of work on which threads take equal
// shares.
class Batch {
 public:
  Batch(const Tensor& q, const Tensor& k, const Tensor& q_offsets, const Tensor& k_offsets)
      : q_(read_offsets(q_offsets, q.size(0))),
        k_(read_offsets(k_offsets, k.size(0))),
        kv_heads_(k.size(1)),
        start_(q_.size()) {
    STD_TORCH_CHECK(q_.size() == k_.size(), "ragged_attention: number of molecules");
    const int64_t per_head = q.size(1) / kv_heads_ * q.size(2);
    for (size_t i = 0; i + 1 < q_.size(); ++i) {
      const auto m = molecule(i);
      const int64_t work = (m.queries * m.keys + m.queries + m.keys + 1) * per_head;
      start_[i + 1] = start_[i] + work * kv_heads_;
    }
  }

  int64_t queries() const { return q_.back(); }
  int64_t keys() const { return k_.back(); }

  // kernel(x, molecule, key head) of all molecules and heads, those of a molecule on one thread
  // as far as shares allow.
  void run(const AttentionKernels& kernels, AttentionKernels::Kernel kernel, const Attention& x,
           int64_t element, std::initializer_list<AttentionRows> q_operands) const {
    torch::stable::parallel_for(0, start_.back(), kGrain, [&](int64_t begin, int64_t end) {
      auto next = std::upper_bound(start_.begin(), start_.end(), begin) - start_.begin() - 1;
      for (size_t i = next; i + 1 < q_.size() && start_[i] < end; ++i) {
        const auto m = molecule(i);
        const int64_t step = (start_[i + 1] - start_[i]) / kv_heads_;
        for (const auto& rows : q_operands)
          prefetch(rows, m.q_begin, m.queries, x.heads * x.dim * element, element);
        for (const auto& rows : {x.k, x.v})
          prefetch(rows, m.k_begin, m.keys, x.kv_heads * x.dim * element, element);
        void* scratch = thread_scratch(kernels.scratch_bytes(x, m));
        for (int64_t head = 0; head < kv_heads_; ++head) {
          const int64_t at = start_[i] + head * step;
          if (begin <= at && at < end) kernel(x, m, head, scratch);
        }
      }
    });
  }

 private:
  AttentionMolecule molecule(size_t i) const {
    return {q_[i], q_[i + 1] - q_[i], k_[i], k_[i + 1] - k_[i]};
  }

  // A head's rows are islands that the hardware prefetcher does not see coming.
  static void prefetch(const AttentionRows& rows, int64_t begin, int64_t count, int64_t bytes,
                       int64_t element) {
    if (count * bytes > kPrefetch) return;
    for (int64_t i = begin; i < begin + count; ++i) {
      const char* row = static_cast<const char*>(rows.data) + i * rows.row * element;
      for (int64_t byte = 0; byte < bytes; byte += 64) __builtin_prefetch(row + byte, 0, 2);
    }
  }

  std::vector<int64_t> q_, k_;
  int64_t kv_heads_;
  std::vector<int64_t> start_;  // [B + 1], on the axis of work
};

template <class T>
void fill_rows(const Tensor& x, int64_t begin, T value) {
  const int64_t row = x.stride(0);
  auto* data = static_cast<T*>(x.data_ptr());
  std::fill(data + begin * row, data + x.size(0) * row, value);
}

// Rows beyond the last molecule; `x` is contiguous.
void zero_tail(const Tensor& x, int64_t begin) {
  const int64_t row = x.size(1) * x.size(2) * element_bytes(x.scalar_type());
  auto* data = static_cast<char*>(x.data_ptr());
  std::fill(data + begin * row, data + x.size(0) * row, 0);
}

std::tuple<Tensor, Tensor> ragged_attention(Tensor q, Tensor k, Tensor v, Tensor q_offsets,
                                            Tensor k_offsets, bool causal,
                                            std::optional<double> scale) {
  check_inputs(q, k, v);
  const ScalarType dtype = q.scalar_type();
  const AttentionKernels& kernels = kernels_for(dtype);
  const Batch batch(q, k, q_offsets, k_offsets);
  q = readable(q), k = readable(k), v = readable(v);
  const Tensor out = allocate_like(q);
  const Tensor lse = allocate({q.size(0), q.size(1)}, lse_dtype(dtype));

  Attention x{};
  x.q = rows_of(q), x.k = rows_of(k), x.v = rows_of(v), x.out = rows_of(out);
  x.lse = lse.data_ptr();
  x.heads = q.size(1), x.kv_heads = k.size(1), x.dim = q.size(2);
  x.causal = causal, x.scale = scale.value_or(1 / std::sqrt(static_cast<double>(x.dim)));
  batch.run(kernels, kernels.forward, x, element_bytes(dtype), {x.q});

  zero_tail(out, batch.queries());
  if (dtype == ScalarType::Double)
    fill_rows<double>(lse, batch.queries(), -INFINITY);
  else
    fill_rows<float>(lse, batch.queries(), -INFINITY);
  return {out, lse};
}

std::tuple<Tensor, Tensor, Tensor> ragged_attention_bwd(Tensor grad, std::optional<Tensor> grad_lse,
                                                        Tensor q, Tensor k, Tensor v, Tensor lse,
                                                        Tensor q_offsets, Tensor k_offsets,
                                                        bool causal, std::optional<double> scale) {
  check_inputs(q, k, v);
  const ScalarType dtype = q.scalar_type();
  const AttentionKernels& kernels = kernels_for(dtype);
  const auto check_rows = [&](const Tensor& x, ScalarType wanted, int64_t dims) {
    bool fits = x.scalar_type() == wanted && x.dim() == dims;
    for (int64_t i = 0; fits && i < dims; ++i) fits = x.size(i) == q.size(i);
    STD_TORCH_CHECK(fits, "ragged_attention_bwd: grad and lse must fit q");
  };
  check_rows(grad, dtype, 3);
  check_rows(lse, lse_dtype(dtype), 2);
  if (grad_lse) check_rows(*grad_lse, lse_dtype(dtype), 2);
  const Batch batch(q, k, q_offsets, k_offsets);
  grad = readable(grad), q = readable(q), k = readable(k), v = readable(v);
  lse = dense(lse);
  if (grad_lse) grad_lse = dense(*grad_lse);
  const Tensor dq = allocate_like(q);
  const Tensor dk = allocate_like(k);
  const Tensor dv = allocate_like(v);

  Attention x{};
  x.q = rows_of(q), x.k = rows_of(k), x.v = rows_of(v), x.grad = rows_of(grad);
  x.dq = rows_of(dq), x.dk = rows_of(dk), x.dv = rows_of(dv);
  x.lse = lse.data_ptr();
  x.grad_lse = grad_lse ? grad_lse->data_ptr() : nullptr;
  x.heads = q.size(1), x.kv_heads = k.size(1), x.dim = q.size(2);
  x.causal = causal, x.scale = scale.value_or(1 / std::sqrt(static_cast<double>(x.dim)));
  batch.run(kernels, kernels.backward, x, element_bytes(dtype), {x.q, x.grad});

  zero_tail(dq, batch.queries());
  zero_tail(dk, batch.keys());
  zero_tail(dv, batch.keys());
  return {dq, dk, dv};
}

}  // namespace
}  // namespace edt

STABLE_TORCH_LIBRARY_IMPL(edt, CPU, m) {
  m.impl("ragged_attention", TORCH_BOX(&edt::ragged_attention));
  m.impl("ragged_attention_bwd", TORCH_BOX(&edt::ragged_attention_bwd));
}
