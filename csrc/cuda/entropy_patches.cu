#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <optional>
#include <tuple>
#include <type_traits>

#include "entropy_patches.cuh"
#include "stream.h"
#include "tensor.h"

namespace edt {
namespace {

using Outputs = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

// One block is fast for batches that it holds at once or a few times over, and saves a launch.
constexpr int64_t kFewRows = 512, kFewMolecules = 64;
// Blocks that number patches: each reads the counts of all molecules.
constexpr int64_t kNumberBlocks = 64, kMoleculesPerBlock = 32;

int limit(int64_t x) { return static_cast<int>(std::min<int64_t>(x, INT32_MAX)); }

template <class S, class W>
Outputs run(const Tensor& logits, const Tensor& offsets, double scale, const Cut& cut,
            int64_t capacity) {
  constexpr ScalarType type = std::is_same_v<W, double> ? ScalarType::Double : ScalarType::Float;
  const int64_t rows = logits.size(0), molecules = offsets.size(0) - 1;
  const Tensor h = allocate(logits, {rows}, type), top = allocate(logits, {rows}, type);
  const Tensor log_total = allocate(logits, {rows}, type);
  const Tensor ids = allocate(logits, {rows}, ScalarType::Long);
  const Tensor atom_offsets = allocate(logits, {capacity + 1}, ScalarType::Long);
  const Tensor patch_offsets = allocate(logits, {molecules + 1}, ScalarType::Long);
  const Tensor count = allocate(logits, {}, ScalarType::Long);
  const Tensor threshold = allocate(logits, {molecules}, type);

  EntropyPatches<W> x{};
  x.logits = logits.data_ptr();
  x.offsets = offsets_of(offsets, rows);
  x.molecules = molecules, x.vocabulary = logits.size(1), x.capacity = capacity;
  x.scale = static_cast<W>(scale);
  x.cut = cut;
  x.h = static_cast<W*>(h.data_ptr()), x.top = static_cast<W*>(top.data_ptr());
  x.log_total = static_cast<W*>(log_total.data_ptr());
  x.threshold = static_cast<W*>(threshold.data_ptr());
  x.ids = static_cast<int64_t*>(ids.data_ptr());
  x.atom_offsets = static_cast<int64_t*>(atom_offsets.data_ptr());
  x.patch_offsets = static_cast<int64_t*>(patch_offsets.data_ptr());
  x.count = static_cast<int64_t*>(count.data_ptr());

  const Launcher launch(logits);
  if (rows <= kFewRows && molecules <= kFewMolecules) {
    launch(entropy_patches_of_few<S, W>, 1, kSmallThreads, 0, x);
  } else {
    launch(cut_molecules<S, W>, molecules, kCutThreads, 0, x);
    const int64_t wanted = (molecules + kMoleculesPerBlock - 1) / kMoleculesPerBlock;
    launch(number_patches_of_batch<W>, std::clamp<int64_t>(wanted, 1, kNumberBlocks),
           kNumberThreads, 0, x);
  }
  return {h, top, log_total, ids, atom_offsets, patch_offsets, count, threshold};
}

Outputs entropy_patches(const Tensor& given, const Tensor& given_offsets, double scale,
                        int64_t rule, double level, int64_t min_size,
                        std::optional<int64_t> max_size, std::optional<int64_t> max_patches,
                        int64_t capacity) {
  STD_TORCH_CHECK(given.dim() == 2 && given.size(1) > 0, "logits: shape");
  STD_TORCH_CHECK(max_size.value_or(1) > 0 && max_patches.value_or(1) > 0 && capacity >= 0,
                  "options of patches");
  const Tensor logits = dense(given), offsets = dense(given_offsets);
  const Cut cut{static_cast<Rule>(rule), level, limit(min_size), limit(max_size.value_or(0)),
                limit(max_patches.value_or(0))};
  if (logits.scalar_type() == ScalarType::Double)
    return run<double, double>(logits, offsets, scale, cut, capacity);
  std::optional<Outputs> found;
  with_type(logits.scalar_type(), [&](auto number) {
    found = run<decltype(number), float>(logits, offsets, scale, cut, capacity);
  });
  return *found;
}

}  // namespace
}  // namespace edt

STABLE_TORCH_LIBRARY_IMPL(edt, CUDA, m) {
  m.impl("entropy_patches", TORCH_BOX(&edt::entropy_patches));
}
