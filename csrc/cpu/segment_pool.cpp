#include "segment_pool.h"

#include <torch/csrc/stable/library.h>

#include <limits>
#include <optional>
#include <tuple>

#include "copy.h"
#include "scratch.h"
#include "segments.h"

namespace edt {
namespace {

using Optional = std::optional<Tensor>;

const PoolKernels& kernels_for(ScalarType dtype) {
  const PoolTable& table = pool_kernels();
  if (dtype == ScalarType::Float) return table.float32;
  if (dtype == ScalarType::BFloat16) return table.bfloat16;
  if (dtype == ScalarType::Half) return table.float16;
  STD_TORCH_CHECK(dtype == ScalarType::Double, "segment_pool: dtype");
  return table.float64;
}

// Of the row that an extreme came from: as wide as the number that it is found with.
ScalarType source_dtype(ScalarType dtype) {
  return dtype == ScalarType::Double ? ScalarType::Long : ScalarType::Int;
}

// The row of every place of the segments: in range, and in one place only.
class Order {
 public:
  Order(const Optional& given, const Segments& segments)
      : rows_(segments.rows()), used_(segments.used()) {
    if (!given) return;
    STD_TORCH_CHECK(given->dim() == 1 && given->size(0) == rows_, "order: shape");
    STD_TORCH_CHECK(dtype_of(*given) == ScalarType::Long, "order: dtype");
    tensor_ = dense(*given);
    const auto* order = static_cast<const int64_t*>(tensor_.data_ptr());
    bool ascending = true;
    for (int64_t i = 0; i < used_; ++i) ascending &= order[i] == i;
    if (ascending) return;

    placed_.resize(rows_);
    for (int64_t i = 0; i < used_; ++i) {
      const int64_t row = order[i];
      STD_TORCH_CHECK(0 <= row && row < rows_ && !placed_[row], "order: content");
      placed_[row] = true;
    }
    data_ = order;
  }

  // Null where place i is row i.
  const int64_t* data() const { return data_; }

  // Rows of no segment take the places beyond the last one.
  void complete() {
    if (!data_ || used_ == rows_) return;
    all_.assign(data_, data_ + used_);
    for (int64_t row = 0; row < rows_; ++row)
      if (!placed_[row]) all_.push_back(row);
    data_ = all_.data();
  }

 private:
  int64_t rows_, used_;
  Tensor tensor_;
  const int64_t* data_ = nullptr;
  std::vector<char> placed_;
  std::vector<int64_t> all_;
};

// One call: the segments of `rows` rows, each of the shape of a row of `like` [_, ...].
class Pooling {
 public:
  Pool pool{};

  Pooling(const Tensor& like, int64_t rows, const Tensor& offsets, const Optional& order)
      : like_(like), segments_(offsets, rows, row_size(like)), order_(order, segments_) {
    static_cast<SegmentRows&>(pool) = segments_.describe();
    pool.order = order_.data();
  }

  int64_t size() const { return segments_.size(); }

  // A new tensor [rows, ...].
  Tensor allocate_rows(int64_t rows, ScalarType dtype) const {
    std::vector<int64_t> sizes(like_.sizes().begin(), like_.sizes().end());
    sizes[0] = rows;
    return allocate(Sizes(sizes.data(), sizes.size()), dtype);
  }

  void forward(PoolKernels::Kernel kernel) const {
    segments_.for_columns([&](const Share& share) { kernel(pool, share); });
  }

  // Also zeroes the rows of `out` that are in no segment.
  template <class F>
  void backward(const Tensor& out, F kernel) {
    order_.complete();
    pool.order = order_.data(), pool.out = out.data_ptr();
    const int64_t row = row_size(out), bytes = row * static_cast<int64_t>(out.element_size());
    segments_.for_places([&](const Share& share) {
      kernel(pool, share);
      for (int64_t i = std::max(share.place_begin, pool.used); i < share.place_end; ++i)
        clear_bytes(at(out, (pool.order ? pool.order[i] : i) * row), bytes);
    });
  }

