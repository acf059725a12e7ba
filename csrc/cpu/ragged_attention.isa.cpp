// Attention of one molecule and head at a time, everything in cache. A block of queries goes
// through all keys at once, so the softmax sees whole columns and nothing is rescaled; queries lie
// along the lanes, so nothing is reduced across lanes:
//   forward   S^T = K Q^T,  P^T = softmax(S^T),  O = P V
//   backward  P^T from S^T and the lse, normalised again,  dP^T = V dO^T,
//             dS = P (dP - sum(P dP) + dlse),
//             dV = P^T dO,  dQ = dS K,  dK = dS^T Q
// With pairs, S carries a bias and dS is the bias's gradient; dropout multiplies P and dP.
// All seven products are one micro-kernel, C (+)= A B, with B in rows of whole vectors and A read
// number by number at any strides. Every choice depends on the molecule alone.
#include "ragged_attention.h"

#include <cmath>
#include <cstring>

#include "matrix.h"

namespace edt {
namespace {

// A block's S and dP stay in the L1 or L2 cache for molecules of usual size.
constexpr int64_t kQueryBlock = 48;

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

// Of the key heads of one call: their K, V and gradients; and what one block of queries needs.
template <class T>
struct Scratch {
  T *q, *k, *v, *grad, *dq, *dk, *dv, *q_t, *grad_t, *p, *dp, *bias, *dscores, *end;
  int64_t kv_block;  // numbers from one key head's k, v, ... to the next one's
  int64_t lanes;     // queries of a block, whole vectors

  Scratch(void* memory, const Attention& x, const AttentionMolecule& m,
          const AttentionHeads& heads) {
    end = static_cast<T*>(memory);
    const int64_t dim = padded<T>(x.dim);
    const int64_t queries = m.queries < kQueryBlock ? m.queries : kQueryBlock;
    const int64_t kv_heads = heads.end - heads.begin, q_heads = kv_heads * (x.heads / x.kv_heads);
    kv_block = m.keys * dim;
    lanes = padded<T>(queries);
    for (T** block : {&q, &grad, &dq}) *block = take(queries * dim);
    for (T** block : {&k, &v, &dk, &dv}) *block = take(kv_heads * kv_block);
    for (T** block : {&q_t, &grad_t}) *block = take(dim * lanes);
    for (T** block : {&p, &dp}) *block = take(m.keys * lanes);
    const int64_t pairs = padded<T>(q_heads) * m.keys * lanes;
    bias = x.pairs.bias || x.pairs.scores ? take(pairs) : nullptr;
    dscores = x.pairs.grad_scores ? take(pairs) : nullptr;
  }

  // Every block is whole vectors long.
  T* take(int64_t count) {
    T* block = end;
    end += count;
    return block;
  }
};

template <class T>
int64_t scratch_bytes(const Attention& x, const AttentionMolecule& m, const AttentionHeads& heads) {
  return reinterpret_cast<char*>(Scratch<T>(nullptr, x, m, heads).end) -
         static_cast<char*>(nullptr);
}

// A block of queries of one molecule, for one call.
struct Block {
  const Attention& x;
  const AttentionMolecule& m;
  int64_t first, rows;        // queries of the molecule
  int64_t first_head, heads;  // query heads of the call
  int64_t keys;               // that its last query sees

  // Lane i of x belongs to query c + i of the block: `rest` where that does not see key j.
  template <class T>
  EDT_INLINE Vec<T> where_visible(Vec<T> x, int64_t j, int64_t c, T rest) const {
    using Int = typename Float<T>::Int;
    const int64_t blind = j - m.keys + m.queries - first - c;
    const Int count = blind < 0 ? 0 : blind < kLanes<T> ? static_cast<Int>(blind) : kLanes<T>;
    return iota<T>() < count ? broadcast<T>(rest) : x;
  }

