// Pooling of segments, a block of columns at a time: its sums stay in registers while the rows of
// the segment pass by, in order. Columns never meet, except in the gradient of the weight, whose
// dot products run over the columns in a fixed order.
#include "segment_pool.h"

#include "columns.h"

namespace edt {
namespace {

EDT_INLINE int64_t row_of(const Pool& x, int64_t place) { return x.order ? x.order[place] : place; }

template <class T>
EDT_INLINE const T* values_of(const Pool& x, int64_t place) {
  return static_cast<const T*>(x.values) + row_of(x, place) * x.dim;
}

template <class T>
EDT_INLINE Wide<T> weight_of(const Pool& x, int64_t place) {
  const T* at = static_cast<const T*>(x.weight) + row_of(x, place);
  if constexpr (sizeof(T) == 2) {
    T copy[kLanes<float>] = {*at};
    return load(copy)[0];
  } else {
    return *at;
  }
}

// What a mean divides by.
template <class T, bool WEIGHTED>
EDT_INLINE Wide<T> mass_of(const Pool& x, int64_t begin, int64_t end) {
  if constexpr (!WEIGHTED) {
    return static_cast<Wide<T>>(end - begin);
  } else {
    Wide<T> mass = 0;
    for_blocks(begin, end, [&](int64_t i, int64_t last) __attribute__((always_inline)) {
      Wide<T> sum = 0;
      for (; i < last; ++i) sum += weight_of<T>(x, i);
      mass += sum;
    });
    return mass;
  }
}

// x / mass, 0 for an empty segment or weights that sum to 0.
template <class W>
EDT_INLINE Vec<W> divide(Vec<W> x, W mass) {
  return mass == 0 ? Vec<W>{} : x / mass;
}

// Sum or mean of places [begin, end), written to `out`.
template <class T, bool WEIGHTED, class C, class S>
EDT_INLINE void pool_columns(const Pool& x, int64_t begin, int64_t end, Wide<T> mass, C columns,
                             S* out) {
  using W = Wide<T>;
  Vec<W> total[C::kCount] = {};
  for_blocks(begin, end, [&](int64_t i, int64_t last) __attribute__((always_inline)) {
    Vec<W> sum[C::kCount] = {};
    for (; i < last; ++i) {
      const T* row = values_of<T>(x, i);
      const W weight = WEIGHTED ? weight_of<T>(x, i) : W(1);
#pragma GCC unroll 8
      for (int j = 0; j < C::kCount; ++j) {
        const Vec<W> value = columns.read(row, j);
        sum[j] += WEIGHTED ? value * weight : value;
      }
    }
#pragma GCC unroll 8
    for (int j = 0; j < C::kCount; ++j) total[j] += sum[j];
  });
#pragma GCC unroll 8
  for (int j = 0; j < C::kCount; ++j)
    columns.write(out, j, x.mean ? divide<W>(total[j], mass) : total[j]);
}

template <class T, bool WEIGHTED>
void sum_of(const Pool& x, const PoolPart& part) {
  using W = Wide<T>;
  for (int64_t p = part.first; p < part.last; ++p) {
    const int64_t begin = x.offsets[p], end = x.offsets[p + 1];
    T* out = static_cast<T*>(x.out) + p * x.dim;
    const W mass = x.mean ? mass_of<T, WEIGHTED>(x, begin, end) : W(1);
    for_columns<W>(part.begin, part.end, [&](auto columns) __attribute__((always_inline)) {
      pool_columns<T, WEIGHTED>(x, begin, end, mass, columns, out);
    });
  }
}

template <class T>
void sum(const Pool& x, const PoolPart& part) {
  x.weight ? sum_of<T, true>(x, part) : sum_of<T, false>(x, part);
}

EDT_INLINE int64_t later(int64_t a, int64_t b) { return a > b ? a : b; }
EDT_INLINE int64_t earlier(int64_t a, int64_t b) { return a < b ? a : b; }

template <class T, bool WEIGHTED>
void sum_bwd_of(const Pool& x, const PoolPart& part) {
  using W = Wide<T>;
  for (int64_t p = part.first; p < part.last; ++p) {
    const int64_t begin = later(x.offsets[p], part.begin);
    const int64_t end = earlier(x.offsets[p + 1], part.end);
    const T* grad = static_cast<const T*>(x.grad) + p * x.dim;
    const W mass = x.mean ? mass_of<T, WEIGHTED>(x, x.offsets[p], x.offsets[p + 1]) : W(1);
    for_columns<W>(0, x.dim, [&](auto columns) __attribute__((always_inline)) {
      Vec<W> g[columns.kCount];
#pragma GCC unroll 8
      for (int j = 0; j < columns.kCount; ++j) {
        const Vec<W> given = columns.read(grad, j);
        g[j] = x.mean ? divide<W>(given, mass) : given;
      }
      for (int64_t i = begin; i < end; ++i) {
        T* out = static_cast<T*>(x.out) + row_of(x, i) * x.dim;
        const W weight = WEIGHTED ? weight_of<T>(x, i) : W(1);
#pragma GCC unroll 8
        for (int j = 0; j < columns.kCount; ++j)
          columns.write(out, j, WEIGHTED ? g[j] * weight : g[j]);
      }
    });
  }
}

template <class T>
void sum_bwd(const Pool& x, const PoolPart& part) {
  x.weight ? sum_bwd_of<T, true>(x, part) : sum_bwd_of<T, false>(x, part);
}

// dw_i = g (x_i - mean) / mass, or g x_i for sums.
template <class T>
void weight_bwd(const Pool& x, const PoolPart& part, void* scratch) {
  using W = Wide<T>;
  W* mean = static_cast<W*>(scratch);
  for (int64_t p = part.first; p < part.last; ++p) {
    const int64_t begin = x.offsets[p], end = x.offsets[p + 1];
    const T* grad = static_cast<const T*>(x.grad) + p * x.dim;
    const W mass = x.mean ? mass_of<T, true>(x, begin, end) : W(1);
    if (x.mean)
      for_columns<W>(0, x.dim, [&](auto columns) __attribute__((always_inline)) {
        pool_columns<T, true>(x, begin, end, mass, columns, mean);
      });
    const int64_t last = earlier(end, part.end);
    for (int64_t i = later(begin, part.begin); i < last; ++i) {
      const T* row = values_of<T>(x, i);
      Vec<W> dot[kColumnBlock] = {};
      for_columns<W>(0, x.dim, [&](auto columns) __attribute__((always_inline)) {
#pragma GCC unroll 8
        for (int j = 0; j < columns.kCount; ++j) {
          const Vec<W> value = columns.read(row, j);
          const Vec<W> deviation = x.mean ? value - columns.read(mean, j) : value;
          dot[j] = fma(columns.read(grad, j), deviation, dot[j]);
        }
      });
      for (int j = 1; j < kColumnBlock; ++j) dot[0] += dot[j];
      const Vec<W> total = broadcast(reduce_sum<W>(dot[0]));
      const Columns<W, 1, false> entry{row_of(x, i), 1};
      entry.write(static_cast<T*>(x.out), 0, x.mean ? divide<W>(total, mass) : total);
    }
  }
}

// The first row that holds the extreme, a NaN before all others.
template <class T, bool LARGEST>
void extreme_of(const Pool& x, const PoolPart& part) {
  using W = Wide<T>;
  using Int = typename Float<W>::Int;
  const Ints<W> nothing = Ints<W>{} + static_cast<Int>(x.rows);
  for (int64_t p = part.first; p < part.last; ++p) {
    const int64_t begin = x.offsets[p], end = x.offsets[p + 1];
    T* out = static_cast<T*>(x.out) + p * x.dim;
    W* sources = static_cast<W*>(x.source) + p * x.dim;
    for_columns<W>(part.begin, part.end, [&](auto columns) __attribute__((always_inline)) {
      Vec<W> best[columns.kCount] = {};
      Ints<W> source[columns.kCount];
      for (auto& row : source) row = nothing;
      for (int64_t i = begin; i < end; ++i) {
        const T* row = values_of<T>(x, i);
        const Ints<W> index = Ints<W>{} + static_cast<Int>(row_of(x, i));
#pragma GCC unroll 8
        for (int j = 0; j < columns.kCount; ++j) {
          const Vec<W> value = columns.read(row, j);
          const Ints<W> no_better = LARGEST ? value <= best[j] : value >= best[j];
          const Ints<W> better = (~no_better & (best[j] == best[j])) | (source[j] == nothing);
          best[j] = better ? value : best[j];
          source[j] = better ? index : source[j];
        }
      }
#pragma GCC unroll 8
      for (int j = 0; j < columns.kCount; ++j) {
        columns.write(out, j, best[j]);
        columns.write(sources, j, (Vec<W>)source[j]);
      }
    });
  }
}

template <class T>
void extreme(const Pool& x, const PoolPart& part) {
  x.largest ? extreme_of<T, true>(x, part) : extreme_of<T, false>(x, part);
}

template <class T>
void extreme_bwd(const Pool& x, const PoolPart& part) {
  using W = Wide<T>;
  using Int = typename Float<W>::Int;
  for (int64_t p = part.first; p < part.last; ++p) {
    const int64_t begin = later(x.offsets[p], part.begin);
    const int64_t end = earlier(x.offsets[p + 1], part.end);
    const T* grad = static_cast<const T*>(x.grad) + p * x.dim;
    const W* sources = static_cast<const W*>(x.source) + p * x.dim;
    for_columns<W>(0, x.dim, [&](auto columns) __attribute__((always_inline)) {
      Vec<W> g[columns.kCount];
      Ints<W> source[columns.kCount];
#pragma GCC unroll 8
      for (int j = 0; j < columns.kCount; ++j) {
        g[j] = columns.read(grad, j);
        source[j] = (Ints<W>)columns.read(sources, j);
      }
      for (int64_t i = begin; i < end; ++i) {
        const auto row = static_cast<Int>(row_of(x, i));
        T* out = static_cast<T*>(x.out) + row_of(x, i) * x.dim;
#pragma GCC unroll 8
        for (int j = 0; j < columns.kCount; ++j)
          columns.write(out, j, source[j] == row ? g[j] : Vec<W>{});
      }
    });
  }
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
