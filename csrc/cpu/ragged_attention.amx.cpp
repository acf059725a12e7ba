// Attention in bfloat16 by AMX tiles, one molecule and key head at a time. Everything is packed
// once into tiles that lie in cache, sums are float:
//   forward   S = Q K^T,  P = exp(S - max) as bfloat16,  O = P V / sum(P)
//   backward  P from S and the lse, normalised again,  dP = dO V^T,
//             dS = P (dP - sum(P dP) + dlse) as bfloat16,
//             dV = P^T dO,  dQ = dS K,  dK = dS^T Q
// Every choice depends on the molecule alone.
#include "ragged_attention.h"

#include <cmath>
#include <cstring>

#include "amx.h"
#include "matrix.h"

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

  // A: rows and columns beyond are zeros.
  void pack(BFloat16* to, int64_t rows, int64_t width) const {
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t d = 0; d < width; d += kStep)
        _mm512_storeu_si512(to + i * width + d, step(i, d));
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

// Rows of float, each times its factor (null: 1), as rows of the tensor.
void write(const float* from, int64_t width, const float* factors, const Rows& to) {
  for (int64_t i = 0; i < to.count; ++i) {
    const float factor = factors ? factors[i] : 1.0f;
    for (int64_t d = 0; d < to.dim; d += kTile) {
      BFloat16* out = to.data + i * to.stride + d;
      const Vec<float> x = load(from + i * width + d) * factor;
      if (d + kTile <= to.dim) {
        store_half(out, x);
      } else {
        BFloat16 few[kTile];
        store_half(few, x);
        std::memcpy(out, few, (to.dim - d) * sizeof(BFloat16));
      }
    }
  }
}

struct Sizes {
  int64_t width, keys, queries;  // whole steps

  Sizes(const Attention& x, const AttentionMolecule& m)
      : width(whole(x.dim, kStep)),
        keys(whole(m.keys, kStep)),
        queries(whole(m.queries < kQueryBlock ? m.queries : kQueryBlock, kStep)) {}
};

struct Scratch {
  BFloat16 *q, *grad, *k, *v, *p, *ds, *p_t, *ds_t;
  uint32_t *q_pairs, *grad_pairs, *k_pairs, *v_pairs, *k_columns, *v_columns;
  float *s, *dp, *rows, *dk, *dv;
  char* end;

  Scratch(void* memory, const Attention& x, const AttentionMolecule& m) {
    end = static_cast<char*>(memory);
    const Sizes n(x, m);
    for (BFloat16** block : {&q, &grad}) take(block, n.queries * n.width);
    for (BFloat16** block : {&k, &v}) take(block, n.keys * n.width);
    for (BFloat16** block : {&p, &ds, &p_t, &ds_t}) take(block, n.queries * n.keys);
    for (uint32_t** block : {&q_pairs, &grad_pairs}) take(block, n.queries * n.width / 2);
    for (uint32_t** block : {&k_pairs, &v_pairs, &k_columns, &v_columns})
      take(block, n.keys * n.width / 2);
    for (float** block : {&s, &dp}) take(block, n.queries * n.keys);
    take(&rows, n.queries * n.width);
    for (float** block : {&dk, &dv}) take(block, n.keys * n.width);
  }

 private:
  template <class T>
  void take(T** block, int64_t count) {
    *block = reinterpret_cast<T*>(end);
    end += whole(count * sizeof(T), 64);
  }
};

int64_t scratch_bytes(const Attention& x, const AttentionMolecule& m, const AttentionHeads&) {
  return Scratch(nullptr, x, m).end - static_cast<char*>(nullptr);
}

EDT_INLINE int64_t visible(const Attention& x, const AttentionMolecule& m, int64_t i) {
  if (!x.causal) return m.keys;
  const int64_t n = i + 1 + m.keys - m.queries;
  return n < 0 ? 0 : n < m.keys ? n : m.keys;
}

