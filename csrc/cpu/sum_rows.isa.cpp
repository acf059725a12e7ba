// A block of columns at a time: its sums stay in the L1 cache while the rows pass by. Columns never
// meet, so their bits do not depend on how threads share them.
#include "sum_rows.h"

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
void sum_rows(const void* const* rows, int64_t count, int64_t begin, int64_t end, void* out) {
  using W = typename Wide<T>::Type;
  constexpr int n = kLanes<W>, vectors = 64;
  for (; begin < end; begin += vectors * n) {
    const int64_t width = end - begin < vectors * n ? end - begin : vectors * n;
    const int64_t whole = width / n, rest = width % n;
    Vec<W> sums[vectors], last{};
    for (int64_t j = 0; j < whole; ++j) sums[j] = Vec<W>{};
    for (int64_t i = 0; i < count; ++i) {
      const T* row = static_cast<const T*>(rows[i]) + begin;
      for (int64_t j = 0; j < whole; ++j) sums[j] += load(row + j * n);
      if (rest == 0) continue;
      T copy[n] = {};
      __builtin_memcpy(copy, row + whole * n, rest * sizeof(T));
      last += load(copy);
    }
    T* to = static_cast<T*>(out) + begin;
    for (int64_t j = 0; j < whole; ++j) store(to + j * n, sums[j]);
    if (rest == 0) continue;
    T copy[n];
    store(copy, last);
    __builtin_memcpy(to + whole * n, copy, rest * sizeof(T));
  }
}

}  // namespace

namespace EDT_ISA {
extern const SumRowsKernels sum_rows_kernels = {
    {sum_rows<float>, sum_rows<double>, sum_rows<BFloat16>, sum_rows<Half>},
};
}  // namespace EDT_ISA
}  // namespace edt
