// Products of small matrices that lie in cache, and what they need: rows of whole vectors,
// transposes in registers, half types as float. For *.isa.cpp files only.
#pragma once

#include <cstdint>
#include <cstring>

#include "half.h"
#include "vec.h"

namespace edt {
namespace {

// Registers hold the tile of C, one row of B and one number of A.
constexpr int kTileRows = 6;
#if defined(EDT_ISA_avx512)
constexpr int kTileCols = 4;
#else
constexpr int kTileCols = 2;
#endif
// Narrow tiles are taller: a product needs some twelve sums under way.
template <int COLS>
constexpr int kRowsOfTile = COLS == 1           ? 2 * kTileRows
                            : COLS <= kTileCols ? kTileRows
                                                : kTileRows * kTileCols / COLS;

template <class T>
constexpr int64_t padded(int64_t n) {
  return (n + kLanes<T> - 1) / kLanes<T> * kLanes<T>;
}

// Rows [n, padded] with a stride.
template <class T>
struct Matrix {
  T* data;
  int64_t stride;
};

// What A gives to the product: element (i, k) at data[i row + k col].
template <class T>
struct Factor {
  const T* data;
  int64_t row, col;
};

template <class T>
Factor<T> plain(Matrix<T> a) {
  return {a.data, a.stride, 1};
}

template <class T>
Factor<T> transposed(Matrix<T> a) {
  return {a.data, 1, a.stride};
}

template <class T, int ROWS, int COLS, bool ADD>
void multiply_tile(Factor<T> a, Matrix<T> b, Matrix<T> c, int64_t depth) {
  constexpr int W = kLanes<T>;
  Vec<T> sum[ROWS][COLS];
#pragma GCC unroll 12
  for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 8
    for (int j = 0; j < COLS; ++j) sum[i][j] = ADD ? load(c.data + i * c.stride + j * W) : Vec<T>{};

  for (int64_t k = 0; k < depth; ++k) {
    Vec<T> row[COLS];
#pragma GCC unroll 8
    for (int j = 0; j < COLS; ++j) row[j] = load(b.data + j * W);
#pragma GCC unroll 12
    for (int i = 0; i < ROWS; ++i) {
      const Vec<T> x = broadcast(a.data[i * a.row]);
#pragma GCC unroll 8
      for (int j = 0; j < COLS; ++j) sum[i][j] = fma(x, row[j], sum[i][j]);
    }
    a.data += a.col;
    b.data += b.stride;
  }

#pragma GCC unroll 12
  for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 8
    for (int j = 0; j < COLS; ++j) store(c.data + i * c.stride + j * W, sum[i][j]);
}

// The last rows, fewer than a tile has.
template <class T, int ROWS, int COLS, bool ADD>
void multiply_rest(Factor<T> a, Matrix<T> b, Matrix<T> c, int64_t rows, int64_t depth) {
  if constexpr (ROWS > 0) {
    if (rows == ROWS)
      multiply_tile<T, ROWS, COLS, ADD>(a, b, c, depth);
    else
      multiply_rest<T, ROWS - 1, COLS, ADD>(a, b, c, rows, depth);
  }
}

// What a product does between two tiles, besides.
struct Nothing {
  EDT_INLINE void operator()() {}
};

template <class T, int COLS, bool ADD, class Between>
void multiply_panel(Factor<T> a, Matrix<T> b, Matrix<T> c, int64_t rows, int64_t depth,
                    Between& between) {
  constexpr int kRows = kRowsOfTile<COLS>;
  for (; rows >= kRows; rows -= kRows) {
    multiply_tile<T, kRows, COLS, ADD>(a, b, c, depth);
    between();
    a.data += kRows * a.row;
    c.data += kRows * c.stride;
  }
  multiply_rest<T, kRows - 1, COLS, ADD>(a, b, c, rows, depth);
}

template <class T, int COLS, bool ADD, class Between>
void multiply_panels(Factor<T> a, Matrix<T> b, Matrix<T> c, int64_t rows, int64_t cols,
                     int64_t depth, Between& between) {
  if constexpr (COLS > 0) {
    // A tile of one column of vectors is slow: three columns go as one tile, where two is the
    // width.
    if constexpr (COLS == 2 && kTileCols == 2)
      if (cols % (2 * kLanes<T>) && cols > kLanes<T>) {
        const int64_t even = cols - 3 * kLanes<T>;
        multiply_panels<T, 2, ADD>(a, b, c, rows, even, depth, between);
        b.data += even, c.data += even;
        return multiply_panel<T, 3, ADD>(a, b, c, rows, depth, between);
      }
    for (; cols >= COLS * kLanes<T>; cols -= COLS * kLanes<T>) {
      multiply_panel<T, COLS, ADD>(a, b, c, rows, depth, between);
      b.data += COLS * kLanes<T>;
      c.data += COLS * kLanes<T>;
    }
    multiply_panels<T, COLS - 1, ADD>(a, b, c, rows, cols, depth, between);
  }
}

// C [rows, cols] = A B, or += with ADD; cols is whole vectors.
template <bool ADD, class T, class Between = Nothing>
void multiply(Factor<T> a, Matrix<T> b, Matrix<T> c, int64_t rows, int64_t cols, int64_t depth,
              Between&& between = {}) {
  multiply_panels<T, kTileCols, ADD>(a, b, c, rows, cols, depth, between);
}

template <class V, int... I>
EDT_INLINE V interleave_low(V a, V b, std::integer_sequence<int, I...>) {
  constexpr int n = sizeof...(I);
  return __builtin_shufflevector(a, b, (I / 2 + I % 2 * n)...);
}

template <class V, int... I>
EDT_INLINE V interleave_high(V a, V b, std::integer_sequence<int, I...>) {
  constexpr int n = sizeof...(I);
  return __builtin_shufflevector(a, b, (n / 2 + I / 2 + I % 2 * n)...);
}

// W x W in registers: log2(W) perfect shuffles of the rows.
template <class T>
EDT_INLINE void transpose_square(Vec<T> (&x)[kLanes<T>]) {
  constexpr int W = kLanes<T>;
  using Lanes = std::make_integer_sequence<int, W>;
#pragma GCC unroll 8
  for (int step = 1; step < W; step *= 2) {
    Vec<T> y[W];
#pragma GCC unroll 16
    for (int i = 0; i < W / 2; ++i) {
      y[2 * i] = interleave_low(x[i], x[i + W / 2], Lanes{});
      y[2 * i + 1] = interleave_high(x[i], x[i + W / 2], Lanes{});
    }
#pragma GCC unroll 16
    for (int i = 0; i < W; ++i) x[i] = y[i];
  }
}

// From every SPAN lanes of a and b, UNIT by UNIT in turn: those of the first half, or of the
// second.
template <int UNIT, int SPAN, bool SECOND, class V, int... I>
EDT_INLINE V interleave(V a, V b, std::integer_sequence<int, I...>) {
  constexpr auto lane = [](int i) {
    const int unit = i % SPAN / UNIT;
    const int from = unit / 2 + (SECOND ? SPAN / UNIT / 2 : 0);
    return i / SPAN * SPAN + from * UNIT + i % UNIT + unit % 2 * static_cast<int>(sizeof...(I));
  };
  return __builtin_shufflevector(a, b, lane(I)...);
}

// Lane i of the result is x[i] reduced over its lanes, by the same tree for every i: first within
// 16 bytes, which any level can shuffle at once.
template <class T, class F>
EDT_INLINE Vec<T> reduce_each(Vec<T> (&x)[kLanes<T>], F combine) {
  constexpr int W = kLanes<T>, kUnit = 16 / sizeof(T);
  using Lanes = std::make_integer_sequence<int, W>;
#pragma GCC unroll 4
  for (int first = 0; first < W; first += kUnit)
#pragma GCC unroll 2
    for (int n = kUnit / 2; n > 0; n /= 2)
#pragma GCC unroll 2
      for (int i = first; i < first + n; ++i)
        x[i] = combine(interleave<1, kUnit, false>(x[i], x[i + n], Lanes{}),
                       interleave<1, kUnit, true>(x[i], x[i + n], Lanes{}));
#pragma GCC unroll 2
  for (int n = W / 2; n >= kUnit; n /= 2)
#pragma GCC unroll 2
    for (int i = 0; i < n; i += kUnit)
      x[i] = combine(interleave<kUnit, W, false>(x[i], x[i + n], Lanes{}),
                     interleave<kUnit, W, true>(x[i], x[i + n], Lanes{}));
  return x[0];
}

template <class T>
EDT_INLINE Vec<T> max_each(Vec<T> (&x)[kLanes<T>]) {
  return reduce_each<T>(
      x, [](Vec<T> a, Vec<T> b) __attribute__((always_inline)) { return max(a, b); });
}

template <class T>
EDT_INLINE Vec<T> sum_each(Vec<T> (&x)[kLanes<T>]) {
  return reduce_each<T>(x, [](Vec<T> a, Vec<T> b) __attribute__((always_inline)) { return a + b; });
}

// to [dim, padded rows] = from^T, zeros beyond `rows`: a NaN there would reach the row sums.
template <class T>
void transpose(Matrix<T> from, int64_t rows, int64_t dim, Matrix<T> to) {
  constexpr int W = kLanes<T>;
  for (int64_t r = 0; r < rows; r += W)
    for (int64_t d = 0; d < dim; d += W) {
      Vec<T> x[W];
#pragma GCC unroll 16
      for (int i = 0; i < W; ++i)
        x[i] = r + i < rows ? load(from.data + (r + i) * from.stride + d) : Vec<T>{};
      transpose_square<T>(x);
#pragma GCC unroll 16
      for (int i = 0; i < W; ++i) store(to.data + (d + i) * to.stride + r, x[i]);
    }
}

// One row in another type, zeros up to the padded length.
template <class S, class T>
void widen(const S* from, int64_t n, T* to) {
  constexpr int W = kLanes<T>;
  int64_t j = 0;
  for (; j + W <= n; j += W) store(to + j, load(from + j));
  if (j < n) {
    S rest[W] = {};
    std::memcpy(rest, from + j, (n - j) * sizeof(S));
    store(to + j, load(rest));
  }
}

template <class T, class S>
void narrow(const T* from, int64_t n, S* to) {
  constexpr int W = kLanes<T>;
  int64_t j = 0;
  for (; j + W <= n; j += W) store(to + j, load(from + j));
  if (j < n) {
    S rest[W];
    store(rest, load(from + j));
    std::memcpy(to + j, rest, (n - j) * sizeof(S));
  }
}

// Half types are computed in float.
template <class S>
struct ComputeType {
  using type = S;
};
template <>
struct ComputeType<BFloat16> {
  using type = float;
};
template <>
struct ComputeType<Half> {
  using type = float;
};

}  // namespace
}  // namespace edt
