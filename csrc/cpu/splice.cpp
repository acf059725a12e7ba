#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <optional>
#include <tuple>
#include <vector>

#include "copy.h"
#include "sum_rows.h"
#include "tensor.h"

namespace edt {
namespace {

// Embeddings [B, S, E], or [T, E] as one row. Rows of E numbers are contiguous, they may lie apart:
// a slice of longer prompts is read in place.
class Grid {
 public:
  explicit Grid(const Tensor& given) : x_(given) {
    const int64_t last = given.dim() - 1;
    STD_TORCH_CHECK(last == 1 || last == 2, "splice: dimensions");
    if (given.size(last) > 1 && given.stride(last) != 1) x_ = torch::stable::contiguous(given);
    rows = last == 2 ? x_.size(0) : 1;
    length = x_.size(last - 1), width = x_.size(last);
    bytes = width * static_cast<int64_t>(x_.element_size());
    row_step_ = last == 2 ? x_.stride(0) : 0, step_ = x_.stride(last - 1);
  }

  char* at(int64_t row, int64_t column) const {
    return edt::at(x_, row * row_step_ + column * step_);
  }

  // Whether x has one entry per position.
  bool is_shape_of(const Tensor& x) const {
    const int64_t dims = x_.dim() - 1;
    return x.dim() == dims && x.size(dims - 1) == length && (dims == 1 || x.size(0) == rows);
  }

  void copy(int64_t row, int64_t column, int64_t count, char* to) const {
    if (step_ == width) return copy_bytes(to, at(row, column), count * bytes);
    for (int64_t i = 0; i < count; ++i) copy_bytes(to + i * bytes, at(row, column + i), bytes);
  }

  int64_t rows, length, width, bytes;

 private:
  Tensor x_;
  int64_t row_step_, step_;
};

enum class Kind { text, token, added };

// Neighbours of one kind in a prompt: positions [column, column + count) of a row, which take the
// tokens or new rows from `source` on.
struct Run {
  Kind kind;
  int64_t row, column, count, source;
};

class Prompts {
 public:
  Prompts(const Tensor& token_offsets, const Tensor& slots, const std::optional<Tensor>& new_ids,
          const Grid& grid, int64_t tokens, int64_t added)
      : offsets_(read_offsets(token_offsets, tokens)),
        rows_(grid.rows),
        length_(grid.length),
        slots_(dense(slots)),
        slot_(static_cast<const uint8_t*>(slots_.data_ptr())) {
    STD_TORCH_CHECK(static_cast<int64_t>(offsets_.size()) == rows_ + 1, "token_offsets: shape");
    STD_TORCH_CHECK(dtype_of(slots) == ScalarType::Bool && grid.is_shape_of(slots), "slots");
    for (int64_t row = 0; row < rows_; ++row)
      STD_TORCH_CHECK(count_slots(row, length_) == offsets_[row + 1] - offsets_[row],
                      "slots: count");
    if (!new_ids) return;
    STD_TORCH_CHECK(dtype_of(*new_ids) == ScalarType::Long && grid.is_shape_of(*new_ids),
                    "new_ids");
    ids_ = dense(*new_ids);
    id_ = static_cast<const int64_t*>(ids_->data_ptr());
    const bool valid = std::all_of(id_, id_ + positions(), [=](int64_t id) { return id < added; });
    STD_TORCH_CHECK(valid, "new_ids: content");
  }

  int64_t positions() const { return rows_ * length_; }
  int64_t tokens() const { return offsets_.back(); }

  // visit(run) for positions [begin, end) in order.
  template <class F>
  void for_runs(int64_t begin, int64_t end, F visit) const {
    while (begin < end) {
      const int64_t row = begin / length_, base = row * length_;
      const int64_t last = std::min(end, base + length_);
      int64_t token = offsets_[row] + count_slots(row, begin - base);
      while (begin < last) {
        const Kind kind = kind_at(begin);
        int64_t stop = begin + 1;
        if (kind != Kind::added)
          while (stop < last && kind_at(stop) == kind) ++stop;
        const int64_t count = stop - begin, id = kind == Kind::added ? id_[begin] : 0;
        visit(Run{kind, row, begin - base, count, kind == Kind::token ? token : id});
        if (kind == Kind::token) token += count;
        begin = stop;
      }
    }
  }

 private:
  Kind kind_at(int64_t position) const {
    if (slot_[position]) return Kind::token;
    return id_ && id_[position] >= 0 ? Kind::added : Kind::text;
  }

  int64_t count_slots(int64_t row, int64_t end) const {
    const uint8_t* first = slot_ + row * length_;
    return std::count_if(first, first + end, [](uint8_t slot) { return slot != 0; });
  }

