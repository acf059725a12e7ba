#include "ragged_attention.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <tuple>
#include <vector>

#include "copy.h"
#include "scratch.h"
#include "tensor.h"

namespace edt {
namespace {

constexpr int64_t kGrain = 1 << 18;  // multiply-adds that are worth a thread

// Only the last dimension must be contiguous: heads of a packed projection are read in place.
Tensor readable(const Tensor& x) {
  return x.stride(2) == 1 || x.size(2) == 1 ? x : torch::stable::contiguous(x);
}

AttentionRows rows_of(const Tensor& x) {
  const auto strides = x.strides();
  return {x.data_ptr(), strides[0], strides[1]};
}

const AttentionKernels& kernels_for(ScalarType dtype, bool pairs) {
  const AttentionTable& table = attention_kernels();
#ifdef EDT_X86
  if (dtype == ScalarType::BFloat16 && !pairs && active_isa() >= Isa::avx512_bf16)
    return active_isa() == Isa::amx ? amx::attention_bfloat16 : avx512_bf16::attention_bfloat16;
#endif
  if (dtype == ScalarType::Float) return table.float32;
  if (dtype == ScalarType::BFloat16) return table.bfloat16;
  if (dtype == ScalarType::Half) return table.float16;
  STD_TORCH_CHECK(dtype == ScalarType::Double, "ragged_attention: dtype");
  return table.float64;
}

ScalarType lse_dtype(ScalarType dtype) {
  return dtype == ScalarType::Double ? dtype : ScalarType::Float;
}

void check_inputs(const Tensor& q, const Tensor& k, const Tensor& v) {
  const auto queries = q.sizes(), keys = k.sizes();
  STD_TORCH_CHECK(queries.size() == 3 && keys.size() == 3, "ragged_attention: dimensions");
  const bool shapes = keys.equals(v.sizes()) && queries[2] == keys[2] && queries[2] > 0 &&
                      queries[1] > 0 && keys[1] > 0 && queries[1] % keys[1] == 0;
  STD_TORCH_CHECK(shapes, "ragged_attention: shapes");
  const ScalarType dtype = dtype_of(q);
  STD_TORCH_CHECK(dtype == dtype_of(k) && dtype == dtype_of(v), "ragged_attention: dtypes");
}

// The molecules of a batch, one after the other on an axis of work on which threads take equal
// shares. A task is some key heads of one molecule.
class Batch {
 public:
  Batch(const Tensor& q, const Tensor& k, const Tensor& q_offsets, const Tensor& k_offsets,
        int64_t heads_per_task)
      : q_(read_offsets(q_offsets, q.size(0))),
        k_(read_offsets(k_offsets, k.size(0))),
        pairs_(q_.size()),
        start_(q_.size()),
        kv_heads_(k.size(1)),
        heads_per_task_(heads_per_task),
        tasks_((kv_heads_ + heads_per_task - 1) / heads_per_task) {
    STD_TORCH_CHECK(q_.size() == k_.size(), "ragged_attention: number of molecules");
    const int64_t per_task = q.size(1) / tasks_ * q.size(2);
    for (size_t i = 0; i + 1 < q_.size(); ++i) {
      const int64_t queries = q_[i + 1] - q_[i], keys = k_[i + 1] - k_[i];
      pairs_[i + 1] = pairs_[i] + queries * keys;
      start_[i + 1] = start_[i] + (queries * keys + queries + keys + 1) * (per_task + 1) * tasks_;
    }
  }

  int64_t molecules() const { return static_cast<int64_t>(q_.size()) - 1; }
  int64_t queries() const { return q_.back(); }
  int64_t keys() const { return k_.back(); }
  int64_t pairs() const { return pairs_.back(); }

  // kernel(x, molecule, key heads) for all, the tasks of a molecule on one thread as far as shares
  // allow.
  void run(const AttentionKernels& kernels, AttentionKernels::Kernel kernel, const Attention& x,
           int64_t element) const {
    torch::stable::parallel_for(0, start_.back(), kGrain, [&](int64_t begin, int64_t end) {
      if (kernels.begin_thread) kernels.begin_thread();
      Task task = task_at(begin);
      if (start_of(task) < end) rows_of_task(x, task, element).fetch(INT64_MAX);
      while (start_of(task) < end) {
        const Task next = after(task);
        AttentionAhead ahead;
        if (start_of(next) < end) ahead = rows_of_task(x, next, element);
        const AttentionMolecule m = molecule(task.molecule);
        const AttentionHeads heads = heads_of(task);
        kernel(x, m, heads, thread_scratch(kernels.scratch_bytes(x, m, heads)), ahead);
        ahead.fetch(INT64_MAX);
        task = next;
      }
      if (kernels.end_thread) kernels.end_thread();
    });
  }