  // Of query i of the block, in [Tq, H].
  EDT_INLINE int64_t entry(int64_t i, int64_t head) const {
    return (m.q_begin + first + i) * x.heads + head;
  }
};

// Between numbers of a head's queries in [Tq, H] and lanes; `rest` in lanes without a query.
template <class T>
EDT_INLINE Vec<T> gather_queries(const Block& b, const void* from, int64_t head, int64_t c,
                                 T rest) {
  T numbers[kLanes<T>];
  for (int i = 0; i < kLanes<T>; ++i)
    numbers[i] = c + i < b.rows ? static_cast<const T*>(from)[b.entry(c + i, head)] : rest;
  return load(numbers);
}

template <class T>
EDT_INLINE void scatter_queries(const Block& b, Vec<T> x, void* to, int64_t head, int64_t c) {
  T numbers[kLanes<T>];
  store(numbers, x);
  for (int i = 0; i < kLanes<T> && c + i < b.rows; ++i)
    static_cast<T*>(to)[b.entry(c + i, head)] = numbers[i];
}

// P^T = softmax(scale S^T) in place, and the lse. A query that sees no key has P = 0 and
// lse = -inf.
template <class T>
void softmax(const Block& b, int64_t head, Matrix<T> s, T scale) {
  for (int64_t c = 0; c < b.rows; c += kLanes<T>) {
    T* const column = s.data + c;
    Vec<T> most = broadcast<T>(-INFINITY);
    for (int64_t j = 0; j < b.keys; ++j) most = max(most, load(column + j * s.stride) * scale);
    const Vec<T> largest = most == -INFINITY ? Vec<T>{} : most;

    Vec<T> total{};
    for (int64_t j = 0; j < b.keys; ++j) {
      const Vec<T> weight = exp_falling<T>(load(column + j * s.stride) * scale - largest);
      total += weight;
      store(column + j * s.stride, weight);
    }
    const auto blind = total == 0;
    const Vec<T> inverse = blind ? Vec<T>{} : 1 / total;
    for (int64_t j = 0; j < b.keys; ++j)
      store(column + j * s.stride, load(column + j * s.stride) * inverse);

    const Vec<T> lse = largest + log<T>(blind ? broadcast<T>(1) : total);
    scatter_queries<T>(b, blind ? broadcast<T>(-INFINITY) : lse, b.x.lse, head, c);
  }
}

// From S^T and dP^T, both overwritten: P^T = softmax(scale S^T), and grad_scale dx^T with
// dx = P (dP - sum(P dP) + dlse).
template <class T>
void softmax_backward(const Block& b, int64_t head, Matrix<T> s, Matrix<T> dp, T scale,
                      T grad_scale) {
  for (int64_t c = 0; c < b.rows; c += kLanes<T>) {
    T *const p_column = s.data + c, *const dp_column = dp.data + c;
    const Vec<T> saved = gather_queries<T>(b, b.x.lse, head, c, 0);
    const Vec<T> lse = saved == -INFINITY ? Vec<T>{} : saved;

    // The rounding of a large lse cancels in weight / sum(weight).
    Vec<T> total{}, product{};
    for (int64_t j = 0; j < b.keys; ++j) {
      const Vec<T> weight = exp_falling<T>(load(p_column + j * s.stride) * scale - lse);
      total += weight;
      product = fma(weight, load(dp_column + j * dp.stride), product);
      store(p_column + j * s.stride, weight);
    }
    const Vec<T> inverse = total == 0 ? Vec<T>{} : 1 / total;
    Vec<T> shift = -product * inverse;
    if (b.x.grad_lse) shift += gather_queries<T>(b, b.x.grad_lse, head, c, 0);
    for (int64_t j = 0; j < b.keys; ++j) {
      const Vec<T> p = load(p_column + j * s.stride) * inverse;
      store(p_column + j * s.stride, p);
      T* const at = dp_column + j * dp.stride;
      store(at, p * (load(at) + shift) * grad_scale);
    }
  }
}

// Between [pairs, H] of S in memory and [heads, keys, lanes] of T in scratch, for the queries and
// heads of a block. Squares of whole vectors are transposed in registers.
template <class S, class T>
void read_pairs(const Block& b, const void* memory, int64_t lanes, T* to) {
  constexpr int W = kLanes<T>;
  for (int64_t c = 0; c < b.rows; c += W)
    for (int64_t j = 0; j < b.m.keys; ++j)
      for (int64_t h = 0; h < b.heads; h += W) {
        const S* from = static_cast<const S*>(memory) + b.first_head + h +
                        (b.m.pair_begin + (b.first + c) * b.m.keys + j) * b.x.heads;
        Vec<T> x[W];
        for (int i = 0; i < W; ++i) {
          x[i] = Vec<T>{};
          if (c + i < b.rows) {
            const S* pair = from + i * b.m.keys * b.x.heads;
            if (h + W <= b.heads) {
              x[i] = load(pair);
            } else {
              S few[W] = {};
              std::memcpy(few, pair, (b.heads - h) * sizeof(S));
              x[i] = load(few);
            }
          }
        }
        transpose_square<T>(x);
        for (int i = 0; i < W; ++i) store(to + ((h + i) * b.m.keys + j) * lanes + c, x[i]);
      }
}

template <class S, class T>
void write_pairs(const Block& b, const T* from, int64_t lanes, void* memory) {
  constexpr int W = kLanes<T>;
  for (int64_t c = 0; c < b.rows; c += W)
    for (int64_t j = 0; j < b.m.keys; ++j)
      for (int64_t h = 0; h < b.heads; h += W) {
        Vec<T> x[W];
        for (int i = 0; i < W; ++i)
          x[i] = h + i < b.heads ? load(from + ((h + i) * b.m.keys + j) * lanes + c) : Vec<T>{};
        transpose_square<T>(x);
        S* to = static_cast<S*>(memory) + b.first_head + h +
                (b.m.pair_begin + (b.first + c) * b.m.keys + j) * b.x.heads;
        for (int i = 0; i < W && c + i < b.rows; ++i) {
          S* pair = to + i * b.m.keys * b.x.heads;
          if (h + W <= b.heads) {
            store(pair, x[i]);
          } else {
            S few[W];
            store(few, x[i]);
            std::memcpy(pair, few, (b.heads - h) * sizeof(S));
          }
        }
      }
}

// Logits scale S + bias in place of S, -inf where causal attention hides the pair; and in place of
// the bias, where it has a place.
template <class T>
void finish_logits(const Block& b, Matrix<T> s, T* bias) {
  const T scale = static_cast<T>(b.x.scale);
  for (int64_t j = 0; j < b.m.keys; ++j)
    for (int64_t c = 0; c < b.rows; c += kLanes<T>) {
      T* const at = bias ? bias + j * s.stride + c : nullptr;
      Vec<T> logit = j < b.keys ? load(s.data + j * s.stride + c) * scale : Vec<T>{};
      if (b.x.pairs.bias) logit += load(at);
      if (b.x.causal) logit = b.where_visible<T>(logit, j, c, -INFINITY);
      if (j < b.keys) store(s.data + j * s.stride + c, logit);
      if (at) store(at, logit);
    }
}

// A bijection of 32 bits in which every bit of the result depends on every bit of x.
EDT_INLINE uint32_t mix(uint32_t x) {
  x = (x ^ (x >> 16)) * 0x7FEB352D;
  x = (x ^ (x >> 15)) * 0x846CA68B;
  return x ^ (x >> 16);
}

// Multiplies every weight with 0 or the dropout's scale.
template <class T>
void drop(const Block& b, int64_t head, Matrix<T> p) {
  const AttentionDropout& dropout = b.x.dropout;
  const auto seed = static_cast<uint64_t>(dropout.seeds[dropout.per_molecule ? b.m.index : 0]);
  const uint32_t of_call =
      mix(mix(static_cast<uint32_t>(seed)) + static_cast<uint32_t>(seed >> 32));
  const uint32_t of_head = mix(of_call + static_cast<uint32_t>(head));
  uint32_t of_query[kQueryBlock];
  for (int64_t i = 0; i < b.rows; ++i)
    of_query[i] = mix(of_head + static_cast<uint32_t>(b.first + i));
  const T scale = static_cast<T>(dropout.scale);
  for (int64_t j = 0; j < b.keys; ++j)
    for (int64_t i = 0; i < b.rows; ++i)
      p.data[j * p.stride + i] *=
          mix(of_query[i] + static_cast<uint32_t>(j)) >= dropout.threshold ? scale : T(0);
}

// dx of the pairs: adds the gradient of the scores, gives it to the bias, and scales it for dQ and
// dK. Both are [keys, lanes] of the head, or null.
template <class T>
void finish_pairs(const Block& b, Matrix<T> dx, const T* dscores, T* dbias) {
  const T scale = static_cast<T>(b.x.scale);
  for (int64_t j = 0; j < b.m.keys; ++j)
    for (int64_t c = 0; c < b.rows; c += kLanes<T>) {
      const int64_t at = j * dx.stride + c;
      Vec<T> grad = j < b.keys ? load(dx.data + at) : Vec<T>{};
      if (dscores) grad += load(dscores + at);
      if (b.x.causal) grad = b.where_visible<T>(grad, j, c, 0);
      if (dbias) store(dbias + at, grad);
      store(dx.data + at, grad * scale);
    }
}

// The key heads of a call: where each has its K, V or their gradients.
template <class S, class T>
struct KeyHeads {
  const Attention& x;
  const AttentionMolecule& m;
  const AttentionHeads& heads;
  const Scratch<T>& scratch;

