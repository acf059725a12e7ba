// Attention of one molecule and head at a time, everything in cache. A block of queries goes
// through all keys at once, so the softmax sees whole rows and nothing is rescaled:
//   forward   S = Q K^T,  P = softmax(S),  O = P V
//   backward  P from S and the lse, normalised again,  dP = dO V^T,
//             dS = P (dP - rowsum(P dP) + dlse),
//             dV = P^T dO,  dQ = dS K,  dK = dS^T Q
// All seven products are one micro-kernel, C (+)= A B, with B in rows of whole vectors and A read
// number by number at any strides. Every choice depends on the molecule alone.
#include "ragged_attention.h"

#include <cmath>
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
// A block's S and dP stay in the L1 or L2 cache for molecules of usual size.
constexpr int64_t kQueryBlock = 48;

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
#pragma GCC unroll 8
  for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 8
    for (int j = 0; j < COLS; ++j) sum[i][j] = ADD ? load(c.data + i * c.stride + j * W) : Vec<T>{};

  for (int64_t k = 0; k < depth; ++k) {
    Vec<T> row[COLS];
#pragma GCC unroll 8
    for (int j = 0; j < COLS; ++j) row[j] = load(b.data + j * W);
#pragma GCC unroll 8
    for (int i = 0; i < ROWS; ++i) {
      const Vec<T> x = broadcast(a.data[i * a.row]);
#pragma GCC unroll 8
      for (int j = 0; j < COLS; ++j) sum[i][j] = fma(x, row[j], sum[i][j]);
    }
    a.data += a.col;
    b.data += b.stride;
  }

#pragma GCC unroll 8
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

template <class T, int COLS, bool ADD>
void multiply_panel(Factor<T> a, Matrix<T> b, Matrix<T> c, int64_t rows, int64_t depth) {
  for (; rows >= kTileRows; rows -= kTileRows) {
    multiply_tile<T, kTileRows, COLS, ADD>(a, b, c, depth);
    a.data += kTileRows * a.row;
    c.data += kTileRows * c.stride;
  }
  multiply_rest<T, kTileRows - 1, COLS, ADD>(a, b, c, rows, depth);
}

template <class T, int COLS, bool ADD>
void multiply_panels(Factor<T> a, Matrix<T> b, Matrix<T> c, int64_t rows, int64_t cols,
                     int64_t depth) {
  if constexpr (COLS > 0) {
    for (; cols >= COLS * kLanes<T>; cols -= COLS * kLanes<T>) {
      multiply_panel<T, COLS, ADD>(a, b, c, rows, depth);
      b.data += COLS * kLanes<T>;
      c.data += COLS * kLanes<T>;
    }
    multiply_panels<T, COLS - 1, ADD>(a, b, c, rows, cols, depth);
  }
}

// C [rows, cols] = A B, or += with ADD; cols is whole vectors.
template <bool ADD, class T>
void multiply(Factor<T> a, Matrix<T> b, Matrix<T> c, int64_t rows, int64_t cols, int64_t depth) {
  multiply_panels<T, kTileCols, ADD>(a, b, c, rows, cols, depth);
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

// Rows of a tensor of S as a matrix of T: in place where they already are one, else in `copy`.
template <class S, class T>
struct View {
  S* data;
  int64_t row, rows, dim;
  Matrix<T> matrix;
  bool in_place;

  View(const AttentionRows& from, int64_t begin, int64_t rows, int64_t head, int64_t dim, T* copy)
      : data(static_cast<S*>(from.data) + begin * from.row + head * from.head),
        row(from.row),
        rows(rows),
        dim(dim),
        matrix{copy, padded<T>(dim)},
        in_place(false) {
    if constexpr (sizeof(S) == sizeof(T)) {
      in_place = dim % kLanes<T> == 0;
      if (in_place) matrix = {data, row};
    }
  }

  Matrix<T> read() const {
    if (!in_place)
      for (int64_t i = 0; i < rows; ++i)
        widen(data + i * row, dim, matrix.data + i * matrix.stride);
    return matrix;
  }

  void write() const {
    if (!in_place)
      for (int64_t i = 0; i < rows; ++i)
        narrow(matrix.data + i * matrix.stride, dim, data + i * row);
  }

  Matrix<T> zeros() const {
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t j = 0; j < dim; j += kLanes<T>)
        store(matrix.data + i * matrix.stride + j, Vec<T>{});
    return matrix;
  }
};

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

template <class T>
struct Scratch {
  T *q, *k, *v, *grad, *dq, *dk, *dv, *k_t, *v_t, *p, *dp, *end;

