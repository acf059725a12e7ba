// One molecule cut into patches, and the cuts of a batch put together.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <optional>
#include <tuple>
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

// torch.quantile(h[0:n], q), bit for bit; reorders h.
template <class T>
T quantile(T* h, int64_t n, double q) {
  const T nan = std::numeric_limits<T>::quiet_NaN();
  if (n == 0 || std::any_of(h, h + n, [](T x) { return x != x; })) return nan;
  const T rank = static_cast<T>(q) * static_cast<T>(n - 1);
  const int64_t below = static_cast<int64_t>(rank);
  std::nth_element(h, h + below, h + n);
  const T low = h[below];
  const T high = rank > static_cast<T>(below) ? *std::min_element(h + below + 1, h + n) : low;
  const T weight = rank - static_cast<T>(below);
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
    if (cut_.rule == Rule::rising_edge) {
      ordered_.assign(h, h + n);
      *threshold = quantile(ordered_.data(), n, cut_.level);
    }
    if (n == 0) return 0;
    starts_.clear();
    find(h, n, *threshold);
    if (cut_.min_size > 1) keep_min_size();
    if (cut_.max_size) split(n, *cut_.max_size);
    if (cut_.max_patches) keep_highest(h, *cut_.max_patches - 1);

    int64_t patch = 0, atom = 0;
    for (const int64_t start : starts_) {
      std::fill(ids + atom, ids + start, patch++);
      atom = start;
    }
    std::fill(ids + atom, ids + n, patch++);
    return patch;
  }

 private:
  void find(const T* h, int64_t n, T threshold) {
    switch (cut_.rule) {
      case Rule::local_max:
        return find_peaks(h, n);
      case Rule::rising_edge:
        for (int64_t i = 0; i + 1 < n; ++i)
          if (h[i] > threshold && (i == 0 || !(h[i - 1] > threshold))) starts_.push_back(i + 1);
        return;
      case Rule::threshold:
        for (int64_t i = 1; i < n; ++i)
          if (h[i] > threshold) starts_.push_back(i);
        return;
      case Rule::monotonic:
        for (int64_t i = 1; i < n; ++i)
          if (h[i] - h[i - 1] > threshold) starts_.push_back(i);
        return;
    }
  }

  void find_peaks(const T* h, int64_t n) {
    int64_t rise = 0;  // where the run of equal values began that was risen to, or 0
    for (int64_t i = 1; i < n; ++i) {
      if (h[i] == h[i - 1]) continue;
      if (rise && h[i] < h[i - 1]) starts_.push_back(rise);
      rise = h[i] > h[i - 1] ? i : 0;
    }
    if (rise) starts_.push_back(rise);
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
  std::vector<T> ordered_;
  std::vector<int64_t> starts_, pieces_;  // rows that open a patch, without the first
};

using PatchTensors = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

// Cuts every molecule, in parallel. molecule(begin, end) gives its entropies: a pointer to T.
// Molecules are counted in the first pass and numbered in the second.
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
    auto read = entropies();
    for (int64_t m = begin; m < end; ++m)
      patch[m + 1] = cutter(read(offsets[m], offsets[m + 1]), offsets[m + 1] - offsets[m],
                            id + offsets[m], levels + m);
  });
  std::partial_sum(patch, patch + molecules + 1, patch);
  const int64_t total = patch[molecules];
  STD_TORCH_CHECK(total <= capacity, "capacity: ", capacity, " < ", total);

  torch::stable::parallel_for(0, molecules, grain, [&](int64_t begin, int64_t end) {
    for (int64_t m = begin; m < end; ++m)
      for (int64_t i = offsets[m]; i < offsets[m + 1]; ++i)
        if (i == offsets[m] || id[i] != id[i - 1]) atom[patch[m] + id[i]] = i;
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
