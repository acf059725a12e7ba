// A row is read twice: for its maximum m, and for S = sum e^(x-m) and T = sum e^(x-m) (x-m), from
// which H = ln S - T / S. Rows never meet, so their bits do not depend on the batch.
#include "entropy.h"

#include "half.h"

namespace edt {
namespace {

template <class T>
struct Wide {
  using Type = float;
};
template <>
struct Wide<double> {
  using Type = double;
};
template <class T>
using Wider = typename Wide<T>::Type;

template <class W>
constexpr W kNothing = -__builtin_huge_val();  // a logit of probability 0

// x where e^x is not 0, and no infinity elsewhere: e^x x is then 0 at -inf.
template <class W>
EDT_INLINE Vec<W> finite(Vec<W> x) {
  return max(x, broadcast(Float<W>::kExpMin));
}

// Calls visit(numbers) for the row's vectors in order. The last one reaches back over
// lanes that were visited before, which hold kNothing; a short row is one vector filled up.
template <class T, class F>
EDT_INLINE void visit_row(const T* row, int64_t v, F visit) {
  using W = Wider<T>;
  constexpr int n = kLanes<W>;
  if (v < n) {
    T copy[n] = {};
    __builtin_memcpy(copy, row, v * sizeof(T));
    visit(first<W>(load(copy), v, kNothing<W>));
    return;
  }
  int64_t i = 0;
  for (; i + n <= v; i += n) visit(load(row + i));
  if (i < v) {
    const auto seen = static_cast<typename Float<W>::Int>(i - (v - n));
    visit(iota<W>() >= seen ? load(row + v - n) : broadcast(kNothing<W>));
  }
}

template <class T>
EDT_INLINE Wider<T> row_max(const T* row, int64_t v) {
  using W = Wider<T>;
  Vec<W> top = broadcast(kNothing<W>);
  visit_row(row, v, [&](Vec<W> x) __attribute__((always_inline)) { top = max(x, top); });
  return reduce_max<W>(top);
}

// Partial sums of 64 vectors are added up in a second level, so that long rows lose no digits.
constexpr int kBlock = 64;

template <class T>
EDT_INLINE void row_sums(const T* row, int64_t v, Wider<T> top, Wider<T>* total, Wider<T>* moment) {
  using W = Wider<T>;
  Vec<W> s{}, t{}, block_s{}, block_t{};
  int in_block = 0;
  visit_row(row, v, [&](Vec<W> x) __attribute__((always_inline)) {
    const Vec<W> shifted = x - top;
    const Vec<W> weight = exp<W>(shifted);
    block_s += weight;
    block_t += weight * finite<W>(shifted);
    if (++in_block == kBlock) {
      s += block_s;
      t += block_t;
      block_s = block_t = Vec<W>{};
      in_block = 0;
    }
  });
  *total = reduce_sum<W>(s + block_s);
  *moment = reduce_sum<W>(t + block_t);
}

template <class T>
void forward(const void* logits, int64_t rows, int64_t v, double scale, void* h, void* top,
             void* log_total) {
  using W = Wider<T>;
  constexpr int n = kLanes<W>;
  for (int64_t begin = 0; begin < rows; begin += n) {
    const int64_t count = rows - begin < n ? rows - begin : n;
    W tops[n], totals[n], moments[n];
    for (int j = 0; j < n; ++j) totals[j] = 1, moments[j] = 0;
    for (int j = 0; j < count; ++j) {
      const T* row = static_cast<const T*>(logits) + (begin + j) * v;
      tops[j] = row_max(row, v);
      row_sums(row, v, tops[j], &totals[j], &moments[j]);
    }
    const Vec<W> log_totals = log<W>(load(totals));
    store(moments, static_cast<W>(scale) * (log_totals - load(moments) / load(totals)));
    store(totals, log_totals);
    __builtin_memcpy(static_cast<W*>(h) + begin, moments, count * sizeof(W));
    __builtin_memcpy(static_cast<W*>(top) + begin, tops, count * sizeof(W));
    __builtin_memcpy(static_cast<W*>(log_total) + begin, totals, count * sizeof(W));
  }
}

template <class T>
void backward(const void* grad, const void* logits, const void* h, const void* top,
              const void* log_total, int64_t rows, int64_t v, double scale, void* dlogits) {
  using W = Wider<T>;
  constexpr int n = kLanes<W>;
  for (int64_t r = 0; r < rows; ++r) {
    const T* row = static_cast<const T*>(logits) + r * v;
    T* out = static_cast<T*>(dlogits) + r * v;
    const W g = static_cast<const W*>(grad)[r], entropy = static_cast<const W*>(h)[r];
    const W m = static_cast<const W*>(top)[r], log_s = static_cast<const W*>(log_total)[r];
    const auto slope = [=](Vec<W> x) __attribute__((always_inline)) {
      const Vec<W> log_p = x - m - log_s;
      return -g * exp<W>(log_p) *
             fma(finite<W>(log_p), broadcast(static_cast<W>(scale)), broadcast(entropy));
    };
    if (v < n) {
      T copy[n] = {};
      __builtin_memcpy(copy, row, v * sizeof(T));
      store(copy, slope(load(copy)));
      __builtin_memcpy(out, copy, v * sizeof(T));
      continue;
    }
    for (int64_t i = 0; i + n <= v; i += n) store(out + i, slope(load(row + i)));
    store(out + v - n, slope(load(row + v - n)));
  }
}

}  // namespace

namespace EDT_ISA {
extern const EntropyKernels entropy_kernels = {
    {forward<float>, forward<double>, forward<BFloat16>, forward<Half>},
    {backward<float>, backward<double>, backward<BFloat16>, backward<Half>},
};
}  // namespace EDT_ISA
}  // namespace edt
