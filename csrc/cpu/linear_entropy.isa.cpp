// A tile is some rows of hidden times a panel of the weight: it is made, read and forgotten. The
// forward keeps for every row and vector lane the maximum m, S = sum e^(x-m) and T = sum e^(x-m)
// (x-m) of the logits so far; the backward makes each tile again. What a row gets does not depend
// on the rows beside it.
#include "linear_entropy.h"

#include "matrix.h"

namespace edt {
namespace {

// Rows of a tile: whole tiles of the micro-kernel, few enough that D = 4096 stays in the L2 cache.
constexpr int64_t kRows = 96;

template <class T>
constexpr int64_t kPanel = kTileCols * kLanes<T>;

template <class T>
constexpr T kNothing = -__builtin_huge_val();  // a logit of probability 0

// x where e^x is not 0, and no infinity elsewhere: e^x x is then 0 at -inf.
template <class T>
EDT_INLINE Vec<T> finite(Vec<T> x) {
  return max(x, broadcast(Float<T>::kExpMin));
}

template <class T>
struct Scratch {
  T *hidden, *weight, *weight_t, *bias, *logits, *dhidden, *state, *end;

  Scratch(void* memory, const LinearEntropy& x) {
    end = static_cast<T*>(memory);
    const int64_t width = padded<T>(x.width);
    hidden = take(kRows * width);
    weight = take(kPanel<T> * width);
    weight_t = take(kPanel<T> * width);
    bias = take(kPanel<T>);
    logits = take(kRows * kPanel<T>);
    dhidden = take(kRows * width);
    state = take(kRows * 3 * kLanes<T>);
  }

  T* take(int64_t count) {
    T* block = end;
    end += count;
    return block;
  }
};

template <class T>
int64_t scratch_bytes(const LinearEntropy& x) {
  return reinterpret_cast<char*>(Scratch<T>(nullptr, x).end) - static_cast<char*>(nullptr);
}

// Rows [begin, begin + count) of [., width] of S as rows of whole vectors of T, copied into `copy`
// where they are not that already.
template <class S, class T>
Matrix<T> read_rows(const void* from, int64_t begin, int64_t count, int64_t width, T* copy) {
  const S* rows = static_cast<const S*>(from) + begin * width;
  if constexpr (sizeof(S) == sizeof(T))
    if (width % kLanes<T> == 0) return {const_cast<S*>(rows), width};
  const int64_t stride = padded<T>(width);
  for (int64_t i = 0; i < count; ++i) widen(rows + i * width, width, copy + i * stride);
  return {copy, stride};
}

// Some tokens with their weight, by rows and transposed, and bias; -inf is the bias of columns
// beyond the last token.
template <class S, class T>
struct Panel {
  int64_t first, tokens;
  Matrix<T> weight, weight_t;
  const T* bias;

  Panel(const LinearEntropy& x, int64_t first, const Scratch<T>& scratch)
      : first(first),
        tokens(x.tokens - first < kPanel<T> ? x.tokens - first : kPanel<T>),
        weight(read_rows<S>(x.weight, first, tokens, x.width, scratch.weight)),
        weight_t{scratch.weight_t, kPanel<T>},
        bias(scratch.bias) {
    transpose(weight, tokens, x.width, weight_t);
    if (x.bias)
      widen(static_cast<const S*>(x.bias) + first, tokens, scratch.bias);
    else
      std::memset(scratch.bias, 0, kPanel<T> * sizeof(T));
    for (int64_t j = tokens; j < kPanel<T>; ++j) scratch.bias[j] = kNothing<T>;
  }

