#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <numeric>
#include <optional>
#include <tuple>
#include <vector>

#include "joined.h"

namespace edt {
namespace {

constexpr int64_t kIgnored = -100;  // the label that torch's losses leave out

// An int64 tensor [count].
const int64_t* integers(const Tensor& x, int64_t count, const char* name) {
  STD_TORCH_CHECK(dtype_of(x) == ScalarType::Long && x.dim() == 1 && x.size(0) == count, name);
  return static_cast<const int64_t*>(x.data_ptr());
}

// Piece g is the text up to at[g], then group g; the last piece is text alone.
Joined pieces(const std::vector<int64_t>& text, std::vector<int64_t> groups, const int64_t* at,
              int64_t rows, int64_t tokens) {
  const auto count = static_cast<int64_t>(groups.size());
  std::vector<int64_t> cuts(count + 1);
  for (int64_t g = 0; g + 1 < count; ++g) {
    STD_TORCH_CHECK(cuts[g] <= at[g] && at[g] <= text.back(), "at: content");
    cuts[g + 1] = at[g];
  }
  cuts[count] = text.back();
  groups.push_back(groups.back());
  std::vector<Joined::Part> parts(2);
  parts[0] = {std::move(cuts), rows}, parts[1] = {std::move(groups), tokens};
  return {std::move(parts), count};
}

// How many groups stand before every row [B + 1].
std::vector<int64_t> groups_before(const std::vector<int64_t>& text, int64_t groups,
                                   const int64_t* at, const int64_t* rows) {
  const auto count = static_cast<int64_t>(text.size()) - 1;
  std::vector<int64_t> before(count + 1);
  int64_t row = 0;
  for (int64_t g = 0; g < groups; ++g) {
    if (rows) {
      STD_TORCH_CHECK(
          row <= rows[g] && rows[g] < count && text[rows[g]] <= at[g] && at[g] <= text[rows[g] + 1],
          "rows: content");
      while (row < rows[g]) before[++row] = g;
    } else {
      STD_TORCH_CHECK(count > 0, "at: no rows");
      while (row + 1 < count && text[row + 1] <= at[g]) before[++row] = g;
    }
  }
  while (row < count) before[++row] = groups;
  return before;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> insert(
    const Tensor& given_embeds, const Tensor& embed_offsets, const Tensor& given_tokens,
    const Tensor& token_offsets, const Tensor& given_at, const std::optional<Tensor>& given_rows,
    const std::optional<Tensor>& given_labels) {
  const ScalarType dtype = dtype_of(given_embeds);
  float_index(dtype);  // refuses others
  const bool alike = given_embeds.dim() == 2 && given_tokens.dim() == 2 &&
                     dtype_of(given_tokens) == dtype &&
                     given_embeds.size(1) == given_tokens.size(1);
  STD_TORCH_CHECK(alike, "insert: embeds and tokens");
  const Tensor embeds = dense(given_embeds), tokens = dense(given_tokens), at = dense(given_at);
  const auto text = read_offsets(embed_offsets, embeds.size(0));
  const auto groups = read_offsets(token_offsets, tokens.size(0));
  const auto count = static_cast<int64_t>(groups.size()) - 1;
  const int64_t* places = integers(at, count, "at");
  const std::optional<Tensor> rows = given_rows ? std::optional(dense(*given_rows)) : std::nullopt;
  const auto before =
      groups_before(text, count, places, rows ? integers(*rows, count, "rows") : nullptr);
  const Joined whole = pieces(text, groups, places, embeds.size(0), tokens.size(0));

  std::vector<int64_t> offsets(text);
  for (size_t b = 0; b < offsets.size(); ++b) offsets[b] += groups[before[b]];
  const Tensor ends = make_offsets(offsets, dtype_of(embed_offsets));

  const Tensor positions = allocate({whole.rows()}, ScalarType::Long);
  auto* position = static_cast<int64_t*>(positions.data_ptr());
  for (size_t b = 0; b + 1 < offsets.size(); ++b)
    std::iota(position + offsets[b], position + offsets[b + 1], int64_t{0});
  std::fill(position + offsets.back(), position + whole.rows(), 0);

  const Tensor labels = allocate({given_labels ? whole.rows() : 0}, ScalarType::Long);
  if (given_labels) {
    const Tensor own = dense(*given_labels);
    const int64_t* from = integers(own, embeds.size(0), "labels");
    auto* to = static_cast<int64_t*>(labels.data_ptr());
    std::fill(to, to + whole.rows(), kIgnored);
    whole.for_runs(0, whole.rows(), [&](size_t part, int64_t row, int64_t place, int64_t n) {
      if (part == 0) std::copy_n(from + row, n, to + place);
    });
  }

  const Tensor out = allocate({whole.rows(), embeds.size(1)}, dtype);
  whole.join({edt::at(embeds, 0), edt::at(tokens, 0)}, edt::at(out, 0),
             embeds.size(1) * static_cast<int64_t>(out.element_size()));
  return {out, ends, positions, labels};
}

std::tuple<Tensor, Tensor> insert_bwd(const Tensor& given_grad, const Tensor& embed_offsets,
                                      const Tensor& token_offsets, const Tensor& given_at,
                                      int64_t rows, int64_t tokens,
                                      const std::vector<bool>& wanted) {
  STD_TORCH_CHECK(given_grad.dim() == 2 && given_grad.size(0) == rows + tokens, "insert_bwd: grad");
  STD_TORCH_CHECK(wanted.size() == 2, "insert_bwd: wanted");
  const Tensor grad = dense(given_grad), at = dense(given_at);
  const auto groups = read_offsets(token_offsets, tokens);
  const int64_t* places = integers(at, static_cast<int64_t>(groups.size()) - 1, "at");
  const Joined whole = pieces(read_offsets(embed_offsets, rows), groups, places, rows, tokens);

  const int64_t width = grad.size(1);
  const auto fresh = [&](bool want, int64_t count) {
    return want ? allocate({count, width}, dtype_of(grad)) : allocate({0}, dtype_of(grad));
  };
  const Tensor dembeds = fresh(wanted[0], rows), dtokens = fresh(wanted[1], tokens);
  whole.split(
      edt::at(grad, 0),
      {wanted[0] ? edt::at(dembeds, 0) : nullptr, wanted[1] ? edt::at(dtokens, 0) : nullptr},
      width * static_cast<int64_t>(grad.element_size()));
  return {dembeds, dtokens};
}

}  // namespace
}  // namespace edt

STABLE_TORCH_LIBRARY_IMPL(edt, CPU, m) {
  m.impl("insert", TORCH_BOX(&edt::insert));
  m.impl("insert_bwd", TORCH_BOX(&edt::insert_bwd));
}