  View<S, T> view(const AttentionRows& rows, T* copies, int64_t head) const {
    return View<S, T>(rows, m.k_begin, m.keys, head, x.dim,
                      copies + (head - heads.begin) * scratch.kv_block);
  }

  void read(const AttentionRows& rows, T* copies) const {
    for (int64_t head = heads.begin; head < heads.end; ++head) view(rows, copies, head).read();
  }
};

// The next queries, at most a block of them.
EDT_INLINE Block block_at(const Attention& x, const AttentionMolecule& m,
                          const AttentionHeads& heads, int64_t first) {
  const int64_t left = m.queries - first, group = x.heads / x.kv_heads;
  const int64_t rows = left < kQueryBlock ? left : kQueryBlock;
  const int64_t seen = first + rows + m.keys - m.queries;
  return {x,
          m,
          first,
          rows,
          heads.begin * group,
          (heads.end - heads.begin) * group,
          !x.causal || seen > m.keys ? m.keys
          : seen < 0                 ? 0
                                     : seen};
}

// Tiles of the products of a call: `count` of [keys, queries], as many of [queries, dim].
template <class T>
int64_t tiles(const Attention& x, const AttentionMolecule& m, const AttentionHeads& heads,
              int64_t count) {
  constexpr int64_t kCols = kTileCols * kLanes<T>;
  const int64_t of_pairs = m.keys / kTileRows * ((m.queries + kCols - 1) / kCols);
  const int64_t of_rows = m.queries / kTileRows * ((x.dim + kCols - 1) / kCols);
  return count * (of_pairs + of_rows) * (heads.end - heads.begin) * (x.heads / x.kv_heads);
}

template <class S, bool PAIRS, class T = typename ComputeType<S>::type>
void forward(const Attention& x, const AttentionMolecule& m, const AttentionHeads& heads,
             void* memory, AttentionAhead& ahead) {
  const Scratch<T> scratch(memory, x, m, heads);
  const int64_t dim = padded<T>(x.dim), group = x.heads / x.kv_heads;
  const KeyHeads<S, T> kv{x, m, heads, scratch};
  kv.read(x.k, scratch.k);
  kv.read(x.v, scratch.v);
  const Matrix<T> q_t{scratch.q_t, scratch.lanes}, p{scratch.p, scratch.lanes};
  const int64_t head_pairs = m.keys * scratch.lanes;
  ahead.spread(tiles<T>(x, m, heads, 1));

  for (int64_t i = 0; i < m.queries; i += kQueryBlock) {
    const Block b = block_at(x, m, heads, i);
    const int64_t row = m.q_begin + i;
    if constexpr (PAIRS)
      if (x.pairs.bias) read_pairs<S>(b, x.pairs.bias, scratch.lanes, scratch.bias);
    for (int64_t h = 0; h < b.heads; ++h) {
      const int64_t head = b.first_head + h, kv_head = head / group;
      transpose(View<S, T>(x.q, row, b.rows, head, x.dim, scratch.q).read(), b.rows, x.dim, q_t);
      const View<S, T> out(x.out, row, b.rows, head, x.dim, scratch.dq);

      multiply<false>(plain(kv.view(x.k, scratch.k, kv_head).matrix), q_t, p, b.keys,
                      padded<T>(b.rows), x.dim, ahead);
      if (PAIRS || x.causal) {
        finish_logits(b, p, scratch.bias ? scratch.bias + h * head_pairs : nullptr);
        softmax(b, head, p, T(1));
      } else {
        softmax(b, head, p, static_cast<T>(x.scale));
      }
      if constexpr (PAIRS)
        if (x.dropout.seeds) drop(b, head, p);
      multiply<false>(transposed(p), kv.view(x.v, scratch.v, kv_head).matrix, out.matrix, b.rows,
                      dim, b.keys, ahead);
      out.write();
    }
    if constexpr (PAIRS)
      if (x.pairs.scores) write_pairs<S>(b, scratch.bias, scratch.lanes, x.pairs.scores);
  }
}

template <class S, bool PAIRS, class T = typename ComputeType<S>::type>
void backward(const Attention& x, const AttentionMolecule& m, const AttentionHeads& heads,
              void* memory, AttentionAhead& ahead) {
  const Scratch<T> scratch(memory, x, m, heads);
  const int64_t dim = padded<T>(x.dim), group = x.heads / x.kv_heads;
  const KeyHeads<S, T> kv{x, m, heads, scratch};
  kv.read(x.k, scratch.k);
  kv.read(x.v, scratch.v);
  for (int64_t head = heads.begin; head < heads.end; ++head) {
    kv.view(x.dk, scratch.dk, head).zeros();
    kv.view(x.dv, scratch.dv, head).zeros();
  }
  const Matrix<T> q_t{scratch.q_t, scratch.lanes}, grad_t{scratch.grad_t, scratch.lanes};
  const Matrix<T> p{scratch.p, scratch.lanes}, dp{scratch.dp, scratch.lanes};
  const int64_t head_pairs = m.keys * scratch.lanes;
  ahead.spread(tiles<T>(x, m, heads, 2));

  for (int64_t i = 0; i < m.queries; i += kQueryBlock) {
    const Block b = block_at(x, m, heads, i);
    const int64_t row = m.q_begin + i;
    if constexpr (PAIRS) {
      if (x.pairs.bias) read_pairs<S>(b, x.pairs.bias, scratch.lanes, scratch.bias);
      if (x.pairs.grad_scores)
        read_pairs<S>(b, x.pairs.grad_scores, scratch.lanes, scratch.dscores);
    }
    for (int64_t h = 0; h < b.heads; ++h) {
      const int64_t head = b.first_head + h, kv_head = head / group;
      const auto q = View<S, T>(x.q, row, b.rows, head, x.dim, scratch.q).read();
      const auto grad = View<S, T>(x.grad, row, b.rows, head, x.dim, scratch.grad).read();
      const auto k = kv.view(x.k, scratch.k, kv_head).matrix;
      const View<S, T> dq(x.dq, row, b.rows, head, x.dim, scratch.dq);
      transpose(q, b.rows, x.dim, q_t);
      transpose(grad, b.rows, x.dim, grad_t);

      multiply<false>(plain(k), q_t, p, b.keys, padded<T>(b.rows), x.dim, ahead);
      multiply<false>(plain(kv.view(x.v, scratch.v, kv_head).matrix), grad_t, dp, b.keys,
                      padded<T>(b.rows), x.dim, ahead);
      const bool finished = PAIRS || x.causal;
      if (finished) finish_logits(b, p, scratch.bias ? scratch.bias + h * head_pairs : nullptr);
      if constexpr (PAIRS) {
        if (x.dropout.seeds) drop(b, head, dp);
        softmax_backward(b, head, p, dp, T(1), T(1));
        if (x.dropout.seeds) drop(b, head, p);
        finish_pairs(b, dp, scratch.dscores ? scratch.dscores + h * head_pairs : nullptr,
                     x.pairs.dbias ? scratch.bias + h * head_pairs : nullptr);
      } else {
        const T scale = static_cast<T>(x.scale);
        softmax_backward(b, head, p, dp, finished ? T(1) : scale, scale);
      }
      multiply<true>(plain(p), grad, kv.view(x.dv, scratch.dv, kv_head).matrix, b.keys, dim, b.rows,
                     ahead);
      multiply<false>(transposed(dp), k, dq.matrix, b.rows, dim, b.keys, ahead);
      multiply<true>(plain(dp), q, kv.view(x.dk, scratch.dk, kv_head).matrix, b.keys, dim, b.rows);
      dq.write();
    }
    if constexpr (PAIRS)
      if (x.pairs.dbias) write_pairs<S>(b, scratch.bias, scratch.lanes, x.pairs.dbias);
  }
  for (int64_t head = heads.begin; head < heads.end; ++head) {
    kv.view(x.dk, scratch.dk, head).write();
    kv.view(x.dv, scratch.dv, head).write();
  }
}

template <class S, class T = typename ComputeType<S>::type>
constexpr AttentionKernels kernels = {scratch_bytes<T>, forward<S, false>, backward<S, false>,
                                      forward<S, true>, backward<S, true>};

}  // namespace

namespace EDT_ISA {

const AttentionTable attention_kernels = {kernels<float>, kernels<BFloat16>, kernels<Half>,
                                          kernels<double>};

}  // namespace EDT_ISA
}  // namespace edt
