#include "instance_lora.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <optional>
#include <tuple>
#include <vector>

#include "copy.h"
#include "scratch.h"
#include "tensor.h"

namespace edt {
namespace {

constexpr int64_t kGrain = 1 << 18;  // multiply-adds that are worth a thread

const InstanceLoraKernels& kernels_for(ScalarType dtype) {
  return instance_lora_kernels().kernels[float_index(dtype)];
}

ScalarType sum_type(ScalarType dtype) {
  return dtype == ScalarType::Double ? dtype : ScalarType::Float;
}

int64_t last_size(const Tensor& x) { return x.size(x.dim() - 1); }

// Rows of x [..., width], width > 0.
int64_t count_rows(const Tensor& x) { return x.numel() / last_size(x); }

std::vector<int64_t> with_width(const Tensor& x, int64_t width) {
  const auto sizes = x.sizes();
  std::vector<int64_t> shape(sizes.begin(), sizes.end());
  shape.back() = width;
  return shape;
}

void check_layer(const Tensor& x, const Tensor& a, const Tensor& b, int64_t molecules) {
  const auto down = a.sizes(), up = b.sizes();
  STD_TORCH_CHECK(x.dim() > 0 && down.size() == 3 && up.size() == 2, "instance_lora: dimensions");
  STD_TORCH_CHECK(down[0] == molecules && down[1] > 0 && down[1] == last_size(x) && down[2] > 0 &&
                      down[2] == up[1],
                  "instance_lora: shapes");
  const ScalarType dtype = dtype_of(x);
  STD_TORCH_CHECK(dtype_of(a) == dtype && dtype_of(b) == dtype, "instance_lora: dtypes");
}

void check_output(const Tensor& out, const Tensor& x, const Tensor& b) {
  bool fits = out.dim() == x.dim() && last_size(out) == b.size(0);
  for (int64_t i = 0; fits && i + 1 < x.dim(); ++i) fits = out.size(i) == x.size(i);
  STD_TORCH_CHECK(fits && dtype_of(out) == dtype_of(x), "instance_lora: output");
}

// Offsets of molecules and the rows that x has.
struct Rows {
  std::vector<int64_t> offsets;
  int64_t count;

  Rows(const Tensor& from, const Tensor& x) : count(0) {
    STD_TORCH_CHECK(x.dim() > 0 && last_size(x) > 0, "instance_lora: x");
    count = count_rows(x);
    offsets = read_offsets(from, count);
  }

  int64_t molecules() const { return static_cast<int64_t>(offsets.size()) - 1; }
  int64_t used() const { return offsets.back(); }
  int64_t molecule_of(int64_t row) const {
    return std::upper_bound(offsets.begin(), offsets.end(), row) - offsets.begin() - 1;
  }
};

// Several adapters of the same rows.
class Adapters {
 public:
  Adapters(const Rows& rows, ScalarType dtype)
      : rows_(rows), dtype_(dtype), kernels_(kernels_for(dtype)) {}

  void add(const Adapter& adapter) { all_.push_back(adapter); }

  void run() {
    pack();
    const int64_t used = rows_.used(), total = used * static_cast<int64_t>(all_.size());
    int64_t products = 1;
    for (const Adapter& a : all_) products = std::max(products, (a.in + a.width) * a.rank);
    torch::stable::parallel_for(0, total, 1 + kGrain / products, [&](int64_t begin, int64_t end) {
      while (begin < end) {
        const int64_t layer = begin / used, first = begin % used;
        const int64_t count = std::min(end - begin, used - first);
        const Adapter& a = all_[layer];
        kernels_.adapt(a, rows_.offsets.data(), rows_.molecule_of(first), first, first + count,
                       thread_scratch(kernels_.adapt_scratch(a)));
        begin += count;
      }
    });
    for (const Adapter& a : all_) finish(a);
  }

