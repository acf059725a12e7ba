#include <torch/csrc/stable/library.h>

#include <optional>
#include <tuple>
#include <vector>

#include "joined.h"
#include "sum_rows.h"

namespace edt {
namespace {

using Offsets = std::vector<std::optional<Tensor>>;

// `rows` are the numbers of rows of the parts.
Joined joined(const Offsets& offsets, const std::vector<int64_t>& rows) {
  STD_TORCH_CHECK(offsets.size() == rows.size(), "ragged_cat: number of offsets");
  std::vector<Joined::Part> parts(rows.size());
  int64_t molecules = -1;
  for (size_t k = 0; k < rows.size(); ++k) {
    STD_TORCH_CHECK(rows[k] >= 0, "ragged_cat: rows");
    parts[k].rows = rows[k];
    if (!offsets[k]) continue;
    parts[k].offsets = read_offsets(*offsets[k], rows[k]);
    const auto own = static_cast<int64_t>(parts[k].offsets.size()) - 1;
    STD_TORCH_CHECK(molecules < 0 || own == molecules, "ragged_cat: number of molecules");
    molecules = own;
  }
  STD_TORCH_CHECK(molecules >= 0, "ragged_cat: no offsets");
  return {std::move(parts), molecules};
}

// The shape of x [N, ...] with other rows.
std::vector<int64_t> with_rows(const Tensor& x, int64_t rows) {
  const auto sizes = x.sizes();
  std::vector<int64_t> shape(sizes.begin(), sizes.end());
  shape[0] = rows;
  return shape;
}

// Numbers in a row of x [N, ...].
int64_t row_size(const Tensor& x) {
  int64_t size = 1;
  for (int64_t i = 1; i < x.dim(); ++i) size *= x.size(i);
  return size;
}

std::tuple<Tensor, Tensor> ragged_cat(std::vector<Tensor> parts, const Offsets& offsets) {
  STD_TORCH_CHECK(!parts.empty() && parts[0].dim() > 0, "ragged_cat: parts");
  const ScalarType dtype = dtype_of(parts[0]);
  float_index(dtype);  // refuses others
  std::vector<int64_t> rows;
  std::vector<const char*> data;
  for (Tensor& part : parts) {
    bool alike = dtype_of(part) == dtype && part.dim() == parts[0].dim();
    for (int64_t i = 1; alike && i < part.dim(); ++i) alike = part.size(i) == parts[0].size(i);
    STD_TORCH_CHECK(alike, "ragged_cat: parts differ");
    part = dense(part);
    rows.push_back(part.size(0));
    data.push_back(at(part, 0));
  }
  const Joined whole = joined(offsets, rows);
  const Tensor& first = **std::find_if(offsets.begin(), offsets.end(), [](auto& x) { return !!x; });
  const Tensor out = allocate(with_rows(parts[0], whole.rows()), dtype);
  const Tensor ends = make_offsets(whole.offsets(), dtype_of(first));
  whole.join(data, at(out, 0), row_size(out) * static_cast<int64_t>(out.element_size()));
  return {out, ends};
}

// The sum over molecules of the rows of part k: L rows in a run are one long row.
void sum_molecules(const Joined& whole, size_t k, const Tensor& grad, const Tensor& out) {
  const int64_t width = row_size(grad), total = whole.parts()[k].rows * width;
  std::vector<const void*> runs;
  whole.for_runs(0, whole.rows(), [&](size_t part, int64_t, int64_t place, int64_t) {
    if (part == k) runs.push_back(at(grad, place * width));
  });
  const auto kernel = sum_rows_kernels().sum[float_index(dtype_of(grad))];
  const int64_t grain = copy_grain(whole.molecules() * static_cast<int64_t>(grad.element_size()));
  torch::stable::parallel_for(0, total, grain, [&](int64_t begin, int64_t end) {
    kernel(runs.data(), static_cast<int64_t>(runs.size()), begin, end, out.data_ptr());
  });
}

std::vector<Tensor> ragged_cat_bwd(const Tensor& given, const Offsets& offsets,
                                   const std::vector<int64_t>& rows,
                                   const std::vector<bool>& wanted) {
  const Joined whole = joined(offsets, rows);
  STD_TORCH_CHECK(given.dim() > 0 && given.size(0) == whole.rows() && wanted.size() == rows.size(),
                  "ragged_cat_bwd: shape");
  const Tensor grad = dense(given);
  std::vector<Tensor> found;
  std::vector<char*> ragged(rows.size());
  for (size_t k = 0; k < rows.size(); ++k) {
    found.push_back(wanted[k] ? allocate(with_rows(grad, rows[k]), dtype_of(grad))
                              : allocate({0}, dtype_of(grad)));
    if (!wanted[k]) continue;
    if (offsets[k])
      ragged[k] = at(found[k], 0);
    else
      sum_molecules(whole, k, grad, found[k]);
  }
  whole.split(at(grad, 0), ragged, row_size(grad) * static_cast<int64_t>(grad.element_size()));
  return found;
}

}  // namespace
}  // namespace edt

STABLE_TORCH_LIBRARY_IMPL(edt, CPU, m) {
  m.impl("ragged_cat", TORCH_BOX(&edt::ragged_cat));
  m.impl("ragged_cat_bwd", TORCH_BOX(&edt::ragged_cat_bwd));
}
