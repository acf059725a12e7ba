// The entropy kernels with tensors in hand: which one serves a dtype, and where rows begin.
#pragma once

#include "entropy.h"
#include "tensor.h"

namespace edt {

inline ScalarType row_type(ScalarType type) {
  return type == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// Rows that make a thread worth waking.
inline int64_t row_grain(int64_t v) { return 1 + 32768 / v; }

// Entropies of the rows [begin, end) of contiguous logits [N, v].
inline void entropy_rows(const Tensor& logits, int64_t v, double scale, int64_t begin, int64_t end,
                         const Tensor& h, const Tensor& top, const Tensor& log_total) {
  entropy_kernels().forward[float_index(dtype_of(logits))](at(logits, begin * v), end - begin, v,
                                                           scale, at(h, begin), at(top, begin),
                                                           at(log_total, begin));
}

}  // namespace edt
