// A tile is some rows of hidden times a panel of the weight: it is made, read and forgotten, or
// kept where it belongs. The forward keeps m, S and T of every row; the backward makes a forgotten
// tile again, and a tile gives to all three gradients. What a row gets does not depend on the rows
// beside it.
#include "linear_entropy.h"

#include "logit_rows.h"

namespace edt {
namespace {

// Rows of a tile of logits: whole tiles of the micro-kernel.
constexpr int64_t kRows = 96;
// Tokens of a panel, and columns of B that a tile of the micro-kernel takes.
constexpr int64_t kPanel = 64;
template <class T>
constexpr int64_t kStrip = kTileCols * kLanes<T>;
// Wider rows lie a page or so apart, and their columns would push each other out of the L1 cache.
constexpr int64_t kWide = 256;

// Rows that a panel is packed for: many, as long as they and their gradient stay in cache.
int64_t chunk(const LinearEntropy& x) {
  constexpr int64_t kNumbers = 1 << 18;
  const int64_t tiles = kNumbers / (x.width + 1) / kRows;
  return kRows * (tiles < 1 ? 1 : tiles > 10 ? 10 : tiles);
}

template <class T>
struct Scratch {
  T *hidden, *weight, *weight_t, *bias, *logits, *strips, *weight_strips, *dhidden, *state, *end;

  Scratch(void* memory, const LinearEntropy& x) {
    end = static_cast<T*>(memory);
    const int64_t width = padded<T>(x.width), rows = chunk(x);
    const int64_t strip_width = (width + kStrip<T> - 1) / kStrip<T> * kStrip<T>;
    hidden = take(rows * width);
    weight = take(kPanel * width);
    weight_t = take(kPanel * width);
    weight_strips = take(kPanel * strip_width);
    bias = take(kPanel);
    logits = take(kRows * kPanel);
    strips = take(kRows * strip_width);
    dhidden = take(rows * width);
    state = take(rows * 3);
  }

  T* take(int64_t count) {
    T* block = end;
    end += (count * sizeof(T) + 63) / 64 * 64 / sizeof(T);
    return block;
  }
};

template <class T>
int64_t scratch_bytes(const LinearEntropy& x) {
  return reinterpret_cast<char*>(Scratch<T>(nullptr, x).end) - static_cast<char*>(nullptr);
}

// Are rows of S whole vectors of T already?
template <class S, class T>
bool in_place(int64_t width) {
  return sizeof(S) == sizeof(T) && width % kLanes<T> == 0;
}

// Rows [begin, begin + count) of [., width] of S as rows of whole vectors of T, copied into `copy`
// where they are not that already.
template <class S, class T>
Matrix<T> read_rows(const void* from, int64_t begin, int64_t count, int64_t width, T* copy) {
  const S* rows = static_cast<const S*>(from) + begin * width;
  if constexpr (sizeof(S) == sizeof(T))
    if (in_place<S, T>(width)) return {const_cast<S*>(rows), width};
  const int64_t stride = padded<T>(width);
  for (int64_t i = 0; i < count; ++i) widen(rows + i * width, width, copy + i * stride);
  return {copy, stride};
}

// The B of a product: rows, or strips of their columns one after the other.
template <class T>
struct Strips {
  Matrix<T> rows;
  int64_t step;  // to the next strip; 0 if there is but one

  // Copies the rows.
  static Strips pack(Matrix<T> from, int64_t rows, int64_t cols, T* to) {
    constexpr int n = kLanes<T>;
    for (int64_t j = 0; j < cols; j += kStrip<T>) {
      const int64_t end = cols - j < kStrip<T> ? cols : j + kStrip<T>;
      for (int64_t i = 0; i < rows; ++i)
        for (int64_t k = j; k < end; k += n)
          store(to + j * rows + i * kStrip<T> + k - j, load(from.data + i * from.stride + k));
    }
    return {{to, kStrip<T>}, rows * kStrip<T>};
  }

