// One molecule cut into patches, and the cuts of a batch put together.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>
#include <optional>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include "tensor.h"

namespace edt {

enum class Rule : int64_t { local_max, rising_edge, threshold, monotonic };

struct Cut {
  Rule rule;
  double level;  // the quantile of rising_edge, the threshold of threshold and monotonic
  int64_t min_size;
  std::optional<int64_t> max_size, max_patches;
};

// Numbers k and k + 1 of h[0:n] in ascending order; the last one where there is no other. None is
// NaN. Of few numbers those below each are counted, which no branch has to guess.
template <class T>
std::pair<T, T> neighbours(const T* h, int64_t n, int64_t k, std::vector<T>& scratch) {
  constexpr int64_t kFew = 64, kLanes = 16 / sizeof(T), kVectors = 4;
  typedef T Vector __attribute__((vector_size(16)));
  using Count = std::conditional_t<sizeof(T) == 8, int64_t, int32_t>;
  typedef Count Counts __attribute__((vector_size(16)));
  if (n > kFew) {
    scratch.assign(h, h + n);
    const auto at = scratch.begin() + k, rest = at + 1;
    std::nth_element(scratch.begin(), at, scratch.end());
    return {*at, rest < scratch.end() ? *std::min_element(rest, scratch.end()) : *at};
  }
  // The largest numbers that have no more than k, or k + 1, below them.
  const Vector least = Vector{} - std::numeric_limits<T>::infinity();
  Vector low = least, high = least;
  const auto most = static_cast<Count>(k);
  for (int64_t i = 0; i < n; i += kVectors * kLanes) {
    T copy[kVectors * kLanes];
    for (int64_t j = 0; j < kVectors * kLanes; ++j) copy[j] = h[std::min(i + j, n - 1)];
    Vector x[kVectors];
    std::memcpy(x, copy, sizeof x);
    Counts below[kVectors] = {};
    for (int64_t j = 0; j < n; ++j)
#pragma GCC unroll 4
      for (int64_t v = 0; v < kVectors; ++v) below[v] -= Vector{} + h[j] < x[v];
    for (int64_t v = 0; v < kVectors; ++v) {
      const Vector a = below[v] <= most ? x[v] : least, b = below[v] <= most + 1 ? x[v] : least;
      low = low > a ? low : a;
      high = high > b ? high : b;
    }
  }
  std::pair<T, T> found{low[0], high[0]};
  for (int64_t j = 1; j < kLanes; ++j)
    found = {std::max<T>(found.first, low[j]), std::max<T>(found.second, high[j])};
  return found;
}

// torch.quantile(h[0:n], q), bit for bit.
template <class T>
T quantile(const T* h, int64_t n, double q, std::vector<T>& scratch) {
  bool unknown = n == 0;
  for (int64_t i = 0; i < n; ++i) unknown |= h[i] != h[i];
  if (unknown) return std::numeric_limits<T>::quiet_NaN();
  const T rank = static_cast<T>(q) * static_cast<T>(n - 1);
  // n - 1 may round up.
  const int64_t below = std::min(static_cast<int64_t>(rank), n - 1);
  const T weight = rank - static_cast<T>(below);
  auto [low, high] = neighbours(h, n, below, scratch);
  if (weight == 0) high = low;
  return weight < T(0.5) ? std::fma(weight, high - low, low)
                         : std::fma(weight - 1, high - low, high);
}

// Cuts molecules one after the other; keeps its scratch.
template <class T>
class Cutter {
 public:
  explicit Cutter(const Cut& cut) : cut_(cut) {}

  // Writes the ids of the n atoms with entropies h and what h was compared with; returns how many
  // patches there are.
  int64_t operator()(const T* h, int64_t n, int64_t* ids, T* threshold) {
    *threshold = static_cast<T>(cut_.level);
    if (cut_.rule == Rule::local_max) *threshold = std::numeric_limits<T>::quiet_NaN();
    if (cut_.rule == Rule::rising_edge) *threshold = quantile(h, n, cut_.level, scratch_);
    if (n == 0) return 0;
    find(h, n, *threshold);
    if (cut_.min_size > 1) keep_min_size();
    if (cut_.max_size) split(n, *cut_.max_size);
    if (cut_.max_patches) keep_highest(h, *cut_.max_patches - 1);

    std::fill(ids, ids + n, 0);
    for (const int64_t start : starts_) ids[start] = 1;
    std::partial_sum(ids, ids + n, ids);
    return static_cast<int64_t>(starts_.size()) + 1;
  }

