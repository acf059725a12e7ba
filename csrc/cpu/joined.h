// Packed batches joined molecule by molecule, as bytes.
#pragma once

#include <algorithm>
#include <utility>
#include <vector>

#include "copy.h"
#include "tensor.h"

namespace edt {

// Where the rows of every part lie in the whole.
class Joined {
 public:
  struct Part {
    std::vector<int64_t> offsets;  // [B + 1], or empty: all its rows go to every molecule
    int64_t rows;
  };

  Joined(std::vector<Part> parts, int64_t molecules)
      : parts_(std::move(parts)), offsets_(molecules + 1), rows_(0) {
    for (const Part& part : parts_) {
      const bool shared = part.offsets.empty();
      rows_ += shared ? molecules * part.rows : part.rows;
      for (int64_t m = 0; m <= molecules; ++m)
        offsets_[m] += shared ? m * part.rows : part.offsets[m];
    }
  }

  const std::vector<Part>& parts() const { return parts_; }
  const std::vector<int64_t>& offsets() const { return offsets_; }  // [B + 1]
  int64_t molecules() const { return static_cast<int64_t>(offsets_.size()) - 1; }
  int64_t rows() const { return rows_; }  // a function of shapes, at least offsets().back()

  // visit(part, first row in the part, first row in the whole, number of rows) for the runs of
  // rows [begin, end) of the whole, without its tail.
  template <class F>
  void for_runs(int64_t begin, int64_t end, F visit) const {
    end = std::min(end, offsets_.back());
    if (begin >= end) return;
    int64_t m = std::upper_bound(offsets_.begin(), offsets_.end(), begin) - offsets_.begin() - 1;
    for (int64_t at = offsets_[m]; at < end; ++m) {
      for (size_t k = 0; k < parts_.size(); ++k) {
        const auto& own = parts_[k].offsets;
        const int64_t start = own.empty() ? 0 : own[m];
        const int64_t count = own.empty() ? parts_[k].rows : own[m + 1] - start;
        const int64_t first = std::max(at, begin), last = std::min(at + count, end);
        if (first < last) visit(k, start + first - at, first, last - first);
        at += count;
      }
    }
  }

  // whole = the rows of all parts, 0 in the tail.
  void join(const std::vector<const char*>& parts, char* whole, int64_t bytes) const {
    torch::stable::parallel_for(0, rows_, copy_grain(bytes), [&](int64_t begin, int64_t end) {
      for_runs(begin, end, [&](size_t k, int64_t row, int64_t place, int64_t count) {
        copy_bytes(whole + place * bytes, parts[k] + row * bytes, count * bytes);
      });
      const int64_t tail = std::max(begin, offsets_.back());
      if (tail < end) clear_bytes(whole + tail * bytes, (end - tail) * bytes);
    });
  }

  // The way back, to the ragged parts that are not null; their tails are 0.
  void split(const char* whole, const std::vector<char*>& parts, int64_t bytes) const {
    torch::stable::parallel_for(
        0, offsets_.back(), copy_grain(bytes), [&](int64_t begin, int64_t end) {
          for_runs(begin, end, [&](size_t k, int64_t row, int64_t place, int64_t count) {
            if (parts[k]) copy_bytes(parts[k] + row * bytes, whole + place * bytes, count * bytes);
          });
        });
    for (size_t k = 0; k < parts.size(); ++k) {
      if (!parts[k]) continue;
      const int64_t used = parts_[k].offsets.back();
      clear_bytes(parts[k] + used * bytes, (parts_[k].rows - used) * bytes);
    }
  }

 private:
  std::vector<Part> parts_;
  std::vector<int64_t> offsets_;
  int64_t rows_;
};

}  // namespace edt
