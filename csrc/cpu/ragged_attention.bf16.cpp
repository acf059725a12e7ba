// Attention in bfloat16 by products of tiles, one molecule and a few heads at a time. Everything is
// packed once into tiles that lie in cache, sums are float:
//   forward   S = Q K^T,  P = exp(S - max) as bfloat16,  O = P V / sum(P)
//   backward  P from S and the lse, normalised again,  dP = dO V^T,
//             dS = P (dP - sum(P dP) + dlse) as bfloat16,
//             dV = P^T dO,  dQ = dS K,  dK = dS^T Q
// Every choice depends on the molecule alone.
#include "ragged_attention.h"

#include <cmath>
#include <cstring>
#include <initializer_list>

#include "matrix.h"
#include "tiles.h"

namespace edt {
namespace {

constexpr int64_t kQueryBlock = 64;

// The rows of one head of a molecule, far apart in memory.
struct Rows {
  BFloat16* data;
  int64_t stride, count, dim;

  Rows(const AttentionRows& from, int64_t begin, int64_t count, int64_t head, int64_t dim)
      : data(static_cast<BFloat16*>(from.data) + begin * from.row + head * from.head),
        stride(from.row),
        count(count),
        dim(dim) {}

  // 32 numbers of row i from column d on, zeros beyond.
  EDT_INLINE __m512i step(int64_t i, int64_t d) const {
    if (i >= count) return _mm512_setzero_si512();
    const int64_t left = dim - d;
    const __mmask32 mask = left >= kStep ? ~0u : (1u << left) - 1;
    return _mm512_maskz_loadu_epi16(mask, data + i * stride + d);
  }
};

// The rows of one step, two by two: in lane c of out[r] rows 2 r and 2 r + 1 of column c.
EDT_INLINE __m512i pair(__m256i low, __m256i high) {
  return _mm512_or_si512(_mm512_cvtepu16_epi32(low),
                         _mm512_slli_epi32(_mm512_cvtepu16_epi32(high), 16));
}

EDT_INLINE __m256i half_row(const BFloat16* row) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(row));
}

// B from packed rows [depth, width] that are multiplied row by row.
void pair_rows(const BFloat16* from, int64_t depth, int64_t width, uint32_t* to) {
  for (int64_t k = 0; k < depth; k += 2)
    for (int64_t c = 0; c < width; c += kTile) {
      const __m512i both =
          pair(half_row(from + k * width + c), half_row(from + (k + 1) * width + c));
      uint32_t* tile = to + (k / kStep * (width / kTile) + c / kTile) * kPairs;
      _mm512_storeu_si512(tile + k % kStep / 2 * kTile, both);
    }
}

EDT_INLINE void transpose_pairs(__m512i (&x)[kTile]) {
  Vec<float> rows[kTile];
  for (int i = 0; i < kTile; ++i) rows[i] = (Vec<float>)x[i];
  transpose_square<float>(rows);
  for (int i = 0; i < kTile; ++i) x[i] = (__m512i)rows[i];
}

// B from packed rows [columns, width] whose columns are multiplied: the transpose.
void pair_columns(const BFloat16* from, int64_t columns, int64_t width, uint32_t* to) {
  for (int64_t k = 0; k < width; k += kStep)
    for (int64_t c = 0; c < columns; c += kTile) {
      __m512i x[kTile];
      for (int i = 0; i < kTile; ++i) x[i] = _mm512_loadu_si512(from + (c + i) * width + k);
      transpose_pairs(x);
      uint32_t* tile = to + (k / kStep * (columns / kTile) + c / kTile) * kPairs;
      for (int i = 0; i < kTile; ++i) _mm512_storeu_si512(tile + i * kTile, x[i]);
    }
}

// A [columns, rows] from rows [rows, columns]: the transpose; rows are whole steps.
void transpose_rows(const BFloat16* from, int64_t rows, int64_t columns, BFloat16* to) {
  for (int64_t k = 0; k < rows; k += kStep)
    for (int64_t c = 0; c < columns; c += kTile) {
      __m512i x[kTile];
      for (int i = 0; i < kTile; ++i) {
        const BFloat16* row = from + (k + 2 * i) * columns + c;
        x[i] = pair(half_row(row), half_row(row + columns));
      }
      transpose_pairs(x);
      for (int i = 0; i < kTile; ++i) _mm512_storeu_si512(to + (c + i) * rows + k, x[i]);
    }
}