 private:
  AttentionMolecule molecule(size_t i) const {
    return {static_cast<int64_t>(i), q_[i], q_[i + 1] - q_[i], k_[i], k_[i + 1] - k_[i], pairs_[i]};
  }

  struct Task {
    size_t molecule;
    int64_t number;
  };

  // The first that starts at `place` of the axis of work or after it.
  Task task_at(int64_t place) const {
    const auto found =
        std::upper_bound(start_.begin(), start_.end() - 1, place) - start_.begin() - 1;
    Task task{static_cast<size_t>(found), 0};
    while (start_of(task) < place) task = after(task);
    return task;
  }

  Task after(Task task) const {
    return task.number + 1 < tasks_ ? Task{task.molecule, task.number + 1}
                                    : Task{task.molecule + 1, 0};
  }

  int64_t start_of(Task task) const {
    if (task.molecule + 1 >= start_.size()) return INT64_MAX;
    const int64_t begin = start_[task.molecule], end = start_[task.molecule + 1];
    return begin + (end - begin) / tasks_ * task.number;
  }

  AttentionHeads heads_of(Task task) const {
    const int64_t first = task.number * heads_per_task_;
    return {first, std::min(first + heads_per_task_, kv_heads_)};
  }

  AttentionAhead rows_of_task(const Attention& x, Task task, int64_t element) const {
    AttentionAhead ahead;
    const AttentionMolecule m = molecule(task.molecule);
    const AttentionHeads heads = heads_of(task);
    const auto add = [&](const AttentionRows& rows, int64_t begin, int64_t count, int64_t group) {
      if (!rows.data) return;
      const int64_t first = begin * rows.row + heads.begin * group * rows.head;
      const int64_t bytes = (heads.end - heads.begin) * group * x.dim * element;
      ahead.operands[ahead.end++] = {static_cast<const char*>(rows.data) + first * element, count,
                                     rows.row * element, (bytes + 63) / 64};
    };
    for (const auto& rows : {x.k, x.v, x.dk, x.dv}) add(rows, m.k_begin, m.keys, 1);
    for (const auto& rows : {x.q, x.out, x.grad, x.dq})
      add(rows, m.q_begin, m.queries, x.heads / x.kv_heads);
    return ahead;
  }