  // Copies wide rows.
  static Strips of(Matrix<T> from, int64_t rows, int64_t cols, T* to) {
    return cols > kWide ? pack(from, rows, cols, to) : Strips{from, 0};
  }

  // The transpose of `count` rows of `cols` numbers.
  static Strips transposed(Matrix<T> from, int64_t count, int64_t cols, T* to) {
    const bool narrow = cols <= kWide;
    const int64_t width = narrow ? padded<T>(count) : kStrip<T>;
    for (int64_t j = 0; j < count; j += width)
      transpose(Matrix<T>{from.data + j * from.stride, from.stride},
                count - j < width ? count - j : width, cols, Matrix<T>{to + j * cols, width});
    return {{to, width}, narrow ? 0 : cols * kStrip<T>};
  }
};

// C [rows, cols] = A B, or += with ADD; cols is whole vectors.
template <bool ADD, class T>
void multiply_strips(Factor<T> a, Strips<T> b, Matrix<T> c, int64_t rows, int64_t cols,
                     int64_t depth) {
  if (b.step == 0) return multiply<ADD>(a, b.rows, c, rows, cols, depth);
  for (; cols > 0; cols -= kStrip<T>) {
    multiply<ADD>(a, b.rows, c, rows, cols < kStrip<T> ? cols : kStrip<T>, depth);
    b.rows.data += b.step;
    c.data += kStrip<T>;
  }
}

template <class T>
void multiply_strips(bool add, Factor<T> a, Strips<T> b, Matrix<T> c, int64_t rows, int64_t cols,
                     int64_t depth) {
  (add ? multiply_strips<true, T> : multiply_strips<false, T>)(a, b, c, rows, cols, depth);
}

// Some tokens with their weight, by rows and transposed, and bias; -inf is the bias of columns
// beyond the last token.
template <class S, class T>
struct Panel {
  int64_t tokens, columns, width;
  Matrix<T> weight;
  Strips<T> weight_t;
  const T* bias;

  Panel(const LinearEntropy& x, int64_t first, int64_t last, const Scratch<T>& scratch)
      : tokens(last - first < kPanel ? last - first : kPanel),
        columns(padded<T>(tokens)),
        width(padded<T>(x.width)),
        weight(read_rows<S>(x.weight, first, tokens, x.width, scratch.weight)),
        weight_t(Strips<T>::transposed(weight, tokens, width, scratch.weight_t)),
        bias(scratch.bias) {
    if (x.bias)
      widen(static_cast<const S*>(x.bias) + first, tokens, scratch.bias);
    else
      std::memset(scratch.bias, 0, columns * sizeof(T));
    for (int64_t j = tokens; j < columns; ++j) scratch.bias[j] = kNothing<T>;
  }

  // The logits of `rows` rows of hidden.
  void multiply_rows(Matrix<T> hidden, int64_t rows, Matrix<T> logits) const {
    multiply_strips<false>(plain(hidden), weight_t, logits, rows, columns, width);
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t j = 0; j < columns; j += kLanes<T>) {
        T* at = logits.data + i * logits.stride + j;
        store(at, load(at) + load(bias + j));
      }
  }
};

template <class T>
EDT_INLINE Matrix<T> rows_from(Matrix<T> x, int64_t row) {
  return {x.data + row * x.stride, x.stride};
}

// Where the tile of these rows and tokens is kept, or the one that is forgotten.
template <class T>
EDT_INLINE Matrix<T> tile(const LinearEntropy& x, int64_t row, int64_t token, T* scratch) {
  if (!x.logits) return {scratch, kPanel};
  return {static_cast<T*>(x.logits) + row * x.logit_stride + token, x.logit_stride};
}

// The columns [from, to) of some rows hold no logits.
template <class T>
void fill_up(Matrix<T> logits, int64_t rows, int64_t from, int64_t to) {
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = from; j < to; ++j) logits.data[i * logits.stride + j] = kNothing<T>;
}

