#include <torch/csrc/stable/library.h>

#include <array>
#include <cmath>
#include <optional>
#include <tuple>

#include "ragged_attention.cuh"
#include "stream.h"
#include "tensor.h"

namespace edt {
namespace {

// Only the last dimension must be contiguous: heads of a packed projection are read in place.
Tensor readable(const Tensor& x) {
  return x.size(2) == 1 || x.stride(2) == 1 ? x : torch::stable::contiguous(x);
}

AttentionRows rows_of(const Tensor& x) { return {x.data_ptr(), x.stride(0), x.stride(1)}; }

bool is_aligned(const Tensor& x) {
  constexpr int64_t kBytes = 16;
  const auto size = static_cast<int64_t>(x.element_size());
  return reinterpret_cast<intptr_t>(x.data_ptr()) % kBytes == 0 &&
         x.stride(0) * size % kBytes == 0 && x.stride(1) * size % kBytes == 0 &&
         x.size(2) * size % kBytes == 0;
}

void check_inputs(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& q_offsets,
                  const Tensor& k_offsets) {
  STD_TORCH_CHECK(q.dim() == 3 && k.dim() == 3 && v.dim() == 3, "ragged_attention: dimensions");
  const bool shapes = k.size(0) == v.size(0) && k.size(1) == v.size(1) && k.size(2) == v.size(2) &&
                      q.size(2) == k.size(2) && q.size(2) > 0 && q.size(1) > 0 && k.size(1) > 0 &&
                      q.size(1) % k.size(1) == 0 && q.size(1) * q.size(2) <= INT32_MAX;
  STD_TORCH_CHECK(shapes, "ragged_attention: shapes");
  const ScalarType dtype = q.scalar_type();
  STD_TORCH_CHECK(dtype == k.scalar_type() && dtype == v.scalar_type(), "ragged_attention: dtypes");
  STD_TORCH_CHECK(
      q_offsets.dim() == 1 && k_offsets.dim() == 1 && q_offsets.size(0) == k_offsets.size(0),
      "ragged_attention: number of molecules");
}

// Of the backward: gradients and lse as the kernels read them.
void check_rows(const Tensor& x, ScalarType dtype, int64_t dims, const Tensor& q) {
  bool fits = x.scalar_type() == dtype && x.dim() == dims;
  for (int64_t i = 0; fits && i < dims; ++i) fits = x.size(i) == q.size(i);
  STD_TORCH_CHECK(fits, "ragged_attention_bwd: grad and lse must fit q");
}

Attention describe(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& lse,
                   const Tensor& q_offsets, const Tensor& k_offsets, bool causal,
                   std::optional<double> scale) {
  Attention x{};
  x.q = rows_of(q), x.k = rows_of(k), x.v = rows_of(v);
  x.lse = static_cast<float*>(lse.data_ptr());
  x.q_offsets = offsets_of(q_offsets, q.size(0)), x.k_offsets = offsets_of(k_offsets, k.size(0));
  x.molecules = q_offsets.size(0) - 1;
  x.heads = static_cast<int>(q.size(1)), x.kv_heads = static_cast<int>(k.size(1));
  x.dim = static_cast<int>(q.size(2));
  x.causal = causal;
  x.scale = static_cast<float>(scale.value_or(1 / std::sqrt(static_cast<double>(x.dim))));
  x.aligned = is_aligned(q) && is_aligned(k) && is_aligned(v);
  return x;
}

// An op of pairs and dropout, which takes float64 too, on any GPU. Returns what is left on its
// stack.
template <class... Arguments>
auto call(const char* op, const Arguments&... arguments) {
  std::array<StableIValue, sizeof...(Arguments)> stack{torch::stable::detail::from(arguments)...};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(op, "", stack.data(), TORCH_ABI_VERSION));
  return stack;
}

Tensor tensor(StableIValue value) { return torch::stable::detail::to<Tensor>(value); }

// Whether a kernel here has the type, and its blocks fit the GPU. KERNEL<T>: with its tiles.
template <template <class> class KERNEL>
bool is_served(ScalarType dtype, const Launcher& launch) {
  if (dtype == ScalarType::Double) return false;
  bool fits = false;
  with_type(dtype, [&](auto number) {
    using T = decltype(number);
    fits = launch.holds(KERNEL<T>::kTiles * kTileBytes<T>);
  });
  return fits;
}

std::tuple<Tensor, Tensor> ragged_attention(Tensor q, Tensor k, Tensor v, Tensor q_offsets,
                                            Tensor k_offsets, bool causal,
                                            std::optional<double> scale) {
  check_inputs(q, k, v, q_offsets, k_offsets);
  const Launcher launch(q);
  if (!is_served<Forward>(q.scalar_type(), launch)) {
    const auto found = call("edt::ragged_attention_general", q, k, v, std::nullopt, std::nullopt,
                            q_offsets, k_offsets, causal, scale, 0.0, false);
    tensor(found[2]);
    return {tensor(found[0]), tensor(found[1])};
  }
  q = readable(q), k = readable(k), v = readable(v);
  q_offsets = dense(q_offsets), k_offsets = dense(k_offsets);
  const Tensor out = allocate(q, {q.size(0), q.size(1), q.size(2)}, q.scalar_type());
  const Tensor lse = allocate(q, {q.size(0), q.size(1)}, ScalarType::Float);

  Attention x = describe(q, k, v, lse, q_offsets, k_offsets, causal, scale);
  x.out = rows_of(out);
  const int64_t blocks = x.molecules * x.heads + kTailBlocks;
  with_type(q.scalar_type(), [&](auto number) {
    using T = decltype(number);
    launch(ragged_attention_forward<T>, blocks, kThreads, Forward<T>::kTiles * kTileBytes<T>, x);
  });
  return {out, lse};
}

std::tuple<Tensor, Tensor, Tensor> ragged_attention_bwd(Tensor grad, std::optional<Tensor> grad_lse,
                                                        Tensor q, Tensor k, Tensor v, Tensor lse,
                                                        Tensor q_offsets, Tensor k_offsets,
                                                        bool causal, std::optional<double> scale) {
  check_inputs(q, k, v, q_offsets, k_offsets);
  const Launcher launch(q);
  if (!is_served<Backward>(q.scalar_type(), launch)) {
    const auto found =
        call("edt::ragged_attention_general_bwd", grad, grad_lse, std::nullopt, q, k, v,
             std::nullopt, std::nullopt, lse, q_offsets, k_offsets, causal, scale, 0.0);
    tensor(found[3]);
    return {tensor(found[0]), tensor(found[1]), tensor(found[2])};
  }
  check_rows(grad, q.scalar_type(), 3, q);
  check_rows(lse, ScalarType::Float, 2, q);
  if (grad_lse) check_rows(*grad_lse, ScalarType::Float, 2, q);
  grad = readable(grad), q = readable(q), k = readable(k), v = readable(v);
  q_offsets = dense(q_offsets), k_offsets = dense(k_offsets), lse = dense(lse);
  if (grad_lse) grad_lse = dense(*grad_lse);
  const Tensor dq = allocate(q, {q.size(0), q.size(1), q.size(2)}, q.scalar_type());
  const Tensor dk = allocate(k, {k.size(0), k.size(1), k.size(2)}, k.scalar_type());
  const Tensor dv = allocate(k, {k.size(0), k.size(1), k.size(2)}, k.scalar_type());
  const Tensor row_sums = allocate(q, {q.size(0), q.size(1), 2}, ScalarType::Float);

  Attention x = describe(q, k, v, lse, q_offsets, k_offsets, causal, scale);
  x.grad = rows_of(grad), x.dq = rows_of(dq), x.dk = rows_of(dk), x.dv = rows_of(dv);
  x.grad_lse = grad_lse ? static_cast<const float*>(grad_lse->data_ptr()) : nullptr;
  x.row_sums = static_cast<float*>(row_sums.data_ptr());
  x.aligned = x.aligned && is_aligned(grad);
  const int64_t blocks = x.molecules * x.kv_heads + kTailBlocks;
  with_type(q.scalar_type(), [&](auto number) {
    using T = decltype(number);
    launch(ragged_attention_backward<T>, blocks, kThreads, Backward<T>::kTiles * kTileBytes<T>, x);
  });
  return {dq, dk, dv};
}

}  // namespace
}  // namespace edt

STABLE_TORCH_LIBRARY_IMPL(edt, CUDA, m) {
  m.impl("ragged_attention", TORCH_BOX(&edt::ragged_attention));
  m.impl("ragged_attention_bwd", TORCH_BOX(&edt::ragged_attention_bwd));
}
