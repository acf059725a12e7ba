// The segments of a batch with tensors in hand, and the shares of them that threads take.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <vector>

#include "segment_rows.h"
#include "tensor.h"

namespace edt {

// Segments [P] of rows [N]; place i holds row order[i], or row i without an order.
class Segments {
 public:
  Segments(const Tensor& offsets, int64_t rows, int64_t dim)
      : offsets_(read_offsets(offsets, rows)), rows_(rows), dim_(dim) {}

  int64_t size() const { return static_cast<int64_t>(offsets_.size()) - 1; }
  int64_t used() const { return offsets_.back(); }
  int64_t rows() const { return rows_; }
  int64_t dim() const { return dim_; }

  // As kernels see them, without an order.
  SegmentRows describe() const { return {offsets_.data(), nullptr, rows_, dim_, used()}; }

  // visit(share) of columns. Threads take equal numbers of rows; what cuts a segment in two cuts
  // its columns.
  template <class F>
  void for_columns(F visit) const {
    torch::stable::parallel_for(0, start(size()), grain(), [&](int64_t begin, int64_t end) {
      const int64_t first = segment_at(begin), last = segment_at(end);
      const auto visit_columns = [&](int64_t p, int64_t q, int64_t from, int64_t to) {
        visit(Share{p, q, from, to, 0, rows_});
      };
      if (first == last)
        return visit_columns(first, first + 1, column(first, begin), column(first, end));
      visit_columns(first, first + 1, column(first, begin), dim_);
      visit_columns(first + 1, last, 0, dim_);
      if (last < size()) visit_columns(last, last + 1, 0, column(last, end));
    });
  }

  // visit(share) of places, also of those that are in no segment.
  template <class F>
  void for_places(F visit) const {
    torch::stable::parallel_for(0, rows_, grain(), [&](int64_t begin, int64_t end) {
      const auto first = std::upper_bound(offsets_.begin(), offsets_.end(), begin) - 1;
      const auto last = std::lower_bound(first, offsets_.end() - 1, end);
      visit(Share{first - offsets_.begin(), last - offsets_.begin(), 0, dim_, begin, end});
    });
  }

 private:
  // Where segment p begins on an axis of reads and writes: its rows, and one output.
  int64_t start(int64_t p) const { return offsets_[p] + p; }

  int64_t segment_at(int64_t place) const {
    int64_t below = 0, above = size() + 1;  // start(below) <= place < start(above)
    while (above - below > 1) {
      const int64_t middle = (below + above) / 2;
      (start(middle) <= place ? below : above) = middle;
    }
    return below;
  }

  // A cache line of the smallest type is not shared by threads.
  int64_t column(int64_t p, int64_t place) const {
    constexpr int64_t kStep = 32;
    return dim_ * (place - start(p)) / (start(p + 1) - start(p)) / kStep * kStep;
  }

  // Rows that make a thread worth waking.
  int64_t grain() const { return 1 + 32768 / std::max<int64_t>(dim_, 1); }

  std::vector<int64_t> offsets_;
  int64_t rows_, dim_;
};

// Numbers in a row of x [N, ...].
inline int64_t row_size(const Tensor& x) {
  int64_t size = 1;
  for (int64_t i = 1; i < x.dim(); ++i) size *= x.size(i);
  return size;
}

}  // namespace edt