  std::vector<int64_t> q_, k_, pairs_;  // [B + 1]
  std::vector<int64_t> start_;          // [B + 1], on the axis of work
  int64_t kv_heads_, heads_per_task_, tasks_;
};

template <class T>
void fill_rows(const Tensor& x, int64_t begin, T value) {
  const int64_t row = x.stride(0);
  auto* data = static_cast<T*>(x.data_ptr());
  std::fill(data + begin * row, data + x.size(0) * row, value);
}

// Rows of a contiguous tensor from `begin` on.
void zero_tail(const Tensor& x, int64_t begin) {
  const int64_t rows = x.size(0), row = rows == 0 ? 0 : x.numel() / rows;
  clear_bytes(at(x, begin * row), (rows - begin) * row * x.element_size());
}

void fill_lse_tail(const Tensor& lse, int64_t begin) {
  if (dtype_of(lse) == ScalarType::Double)
    fill_rows<double>(lse, begin, -INFINITY);
  else
    fill_rows<float>(lse, begin, -INFINITY);
}

Attention describe(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& lse,
                   bool causal, std::optional<double> scale) {
  Attention x{};
  x.q = rows_of(q), x.k = rows_of(k), x.v = rows_of(v);
  x.lse = lse.data_ptr();
  x.heads = q.size(1), x.kv_heads = k.size(1), x.dim = q.size(2);
  x.causal = causal, x.scale = scale.value_or(1 / std::sqrt(static_cast<double>(x.dim)));
  return x;
}

// Pairs of all heads of a task are read together, and they should fill a cache line.
constexpr int64_t kHeadsOfPairs = 16;

// Key heads of a task that has `wanted` query heads or more.
int64_t heads_per_task(const Tensor& q, const Tensor& k, int64_t wanted) {
  const int64_t group = q.size(1) / k.size(1);
  return std::min((wanted + group - 1) / group, k.size(1));
}

Tensor dense_pairs(const Tensor& x, const Tensor& q, const Batch& batch) {
  STD_TORCH_CHECK(x.dim() == 2 && x.size(1) == q.size(1) && x.size(0) >= batch.pairs() &&
                      dtype_of(x) == dtype_of(q),
                  "ragged_attention: pairs");
  return dense(x);
}

// Reads a seed that the caller holds.
AttentionDropout dropout_of(double p, std::optional<Tensor>& seed, const Batch& batch) {
  STD_TORCH_CHECK(p >= 0 && p < 1, "ragged_attention: dropout_p");
  if (p == 0) return {};
  STD_TORCH_CHECK(seed && dtype_of(*seed) == ScalarType::Long &&
                      (seed->numel() == 1 || seed->numel() == batch.molecules()),
                  "ragged_attention: seed");
  seed = dense(*seed);
  return {static_cast<const int64_t*>(seed->data_ptr()), seed->numel() > 1,
          static_cast<uint32_t>(p * 4294967296.0), 1 / (1 - p)};
}

std::tuple<Tensor, Tensor> ragged_attention(const Tensor& given_q, const Tensor& given_k,
                                            const Tensor& given_v, const Tensor& q_offsets,
                                            const Tensor& k_offsets, bool causal,
                                            std::optional<double> scale) {
  check_inputs(given_q, given_k, given_v);
  const Tensor q = readable(given_q), k = readable(given_k), v = readable(given_v);
  const AttentionKernels& kernels = kernels_for(dtype_of(q), false);
  const Batch batch(q, k, q_offsets, k_offsets, heads_per_task(q, k, kernels.heads_per_call));
  const Tensor out = allocate_like(q);
  const Tensor lse = allocate({q.size(0), q.size(1)}, lse_dtype(dtype_of(q)));

  Attention x = describe(q, k, v, lse, causal, scale);
  x.out = rows_of(out);
  batch.run(kernels, kernels.forward, x, q.element_size());
  zero_tail(out, batch.queries());
  fill_lse_tail(lse, batch.queries());
  return {out, lse};
}

std::tuple<Tensor, Tensor, Tensor> ragged_attention_general(
    Tensor q, Tensor k, Tensor v, std::optional<Tensor> bias, std::optional<Tensor> seed,
    Tensor q_offsets, Tensor k_offsets, bool causal, std::optional<double> scale, double dropout_p,
    bool return_scores) {
  check_inputs(q, k, v);
  const AttentionKernels& kernels = kernels_for(dtype_of(q), true);
  const Batch batch(q, k, q_offsets, k_offsets, heads_per_task(q, k, kHeadsOfPairs));
  q = readable(q), k = readable(k), v = readable(v);
  if (bias) bias = dense_pairs(*bias, q, batch);
  const Tensor out = allocate_like(q);
  const Tensor lse = allocate({q.size(0), q.size(1)}, lse_dtype(dtype_of(q)));
  const int64_t pairs = !return_scores ? 0 : bias ? bias->size(0) : batch.pairs();
  const Tensor scores = allocate({pairs, q.size(1)}, dtype_of(q));

  Attention x = describe(q, k, v, lse, causal, scale);
  x.out = rows_of(out);
  x.pairs.bias = bias ? bias->data_ptr() : nullptr;
  x.pairs.scores = return_scores ? scores.data_ptr() : nullptr;
  x.dropout = dropout_of(dropout_p, seed, batch);
  batch.run(kernels, kernels.forward_pairs, x, q.element_size());
  zero_tail(out, batch.queries());
  fill_lse_tail(lse, batch.queries());
  if (return_scores) zero_tail(scores, batch.pairs());
  return {out, lse, scores};
}

// Of the backward: gradients and lse as the kernels read them.
void check_rows(const Tensor& x, ScalarType dtype, int64_t dims, const Tensor& q) {
  bool fits = dtype_of(x) == dtype && x.dim() == dims;
  for (int64_t i = 0; fits && i < dims; ++i) fits = x.size(i) == q.size(i);
  STD_TORCH_CHECK(fits, "ragged_attention_bwd: grad and lse must fit q");
}

// What both backwards share: `kernel` with everything but the pairs described.
std::tuple<Tensor, Tensor, Tensor> run_backward(
    Tensor grad, std::optional<Tensor> grad_lse, Tensor q, Tensor k, Tensor v, Tensor lse,
    bool causal, std::optional<double> scale, const Batch& batch, const AttentionKernels& kernels,
    AttentionKernels::Kernel kernel, const AttentionPairs& pairs, const AttentionDropout& dropout) {
  check_rows(grad, dtype_of(q), 3, q);
  check_rows(lse, lse_dtype(dtype_of(q)), 2, q);
  if (grad_lse) check_rows(*grad_lse, lse_dtype(dtype_of(q)), 2, q);
  grad = readable(grad), q = readable(q), k = readable(k), v = readable(v);
  lse = dense(lse);
  if (grad_lse) grad_lse = dense(*grad_lse);
  const Tensor dq = allocate_like(q), dk = allocate_like(k), dv = allocate_like(v);

  Attention x = describe(q, k, v, lse, causal, scale);
  x.grad = rows_of(grad), x.dq = rows_of(dq), x.dk = rows_of(dk), x.dv = rows_of(dv);
  x.grad_lse = grad_lse ? grad_lse->data_ptr() : nullptr;
  x.pairs = pairs;
  x.dropout = dropout;
  batch.run(kernels, kernel, x, q.element_size());
  zero_tail(dq, batch.queries());
  zero_tail(dk, batch.keys());
  zero_tail(dv, batch.keys());
  return {dq, dk, dv};
}

std::tuple<Tensor, Tensor, Tensor> ragged_attention_bwd(Tensor grad, std::optional<Tensor> grad_lse,
                                                        Tensor q, Tensor k, Tensor v, Tensor lse,
                                                        Tensor q_offsets, Tensor k_offsets,
                                                        bool causal, std::optional<double> scale) {
  check_inputs(q, k, v);
  const AttentionKernels& kernels = kernels_for(dtype_of(q), false);
  const Batch batch(q, k, q_offsets, k_offsets, heads_per_task(q, k, kernels.heads_per_call));
  return run_backward(grad, grad_lse, q, k, v, lse, causal, scale, batch, kernels, kernels.backward,
                      {}, {});
}

std::tuple<Tensor, Tensor, Tensor, Tensor> ragged_attention_general_bwd(
    Tensor grad, std::optional<Tensor> grad_lse, std::optional<Tensor> grad_scores, Tensor q,
    Tensor k, Tensor v, std::optional<Tensor> bias, std::optional<Tensor> seed, Tensor lse,
    Tensor q_offsets, Tensor k_offsets, bool causal, std::optional<double> scale,
    double dropout_p) {
  check_inputs(q, k, v);
  const Batch batch(q, k, q_offsets, k_offsets, heads_per_task(q, k, kHeadsOfPairs));
  AttentionPairs pairs{};
  Tensor dbias = allocate({bias ? bias->size(0) : 0, q.size(1)}, dtype_of(q));
  if (bias) {
    bias = dense_pairs(*bias, q, batch);
    pairs.bias = bias->data_ptr(), pairs.dbias = dbias.data_ptr();
    zero_tail(dbias, batch.pairs());
  }
  if (grad_scores) {
    grad_scores = dense_pairs(*grad_scores, q, batch);
    pairs.grad_scores = grad_scores->data_ptr();
  }
  const AttentionKernels& kernels = kernels_for(dtype_of(q), true);
  const auto found =
      run_backward(grad, grad_lse, q, k, v, lse, causal, scale, batch, kernels,
                   kernels.backward_pairs, pairs, dropout_of(dropout_p, seed, batch));
  return std::tuple_cat(found, std::make_tuple(dbias));
}

}  // namespace
}  // namespace edt

STABLE_TORCH_LIBRARY_IMPL(edt, CPU, m) {
  m.impl("ragged_attention", TORCH_BOX(&edt::ragged_attention));
  m.impl("ragged_attention_bwd", TORCH_BOX(&edt::ragged_attention_bwd));
  m.impl("ragged_attention_general", TORCH_BOX(&edt::ragged_attention_general));
  m.impl("ragged_attention_general_bwd", TORCH_BOX(&edt::ragged_attention_general_bwd));
}