  Scratch(void* memory, const Attention& x, const AttentionMolecule& m) {
    end = static_cast<T*>(memory);
    const int64_t dim = padded<T>(x.dim), keys = padded<T>(m.keys);
    const int64_t queries = m.queries < kQueryBlock ? m.queries : kQueryBlock;
    for (T** block : {&q, &grad, &dq}) *block = take(queries * dim);
    for (T** block : {&k, &v, &dk, &dv, &k_t, &v_t}) *block = take(keys * dim);
    for (T** block : {&p, &dp}) *block = take(queries * keys);
  }

  // Every block is whole vectors long.
  T* take(int64_t count) {
    T* block = end;
    end += count;
    return block;
  }
};

template <class T>
int64_t scratch_bytes(const Attention& x, const AttentionMolecule& m) {
  return reinterpret_cast<char*>(Scratch<T>(nullptr, x, m).end) - static_cast<char*>(nullptr);
}

// How many keys query i of the molecule sees.
EDT_INLINE int64_t visible(const Attention& x, const AttentionMolecule& m, int64_t i) {
  if (!x.causal) return m.keys;
  const int64_t n = i + 1 + m.keys - m.queries;
  return n < 0 ? 0 : n < m.keys ? n : m.keys;
}

// Rows [first, first + rows) of P = softmax(scale S), in place, and their lse. A query that sees
// no key has P = 0 and lse = -inf.
template <class T>
void softmax(const Attention& x, const AttentionMolecule& m, int64_t first_query, int64_t rows,
             int64_t head, Matrix<T> s) {
  constexpr int W = kLanes<T>;
  const T scale = static_cast<T>(x.scale);
  const int64_t keys = visible(x, m, first_query + rows - 1);
  T largest[kQueryBlock], totals[kQueryBlock] = {}, logs[kQueryBlock];
  for (int64_t i = 0; i < rows; ++i) {
    T* row = s.data + i * s.stride;
    const int64_t seen = visible(x, m, first_query + i);
    Vec<T> most = broadcast<T>(-INFINITY);
    for (int64_t j = 0; j < keys; j += W) {
      const Vec<T> logit = first<T>(load(row + j) * scale, seen - j, -INFINITY);
      most = max(most, logit);
      store(row + j, logit);
    }
    const T peak = reduce_max<T>(most);
    largest[i] = peak == -INFINITY ? 0 : peak;

    Vec<T> sum{};
    for (int64_t j = 0; j < keys; j += W) {
      const Vec<T> weight = exp<T>(load(row + j) - largest[i]);
      sum += weight;
      store(row + j, weight);
    }
    totals[i] = reduce_sum<T>(sum);
    const T inverse = totals[i] == 0 ? 0 : 1 / totals[i];
    for (int64_t j = 0; j < keys; j += W) store(row + j, load(row + j) * inverse);
  }

  T* lse = static_cast<T*>(x.lse) + (m.q_begin + first_query) * x.heads + head;
  for (int64_t i = 0; i < rows; i += W) store(logs + i, log<T>(load(totals + i)));
  for (int64_t i = 0; i < rows; ++i)
    lse[i * x.heads] = totals[i] == 0 ? -INFINITY : largest[i] + logs[i];
}

// From S and dP, both overwritten: P, and scale dS = scale P (dP - rowsum(P dP) + dlse).
template <class T>
void softmax_backward(const Attention& x, const AttentionMolecule& m, int64_t first_query,
                      int64_t rows, int64_t head, Matrix<T> s, Matrix<T> dp) {
  constexpr int W = kLanes<T>;
  const T scale = static_cast<T>(x.scale);
  const int64_t keys = visible(x, m, first_query + rows - 1);
  for (int64_t i = 0; i < rows; ++i) {
    T *p_row = s.data + i * s.stride, *dp_row = dp.data + i * dp.stride;
    const int64_t seen = visible(x, m, first_query + i);
    const int64_t entry = (m.q_begin + first_query + i) * x.heads + head;
    const T saved = static_cast<const T*>(x.lse)[entry];
    const T lse = saved == -INFINITY ? 0 : saved;

    // The rounding of a large lse cancels in weight / sum(weight).
    Vec<T> weights{}, products{};
    for (int64_t j = 0; j < keys; j += W) {
      const Vec<T> logit = first<T>(load(p_row + j) * scale, seen - j, -INFINITY);
      const Vec<T> weight = exp<T>(logit - lse);
      weights += weight;
      products = fma(weight, load(dp_row + j), products);
      store(p_row + j, weight);
    }
    const T total = reduce_sum<T>(weights);
    const T inverse = total == 0 ? 0 : 1 / total;
    T shift = -reduce_sum<T>(products) * inverse;
    if (x.grad_lse) shift += static_cast<const T*>(x.grad_lse)[entry];
    for (int64_t j = 0; j < keys; j += W) {
      const Vec<T> p = load(p_row + j) * inverse;
      store(p_row + j, p);
      store(dp_row + j, p * (load(dp_row + j) + shift) * scale);
    }
  }
}