EDT_INLINE void store_half(BFloat16* to, Vec<float> x) {
  const auto half = _mm512_cvtneps_pbh((__m512)x);
  std::memcpy(to, &half, sizeof(half));
}

// 32 numbers, rounded, or as many as there are.
EDT_INLINE void store_step(BFloat16* to, const float* from, Vec<float> factor, int64_t left) {
  const auto low = (__m512)(load(from) * factor), high = (__m512)(load(from + kTile) * factor);
  const __m512i both = (__m512i)_mm512_cvtne2ps_pbh(high, low);
  const __mmask32 mask = left >= kStep ? ~0u : (1u << left) - 1;
  _mm512_mask_storeu_epi16(to, mask, both);
}

struct Sizes {
  int64_t width, keys, queries;  // whole steps
  int64_t kv_heads, heads;       // of the call

  Sizes(const Attention& x, const AttentionMolecule& m, const AttentionHeads& of)
      : width(whole(x.dim, kStep)),
        keys(whole(m.keys, kStep)),
        queries(whole(m.queries < kQueryBlock ? m.queries : kQueryBlock, kStep)),
        kv_heads(of.end - of.begin),
        heads(kv_heads * (x.heads / x.kv_heads)) {}
};

// Memory that each head of a call has its own part of.
template <class T>
struct PerHead {
  T* data;
  int64_t stride;

  T* operator[](int64_t head) const { return data + head * stride; }
};

struct Scratch {
  PerHead<BFloat16> q, grad, k, v, p, ds, p_t, ds_t;
  PerHead<uint32_t> q_pairs, grad_pairs, k_pairs, v_pairs, k_columns, v_columns;
  PerHead<float> s, dp, rows, inverse, dk, dv;
  char* end;

  Scratch(void* memory, const Attention& x, const AttentionMolecule& m, const Sizes& n,
          bool backward) {
    end = static_cast<char*>(memory);
    const int64_t of_queries = n.queries * n.width, of_keys = n.keys * n.width;
    const int64_t pairs = n.queries * n.keys;
    take(n.heads, {&q}, of_queries);
    take(n.kv_heads, {&k, &v}, of_keys);
    take(n.kv_heads, {&k_columns}, of_keys / 2);
    take(n.heads, {&p}, pairs);
    take(n.heads, {&s}, pairs);
    take(n.heads, {&rows}, of_queries);
    take(n.heads, {&inverse}, kQueryBlock);
    if (!backward) {
      take(n.kv_heads, {&v_pairs}, of_keys / 2);
      return;
    }
    take(n.heads, {&grad}, of_queries);
    take(n.heads, {&ds, &p_t, &ds_t}, pairs);
    take(n.heads, {&q_pairs, &grad_pairs}, of_queries / 2);
    take(n.kv_heads, {&k_pairs, &v_columns}, of_keys / 2);
    take(n.heads, {&dp}, pairs);
    take(n.kv_heads, {&dk, &dv}, of_keys);
  }

 private:
  template <class T>
  void take(int64_t heads, std::initializer_list<PerHead<T>*> blocks, int64_t count) {
    for (PerHead<T>* block : blocks) {
      block->data = reinterpret_cast<T*>(end);
      block->stride = whole(count * sizeof(T), 64) / sizeof(T);
      end += heads * block->stride * sizeof(T);
    }
  }
};

int64_t scratch_bytes(const Attention& x, const AttentionMolecule& m, const AttentionHeads& heads) {
  const Sizes n(x, m, heads);
  return Scratch(nullptr, x, m, n, x.dq.data).end - static_cast<char*>(nullptr);
}

// Packs rows of neighbouring heads, which lie side by side in memory: A, zeros beyond.
void pack(const AttentionRows& from, int64_t begin, int64_t count, int64_t all_rows,
          int64_t first_head, int64_t heads, int64_t dim, int64_t width,
          const PerHead<BFloat16>& to) {
  for (int64_t i = 0; i < all_rows; ++i)
    for (int64_t h = 0; h < heads; ++h) {
      const Rows rows(from, begin, count, first_head + h, dim);
      for (int64_t d = 0; d < width; d += kStep)
        _mm512_storeu_si512(to[h] + i * width + d, rows.step(i, d));
    }
}