template <class S, class T = typename ComputeType<S>::type>
void forward(const LinearEntropy& x, int64_t first, int64_t last, int64_t begin, int64_t end,
             void* sums, void* memory) {
  constexpr int n = kLanes<T>;
  const Scratch<T> scratch(memory, x);
  const int64_t many = chunk(x);
  auto* state = reinterpret_cast<Sums<T>*>(scratch.state);
  for (int64_t r = begin; r < end; r += many) {
    const int64_t rows = end - r < many ? end - r : many;
    const auto hidden = read_rows<S>(x.hidden, r, rows, x.width, scratch.hidden);
    for (int64_t i = 0; i < rows; i += n) state[i / n] = Sums<T>{};
    for (int64_t token = first; token < last; token += kPanel) {
      const Panel<S, T> panel(x, token, last, scratch);
      for (int64_t i = 0; i < rows; i += kRows) {
        const int64_t block = rows - i < kRows ? rows - i : kRows;
        const auto logits = tile(x, r + i, token, scratch.logits);
        panel.multiply_rows(rows_from(hidden, i), block, logits);
        if (x.logits && token + kPanel >= x.tokens)
          fill_up(logits, block, panel.columns, x.logit_stride - token);
        const auto add = [&](int64_t row, const Sums<T>& sums) __attribute__((always_inline)) {
          state[(i + row) / n] = state[(i + row) / n] + sums;
        };
        sum_rows(logits.data, logits.stride, panel.columns, block, add);
      }
    }
    T* to = static_cast<T*>(sums) + r;
    for (int64_t i = 0; i < rows; i += n) {
      store_first(to + i, state[i / n].top, rows - i);
      store_first(to + x.rows + i, state[i / n].total, rows - i);
      store_first(to + 2 * x.rows + i, state[i / n].moment, rows - i);
    }
  }
}

template <class T>
void finish(const LinearEntropy& x, const void* all_sums, int64_t spans, int64_t begin,
            int64_t end) {
  constexpr int n = kLanes<T>;
  for (int64_t r = begin; r < end; r += n) {
    Sums<T> sums;
    for (int64_t s = 0; s < spans; ++s) {
      const T* from = static_cast<const T*>(all_sums) + s * 3 * x.rows + r;
      sums = sums + Sums<T>{load_first(from, end - r), load_first(from + x.rows, end - r),
                            load_first(from + 2 * x.rows, end - r)};
    }
    const Vec<T> log_total = log<T>(sums.total);
    const Vec<T> h = static_cast<T>(x.scale) * (log_total - sums.moment / sums.total);
    store_first(static_cast<T*>(x.h) + r, h, end - r);
    store_first(static_cast<T*>(x.top) + r, sums.top, end - r);
    store_first(static_cast<T*>(x.log_total) + r, log_total, end - r);
  }
}

// -g p (scale ln p + h) for logits of the rows [r, r + rows), which may lie in the same place.
template <class T>
void slopes(const LinearEntropy& x, int64_t r, int64_t rows, int64_t columns, Matrix<T> logits,
            T* to) {
  for (int64_t i = 0; i < rows; i += 2) {
    const int64_t second = i + 1 < rows ? i + 1 : i;
    write_slopes<T>({Slope<T>(x.grad, x.h, x.top, x.log_total, x.scale, r + i),
                     Slope<T>(x.grad, x.h, x.top, x.log_total, x.scale, r + second)},
                    {logits.data + i * logits.stride, logits.data + second * logits.stride},
                    {to + i * kPanel, to + second * kPanel}, columns);
  }
}

