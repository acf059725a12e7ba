// Attention of one molecule and head at a time, everything in cache. A block of queries goes
// through all keys at once, so the softmax sees whole rows and nothing is rescaled:
//   forward   S = Q K^T,  P = softmax(S),  O = P V
//   backward  P from S and the lse, normalised again,  dP = dO V^T,
//             dS = P (dP - rowsum(P dP) + dlse),
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
  T *q, *k, *v, *grad, *dq, *dk, *dv, *k_t, *v_t, *p, *dp, *bias, *dscores, *keep, *end;
  int64_t kv_block;  // numbers from one key head's k, v, ... to the next one's

  Scratch(void* memory, const Attention& x, const AttentionMolecule& m,
          const AttentionHeads& heads) {
    end = static_cast<T*>(memory);
    const int64_t dim = padded<T>(x.dim), keys = padded<T>(m.keys);
    const int64_t queries = m.queries < kQueryBlock ? m.queries : kQueryBlock;
    const int64_t kv_heads = heads.end - heads.begin, q_heads = kv_heads * (x.heads / x.kv_heads);
    kv_block = keys * dim;
    for (T** block : {&q, &grad, &dq}) *block = take(queries * dim);
    for (T** block : {&k, &v, &dk, &dv, &k_t, &v_t}) *block = take(kv_heads * kv_block);
    for (T** block : {&p, &dp}) *block = take(queries * keys);
    const int64_t pairs = padded<T>(q_heads) * queries * keys;
    bias = x.pairs.bias || x.pairs.scores ? take(pairs) : nullptr;
    dscores = x.pairs.grad_scores ? take(pairs) : nullptr;
    keep = x.dropout.seeds ? take(keys) : nullptr;
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
};

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
             int64_t head, Matrix<T> s, T scale) {
  constexpr int W = kLanes<T>;
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

// From S and dP, both overwritten: P = softmax(scale S), and scale dx with
// dx = P (dP - rowsum(P dP) + dlse).
template <class T>
void softmax_backward(const Attention& x, const AttentionMolecule& m, int64_t first_query,
                      int64_t rows, int64_t head, Matrix<T> s, Matrix<T> dp, T scale) {
  constexpr int W = kLanes<T>;
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

// Between [pairs, H] of S in memory and [heads, rows, padded keys] of T in scratch, for the rows
// and heads of a block. Squares of whole vectors are transposed in registers.
template <class S, class T>
void read_pairs(const Block& b, const void* memory, T* to) {
  constexpr int W = kLanes<T>;
  const int64_t keys = b.m.keys, stride = padded<T>(keys);
  for (int64_t r = 0; r < b.rows; ++r)
    for (int64_t h = 0; h < b.heads; h += W)
      for (int64_t j = 0; j < keys; j += W) {
        const S* from = static_cast<const S*>(memory) + b.first_head + h +
                        (b.m.pair_begin + (b.first + r) * keys + j) * b.x.heads;
        Vec<T> x[W];
        for (int i = 0; i < W; ++i) {
          x[i] = Vec<T>{};
          if (j + i < keys) {
            if (h + W <= b.heads) {
              x[i] = load(from + i * b.x.heads);
            } else {
              S few[W] = {};
              std::memcpy(few, from + i * b.x.heads, (b.heads - h) * sizeof(S));
              x[i] = load(few);
            }
          }
        }
        transpose_square<T>(x);
        for (int i = 0; i < W; ++i) store(to + ((h + i) * b.rows + r) * stride + j, x[i]);
      }
}

template <class S, class T>
void write_pairs(const Block& b, const T* from, void* memory) {
  constexpr int W = kLanes<T>;
  const int64_t keys = b.m.keys, stride = padded<T>(keys);
  for (int64_t r = 0; r < b.rows; ++r)
    for (int64_t h = 0; h < b.heads; h += W)
      for (int64_t j = 0; j < keys; j += W) {
        Vec<T> x[W];
        for (int i = 0; i < W; ++i)
          x[i] = h + i < b.heads ? load(from + ((h + i) * b.rows + r) * stride + j) : Vec<T>{};
        transpose_square<T>(x);
        S* to = static_cast<S*>(memory) + b.first_head + h +
                (b.m.pair_begin + (b.first + r) * keys + j) * b.x.heads;
        for (int i = 0; i < W && j + i < keys; ++i) {
          if (h + W <= b.heads) {
            store(to + i * b.x.heads, x[i]);
          } else {
            S few[W];
            store(few, x[i]);
            std::memcpy(to + i * b.x.heads, few, (b.heads - h) * sizeof(S));
          }
        }
      }
}

// Logits scale S + bias in place of S and, where there is room for them, of the bias; -inf where
// causal attention hides the pair.
template <class T>
void add_bias(const Block& b, Matrix<T> s, T* bias, bool biased) {
  constexpr int W = kLanes<T>;
  const T scale = static_cast<T>(b.x.scale);
  for (int64_t r = 0; r < b.rows; ++r) {
    const int64_t seen = visible(b.x, b.m, b.first + r);
    for (int64_t j = 0; j < b.m.keys; j += W) {
      T* at = bias ? bias + r * s.stride + j : nullptr;
      Vec<T> logit = load(s.data + r * s.stride + j) * scale;
      if (biased) logit += load(at);
      if (b.x.causal) logit = first<T>(logit, seen - j, -INFINITY);
      store(s.data + r * s.stride + j, logit);
      if (bias) store(at, logit);
    }
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
void drop(const Block& b, int64_t head, Matrix<T> p, T* keep) {
  const AttentionDropout& dropout = b.x.dropout;
  const auto seed = static_cast<uint64_t>(dropout.seeds[dropout.per_molecule ? b.m.index : 0]);
  const uint32_t of_call =
      mix(mix(static_cast<uint32_t>(seed)) + static_cast<uint32_t>(seed >> 32));
  const uint32_t of_head = mix(of_call + static_cast<uint32_t>(head));
  const T scale = static_cast<T>(dropout.scale);
  for (int64_t r = 0; r < b.rows; ++r) {
    const uint32_t of_query = mix(of_head + static_cast<uint32_t>(b.first + r));
    const int64_t keys = visible(b.x, b.m, b.first + r);
    for (int64_t j = 0; j < keys; ++j)
      keep[j] = mix(of_query + static_cast<uint32_t>(j)) >= dropout.threshold ? scale : T(0);
    for (int64_t j = 0; j < keys; ++j) p.data[r * p.stride + j] *= keep[j];
  }
}

// dx of the pairs: adds the gradient of the scores, gives it to the bias, and scales it for dQ and
// dK. Both are [rows, padded keys] of the head, or null.
template <class T>
void finish_pairs(const Block& b, Matrix<T> dx, const T* dscores, T* dbias) {
  constexpr int W = kLanes<T>;
  const T scale = static_cast<T>(b.x.scale);
  const int64_t computed = visible(b.x, b.m, b.first + b.rows - 1);
  for (int64_t r = 0; r < b.rows; ++r) {
    const int64_t seen = visible(b.x, b.m, b.first + r);
    for (int64_t j = 0; j < b.m.keys; j += W) {
      T* at = dx.data + r * dx.stride + j;
      Vec<T> grad = j < computed ? load(at) : Vec<T>{};
      if (dscores) grad += load(dscores + r * dx.stride + j);
      grad = first<T>(grad, seen - j, T(0));
      if (dbias) store(dbias + r * dx.stride + j, grad);
      store(at, grad * scale);
    }
  }
}

// The key heads of a call: where each has its K, V and what is computed from them.
template <class S, class T>
struct KeyHeads {
  const Attention& x;
  const AttentionMolecule& m;
  const AttentionHeads& heads;
  const Scratch<T>& scratch;

  View<S, T> view(const AttentionRows& rows, T* copies, int64_t head) const {
    return View<S, T>(rows, m.k_begin, m.keys, head, x.dim, copies + offset(head));
  }

  Matrix<T> transposed(T* blocks, int64_t head) const {
    return {blocks + offset(head), padded<T>(m.keys)};
  }

  // Reads the rows, and transposes them where they are given a place.
  void read(const AttentionRows& rows, T* copies, T* blocks) const {
    for (int64_t head = heads.begin; head < heads.end; ++head) {
      const Matrix<T> matrix = view(rows, copies, head).read();
      if (blocks) transpose(matrix, m.keys, x.dim, transposed(blocks, head));
    }
  }

 private:
  int64_t offset(int64_t head) const { return (head - heads.begin) * scratch.kv_block; }
};

// The next queries, at most a block of them.
EDT_INLINE Block block_at(const Attention& x, const AttentionMolecule& m,
                          const AttentionHeads& heads, int64_t first) {
  const int64_t left = m.queries - first, group = x.heads / x.kv_heads;
  return {x,
          m,
          first,
          left < kQueryBlock ? left : kQueryBlock,
          heads.begin * group,
          (heads.end - heads.begin) * group};
}

template <class S, bool PAIRS, class T = typename ComputeType<S>::type>
void forward(const Attention& x, const AttentionMolecule& m, const AttentionHeads& heads,
             void* memory) {
  const Scratch<T> scratch(memory, x, m, heads);
  const int64_t dim = padded<T>(x.dim), stride = padded<T>(m.keys), group = x.heads / x.kv_heads;
  const KeyHeads<S, T> kv{x, m, heads, scratch};
  kv.read(x.k, scratch.k, scratch.k_t);
  kv.read(x.v, scratch.v, nullptr);
  const Matrix<T> p{scratch.p, stride};

  for (int64_t i = 0; i < m.queries; i += kQueryBlock) {
    const Block b = block_at(x, m, heads, i);
    const int64_t keys = visible(x, m, i + b.rows - 1), row = m.q_begin + i;
    if constexpr (PAIRS)
      if (x.pairs.bias) read_pairs<S>(b, x.pairs.bias, scratch.bias);
    for (int64_t h = 0; h < b.heads; ++h) {
      const int64_t head = b.first_head + h, kv_head = head / group;
      const auto q = View<S, T>(x.q, row, b.rows, head, x.dim, scratch.q).read();
      const View<S, T> out(x.out, row, b.rows, head, x.dim, scratch.dq);

      multiply<false>(plain(q), kv.transposed(scratch.k_t, kv_head), p, b.rows, padded<T>(keys),
                      x.dim);
      if constexpr (PAIRS) {
        T* bias = scratch.bias ? scratch.bias + h * b.rows * stride : nullptr;
        add_bias(b, p, bias, x.pairs.bias);
        softmax(x, m, i, b.rows, head, p, T(1));
        if (x.dropout.seeds) drop(b, head, p, scratch.keep);
      } else {
        softmax(x, m, i, b.rows, head, p, static_cast<T>(x.scale));
      }
      const auto v = kv.view(x.v, scratch.v, kv_head).matrix;
      multiply<false>(plain(p), v, out.matrix, b.rows, dim, keys);
      out.write();
    }
    if constexpr (PAIRS)
      if (x.pairs.scores) write_pairs<S>(b, scratch.bias, x.pairs.scores);
  }
}

template <class S, bool PAIRS, class T = typename ComputeType<S>::type>
void backward(const Attention& x, const AttentionMolecule& m, const AttentionHeads& heads,
              void* memory) {
  const Scratch<T> scratch(memory, x, m, heads);
  const int64_t dim = padded<T>(x.dim), stride = padded<T>(m.keys), group = x.heads / x.kv_heads;
  const KeyHeads<S, T> kv{x, m, heads, scratch};
  kv.read(x.k, scratch.k, scratch.k_t);
  kv.read(x.v, scratch.v, scratch.v_t);
  for (int64_t head = heads.begin; head < heads.end; ++head) {
    kv.view(x.dk, scratch.dk, head).zeros();
    kv.view(x.dv, scratch.dv, head).zeros();
  }
  const Matrix<T> p{scratch.p, stride}, dp{scratch.dp, stride};

  for (int64_t i = 0; i < m.queries; i += kQueryBlock) {
    const Block b = block_at(x, m, heads, i);
    const int64_t keys = visible(x, m, i + b.rows - 1), row = m.q_begin + i;
    if constexpr (PAIRS) {
      if (x.pairs.bias) read_pairs<S>(b, x.pairs.bias, scratch.bias);
      if (x.pairs.grad_scores) read_pairs<S>(b, x.pairs.grad_scores, scratch.dscores);
    }
    for (int64_t h = 0; h < b.heads; ++h) {
      const int64_t head = b.first_head + h, kv_head = head / group;
      const auto q = View<S, T>(x.q, row, b.rows, head, x.dim, scratch.q).read();
      const auto grad = View<S, T>(x.grad, row, b.rows, head, x.dim, scratch.grad).read();
      const View<S, T> dq(x.dq, row, b.rows, head, x.dim, scratch.dq);

      multiply<false>(plain(q), kv.transposed(scratch.k_t, kv_head), p, b.rows, padded<T>(keys),
                      x.dim);
      multiply<false>(plain(grad), kv.transposed(scratch.v_t, kv_head), dp, b.rows, padded<T>(keys),
                      x.dim);
      if constexpr (PAIRS) {
        T* bias = scratch.bias ? scratch.bias + h * b.rows * stride : nullptr;
        const T* dscores = scratch.dscores ? scratch.dscores + h * b.rows * stride : nullptr;
        add_bias(b, p, bias, x.pairs.bias);
        if (x.dropout.seeds) drop(b, head, dp, scratch.keep);
        softmax_backward(x, m, i, b.rows, head, p, dp, T(1));
        if (x.dropout.seeds) drop(b, head, p, scratch.keep);
        finish_pairs(b, dp, dscores, x.pairs.dbias ? bias : nullptr);
      } else {
        softmax_backward(x, m, i, b.rows, head, p, dp, static_cast<T>(x.scale));
      }
      multiply<true>(transposed(p), grad, kv.view(x.dv, scratch.dv, kv_head).matrix, keys, dim,
                     b.rows);
      multiply<false>(plain(dp), kv.view(x.k, scratch.k, kv_head).matrix, dq.matrix, b.rows, dim,
                      keys);
      multiply<true>(transposed(dp), q, kv.view(x.dk, scratch.dk, kv_head).matrix, keys, dim,
                     b.rows);
      dq.write();
    }
    if constexpr (PAIRS)
      if (x.pairs.dbias) write_pairs<S>(b, scratch.bias, x.pairs.dbias);
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