// Rows of float of neighbouring heads, each times its factor (null: 1), as rows of the tensor.
void write(const PerHead<float>& from, const PerHead<float>* factors, int64_t width,
           const AttentionRows& to, int64_t begin, int64_t count, int64_t first_head, int64_t heads,
           int64_t dim) {
  for (int64_t i = 0; i < count; ++i)
    for (int64_t h = 0; h < heads; ++h) {
      const Rows rows(to, begin, count, first_head + h, dim);
      const Vec<float> factor = broadcast(factors ? (*factors)[h][i] : 1.0f);
      for (int64_t d = 0; d < dim; d += kStep)
        store_step(rows.data + i * rows.stride + d, from[h] + i * width + d, factor, dim - d);
    }
}

// A block of queries of one molecule and one head.
struct Block {
  const Attention& x;
  const AttentionMolecule& m;
  int64_t first, rows, head, keys;  // `keys` are whole steps

  // How many keys query i of the block sees.
  EDT_INLINE int64_t visible(int64_t i) const {
    if (!x.causal) return m.keys;
    const int64_t n = first + i + 1 + m.keys - m.queries;
    return n < 0 ? 0 : n < m.keys ? n : m.keys;
  }

  EDT_INLINE int64_t row(int64_t i) const { return (m.q_begin + first + i) * x.heads + head; }
};

// Lane j + lane of `x` for keys that query i sees, -inf for others.
EDT_INLINE Vec<float> where_visible(Vec<float> x, int64_t seen, int64_t j) {
  return seen - j >= kTile ? x : first<float>(x, seen - j, -INFINITY);
}

// P and 1 / sum(P) of the queries, 0 where one sees no key; rows up to `all_rows` are zeros.
// Writes the lse.
void softmax(const Block& b, int64_t all_rows, const float* s, BFloat16* p, float* inverse) {
  const float scale = static_cast<float>(b.x.scale);
  float* lse = static_cast<float*>(b.x.lse);
  for (int64_t i = 0; i < b.rows; i += kTile) {
    const int64_t rows = b.rows - i < kTile ? b.rows - i : kTile;
    Vec<float> vectors[kTile] = {};
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t seen = b.visible(i + r);
      Vec<float> most = broadcast<float>(-INFINITY);
      for (int64_t j = 0; j < b.keys; j += kTile)
        most = max(where_visible(load(s + (i + r) * b.keys + j) * scale, seen, j), most);
      vectors[r] = most;
    }
    // Not -inf for a query that sees no key: its weights are then e^-inf = 0.
    const Vec<float> largest = max(max_each<float>(vectors), broadcast(-Float<float>::kLargest));
    float shifts[kTile];
    store(shifts, largest);
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t seen = b.visible(i + r);
      Vec<float> total{};
      for (int64_t j = 0; j < b.keys; j += kTile) {
        const Vec<float> logit = load(s + (i + r) * b.keys + j) * scale;
        const Vec<float> weight = exp<float>(where_visible(logit, seen, j) - shifts[r]);
        total += weight;
        store_half(p + (i + r) * b.keys + j, weight);
      }
      vectors[r] = total;
    }
    const Vec<float> total = sum_each<float>(vectors);
    const auto blind = total == 0;
    store(inverse + i, blind ? Vec<float>{} : 1.0f / total);
    float logs[kTile];
    store(logs, blind ? broadcast<float>(-INFINITY)
                      : largest + log<float>(blind ? broadcast(1.0f) : total));
    for (int64_t r = 0; r < rows; ++r) lse[b.row(i + r)] = logs[r];
  }
  std::memset(p + b.rows * b.keys, 0, (all_rows - b.rows) * b.keys * sizeof(BFloat16));
}