 private:
  // The U that all molecules share, once for all rows.
  void pack() {
    std::vector<int64_t> ends(all_.size() + 1);  // of the layers' panels
    const int64_t size = dtype_ == ScalarType::Double ? 8 : 4;
    int64_t bytes = 0;
    for (size_t k = 0; k < all_.size(); ++k) {
      const Adapter& a = all_[k];
      const bool shared = a.up_step == 0 && a.out && rows_.used() > 0;
      const int64_t panels = shared ? (a.width + kernels_.panel - 1) / kernels_.panel : 0;
      ends[k + 1] = ends[k] + panels;
      bytes += panels * kernels_.panel * a.rank * size;
    }
    if (bytes == 0) return;
    packed_.reset(static_cast<char*>(std::aligned_alloc(64, (bytes + 63) / 64 * 64)));
    STD_TORCH_CHECK(packed_, "no memory for ", bytes, " bytes of an adapter");
    char* place = packed_.get();
    for (size_t k = 0; k < all_.size(); ++k) {
      if (ends[k] == ends[k + 1]) continue;
      all_[k].packed = place;
      place += (ends[k + 1] - ends[k]) * kernels_.panel * all_[k].rank * size;
    }
    const int64_t grain = 1 + kGrain / (kernels_.panel * all_[0].rank);
    torch::stable::parallel_for(0, ends.back(), grain, [&](int64_t begin, int64_t end) {
      for (size_t k = 0; k < all_.size(); ++k) {
        const int64_t from = std::max(begin, ends[k]), to = std::min(end, ends[k + 1]);
        if (from < to)
          kernels_.pack(all_[k], from - ends[k], to - ends[k], const_cast<void*>(all_[k].packed));
      }
    });
  }

  // Rows of no molecule: the base, and zeros.
  void finish(const Adapter& a) const {
    const int64_t used = rows_.used(), tail = rows_.count - used;
    const int64_t size = dtype_ == ScalarType::Double ? 8 : dtype_ == ScalarType::Float ? 4 : 2;
    const int64_t sum_size = std::max<int64_t>(size, 4);
    if (a.out) {
      char* out = static_cast<char*>(a.out) + used * a.width * size;
      if (a.base)
        copy_bytes(out, static_cast<const char*>(a.base) + used * a.width * size,
                   tail * a.width * size);
      else
        clear_bytes(out, tail * a.width * size);
    }
    if (a.shrunk)
      clear_bytes(static_cast<char*>(a.shrunk) + used * a.rank * sum_size,
                  tail * a.rank * sum_size);
  }

  const Rows& rows_;
  const ScalarType dtype_;
  const InstanceLoraKernels& kernels_;
  std::vector<Adapter> all_;
  struct Free {
    void operator()(char* memory) const { std::free(memory); }
  };
  std::unique_ptr<char, Free> packed_;  // a tensor would cost a small call more
};

Adapter forward(const Tensor& x, const Tensor& a, const Tensor& b, double scale,
                const std::optional<Tensor>& base, const Tensor& out) {
  Adapter adapter{};
  adapter.x = x.data_ptr(), adapter.down = a.data_ptr(), adapter.up = b.data_ptr();
  adapter.in = a.size(1), adapter.width = b.size(0), adapter.rank = a.size(2);
  adapter.down_step = adapter.in * adapter.rank;
  adapter.base = base ? base->data_ptr() : nullptr;
  adapter.out = out.data_ptr();
  adapter.scale = scale;
  return adapter;
}

std::tuple<Tensor, Tensor> instance_lora(const Tensor& given_x, const Tensor& given_a,
                                         const Tensor& given_b, const Tensor& offsets, double scale,
                                         const std::optional<Tensor>& given_base) {
  const Rows rows(offsets, given_x);
  check_layer(given_x, given_a, given_b, rows.molecules());
  const Tensor x = dense(given_x), a = dense(given_a), b = dense(given_b);
  std::optional<Tensor> base;
  if (given_base) {
    check_output(*given_base, x, b);
    base = dense(*given_base);
  }
  const ScalarType dtype = dtype_of(x);
  const Tensor out = allocate(with_width(x, b.size(0)), dtype);
  const Tensor shrunk = allocate({rows.count, a.size(2)}, sum_type(dtype));
  Adapter adapter = forward(x, a, b, scale, base, out);
  adapter.shrunk = shrunk.data_ptr();
  Adapters adapters(rows, dtype);
  adapters.add(adapter);
  adapters.run();
  return {out, shrunk};
}

std::vector<Tensor> instance_lora_many(std::vector<Tensor> x, std::vector<Tensor> a,
                                       std::vector<Tensor> b, const Tensor& offsets, double scale,
                                       std::vector<std::optional<Tensor>> base) {
  STD_TORCH_CHECK(
      !x.empty() && a.size() == x.size() && b.size() == x.size() && base.size() == x.size(),
      "instance_lora_many: number of layers");
  const Rows rows(offsets, x[0]);
  const ScalarType dtype = dtype_of(x[0]);
  Adapters adapters(rows, dtype);
  std::vector<Tensor> outs;
  for (size_t k = 0; k < x.size(); ++k) {
    check_layer(x[k], a[k], b[k], rows.molecules());
    STD_TORCH_CHECK(dtype_of(x[k]) == dtype && count_rows(x[k]) == rows.count,
                    "instance_lora_many: layers differ");
    x[k] = dense(x[k]), a[k] = dense(a[k]), b[k] = dense(b[k]);
    if (base[k]) {
      check_output(*base[k], x[k], b[k]);
      base[k] = dense(*base[k]);
    }
    outs.push_back(allocate(with_width(x[k], b[k].size(0)), dtype));
    adapters.add(forward(x[k], a[k], b[k], scale, base[k], outs[k]));
  }
  adapters.run();
  return outs;
}

// Sums of outer products over every range of rows [bounds[m], bounds[m + 1]), one behind the other.
void outer_sums(const InstanceLoraKernels& kernels, const OuterSum& sum,
                const std::vector<int64_t>& bounds, const Tensor& out) {
  const auto ranges = static_cast<int64_t>(bounds.size()) - 1;
  const int64_t chunks = (sum.width + kernels.columns - 1) / kernels.columns;
  const int64_t rows = bounds.back() / std::max<int64_t>(ranges, 1) + 1;
  const int64_t grain = 1 + kGrain / (rows * kernels.columns * sum.rank);
  torch::stable::parallel_for(0, ranges * chunks, grain, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t m = task / chunks, first = task % chunks * kernels.columns;
      kernels.outer(sum, first, bounds[m], bounds[m + 1], at(out, m * sum.width * sum.rank),
                    thread_scratch(kernels.outer_scratch(sum)));
    }
  });
}