  // The logits of `rows` rows of hidden, [rows, kPanel].
  void multiply_rows(Matrix<T> hidden, int64_t rows, int64_t width, T* logits) const {
    const int64_t columns = padded<T>(tokens);
    const Matrix<T> tile{logits, kPanel<T>};
    multiply<false>(plain(hidden), weight_t, tile, rows, columns, width);
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t j = 0; j < columns; j += kLanes<T>) {
        T* at = logits + i * kPanel<T> + j;
        store(at, load(at) + load(bias + j));
      }
  }
};

// What a row knows of its logits so far, lane by lane.
template <class T>
struct Sums {
  Vec<T> top, total, moment;  // m, S, T
};

template <class T>
void add_tile(const T* logits, int64_t columns, Sums<T>& sums) {
  Vec<T> top = sums.top;
  for (int64_t j = 0; j < columns; j += kLanes<T>) top = max(load(logits + j), top);
  // No lane's own maximum where there was no logit yet, so that -inf - top is -inf.
  const Vec<T> base = max(top, broadcast(-Float<T>::kLargest));
  const Vec<T> before = sums.top - base;
  const Vec<T> shrink = exp<T>(before);
  Vec<T> total = shrink * sums.total;
  Vec<T> moment = shrink * fma(finite<T>(before), sums.total, sums.moment);
  for (int64_t j = 0; j < columns; j += kLanes<T>) {
    const Vec<T> shifted = load(logits + j) - base;
    const Vec<T> weight = exp<T>(shifted);
    total += weight;
    moment = fma(weight, finite<T>(shifted), moment);
  }
  sums = {top, total, moment};
}

template <class S, class T = typename ComputeType<S>::type>
void forward(const LinearEntropy& x, int64_t begin, int64_t end, void* memory) {
  const Scratch<T> scratch(memory, x);
  auto* state = reinterpret_cast<Sums<T>*>(scratch.state);
  for (int64_t r = begin; r < end; r += kRows) {
    const int64_t rows = end - r < kRows ? end - r : kRows;
    const auto hidden = read_rows<S>(x.hidden, r, rows, x.width, scratch.hidden);
    for (int64_t i = 0; i < rows; ++i) state[i] = {broadcast(kNothing<T>), Vec<T>{}, Vec<T>{}};
    for (int64_t token = 0; token < x.tokens; token += kPanel<T>) {
      const Panel<S, T> panel(x, token, scratch);
      panel.multiply_rows(hidden, rows, x.width, scratch.logits);
      for (int64_t i = 0; i < rows; ++i)
        add_tile(scratch.logits + i * kPanel<T>, padded<T>(panel.tokens), state[i]);
    }
    for (int64_t i = 0; i < rows; ++i) {
      const T top = reduce_max<T>(state[i].top);
      const Vec<T> apart = max(state[i].top, broadcast(-Float<T>::kLargest)) - top;
      const Vec<T> shrink = exp<T>(apart);
      const T total = reduce_sum<T>(shrink * state[i].total);
      const T moment =
          reduce_sum<T>(shrink * fma(finite<T>(apart), state[i].total, state[i].moment));
      const T log_total = log<T>(broadcast(total))[0];
      static_cast<T*>(x.h)[r + i] = static_cast<T>(x.scale) * (log_total - moment / total);
      static_cast<T*>(x.top)[r + i] = top;
      static_cast<T*>(x.log_total)[r + i] = log_total;
    }
  }
}

// Logits of rows [r, r + rows), in place, as -g p (scale ln p + h).
template <class T>
void slope(const LinearEntropy& x, int64_t r, int64_t rows, int64_t columns, T* logits) {
  const Vec<T> scale = broadcast(static_cast<T>(x.scale));
  for (int64_t i = 0; i < rows; ++i) {
    const T g = static_cast<const T*>(x.grad)[r + i], h = static_cast<const T*>(x.h)[r + i];
    const T top = static_cast<const T*>(x.top)[r + i];
    const T log_total = static_cast<const T*>(x.log_total)[r + i];
    for (int64_t j = 0; j < columns; j += kLanes<T>) {
      T* at = logits + i * kPanel<T> + j;
      const Vec<T> log_p = load(at) - top - log_total;
      store(at, -g * exp<T>(log_p) * fma(finite<T>(log_p), scale, broadcast(h)));
    }
  }
}

template <class S, class T = typename ComputeType<S>::type>
void backward_hidden(const LinearEntropy& x, int64_t begin, int64_t end, void* memory) {
  const Scratch<T> scratch(memory, x);
  const int64_t width = padded<T>(x.width);
  const Matrix<T> dhidden{scratch.dhidden, width}, dlogits{scratch.logits, kPanel<T>};
  for (int64_t r = begin; r < end; r += kRows) {
    const int64_t rows = end - r < kRows ? end - r : kRows;
    const auto hidden = read_rows<S>(x.hidden, r, rows, x.width, scratch.hidden);
    std::memset(dhidden.data, 0, rows * width * sizeof(T));
    for (int64_t token = 0; token < x.tokens; token += kPanel<T>) {
      const Panel<S, T> panel(x, token, scratch);
      panel.multiply_rows(hidden, rows, x.width, scratch.logits);
      slope(x, r, rows, padded<T>(panel.tokens), scratch.logits);
      multiply<true>(plain(dlogits), panel.weight, dhidden, rows, width, panel.tokens);
    }
    for (int64_t i = 0; i < rows; ++i)
      narrow(dhidden.data + i * width, x.width, static_cast<S*>(x.dhidden) + (r + i) * x.width);
  }
}

template <class S, class T = typename ComputeType<S>::type>
void backward_weight(const LinearEntropy& x, int64_t first_token, int64_t begin, int64_t end,
                     void* dweight, void* dbias, void* memory) {
  const Scratch<T> scratch(memory, x);
  const int64_t width = padded<T>(x.width);
  const Panel<S, T> panel(x, first_token, scratch);
  // The rows of the weight are not needed again: their place holds the sums.
  const Matrix<T> sums{scratch.dhidden, width}, dlogits{scratch.logits, kPanel<T>};
  static_assert(kRows >= kPanel<T>);
  Vec<T> column_sums[kTileCols] = {};
  std::memset(sums.data, 0, panel.tokens * width * sizeof(T));
  for (int64_t r = begin; r < end; r += kRows) {
    const int64_t rows = end - r < kRows ? end - r : kRows;
    const auto hidden = read_rows<S>(x.hidden, r, rows, x.width, scratch.hidden);
    panel.multiply_rows(hidden, rows, x.width, scratch.logits);
    slope(x, r, rows, padded<T>(panel.tokens), scratch.logits);
    multiply<true>(transposed(dlogits), hidden, sums, panel.tokens, width, rows);
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t j = 0; j * kLanes<T> < panel.tokens; ++j)
        column_sums[j] += load(scratch.logits + i * kPanel<T> + j * kLanes<T>);
  }
  for (int64_t i = 0; i < panel.tokens; ++i)
    narrow(sums.data + i * width, x.width, static_cast<T*>(dweight) + i * x.width);
  for (int64_t j = 0; j * kLanes<T> < panel.tokens; ++j)
    store(scratch.bias + j * kLanes<T>, column_sums[j]);
  std::memcpy(dbias, scratch.bias, panel.tokens * sizeof(T));
}

template <class S, class T = typename ComputeType<S>::type>
void add_parts(const void* parts, int64_t count, int64_t stride, int64_t begin, int64_t end,
               void* out) {
  const T* numbers = static_cast<const T*>(parts);
  T sums[kLanes<T>];
  for (int64_t i = begin; i < end; i += kLanes<T>) {
    const int64_t n = end - i < kLanes<T> ? end - i : kLanes<T>;
    std::memset(sums, 0, sizeof(sums));
    for (int64_t c = 0; c < count; ++c)
      for (int64_t j = 0; j < n; ++j) sums[j] += numbers[c * stride + i + j];
    narrow(sums, n, static_cast<S*>(out) + i);
  }
}

template <class S, class T = typename ComputeType<S>::type>
constexpr LinearEntropyKernels kernels = {kPanel<T>,          scratch_bytes<T>,   forward<S>,
                                          backward_hidden<S>, backward_weight<S>, add_parts<S>};

}  // namespace

namespace EDT_ISA {

const LinearEntropyTable linear_entropy_kernels = {kernels<float>, kernels<BFloat16>, kernels<Half>,
                                                   kernels<double>};

}  // namespace EDT_ISA
}  // namespace edt