template <class S, class T = typename ComputeType<S>::type>
void forward(const Attention& x, const AttentionMolecule& m, int64_t kv_head, void* memory) {
  const Scratch<T> scratch(memory, x, m);
  const int64_t dim = padded<T>(x.dim), stride = padded<T>(m.keys);
  const auto k = View<S, T>(x.k, m.k_begin, m.keys, kv_head, x.dim, scratch.k).read();
  const auto v = View<S, T>(x.v, m.k_begin, m.keys, kv_head, x.dim, scratch.v).read();
  const Matrix<T> k_t{scratch.k_t, stride}, p{scratch.p, stride};
  transpose(k, m.keys, x.dim, k_t);

  const int64_t group = x.heads / x.kv_heads;
  for (int64_t head = kv_head * group; head < (kv_head + 1) * group; ++head)
    for (int64_t i = 0; i < m.queries; i += kQueryBlock) {
      const int64_t rows = m.queries - i < kQueryBlock ? m.queries - i : kQueryBlock;
      const int64_t keys = visible(x, m, i + rows - 1);
      const int64_t row = m.q_begin + i;
      const auto q = View<S, T>(x.q, row, rows, head, x.dim, scratch.q).read();
      const View<S, T> out(x.out, row, rows, head, x.dim, scratch.dq);

      multiply<false>(plain(q), k_t, p, rows, padded<T>(keys), x.dim);
      softmax(x, m, i, rows, head, p);
      multiply<false>(plain(p), v, out.matrix, rows, dim, keys);
      out.write();
    }
}

template <class S, class T = typename ComputeType<S>::type>
void backward(const Attention& x, const AttentionMolecule& m, int64_t kv_head, void* memory) {
  const Scratch<T> scratch(memory, x, m);
  const int64_t dim = padded<T>(x.dim), stride = padded<T>(m.keys);
  const auto k = View<S, T>(x.k, m.k_begin, m.keys, kv_head, x.dim, scratch.k).read();
  const auto v = View<S, T>(x.v, m.k_begin, m.keys, kv_head, x.dim, scratch.v).read();
  const Matrix<T> k_t{scratch.k_t, stride}, v_t{scratch.v_t, stride};
  const Matrix<T> p{scratch.p, stride}, dp{scratch.dp, stride};
  transpose(k, m.keys, x.dim, k_t);
  transpose(v, m.keys, x.dim, v_t);
  const View<S, T> dk_view(x.dk, m.k_begin, m.keys, kv_head, x.dim, scratch.dk);
  const View<S, T> dv_view(x.dv, m.k_begin, m.keys, kv_head, x.dim, scratch.dv);
  const Matrix<T> dk = dk_view.zeros(), dv = dv_view.zeros();

  const int64_t group = x.heads / x.kv_heads;
  for (int64_t head = kv_head * group; head < (kv_head + 1) * group; ++head)
    for (int64_t i = 0; i < m.queries; i += kQueryBlock) {
      const int64_t rows = m.queries - i < kQueryBlock ? m.queries - i : kQueryBlock;
      const int64_t keys = visible(x, m, i + rows - 1);
      const int64_t row = m.q_begin + i;
      const auto q = View<S, T>(x.q, row, rows, head, x.dim, scratch.q).read();
      const auto grad = View<S, T>(x.grad, row, rows, head, x.dim, scratch.grad).read();
      const View<S, T> dq(x.dq, row, rows, head, x.dim, scratch.dq);

      multiply<false>(plain(q), k_t, p, rows, padded<T>(keys), x.dim);
      multiply<false>(plain(grad), v_t, dp, rows, padded<T>(keys), x.dim);
      softmax_backward(x, m, i, rows, head, p, dp);
      multiply<true>(transposed(p), grad, dv, keys, dim, rows);
      multiply<false>(plain(dp), k, dq.matrix, rows, dim, keys);
      multiply<true>(transposed(dp), q, dk, keys, dim, rows);
      dq.write();
    }
  dk_view.write();
  dv_view.write();
}

}  // namespace

namespace EDT_ISA {

const AttentionTable attention_kernels = {
    {scratch_bytes<float>, forward<float>, backward<float>},
    {scratch_bytes<float>, forward<BFloat16>, backward<BFloat16>},
    {scratch_bytes<float>, forward<Half>, backward<Half>},
    {scratch_bytes<double>, forward<double>, backward<double>},
};

}  // namespace EDT_ISA
}  // namespace edt