// P and 1 / sum(P) of `rows` queries from query `first` on, 0 where one sees no key; rows beyond
// are zeros. Writes the lse.
void softmax(const Attention& x, const AttentionMolecule& m, int64_t first_query, int64_t rows,
             int64_t all_rows, int64_t head, float* s, int64_t keys, BFloat16* p, float* inverse) {
  const float scale = static_cast<float>(x.scale);
  float largest[kQueryBlock], totals[kQueryBlock] = {}, logs[kQueryBlock];
  for (int64_t i = 0; i < rows; ++i) {
    float* row = s + i * keys;
    const int64_t seen = visible(x, m, first_query + i);
    Vec<float> most = broadcast<float>(-INFINITY);
    for (int64_t j = 0; j < keys; j += kTile) {
      const Vec<float> logit = first<float>(load(row + j) * scale, seen - j, -INFINITY);
      most = max(logit, most);
      store(row + j, logit);
    }
    const float peak = reduce_max<float>(most);
    largest[i] = peak == -INFINITY ? 0 : peak;
  }
  for (int64_t i = 0; i < rows; ++i) {
    Vec<float> total{};
    for (int64_t j = 0; j < keys; j += kTile) {
      const Vec<float> weight = exp<float>(load(s + i * keys + j) - largest[i]);
      total += weight;
      store_half(p + i * keys + j, weight);
    }
    totals[i] = reduce_sum<float>(total);
    inverse[i] = totals[i] == 0 ? 0 : 1 / totals[i];
  }
  std::memset(p + rows * keys, 0, (all_rows - rows) * keys * sizeof(BFloat16));

  float* lse = static_cast<float*>(x.lse) + (m.q_begin + first_query) * x.heads + head;
  for (int64_t i = 0; i < rows; i += kTile) store(logs + i, log<float>(load(totals + i)));
  for (int64_t i = 0; i < rows; ++i)
    lse[i * x.heads] = totals[i] == 0 ? -INFINITY : largest[i] + logs[i];
}

// P and scale dS of `rows` queries, from S (overwritten) and dP.
void softmax_backward(const Attention& x, const AttentionMolecule& m, int64_t first_query,
                      int64_t rows, int64_t all_rows, int64_t head, float* s, const float* dp,
                      int64_t keys, BFloat16* p, BFloat16* ds) {
  const float scale = static_cast<float>(x.scale);
  for (int64_t i = 0; i < rows; ++i) {
    float* weights = s + i * keys;
    const int64_t seen = visible(x, m, first_query + i);
    const int64_t entry = (m.q_begin + first_query + i) * x.heads + head;
    const float saved = static_cast<const float*>(x.lse)[entry];
    const float lse = saved == -INFINITY ? 0 : saved;

    // The rounding of a large lse cancels in weight / sum(weight).
    Vec<float> total{}, product{};
    for (int64_t j = 0; j < keys; j += kTile) {
      const Vec<float> logit = first<float>(load(weights + j) * scale, seen - j, -INFINITY);
      const Vec<float> weight = exp<float>(logit - lse);
      total += weight;
      product = fma(weight, load(dp + i * keys + j), product);
      store(weights + j, weight);
    }
    const float sum = reduce_sum<float>(total);
    const float inverse = sum == 0 ? 0 : 1 / sum;
    float shift = -reduce_sum<float>(product) * inverse;
    if (x.grad_lse) shift += static_cast<const float*>(x.grad_lse)[entry];
    for (int64_t j = 0; j < keys; j += kTile) {
      const Vec<float> weight = load(weights + j) * inverse;
      store_half(p + i * keys + j, weight);
      store_half(ds + i * keys + j, weight * (load(dp + i * keys + j) + shift) * scale);
    }
  }
  for (BFloat16* rest : {p, ds})
    std::memset(rest + rows * keys, 0, (all_rows - rows) * keys * sizeof(BFloat16));
}

