// Softmax within segments, a block of columns at a time: three passes over the rows of a segment,
// for the maximum m, for S = sum e^(x-m), and for y = e^(x-m) / S. Columns never meet.
#include "segment_softmax.h"

#include "columns.h"

namespace edt {
namespace {

template <class T>
void forward(const SoftmaxPart& part, const void* values, void* out) {
  using W = Wide<T>;
  constexpr W kNothing = -__builtin_huge_val();  // a value of probability 0
  for (int64_t p = part.first; p < part.last; ++p) {
    const int64_t rows = part.offsets[p + 1] - part.offsets[p];
    const T* x = static_cast<const T*>(values) + part.offsets[p] * part.dim;
    T* y = static_cast<T*>(out) + part.offsets[p] * part.dim;
    for_columns<W>(part.begin, part.end, [&](auto columns) __attribute__((always_inline)) {
      constexpr int kCount = columns.kCount;
      Vec<W> top[kCount], total[kCount] = {};
      for (auto& most : top) most = broadcast(kNothing);
      for (int64_t i = 0; i < rows; ++i)
#pragma GCC unroll 8
        for (int j = 0; j < kCount; ++j) top[j] = max(columns.read(x + i * part.dim, j), top[j]);
      for (auto& most : top) most = most == kNothing ? Vec<W>{} : most;

      for_blocks(0, rows, [&](int64_t i, int64_t last) __attribute__((always_inline)) {
        Vec<W> sum[kCount] = {};
        for (; i < last; ++i)
#pragma GCC unroll 8
          for (int j = 0; j < kCount; ++j)
            sum[j] += exp<W>(columns.read(x + i * part.dim, j) - top[j]);
#pragma GCC unroll 8
        for (int j = 0; j < kCount; ++j) total[j] += sum[j];
      });

      for (auto& sum : total) sum = sum == 0 ? Vec<W>{} : 1 / sum;
      for (int64_t i = 0; i < rows; ++i)
#pragma GCC unroll 8
        for (int j = 0; j < kCount; ++j)
          columns.write(y + i * part.dim, j,
                        exp<W>(columns.read(x + i * part.dim, j) - top[j]) * total[j]);
    });
  }
}

// y (g - sum y g)
template <class T>
void backward(const SoftmaxPart& part, const void* grad, const void* out, void* dvalues) {
  using W = Wide<T>;
  for (int64_t p = part.first; p < part.last; ++p) {
    const int64_t rows = part.offsets[p + 1] - part.offsets[p];
    const int64_t start = part.offsets[p] * part.dim;
    const T* g = static_cast<const T*>(grad) + start;
    const T* y = static_cast<const T*>(out) + start;
    T* dx = static_cast<T*>(dvalues) + start;
    for_columns<W>(part.begin, part.end, [&](auto columns) __attribute__((always_inline)) {
      constexpr int kCount = columns.kCount;
      Vec<W> total[kCount] = {};
      for_blocks(0, rows, [&](int64_t i, int64_t last) __attribute__((always_inline)) {
        Vec<W> sum[kCount] = {};
        for (; i < last; ++i)
#pragma GCC unroll 8
          for (int j = 0; j < kCount; ++j)
            sum[j] += columns.read(y + i * part.dim, j) * columns.read(g + i * part.dim, j);
#pragma GCC unroll 8
        for (int j = 0; j < kCount; ++j) total[j] += sum[j];
      });
      for (int64_t i = 0; i < rows; ++i)
#pragma GCC unroll 8
        for (int j = 0; j < kCount; ++j)
          columns.write(
              dx + i * part.dim, j,
              columns.read(y + i * part.dim, j) * (columns.read(g + i * part.dim, j) - total[j]));
    });
  }
}

}  // namespace

namespace EDT_ISA {
extern const SegmentSoftmaxKernels segment_softmax_kernels = {
    {forward<float>, forward<double>, forward<BFloat16>, forward<Half>},
    {backward<float>, backward<double>, backward<BFloat16>, backward<Half>},
};
}  // namespace EDT_ISA
}  // namespace edt