std::tuple<Tensor, Tensor, Tensor> instance_lora_bwd(Tensor grad, Tensor x, Tensor a, Tensor b,
                                                     Tensor shrunk, const Tensor& offsets,
                                                     double scale, bool need_x, bool need_a,
                                                     bool need_b) {
  const Rows rows(offsets, x);
  check_layer(x, a, b, rows.molecules());
  check_output(grad, x, b);
  const ScalarType dtype = dtype_of(x);
  const int64_t in = a.size(1), width = b.size(0), rank = a.size(2);
  STD_TORCH_CHECK(dtype_of(shrunk) == sum_type(dtype) && shrunk.dim() == 2 &&
                      shrunk.size(0) == rows.count && shrunk.size(1) == rank,
                  "instance_lora_bwd: shrunk");
  grad = dense(grad), x = dense(x), a = dense(a), b = dense(b), shrunk = dense(shrunk);
  const auto& kernels = kernels_for(dtype);
  const Tensor dx = need_x ? allocate_like(x) : allocate({0, in}, dtype);
  const Tensor da = allocate({need_a ? a.size(0) : 0, in, rank}, dtype);
  const Tensor db = allocate({need_b ? width : 0, rank}, dtype);

  if (need_x || need_a) {
    const Tensor u = allocate({rows.count, rank}, sum_type(dtype));  // dout B
    Adapter back{};
    back.x = grad.data_ptr(), back.down = b.data_ptr(), back.up = a.data_ptr();
    back.in = width, back.width = in, back.rank = rank, back.up_step = in * rank;
    back.out = need_x ? dx.data_ptr() : nullptr;
    back.shrunk = u.data_ptr();
    back.scale = scale;
    Adapters adapters(rows, dtype);
    adapters.add(back);
    adapters.run();
    if (need_a)
      outer_sums(kernels, {x.data_ptr(), u.data_ptr(), in, rank, scale}, rows.offsets, da);
  }
  if (need_b)
    outer_sums(kernels, {grad.data_ptr(), shrunk.data_ptr(), width, rank, scale}, {0, rows.used()},
               db);
  return {dx, da, db};
}

}  // namespace
}  // namespace edt

STABLE_TORCH_LIBRARY_IMPL(edt, CPU, m) {
  m.impl("instance_lora", TORCH_BOX(&edt::instance_lora));
  m.impl("instance_lora_bwd", TORCH_BOX(&edt::instance_lora_bwd));
  m.impl("instance_lora_many", TORCH_BOX(&edt::instance_lora_many));
}
