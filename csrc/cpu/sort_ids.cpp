#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <numeric>
#include <tuple>
#include <vector>

#include "tensor.h"

namespace edt {
namespace {

// A counting sort. Ids outside [0, segments) share a bucket beyond the last.
std::tuple<Tensor, Tensor> sort_ids(const Tensor& given, int64_t segments) {
  STD_TORCH_CHECK(given.dim() == 1 && segments >= 0, "ids: shape");
  STD_TORCH_CHECK(dtype_of(given) == ScalarType::Long, "ids: dtype");
  const Tensor ids = dense(given);
  const int64_t rows = ids.size(0);
  const Tensor order = allocate({rows}, ScalarType::Long);
  const Tensor offsets = allocate({segments + 1}, ScalarType::Long);
  const auto* id = static_cast<const int64_t*>(ids.data_ptr());
  auto* place = static_cast<int64_t*>(order.data_ptr());
  auto* begin = static_cast<int64_t*>(offsets.data_ptr());
  const auto bucket = [=](int64_t row) {
    return std::min(static_cast<uint64_t>(id[row]), static_cast<uint64_t>(segments));
  };

  // Ids that ascend already: the last row of a bucket says where the next one begins.
  std::vector<int64_t> next(segments + 2);
  bool ascending = true;
  uint64_t previous = 0;
  for (int64_t row = 0; row < rows; ++row) {
    const uint64_t current = bucket(row);
    ascending &= previous <= current;
    previous = current;
    next[current + 1] = row + 1;
    place[row] = row;
  }
  if (ascending) {
    for (int64_t p = 0; p < segments; ++p) next[p + 1] = std::max(next[p], next[p + 1]);
    std::copy(next.begin(), next.end() - 1, begin);
    return {order, offsets};
  }

  std::fill(next.begin(), next.end(), 0);
  for (int64_t row = 0; row < rows; ++row) ++next[bucket(row) + 1];
  std::partial_sum(next.begin(), next.end(), next.begin());
  std::copy(next.begin(), next.end() - 1, begin);
  for (int64_t row = 0; row < rows; ++row) place[next[bucket(row)]++] = row;
  return {order, offsets};
}

}  // namespace
}  // namespace edt

STABLE_TORCH_LIBRARY_IMPL(edt, CPU, m) { m.impl("sort_ids", TORCH_BOX(&edt::sort_ids)); }
