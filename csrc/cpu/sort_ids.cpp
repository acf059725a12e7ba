#include <torch/csrc/stable/library.h>

#include <numeric>
#include <tuple>
#include <vector>

#include "tensor.h"

namespace edt {
namespace {

// A counting sort. Ids outside [0, segments) share a bucket beyond the last.
std::tuple<Tensor, Tensor> sort_ids(const Tensor& given, int64_t segments) {
  STD_TORCH_CHECK(given.dim() == 1 && segments >= 0, "ids: shape");
  STD_TORCH_CHECK(given.scalar_type() == ScalarType::Long, "ids: dtype");
  const Tensor ids = dense(given);
  const int64_t rows = ids.size(0);
  const Tensor order = allocate({rows}, ScalarType::Long);
  const Tensor offsets = allocate({segments + 1}, ScalarType::Long);
  const auto* id = static_cast<const int64_t*>(ids.data_ptr());
  auto* place = static_cast<int64_t*>(order.data_ptr());
  auto* begin = static_cast<int64_t*>(offsets.data_ptr());
  const auto bucket = [=](int64_t row) {
    const bool inside = 0 <= id[row] && id[row] < segments;
    return inside ? id[row] : segments;
  };

  bool ascending = true;
  for (int64_t row = 1; row < rows; ++row) ascending &= bucket(row - 1) <= bucket(row);
  if (ascending) {
    std::iota(place, place + rows, 0);
    int64_t row = 0;
    for (int64_t p = 0; p <= segments; ++p) {
      while (row < rows && bucket(row) < p) ++row;
      begin[p] = row;
    }
    return {order, offsets};
  }

  std::vector<int64_t> next(segments + 2);
  for (int64_t row = 0; row < rows; ++row) ++next[bucket(row) + 1];
  std::partial_sum(next.begin(), next.end(), next.begin());
  std::copy(next.begin(), next.end() - 1, begin);
  for (int64_t row = 0; row < rows; ++row) place[next[bucket(row)]++] = row;
  return {order, offsets};
}

}  // namespace
}  // namespace edt

STABLE_TORCH_LIBRARY_IMPL(edt, CPU, m) { m.impl("sort_ids", TORCH_BOX(&edt::sort_ids)); }
