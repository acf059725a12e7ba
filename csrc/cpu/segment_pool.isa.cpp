// Pooling of segments, a bundle at a time: its sums stay in registers while the rows of the segment
// pass by, in order. The gradient of the weight alone sums over columns, in a fixed order.
#include "segment_pool.h"

#include "bundles.h"

namespace edt {
namespace {

template <class T>
const T* read_only(const void* data) {
  return static_cast<const T*>(data);
}

// What a mean divides by: the number of rows, or their weight.
template <class T, bool WEIGHTED, class B>
EDT_INLINE auto mass_of(const Pool& x, const B& bundle) {
  using Mass = decltype(bundle.length());
  if constexpr (!WEIGHTED) {
    return bundle.length();
  } else {
    Mass mass{};
    for_blocks(bundle.rounds(), [&](int64_t i, int64_t last) __attribute__((always_inline)) {
      Mass sum{};
      for (; i < last; ++i) sum += bundle.number(read_only<T>(x.weight), bundle.row(x.order, i));
      mass += sum;
    });
    return mass;
  }
}

// For an empty segment, or weights that sum to 0, a mean is 0 and so are the gradients.
template <class M, class V, int COUNT>
EDT_INLINE void divide(V (&sum)[COUNT], M mass) {
#pragma GCC unroll 8
  for (int j = 0; j < COUNT; ++j) sum[j] = mass == 0 ? V{} : sum[j] / mass;
}

// The factor of a row.
template <class T, bool WEIGHTED, class B>
EDT_INLINE auto weight_of(const Pool& x, const B& bundle, typename B::Row row) {
  if constexpr (WEIGHTED)
    return bundle.number(read_only<T>(x.weight), row);
  else
    return Wide<T>(1);
}

// The hardware prefetcher sees neither rows of an order nor the next segment in a block of columns.
template <class T, bool WRITE, class B>
EDT_INLINE void prefetch(const Pool& x, const B& bundle, const void* rows, int64_t i) {
  constexpr int64_t kAhead = 4, kLine = 64 / sizeof(T);
  if constexpr (!B::kSegments) {
    const int64_t place = bundle.begin + i + kAhead;
    if ((WRITE && !x.order) || place >= x.used) return;
    const T* row = read_only<T>(rows) + bundle.row(x.order, i + kAhead) * x.dim + bundle.column;
#pragma GCC unroll 8
    for (int64_t j = 0; j < B::kCount * kLanes<Wide<T>>; j += kLine)
      __builtin_prefetch(row + j, WRITE);
  }
}

// Sums of the rows of a bundle.
template <class T, bool WEIGHTED, class B>
EDT_INLINE void add_rows(const Pool& x, const B& bundle, Vec<Wide<T>> (&total)[B::kCount]) {
  using W = Wide<T>;
  for (auto& sum : total) sum = Vec<W>{};
  for_blocks(bundle.rounds(), [&](int64_t i, int64_t last) __attribute__((always_inline)) {
    Vec<W> sum[B::kCount] = {};
    for (; i < last; ++i) {
      const auto row = bundle.row(x.order, i);
      const auto weight = weight_of<T, WEIGHTED>(x, bundle, row);
      prefetch<T, false>(x, bundle, x.values, i);
#pragma GCC unroll 8
      for (int j = 0; j < B::kCount; ++j)
        sum[j] += bundle.read(read_only<T>(x.values), row, j) * weight;
    }
#pragma GCC unroll 8
    for (int j = 0; j < B::kCount; ++j) total[j] += sum[j];
  });
}

template <class T, bool WEIGHTED>
void sum_of(Pool x, Share share) {
  using W = Wide<T>;
  for_bundles<W>(x, share, [&]<class B>(const B& bundle) __attribute__((always_inline)) {
    Vec<W> total[B::kCount];
    add_rows<T, WEIGHTED>(x, bundle, total);
    if (x.mean) divide(total, mass_of<T, WEIGHTED>(x, bundle));
#pragma GCC unroll 8
    for (int j = 0; j < B::kCount; ++j)
      bundle.write(static_cast<T*>(x.out), bundle.segment, j, total[j]);
  });
}

template <class T>
void sum(Pool x, Share share) {
  x.weight ? sum_of<T, true>(x, share) : sum_of<T, false>(x, share);
}

// The gradient of the output.
template <class T, class B>
EDT_INLINE void read_grad(const Pool& x, const B& bundle, Vec<Wide<T>> (&grad)[B::kCount]) {
#pragma GCC unroll 8
  for (int j = 0; j < B::kCount; ++j)
    grad[j] = bundle.read(read_only<T>(x.grad), bundle.segment, j);
}

template <class T, bool WEIGHTED>
void sum_bwd_of(Pool x, Share share) {
  using W = Wide<T>;
  for_bundles<W>(x, share, [&]<class B>(const B& bundle) __attribute__((always_inline)) {
    Vec<W> grad[B::kCount];
    read_grad<T>(x, bundle, grad);
    if (x.mean) divide(grad, mass_of<T, WEIGHTED>(x, bundle));
    for (int64_t i = bundle.first_round(); i < bundle.last_round(); ++i) {
      const auto row = bundle.row(x.order, i);
      const auto weight = weight_of<T, WEIGHTED>(x, bundle, row);
      prefetch<T, true>(x, bundle, x.out, i);
#pragma GCC unroll 8
      for (int j = 0; j < B::kCount; ++j)
        bundle.write(static_cast<T*>(x.out), row, j, grad[j] * weight);
    }
  });
}

template <class T>
void sum_bwd(Pool x, Share share) {
  x.weight ? sum_bwd_of<T, true>(x, share) : sum_bwd_of<T, false>(x, share);
}

// dw_i = g (x_i - mean) / mass, or g x_i for sums.
template <class T>
void weight_bwd(Pool x, Share share, void* scratch) {
  using W = Wide<T>;
  for_bundles<W>(x, share, [&]<class B>(const B& bundle) __attribute__((always_inline)) {
    Vec<W> grad[B::kCount], mean[B::kCount] = {};
    read_grad<T>(x, bundle, grad);
    if (x.mean) {
      const auto mass = mass_of<T, true>(x, bundle);
      divide(grad, mass);
      add_rows<T, true>(x, bundle, mean);
      divide(mean, mass);
    }
    W* dots = static_cast<W*>(scratch) - bundle.first_round();
    for (int64_t i = bundle.first_round(); i < bundle.last_round(); ++i) {
      const auto row = bundle.row(x.order, i);
      Vec<W> dot{};
#pragma GCC unroll 8
      for (int j = 0; j < B::kCount; ++j)
        dot = fma(grad[j], bundle.read(read_only<T>(x.values), row, j) - mean[j], dot);
      bundle.write_number(static_cast<T*>(x.out), row, bundle.add_columns(dot, &dots[i]));
    }
  });
}

// The first row that holds the extreme, a NaN before all others.
template <class T, bool LARGEST>
void extreme_of(Pool x, Share share) {
  using W = Wide<T>;
  for_bundles<W>(x, share, [&]<class B>(const B& bundle) __attribute__((always_inline)) {
    const Ints<W> nothing = Ints<W>{} + static_cast<typename Float<W>::Int>(x.rows);
    Vec<W> best[B::kCount] = {};
    Ints<W> source[B::kCount];
    for (auto& row : source) row = nothing;
    const auto meet = [&]<bool FIRST>(int64_t i) __attribute__((always_inline)) {
      const auto row = bundle.row(x.order, i);
      const Ints<W> index = bundle.index(row);
      prefetch<T, false>(x, bundle, x.values, i);
#pragma GCC unroll 8
      for (int j = 0; j < B::kCount; ++j) {
        const Vec<W> value = bundle.read(read_only<T>(x.values), row, j);
        const Ints<W> no_better = LARGEST ? value <= best[j] : value >= best[j];
        Ints<W> taken = FIRST ? Ints<W>{} - 1 : ~no_better & (best[j] == best[j]);
        if constexpr (B::kSegments) taken &= index >= 0;
        best[j] = taken ? value : best[j];
        source[j] = taken ? index : source[j];
      }
    };
    if (bundle.rounds()) meet.template operator()<true>(0);
    for (int64_t i = 1; i < bundle.rounds(); ++i) meet.template operator()<false>(i);
#pragma GCC unroll 8
    for (int j = 0; j < B::kCount; ++j) {
      bundle.write(static_cast<T*>(x.out), bundle.segment, j, best[j]);
      bundle.write(static_cast<W*>(x.source), bundle.segment, j, (Vec<W>)source[j]);
    }
  });
}

template <class T>
void extreme(Pool x, Share share) {
  x.largest ? extreme_of<T, true>(x, share) : extreme_of<T, false>(x, share);
}

template <class T>
void extreme_bwd(Pool x, Share share) {
  using W = Wide<T>;
  for_bundles<W>(x, share, [&]<class B>(const B& bundle) __attribute__((always_inline)) {
    Vec<W> grad[B::kCount];
    read_grad<T>(x, bundle, grad);
    Ints<W> source[B::kCount];
#pragma GCC unroll 8
    for (int j = 0; j < B::kCount; ++j)
      source[j] = (Ints<W>)bundle.read(read_only<W>(x.source), bundle.segment, j);
    for (int64_t i = bundle.first_round(); i < bundle.last_round(); ++i) {
      const auto row = bundle.row(x.order, i);
      const Ints<W> index = bundle.index(row);
      prefetch<T, true>(x, bundle, x.out, i);
#pragma GCC unroll 8
      for (int j = 0; j < B::kCount; ++j)
        bundle.write(static_cast<T*>(x.out), row, j, source[j] == index ? grad[j] : Vec<W>{});
    }
  });
}

template <class T>
constexpr PoolKernels kernels = {sum<T>, sum_bwd<T>, extreme<T>, extreme_bwd<T>, weight_bwd<T>};

}  // namespace

namespace EDT_ISA {

const PoolTable pool_kernels = {
    kernels<float>,
    kernels<BFloat16>,
    kernels<Half>,
    kernels<double>,
};

}  // namespace EDT_ISA
}  // namespace edt
