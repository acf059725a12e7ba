#include <torch/csrc/stable/library.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include "patches.h"

namespace edt {
namespace {

// Entropies as T, whatever dtype and stride they are stored with.
template <class T, class Stored>
PatchTensors find(const Tensor& entropy, const std::vector<int64_t>& offsets, const Cut& cut,
                  int64_t capacity) {
  const int64_t rows = entropy.size(0), stride = entropy.stride(0);
  const auto* data = static_cast<const Stored*>(entropy.data_ptr());
  const auto entropies = [=](int64_t begin, int64_t end, std::vector<T>& wide) {
    wide.resize(end - begin);
    for (int64_t i = begin; i < end; ++i) wide[i - begin] = static_cast<T>(data[i * stride]);
    return static_cast<const T*>(wide.data());
  };
  const int64_t molecules = static_cast<int64_t>(offsets.size()) - 1;
  const int64_t grain = molecule_grain(rows, molecules, 16);
  return cut_batch<T>(rows, offsets, cut, capacity, grain, entropies);
}

PatchTensors find_patches(const Tensor& entropy, const Tensor& offsets, int64_t rule, double level,
                          int64_t min_size, std::optional<int64_t> max_size,
                          std::optional<int64_t> max_patches, int64_t capacity) {
  STD_TORCH_CHECK(entropy.dim() == 1, "entropy: shape");
  const auto begins = read_offsets(offsets, entropy.size(0));
  const Cut cut{static_cast<Rule>(rule), level, min_size, max_size, max_patches};
  switch (dtype_of(entropy)) {
    case ScalarType::Float:
      return find<float, float>(entropy, begins, cut, capacity);
    case ScalarType::Double:
      return find<double, double>(entropy, begins, cut, capacity);
    case ScalarType::BFloat16:
      return find<float, torch::headeronly::BFloat16>(entropy, begins, cut, capacity);
    case ScalarType::Half:
      return find<float, torch::headeronly::Half>(entropy, begins, cut, capacity);
    default:
      STD_TORCH_CHECK(false, "entropy: dtype");
  }
}

}  // namespace
}  // namespace edt

STABLE_TORCH_LIBRARY_IMPL(edt, CPU, m) { m.impl("find_patches", TORCH_BOX(&edt::find_patches)); }