template <class S, class T = typename ComputeType<S>::type>
void backward(const LinearEntropy& x, const LinearEntropyShare& share, void* memory) {
  constexpr int n = kLanes<T>;
  const Scratch<T> scratch(memory, x);
  const int64_t width = padded<T>(x.width), many = chunk(x);
  const bool need_hidden = share.dhidden_sums || x.dhidden;
  const Matrix<T> dlogits{scratch.logits, kPanel};
  for (int64_t r = share.begin; r < share.end; r += many) {
    const int64_t rows = share.end - r < many ? share.end - r : many;
    const auto hidden = read_rows<S>(x.hidden, r, rows, x.width, scratch.hidden);
    const bool direct = share.dhidden_sums || in_place<S, T>(x.width);
    const Matrix<T> dhidden{share.dhidden_sums
                                ? static_cast<T*>(share.dhidden_sums) + (r - share.begin) * width
                            : direct ? static_cast<T*>(x.dhidden) + r * width
                                     : scratch.dhidden,
                            width};
    for (int64_t token = share.first; token < share.last; token += kPanel) {
      const Panel<S, T> panel(x, token, share.last, scratch);
      const auto weight =
          need_hidden ? Strips<T>::of(panel.weight, panel.tokens, width, scratch.weight_strips)
                      : Strips<T>{};
      for (int64_t i = 0; i < rows; i += kRows) {
        const int64_t block = rows - i < kRows ? rows - i : kRows;
        const auto block_hidden = rows_from(hidden, i);
        const auto logits = tile(x, r + i, token, scratch.logits);
        if (!x.logits) panel.multiply_rows(block_hidden, block, logits);
        slopes(x, r + i, block, panel.columns, logits, scratch.logits);
        if (need_hidden)
          multiply_strips(token != share.first, plain(dlogits), weight, rows_from(dhidden, i),
                          block, width, panel.tokens);
        if (!share.dweight_sums) continue;
        const bool add = share.add || r + i != share.begin;
        T* sums = static_cast<T*>(share.dweight_sums) + token * width;
        multiply_strips(add, transposed(dlogits),
                        Strips<T>::of(block_hidden, block, width, scratch.strips),
                        Matrix<T>{sums, width}, panel.tokens, width, block);
        for (int64_t j = 0; j < panel.columns; j += n) {
          T* to = static_cast<T*>(share.dbias_sums) + token + j;
          Vec<T> sum{};
          for (int64_t k = 0; k < block; ++k) sum += load(scratch.logits + k * kPanel + j);
          store(to, add ? load(to) + sum : sum);
        }
      }
    }
    if (need_hidden && !direct)
      for (int64_t i = 0; i < rows; ++i)
        narrow(dhidden.data + i * width, x.width, static_cast<S*>(x.dhidden) + (r + i) * x.width);
  }
}

template <class S, class T = typename ComputeType<S>::type>
void add_parts(const void* parts, int64_t count, int64_t rows, int64_t width, int64_t begin,
               int64_t end, void* out) {
  constexpr int n = kLanes<T>;
  const int64_t stride = padded<T>(width);
  for (int64_t i = begin; i < end; ++i)
    for (int64_t j = 0; j < width; j += n) {
      Vec<T> sum{};
      for (int64_t c = 0; c < count; ++c)
        sum += load(static_cast<const T*>(parts) + (c * rows + i) * stride + j);
      T numbers[n];
      store(numbers, sum);
      narrow(numbers, width - j < n ? width - j : n, static_cast<S*>(out) + i * width + j);
    }
}

template <class S, class T = typename ComputeType<S>::type>
constexpr LinearEntropyKernels kernels = {kRows,     kPanel,           kLanes<T>,
                                          chunk,     scratch_bytes<T>, forward<S>,
                                          finish<T>, backward<S>,      add_parts<S>};

}  // namespace

namespace EDT_ISA {

const LinearEntropyTable linear_entropy_kernels = {kernels<float>, kernels<BFloat16>, kernels<Half>,
                                                   kernels<double>};

}  // namespace EDT_ISA
}  // namespace edt