 private:
  // Every row is written as a start and kept where it is one: without a branch, for nobody can
  // predict where entropies rise.
  void find(const T* h, int64_t n, T threshold) {
    starts_.resize(n + 1);
    int64_t* put = starts_.data();
    const auto open = [&](int64_t row, bool opens) {
      *put = row;
      put += opens;
    };
    int64_t rise = 0;  // local_max: where the run of equal values began that was risen to, or 0
    bool before = false;
    switch (cut_.rule) {
      case Rule::local_max:
        for (int64_t i = 1; i < n; ++i) {
          open(rise, (rise != 0) & (h[i] < h[i - 1]));
          rise = h[i] > h[i - 1] ? i : h[i] == h[i - 1] ? rise : 0;
        }
        open(rise, rise != 0);
        break;
      case Rule::rising_edge:
        for (int64_t i = 0; i + 1 < n; ++i) {
          const bool above = h[i] > threshold;
          open(i + 1, above & !before);
          before = above;
        }
        break;
      case Rule::threshold:
        for (int64_t i = 1; i < n; ++i) open(i, h[i] > threshold);
        break;
      case Rule::monotonic:
        for (int64_t i = 1; i < n; ++i) open(i, h[i] - h[i - 1] > threshold);
        break;
    }
    starts_.resize(put - starts_.data());
  }

  void keep_min_size() {
    int64_t last = 0;
    std::erase_if(starts_, [&](int64_t start) {
      const bool drop = start - last < cut_.min_size;
      if (!drop) last = start;
      return drop;
    });
  }

  void split(int64_t n, int64_t max_size) {
    pieces_.clear();
    starts_.push_back(n);
    int64_t begin = 0;
    for (const int64_t end : starts_) {
      for (; end - begin > max_size; begin += max_size) pieces_.push_back(begin + max_size);
      begin = end;
      if (end < n) pieces_.push_back(end);
    }
    std::swap(starts_, pieces_);
  }

  void keep_highest(const T* h, int64_t keep) {
    if (keep >= static_cast<int64_t>(starts_.size())) return;
    const int64_t back = cut_.rule == Rule::rising_edge;  // the edge lies before its boundary
    const auto score = [=](int64_t start) {
      const T value = h[start - back];
      return value == value ? value : -std::numeric_limits<T>::infinity();
    };
    std::nth_element(starts_.begin(), starts_.begin() + keep, starts_.end(),
                     [&](int64_t a, int64_t b) {
                       return score(a) > score(b) || (score(a) == score(b) && a < b);
                     });
    starts_.resize(keep);
    std::sort(starts_.begin(), starts_.end());
  }

  Cut cut_;
  std::vector<T> scratch_;
  std::vector<int64_t> starts_, pieces_;  // rows that open a patch, without the first
};

using PatchTensors = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

// Cuts every molecule, in parallel. entropies(begin, end, scratch) gives those of the rows of some
// molecules: a pointer to T, into `scratch` if need be. Molecules are counted in the first pass and
// numbered in the second.
template <class T, class Entropies>
PatchTensors cut_batch(int64_t rows, const std::vector<int64_t>& offsets, const Cut& cut,
                       int64_t capacity, int64_t grain, Entropies entropies) {
  const int64_t molecules = static_cast<int64_t>(offsets.size()) - 1;
  Tensor ids = allocate({rows}, ScalarType::Long);
  Tensor atom_offsets = allocate({capacity + 1}, ScalarType::Long);
  Tensor patch_offsets = allocate({molecules + 1}, ScalarType::Long);
  Tensor count = allocate({}, ScalarType::Long);
  Tensor threshold =
      allocate({molecules}, std::is_same_v<T, double> ? ScalarType::Double : ScalarType::Float);
  auto* id = static_cast<int64_t*>(ids.data_ptr());
  auto* atom = static_cast<int64_t*>(atom_offsets.data_ptr());
  auto* patch = static_cast<int64_t*>(patch_offsets.data_ptr());
  auto* levels = static_cast<T*>(threshold.data_ptr());

  patch[0] = 0;
  torch::stable::parallel_for(0, molecules, grain, [&](int64_t begin, int64_t end) {
    Cutter<T> cutter(cut);
    std::vector<T> scratch;
    const T* share = entropies(offsets[begin], offsets[end], scratch);
    for (int64_t m = begin; m < end; ++m)
      patch[m + 1] = cutter(share + offsets[m] - offsets[begin], offsets[m + 1] - offsets[m],
                            id + offsets[m], levels + m);
  });
  std::partial_sum(patch, patch + molecules + 1, patch);
  const int64_t total = patch[molecules];
  STD_TORCH_CHECK(total <= capacity, "capacity: ", capacity, " < ", total);

  torch::stable::parallel_for(0, molecules, grain, [&](int64_t begin, int64_t end) {
    // The first row of a patch is written last.
    for (int64_t m = begin; m < end; ++m)
      for (int64_t i = offsets[m + 1] - 1; i >= offsets[m]; --i) atom[patch[m] + id[i]] = i;
  });
  std::fill(atom + total, atom + capacity + 1, offsets[molecules]);
  std::fill(id + offsets[molecules], id + rows, 0);
  *static_cast<int64_t*>(count.data_ptr()) = total;
  return {ids, atom_offsets, patch_offsets, count, threshold};
}

// Molecules that make a thread worth waking, at `work` operations an atom.
inline int64_t molecule_grain(int64_t rows, int64_t molecules, int64_t work) {
  const int64_t each = 1 + rows / std::max<int64_t>(molecules, 1);
  return 1 + 32768 / (each * work);
}

}  // namespace edt