// P and scale dS of the queries, from S (overwritten) and dP; rows up to `all_rows` are zeros.
void softmax_backward(const Block& b, int64_t all_rows, float* s, const float* dp, BFloat16* p,
                      BFloat16* ds) {
  const float scale = static_cast<float>(b.x.scale);
  const float* lse = static_cast<const float*>(b.x.lse);
  const float* grad_lse = static_cast<const float*>(b.x.grad_lse);
  for (int64_t i = 0; i < b.rows; i += kTile) {
    const int64_t rows = b.rows - i < kTile ? b.rows - i : kTile;
    Vec<float> totals[kTile] = {}, products[kTile] = {};
    float grads[kTile] = {}, inverses[kTile], shifts[kTile];
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t seen = b.visible(i + r), at = (i + r) * b.keys;
      const float saved = lse[b.row(i + r)], shift = saved == -INFINITY ? 0 : saved;
      if (grad_lse) grads[r] = grad_lse[b.row(i + r)];
      // The rounding of a large lse cancels in weight / sum(weight).
      for (int64_t j = 0; j < b.keys; j += kTile) {
        const Vec<float> logit = load(s + at + j) * scale;
        const Vec<float> weight = exp<float>(where_visible(logit, seen, j) - shift);
        totals[r] += weight;
        products[r] = fma(weight, load(dp + at + j), products[r]);
        store(s + at + j, weight);
      }
    }
    const Vec<float> total = sum_each<float>(totals), product = sum_each<float>(products);
    const Vec<float> inverse = total == 0 ? Vec<float>{} : 1.0f / total;
    store(inverses, inverse);
    store(shifts, load(grads) - product * inverse);
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t j = 0; j < b.keys; j += kTile) {
        const int64_t at = (i + r) * b.keys + j;
        const Vec<float> weight = load(s + at) * inverses[r];
        store_half(p + at, weight);
        store_half(ds + at, weight * (load(dp + at) + shifts[r]) * scale);
      }
  }
  for (BFloat16* rest : {p, ds})
    std::memset(rest + b.rows * b.keys, 0, (all_rows - b.rows) * b.keys * sizeof(BFloat16));
}

int64_t blocks(const AttentionMolecule& m) { return (m.queries + kQueryBlock - 1) / kQueryBlock; }

// The heads of a call go through each step together: what one head has just stored, another one
// need not wait for.
void forward(const Attention& x, const AttentionMolecule& m, const AttentionHeads& heads,
             void* memory, AttentionAhead& ahead) {
  const Sizes n(x, m, heads);
  const Scratch scratch(memory, x, m, n, false);
  const int64_t group = x.heads / x.kv_heads, first_head = heads.begin * group;
  ahead.spread(2 * n.heads * blocks(m));
  pack(x.k, m.k_begin, m.keys, n.keys, heads.begin, n.kv_heads, x.dim, n.width, scratch.k);
  pack(x.v, m.k_begin, m.keys, n.keys, heads.begin, n.kv_heads, x.dim, n.width, scratch.v);
  for (int64_t h = 0; h < n.kv_heads; ++h) {
    pair_columns(scratch.k[h], n.keys, n.width, scratch.k_columns[h]);
    pair_rows(scratch.v[h], n.keys, n.width, scratch.v_pairs[h]);
  }

  for (int64_t i = 0; i < m.queries; i += kQueryBlock) {
    const int64_t rows = m.queries - i < kQueryBlock ? m.queries - i : kQueryBlock;
    const int64_t all_rows = whole(rows, kRowUnit), row = m.q_begin + i;
    pack(x.q, row, rows, all_rows, first_head, n.heads, x.dim, n.width, scratch.q);
    for (int64_t h = 0; h < n.heads; ++h) {
      multiply<false>(scratch.q[h], n.width, scratch.k_columns[h / group], scratch.s[h], n.keys,
                      all_rows, n.keys, n.width);
      ahead();
    }
    for (int64_t h = 0; h < n.heads; ++h)
      softmax({x, m, i, rows, first_head + h, n.keys}, all_rows, scratch.s[h], scratch.p[h],
              scratch.inverse[h]);
    for (int64_t h = 0; h < n.heads; ++h) {
      multiply<false>(scratch.p[h], n.keys, scratch.v_pairs[h / group], scratch.rows[h], n.width,
                      all_rows, n.width, n.keys);
      ahead();
    }
    write(scratch.rows, &scratch.inverse, n.width, x.out, row, rows, first_head, n.heads, x.dim);
  }
}

