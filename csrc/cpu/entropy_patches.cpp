#include <torch/csrc/stable/library.h>

#include "copy.h"
#include "entropy_rows.h"
#include "patches.h"

namespace edt {
namespace {

using Outputs = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

template <class T>
Outputs run(const Tensor& logits, const std::vector<int64_t>& offsets, double scale, const Cut& cut,
            int64_t capacity) {
  const int64_t rows = logits.size(0), v = logits.size(1);
  const ScalarType type = row_type(dtype_of(logits));
  Tensor h = allocate({rows}, type);
  Tensor top = allocate({rows}, type);
  Tensor log_total = allocate({rows}, type);
  const auto entropies = [&](int64_t begin, int64_t end, std::vector<T>&) {
    entropy_rows(logits, v, scale, begin, end, h, top, log_total);
    return static_cast<const T*>(h.data_ptr()) + begin;
  };
  const int64_t grain = molecule_grain(rows, static_cast<int64_t>(offsets.size()) - 1, v + 16);
  auto patches = cut_batch<T>(rows, offsets, cut, capacity, grain, entropies);
  const int64_t tail = rows - offsets.back();
  for (const Tensor& x : {h, top, log_total}) clear_bytes(at(x, offsets.back()), tail * sizeof(T));
  return std::tuple_cat(std::make_tuple(h, top, log_total), patches);
}

Outputs entropy_patches(const Tensor& given, const Tensor& offsets, double scale, int64_t rule,
                        double level, int64_t min_size, std::optional<int64_t> max_size,
                        std::optional<int64_t> max_patches, int64_t capacity) {
  STD_TORCH_CHECK(given.dim() == 2 && given.size(1) > 0, "logits: shape");
  const Tensor logits = dense(given);
  const auto begins = read_offsets(offsets, logits.size(0));
  const Cut cut{static_cast<Rule>(rule), level, min_size, max_size, max_patches};
  return dtype_of(logits) == ScalarType::Double ? run<double>(logits, begins, scale, cut, capacity)
                                                : run<float>(logits, begins, scale, cut, capacity);
}

}  // namespace
}  // namespace edt

STABLE_TORCH_LIBRARY_IMPL(edt, CPU, m) {
  m.impl("entropy_patches", TORCH_BOX(&edt::entropy_patches));
}