  std::vector<int64_t> offsets_;
  int64_t rows_, length_;
  Tensor slots_;
  std::optional<Tensor> ids_;
  const uint8_t* slot_;  // not 0 in a slot: a view of other bytes need not hold 1
  const int64_t* id_ = nullptr;
};

Tensor splice(const Tensor& embeds, Tensor tokens, const Tensor& token_offsets, const Tensor& slots,
              const std::optional<Tensor>& new_rows, const std::optional<Tensor>& new_ids) {
  const ScalarType dtype = dtype_of(embeds);
  float_index(dtype);  // refuses others
  const Grid grid(embeds);
  const auto rows_of = [&](const Tensor& x) {
    STD_TORCH_CHECK(dtype_of(x) == dtype && x.dim() == 2 && x.size(1) == grid.width,
                    "splice: rows");
    return dense(x);
  };
  tokens = rows_of(tokens);
  const Tensor added = new_rows ? rows_of(*new_rows) : tokens;
  STD_TORCH_CHECK(new_rows.has_value() == new_ids.has_value() && (!new_rows || added.size(0) > 0),
                  "new_rows");
  const Prompts prompts(token_offsets, slots, new_ids, grid, tokens.size(0),
                        new_rows ? added.size(0) : 0);

  const Tensor out = allocate_like(embeds);
  char* const to = at(out, 0);
  const char *const token_rows = at(tokens, 0), *const added_rows = at(added, 0);
  torch::stable::parallel_for(
      0, prompts.positions(), copy_grain(grid.bytes), [&](int64_t begin, int64_t end) {
        prompts.for_runs(begin, end, [&](const Run& run) {
          char* place = to + (run.row * grid.length + run.column) * grid.bytes;
          if (run.kind == Kind::text) return grid.copy(run.row, run.column, run.count, place);
          const char* rows = run.kind == Kind::token ? token_rows : added_rows;
          copy_bytes(place, rows + run.source * grid.bytes, run.count * grid.bytes);
        });
      });
  return out;
}

// Every new row's sum over its positions, in their order.
void sum_positions(const Prompts& prompts, const Grid& grid, const Tensor& out) {
  std::vector<std::vector<const void*>> places(out.size(0));
  prompts.for_runs(0, prompts.positions(), [&](const Run& run) {
    if (run.kind == Kind::added) places[run.source].push_back(grid.at(run.row, run.column));
  });
  const int64_t element = static_cast<int64_t>(out.element_size()), width = grid.width;
  const auto kernel = sum_rows_kernels().sum[float_index(dtype_of(out))];
  const int64_t grain = copy_grain(prompts.positions() / out.size(0) * element);
  torch::stable::parallel_for(0, out.numel(), grain, [&](int64_t begin, int64_t end) {
    while (begin < end) {
      const int64_t id = begin / width, first = begin - id * width;
      const int64_t last = std::min(width, end - id * width);
      kernel(places[id].data(), static_cast<int64_t>(places[id].size()), first, last,
             at(out, id * width));
      begin += last - first;
    }
  });
}

std::tuple<Tensor, Tensor, Tensor> splice_bwd(const Tensor& grad, const Tensor& token_offsets,
                                              const Tensor& slots,
                                              const std::optional<Tensor>& new_ids, int64_t tokens,
                                              int64_t added, const std::vector<bool>& wanted) {
  const ScalarType dtype = dtype_of(grad);
  float_index(dtype);  // refuses others
  const Grid grid(grad);
  const Prompts prompts(token_offsets, slots, new_ids, grid, tokens, added);
  STD_TORCH_CHECK(wanted.size() == 3 && added >= 0, "splice_bwd");
  const Tensor embeds = wanted[0] ? allocate_like(grad) : allocate({0}, dtype);
  const Tensor token = wanted[1] ? allocate({tokens, grid.width}, dtype) : allocate({0}, dtype);
  const Tensor rows = wanted[2] ? allocate({added, grid.width}, dtype) : allocate({0}, dtype);

  char* const to_embeds = wanted[0] ? at(embeds, 0) : nullptr;
  char* const to_tokens = wanted[1] ? at(token, 0) : nullptr;
  torch::stable::parallel_for(
      0, prompts.positions(), copy_grain(grid.bytes), [&](int64_t begin, int64_t end) {
        prompts.for_runs(begin, end, [&](const Run& run) {
          const int64_t place = (run.row * grid.length + run.column) * grid.bytes;
          if (to_embeds && run.kind == Kind::text)
            grid.copy(run.row, run.column, run.count, to_embeds + place);
          else if (to_embeds)
            clear_bytes(to_embeds + place, run.count * grid.bytes);
          if (to_tokens && run.kind == Kind::token)
            grid.copy(run.row, run.column, run.count, to_tokens + run.source * grid.bytes);
        });
      });
  if (to_tokens) {
    const int64_t used = prompts.tokens();
    clear_bytes(to_tokens + used * grid.bytes, (tokens - used) * grid.bytes);
  }
  if (wanted[2] && added > 0) sum_positions(prompts, grid, rows);
  return {embeds, token, rows};
}

}  // namespace
}  // namespace edt

STABLE_TORCH_LIBRARY_IMPL(edt, CPU, m) {
  m.impl("splice", TORCH_BOX(&edt::splice));
  m.impl("splice_bwd", TORCH_BOX(&edt::splice_bwd));
}