void backward(const Attention& x, const AttentionMolecule& m, const AttentionHeads& heads,
              void* memory, AttentionAhead& ahead) {
  const Sizes n(x, m, heads);
  const Scratch scratch(memory, x, m, n, true);
  const int64_t group = x.heads / x.kv_heads, first_head = heads.begin * group;
  ahead.spread(2 * n.heads * blocks(m));
  pack(x.k, m.k_begin, m.keys, n.keys, heads.begin, n.kv_heads, x.dim, n.width, scratch.k);
  pack(x.v, m.k_begin, m.keys, n.keys, heads.begin, n.kv_heads, x.dim, n.width, scratch.v);
  for (int64_t h = 0; h < n.kv_heads; ++h) {
    pair_columns(scratch.k[h], n.keys, n.width, scratch.k_columns[h]);
    pair_columns(scratch.v[h], n.keys, n.width, scratch.v_columns[h]);
    pair_rows(scratch.k[h], n.keys, n.width, scratch.k_pairs[h]);
    for (float* sums : {scratch.dk[h], scratch.dv[h]})
      std::memset(sums, 0, n.keys * n.width * sizeof(float));
  }

  for (int64_t i = 0; i < m.queries; i += kQueryBlock) {
    const int64_t rows = m.queries - i < kQueryBlock ? m.queries - i : kQueryBlock;
    const int64_t all_rows = whole(rows, kStep), row = m.q_begin + i;
    pack(x.q, row, rows, all_rows, first_head, n.heads, x.dim, n.width, scratch.q);
    pack(x.grad, row, rows, all_rows, first_head, n.heads, x.dim, n.width, scratch.grad);
    for (int64_t h = 0; h < n.heads; ++h) {
      multiply<false>(scratch.q[h], n.width, scratch.k_columns[h / group], scratch.s[h], n.keys,
                      all_rows, n.keys, n.width);
      multiply<false>(scratch.grad[h], n.width, scratch.v_columns[h / group], scratch.dp[h], n.keys,
                      all_rows, n.keys, n.width);
      ahead();
    }
    for (int64_t h = 0; h < n.heads; ++h)
      softmax_backward({x, m, i, rows, first_head + h, n.keys}, all_rows, scratch.s[h],
                       scratch.dp[h], scratch.p[h], scratch.ds[h]);
    for (int64_t h = 0; h < n.heads; ++h) {
      transpose_rows(scratch.p[h], all_rows, n.keys, scratch.p_t[h]);
      transpose_rows(scratch.ds[h], all_rows, n.keys, scratch.ds_t[h]);
      pair_rows(scratch.q[h], all_rows, n.width, scratch.q_pairs[h]);
      pair_rows(scratch.grad[h], all_rows, n.width, scratch.grad_pairs[h]);
    }
    for (int64_t h = 0; h < n.heads; ++h) {
      const int64_t kv = h / group;
      multiply<true>(scratch.p_t[h], all_rows, scratch.grad_pairs[h], scratch.dv[kv], n.width,
                     n.keys, n.width, all_rows);
      multiply<true>(scratch.ds_t[h], all_rows, scratch.q_pairs[h], scratch.dk[kv], n.width, n.keys,
                     n.width, all_rows);
      multiply<false>(scratch.ds[h], n.keys, scratch.k_pairs[kv], scratch.rows[h], n.width,
                      all_rows, n.width, n.keys);
      ahead();
    }
    write(scratch.rows, nullptr, n.width, x.dq, row, rows, first_head, n.heads, x.dim);
  }
  write(scratch.dk, nullptr, n.width, x.dk, m.k_begin, m.keys, heads.begin, n.kv_heads, x.dim);
  write(scratch.dv, nullptr, n.width, x.dv, m.k_begin, m.keys, heads.begin, n.kv_heads, x.dim);
}

}  // namespace

namespace EDT_ISA {

extern const AttentionKernels attention_bfloat16 = {scratch_bytes,   forward,      backward,
                                                    nullptr,         nullptr,      kHeadsPerCall,
                                                    configure_tiles, release_tiles};

}  // namespace EDT_ISA
}  // namespace edt
