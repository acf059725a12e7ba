// Softmax within segments, a bundle at a time: three passes over the rows of a segment, for the
// maximum m, for S = sum e^(x-m), and for y = e^(x-m) / S.
#include "segment_softmax.h"

#include "bundles.h"

namespace edt {
namespace {

// Rows whose exponentials stay in the L1 cache between the passes.
constexpr int64_t kKept = 32;

template <class W>
constexpr W kNothing = -__builtin_huge_val();  // a value of probability 0

// A segment of a single column: its rows are neighbours, whose exponentials fill a vector. They are
// added up one by one, as in a bundle.
template <class T>
void forward_column(const T* x, int64_t rows, T* y) {
  using W = Wide<T>;
  constexpr int n = kLanes<W>;
  const auto vectors = [&](int64_t begin, int64_t end, auto visit) __attribute__((always_inline)) {
    for (; begin + n <= end; begin += n) visit(ColumnBlock<W, 1, true>{{}, 0, begin, n});
    if (begin < end) visit(ColumnBlock<W, 1, false>{{}, 0, begin, end - begin});
  };
  Vec<W> tops = broadcast(kNothing<W>);
  vectors(0, rows, [&](const auto& block) __attribute__((always_inline)) {
    tops = max(first<W>(block.read(x, 0, 0), block.lanes, kNothing<W>), tops);
  });
  const W most = reduce_max<W>(tops), top = most == kNothing<W> ? 0 : most;

  W total = 0;
  for_blocks(rows, [&](int64_t i, int64_t last) __attribute__((always_inline)) {
    W sum = 0;
    vectors(i, last, [&](const auto& block) __attribute__((always_inline)) {
      const Vec<W> weight = exp<W>(block.read(x, 0, 0) - top);
      for (int64_t lane = 0; lane < block.lanes; ++lane) sum += weight[lane];
    });
    total += sum;
  });

  const W inverse = total == 0 ? 0 : 1 / total;
  vectors(0, rows, [&](const auto& block) __attribute__((always_inline)) {
    block.write(y, 0, 0, exp<W>(block.read(x, 0, 0) - top) * inverse);
  });
}

template <class T>
void forward(SegmentSoftmax s, Share share) {
  using W = Wide<T>;
  const T* x = static_cast<const T*>(s.values);
  for_bundles<W>(s, share, [&]<class B>(const B& bundle) __attribute__((always_inline)) {
    constexpr int kCount = B::kCount;
    if constexpr (!B::kSegments)
      if (s.dim == 1)
        return forward_column(x + bundle.begin, bundle.rounds(),
                              static_cast<T*>(s.result) + bundle.begin);
    Vec<W> top[kCount], total[kCount] = {}, kept[kKept][kCount];
    for (auto& most : top) most = broadcast(kNothing<W>);
    for (int64_t i = 0; i < bundle.rounds(); ++i) {
      const auto row = bundle.row(nullptr, i);
#pragma GCC unroll 8
      for (int j = 0; j < kCount; ++j)
        top[j] = max(bundle.keep(bundle.read(x, row, j), row, kNothing<W>), top[j]);
    }
    for (auto& most : top) most = most == kNothing<W> ? Vec<W>{} : most;

    for_blocks(bundle.rounds(), [&](int64_t i, int64_t last) __attribute__((always_inline)) {
      Vec<W> sum[kCount] = {};
      for (; i < last; ++i) {
        const auto row = bundle.row(nullptr, i);
#pragma GCC unroll 8
        for (int j = 0; j < kCount; ++j) {
          const Vec<W> weight = bundle.keep(exp<W>(bundle.read(x, row, j) - top[j]), row, W(0));
          if (i < kKept) kept[i][j] = weight;
          sum[j] += weight;
        }
      }
#pragma GCC unroll 8
      for (int j = 0; j < kCount; ++j) total[j] += sum[j];
    });

    for (auto& sum : total) sum = sum == 0 ? Vec<W>{} : 1 / sum;
    for (int64_t i = 0; i < bundle.rounds(); ++i) {
      const auto row = bundle.row(nullptr, i);
#pragma GCC unroll 8
      for (int j = 0; j < kCount; ++j) {
        const Vec<W> weight = i < kKept ? kept[i][j] : exp<W>(bundle.read(x, row, j) - top[j]);
        bundle.write(static_cast<T*>(s.result), row, j, weight * total[j]);
      }
    }
  });
}

// y (g - sum y g)
template <class T>
void backward(SegmentSoftmax s, Share share) {
  using W = Wide<T>;
  const T *g = static_cast<const T*>(s.grad), *y = static_cast<const T*>(s.out);
  for_bundles<W>(s, share, [&]<class B>(const B& bundle) __attribute__((always_inline)) {
    constexpr int kCount = B::kCount;
    Vec<W> total[kCount] = {};
    for_blocks(bundle.rounds(), [&](int64_t i, int64_t last) __attribute__((always_inline)) {
      Vec<W> sum[kCount] = {};
      for (; i < last; ++i) {
        const auto row = bundle.row(nullptr, i);
#pragma GCC unroll 8
        for (int j = 0; j < kCount; ++j) sum[j] += bundle.read(y, row, j) * bundle.read(g, row, j);
      }
#pragma GCC unroll 8
      for (int j = 0; j < kCount; ++j) total[j] += sum[j];
    });
    for (int64_t i = 0; i < bundle.rounds(); ++i) {
      const auto row = bundle.row(nullptr, i);
#pragma GCC unroll 8
      for (int j = 0; j < kCount; ++j)
        bundle.write(static_cast<T*>(s.result), row, j,
                     bundle.read(y, row, j) * (bundle.read(g, row, j) - total[j]));
    }
  });
}

}  // namespace

namespace EDT_ISA {

const SegmentSoftmaxTable segment_softmax_kernels = {
    {forward<float>, backward<float>},
    {forward<BFloat16>, backward<BFloat16>},
    {forward<Half>, backward<Half>},
    {forward<double>, backward<double>},
};

}  // namespace EDT_ISA
}  // namespace edt