 private:
  Tensor like_;
  Segments segments_;
  Order order_;
};

// `weight` [rows] of that dtype, contiguous.
Optional read_weight(const Optional& weight, int64_t rows, ScalarType dtype) {
  if (!weight) return weight;
  STD_TORCH_CHECK(weight->dim() == 1 && weight->size(0) == rows, "weight: shape");
  STD_TORCH_CHECK(dtype_of(*weight) == dtype, "weight: dtype");
  return dense(*weight);
}

void check_pooled(const Tensor& x, const Pooling& call, const char* what) {
  STD_TORCH_CHECK(x.dim() > 0 && x.size(0) == call.size() && row_size(x) == call.pool.dim, what);
}

Tensor segment_pool(const Tensor& given, const Tensor& offsets, const Optional& order,
                    const Optional& given_weight, bool mean) {
  STD_TORCH_CHECK(given.dim() > 0, "values: shape");
  const Tensor values = dense(given);
  const ScalarType dtype = dtype_of(values);
  const PoolKernels& kernels = kernels_for(dtype);
  const Optional weight = read_weight(given_weight, values.size(0), dtype);
  Pooling call(values, values.size(0), offsets, order);
  const Tensor out = call.allocate_rows(call.size(), dtype);
  call.pool.mean = mean, call.pool.values = values.data_ptr(), call.pool.out = out.data_ptr();
  if (weight) call.pool.weight = weight->data_ptr();
  call.forward(kernels.sum);
  return out;
}

Tensor segment_pool_bwd(const Tensor& given, const Tensor& offsets, const Optional& order,
                        const Optional& given_weight, int64_t rows, bool mean) {
  STD_TORCH_CHECK(given.dim() > 0 && rows >= 0, "grad: shape");
  const Tensor grad = dense(given);
  const ScalarType dtype = dtype_of(grad);
  const PoolKernels& kernels = kernels_for(dtype);
  const Optional weight = read_weight(given_weight, rows, dtype);
  Pooling call(grad, rows, offsets, order);
  check_pooled(grad, call, "grad: shape");
  const Tensor out = call.allocate_rows(rows, dtype);
  call.pool.mean = mean, call.pool.grad = grad.data_ptr();
  if (weight) call.pool.weight = weight->data_ptr();
  call.backward(out, kernels.sum_bwd);
  return out;
}

Tensor segment_pool_weight_bwd(const Tensor& given_grad, const Tensor& given, const Tensor& offsets,
                               const Optional& order, const Tensor& given_weight, bool mean) {
  STD_TORCH_CHECK(given.dim() > 0, "values: shape");
  const Tensor grad = dense(given_grad), values = dense(given);
  const ScalarType dtype = dtype_of(values);
  STD_TORCH_CHECK(dtype_of(grad) == dtype, "grad: dtype");
  const PoolKernels& kernels = kernels_for(dtype);
  const Optional weight = read_weight(given_weight, values.size(0), dtype);
  Pooling call(values, values.size(0), offsets, order);
  check_pooled(grad, call, "grad: shape");
  const Tensor out = allocate({values.size(0)}, dtype);
  if (call.pool.dim == 0) {
    clear_bytes(at(out, 0), out.numel() * static_cast<int64_t>(out.element_size()));
    return out;
  }
  call.pool.mean = mean, call.pool.grad = grad.data_ptr();
  call.pool.values = values.data_ptr(), call.pool.weight = weight->data_ptr();
  call.backward(out, [&](const Pool& pool, const Share& share) {
    const int64_t places = share.place_end - share.place_begin;
    kernels.weight_bwd(pool, share, thread_scratch(places * static_cast<int64_t>(sizeof(double))));
  });
  return out;
}

std::tuple<Tensor, Tensor> segment_extreme(const Tensor& given, const Tensor& offsets,
                                           const Optional& order, bool largest) {
  STD_TORCH_CHECK(given.dim() > 0, "values: shape");
  const Tensor values = dense(given);
  const ScalarType dtype = dtype_of(values);
  const PoolKernels& kernels = kernels_for(dtype);
  const bool countable = values.size(0) <= std::numeric_limits<int32_t>::max();
  STD_TORCH_CHECK(countable || dtype == ScalarType::Double, "values: rows beyond 32 bits");
  Pooling call(values, values.size(0), offsets, order);
  const Tensor out = call.allocate_rows(call.size(), dtype);
  const Tensor source = call.allocate_rows(call.size(), source_dtype(dtype));
  call.pool.largest = largest, call.pool.values = values.data_ptr();
  call.pool.out = out.data_ptr(), call.pool.source = source.data_ptr();
  call.forward(kernels.extreme);
  return {out, source};
}

Tensor segment_extreme_bwd(const Tensor& given, const Tensor& given_source, const Tensor& offsets,
                           const Optional& order, int64_t rows) {
  STD_TORCH_CHECK(given.dim() > 0 && rows >= 0, "grad: shape");
  const Tensor grad = dense(given), source = dense(given_source);
  const ScalarType dtype = dtype_of(grad);
  const PoolKernels& kernels = kernels_for(dtype);
  STD_TORCH_CHECK(dtype_of(source) == source_dtype(dtype), "source: dtype");
  Pooling call(grad, rows, offsets, order);
  check_pooled(grad, call, "grad: shape");
  check_pooled(source, call, "source: shape");
  const Tensor out = call.allocate_rows(rows, dtype);
  call.pool.grad = grad.data_ptr(), call.pool.source = source.data_ptr();
  call.backward(out, kernels.extreme_bwd);
  return out;
}

}  // namespace
}  // namespace edt

STABLE_TORCH_LIBRARY_IMPL(edt, CPU, m) {
  m.impl("segment_pool", TORCH_BOX(&edt::segment_pool));
  m.impl("segment_pool_bwd", TORCH_BOX(&edt::segment_pool_bwd));
  m.impl("segment_pool_weight_bwd", TORCH_BOX(&edt::segment_pool_weight_bwd));
  m.impl("segment_extreme", TORCH_BOX(&edt::segment_extreme));
  m.impl("segment_extreme_bwd", TORCH_BOX(&edt::segment_extreme_bwd));
}