void forward(const Attention& x, const AttentionMolecule& m, const AttentionHeads& heads,
             void* memory) {
  const Scratch scratch(memory, x, m);
  const Sizes n(x, m);
  const int64_t group = x.heads / x.kv_heads;
  for (int64_t kv_head = heads.begin; kv_head < heads.end; ++kv_head) {
    Rows(x.k, m.k_begin, m.keys, kv_head, x.dim).pack(scratch.k, n.keys, n.width);
    Rows(x.v, m.k_begin, m.keys, kv_head, x.dim).pack(scratch.v, n.keys, n.width);
    pair_columns(scratch.k, n.keys, n.width, scratch.k_columns);
    pair_rows(scratch.v, n.keys, n.width, scratch.v_pairs);

    for (int64_t head = kv_head * group; head < (kv_head + 1) * group; ++head)
      for (int64_t i = 0; i < m.queries; i += kQueryBlock) {
        const int64_t rows = m.queries - i < kQueryBlock ? m.queries - i : kQueryBlock;
        const int64_t all_rows = whole(rows, kTile), row = m.q_begin + i;
        float inverse[kQueryBlock];
        Rows(x.q, row, rows, head, x.dim).pack(scratch.q, all_rows, n.width);
        multiply<false>(scratch.q, n.width, scratch.k_columns, scratch.s, n.keys, all_rows, n.keys,
                        n.width);
        softmax(x, m, i, rows, all_rows, head, scratch.s, n.keys, scratch.p, inverse);
        multiply<false>(scratch.p, n.keys, scratch.v_pairs, scratch.rows, n.width, all_rows,
                        n.width, n.keys);
        write(scratch.rows, n.width, inverse, Rows(x.out, row, rows, head, x.dim));
      }
  }
}

void backward(const Attention& x, const AttentionMolecule& m, const AttentionHeads& heads,
              void* memory) {
  const Scratch scratch(memory, x, m);
  const Sizes n(x, m);
  const int64_t group = x.heads / x.kv_heads;
  for (int64_t kv_head = heads.begin; kv_head < heads.end; ++kv_head) {
    Rows(x.k, m.k_begin, m.keys, kv_head, x.dim).pack(scratch.k, n.keys, n.width);
    Rows(x.v, m.k_begin, m.keys, kv_head, x.dim).pack(scratch.v, n.keys, n.width);
    pair_columns(scratch.k, n.keys, n.width, scratch.k_columns);
    pair_columns(scratch.v, n.keys, n.width, scratch.v_columns);
    pair_rows(scratch.k, n.keys, n.width, scratch.k_pairs);
    for (float* sums : {scratch.dk, scratch.dv})
      std::memset(sums, 0, n.keys * n.width * sizeof(float));

    for (int64_t head = kv_head * group; head < (kv_head + 1) * group; ++head)
      for (int64_t i = 0; i < m.queries; i += kQueryBlock) {
        const int64_t rows = m.queries - i < kQueryBlock ? m.queries - i : kQueryBlock;
        const int64_t all_rows = whole(rows, kStep), row = m.q_begin + i;
        Rows(x.q, row, rows, head, x.dim).pack(scratch.q, all_rows, n.width);
        Rows(x.grad, row, rows, head, x.dim).pack(scratch.grad, all_rows, n.width);
        multiply<false>(scratch.q, n.width, scratch.k_columns, scratch.s, n.keys, all_rows, n.keys,
                        n.width);
        multiply<false>(scratch.grad, n.width, scratch.v_columns, scratch.dp, n.keys, all_rows,
                        n.keys, n.width);
        softmax_backward(x, m, i, rows, all_rows, head, scratch.s, scratch.dp, n.keys, scratch.p,
                         scratch.ds);

        transpose_rows(scratch.p, all_rows, n.keys, scratch.p_t);
        transpose_rows(scratch.ds, all_rows, n.keys, scratch.ds_t);
        pair_rows(scratch.q, all_rows, n.width, scratch.q_pairs);
        pair_rows(scratch.grad, all_rows, n.width, scratch.grad_pairs);
        multiply<true>(scratch.p_t, all_rows, scratch.grad_pairs, scratch.dv, n.width, n.keys,
                       n.width, all_rows);
        multiply<true>(scratch.ds_t, all_rows, scratch.q_pairs, scratch.dk, n.width, n.keys,
                       n.width, all_rows);
        multiply<false>(scratch.ds, n.keys, scratch.k_pairs, scratch.rows, n.width, all_rows,
                        n.width, n.keys);
        write(scratch.rows, n.width, nullptr, Rows(x.dq, row, rows, head, x.dim));
      }
    write(scratch.dk, n.width, nullptr, Rows(x.dk, m.k_begin, m.keys, kv_head, x.dim));
    write(scratch.dv, n.width, nullptr, Rows(x.dv, m.k_begin, m.keys, kv_head, x.dim));
  }
}

}  // namespace

namespace amx {

extern const AttentionKernels attention_bfloat16 = {
    scratch_bytes, forward, backward, nullptr, nullptr, configure_tiles, release_tiles};

}  // namespace amx
}  // namespace edt
