// Attention for few and short molecules: a block serves one molecule and head from shared memory,
// its four warps 16 queries each of a tile of 64.
//   forward   S = Q K^T,  P = softmax(S),  O = P V
//   backward  P from S and the lse, normalised again,  dP = dO V^T,
//             dS = P (dP - rowsum(P dP) + dlse),
//             dV = P^T dO,  dQ = dS K,  dK = dS^T Q
// A molecule with at most 64 keys of at most 64 numbers is read once, and its products stay in
// registers. What is longer goes through tiles, and products are made again where they are needed:
// softmax sees whole rows, every sum has one owner, nothing depends on other molecules.
#pragma once

#include <math.h>

#include <instructions.cuh>

#include "segments.cuh"

namespace edt {

constexpr int kThreads = 128;
constexpr int kTile = 64;   // rows of a tile, queries or keys: 16 for every warp
constexpr int kWidth = 64;  // numbers of a row in a tile

// Rows [T, H, D] of one operand, D contiguous; strides in numbers.
struct AttentionRows {
  void* data;
  int64_t row, head;
};

struct Attention {
  AttentionRows q, k, v;
  float* lse;                      // [Tq, H]: the forward writes it, the backward reads it
  AttentionRows out;               // forward only
  AttentionRows grad, dq, dk, dv;  // backward only
  const float* grad_lse;           // [Tq, H] or null
  float* row_sums;                 // [Tq, H, 2], backward of molecules that are more than one tile
  Offsets q_offsets, k_offsets;
  int64_t molecules;
  int heads, kv_heads, dim;
  bool causal, aligned;  // aligned: rows of all operands begin at multiples of 16 bytes
  float scale;
};

struct AttentionMolecule {
  Segment queries, keys;

  __device__ AttentionMolecule(const Attention& x, int64_t m)
      : queries(x.q_offsets, m), keys(x.k_offsets, m) {}

  // How many keys query i sees: none beyond the last query.
  __device__ int visible(const Attention& x, int i) const {
    if (i >= queries.count) return 0;
    if (!x.causal) return keys.count;
    const int seen = i + 1 + keys.count - queries.count;
    return seen < 0 ? 0 : min(seen, keys.count);
  }
};

__device__ constexpr int round_up(int x, int multiple) {
  return (x + multiple - 1) / multiple * multiple;
}

// Rows of a tile lie 16 bytes further apart than they are long, so that neither the same column of
// eight rows nor a row meets a bank twice.
template <class T>
constexpr int kStride = kWidth + 16 / static_cast<int>(sizeof(T));

template <class T>
constexpr int kTileBytes = kTile * kStride<T> * static_cast<int>(sizeof(T));

template <class T>
struct Tile {
  T* data;                   // [kTile, kStride]
  const T* holds = nullptr;  // where what it holds begins in global memory,
  int held = 0;              // and how much of it there is

  __device__ Tile(unsigned char* memory, int place)
      : data(reinterpret_cast<T*>(memory + place * kTileBytes<T>)) {}
};

// 16 rows of a product with up to 64 columns. With g = lane / 4 and t = 2 (lane % 4) a lane holds,
// of columns 8 n to 8 n + 7: rows [g, g, g + 8, g + 8] and columns [t, t + 1, t, t + 1].
using Products = float[kWidth / 8][4];

__device__ inline void clear(Products& c) {
#pragma unroll
  for (int n = 0; n < kWidth / 8; ++n)
#pragma unroll
    for (int e = 0; e < 4; ++e) c[n][e] = 0;
}

// c += A B of a warp: A [16, depth] and B [depth, columns] in tiles. A_COLUMNS: the tile of A holds
// its columns as rows; B_COLUMNS likewise. What lies in the tiles between depth or columns and the
// next multiple of 16 is read, too.
template <bool A_COLUMNS, bool B_COLUMNS, class T>
__device__ void multiply(Products& c, const T* a, const T* b, int columns, int depth) {
  constexpr int stride = kStride<T>;
  const int lane = threadIdx.x % 32;
  if constexpr (sizeof(T) == 2) {
    const int r = lane % 8, i = lane / 8;  // which row of which matrix this lane names
    for (int k = 0; k < depth; k += 16) {
      uint32_t of_a[4];
      if constexpr (A_COLUMNS)
        load_matrices<true>(of_a, a + (k + 8 * (i / 2) + r) * stride + 8 * (i % 2));
      else
        load_matrices<false>(of_a, a + (8 * (i % 2) + r) * stride + k + 8 * (i / 2));
#pragma unroll
      for (int n = 0; n < kWidth / 8; ++n) {
        if (8 * n >= columns) break;
        uint32_t of_b[2];
        if constexpr (B_COLUMNS)
          load_matrices<false>(of_b, b + (8 * n + r) * stride + k + 8 * (i % 2));
        else
          load_matrices<true>(of_b, b + (k + 8 * (i % 2) + r) * stride + 8 * n);
        multiply_add<T>(c[n], of_a, of_b);
      }
    }
  } else {
    const int g = lane / 4, t = 2 * (lane % 4);
#pragma unroll 4
    for (int k = 0; k < depth; ++k) {
      const T a0 = A_COLUMNS ? a[k * stride + g] : a[g * stride + k];
      const T a1 = A_COLUMNS ? a[k * stride + g + 8] : a[(g + 8) * stride + k];
#pragma unroll
      for (int n = 0; n < kWidth / 8; ++n) {
        if (8 * n >= columns) break;
        const int j = 8 * n + t;
        const T b0 = B_COLUMNS ? b[j * stride + k] : b[k * stride + j];
        const T b1 = B_COLUMNS ? b[(j + 1) * stride + k] : b[k * stride + j + 1];
        c[n][0] = fmaf(a0, b0, c[n][0]);
        c[n][1] = fmaf(a0, b1, c[n][1]);
        c[n][2] = fmaf(a1, b0, c[n][2]);
        c[n][3] = fmaf(a1, b1, c[n][3]);
      }
    }
  }
}

// Products of a warp into the 16 rows of a tile that begin at `rows`.
template <class T>
__device__ void put(T* rows, const Products& c, int columns) {
  const int lane = threadIdx.x % 32, g = lane / 4, t = 2 * (lane % 4);
#pragma unroll
  for (int n = 0; n < kWidth / 8; ++n) {
    if (8 * n >= columns) break;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      T* to = rows + (g + 8 * half) * kStride<T> + 8 * n + t;
      const float first = c[n][2 * half], second = c[n][2 * half + 1];
      if constexpr (sizeof(T) == 2)
        *reinterpret_cast<uint32_t*>(to) = pack<T>(first, second);
      else
        *reinterpret_cast<float2*>(to) = make_float2(first, second);
    }
  }
}

// Over the four lanes that hold a row together.
__device__ inline float row_sum(float x) {
  x += __shfl_xor_sync(~0u, x, 1);
  return x + __shfl_xor_sync(~0u, x, 2);
}
__device__ inline float row_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(~0u, x, 1));
  return fmaxf(x, __shfl_xor_sync(~0u, x, 2));
}

// What the forward and the backward of one molecule share.
template <class T>
struct Block {
  const Attention& x;
  const AttentionMolecule m;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int g = lane / 4, t = 2 * (lane % 4);  // see Products

  __device__ Block(const Attention& x, int64_t molecule) : x(x), m(x, molecule) {}

  __device__ bool one_tile() const { return m.keys.count <= kTile && x.dim <= kWidth; }

  // Of the tiles that begin there.
  __device__ int queries(int first) const { return min(m.queries.count - first, kTile); }
  __device__ int keys(int first) const { return min(m.keys.count - first, kTile); }
  __device__ int width(int column) const { return min(x.dim - column, kWidth); }

  // The warp has queries, or keys, of a tile with so many.
  __device__ bool has_rows(int rows) const { return 16 * warp < rows; }

  // The row of the molecule that entries [2 half] and [2 half + 1] of products belong to.
  __device__ int row(int first, int half) const { return first + 16 * warp + g + 8 * half; }

  __device__ T* own(const Tile<T>& tile) const { return tile.data + 16 * warp * kStride<T>; }

  // Begins to read rows of the molecule into a tile, unless it holds them; says whether it did.
  // Rows and columns beyond, up to a multiple of 16, are 0.
  __device__ bool fetch(Tile<T>& tile, const AttentionRows& from, int64_t first, int rows, int head,
                        int column) const {
    const T* source =
        static_cast<const T*>(from.data) + first * from.row + head * from.head + column;
    const int columns = width(column), size = rows * (kWidth + 1) + columns;
    if (tile.holds == source && tile.held == size) return false;
    __syncthreads();  // all have read what it held
    tile.holds = source;
    tile.held = size;
    constexpr int each = 16 / sizeof(T), per_row = kWidth / each;
    for (int i = threadIdx.x; i < round_up(rows, 16) * per_row; i += kThreads) {
      const int r = i / per_row, c = i % per_row * each;
      if (c >= round_up(columns, 16)) continue;
      const int count = r < rows ? max(0, min(columns - c, each)) : 0;
      const T* numbers = count > 0 ? source + r * from.row + c : source;
      T* to = tile.data + r * kStride<T> + c;
      if (x.aligned)
        copy_async(to, numbers, count * sizeof(T));
      else
        for (int j = 0; j < each; ++j) to[j] = j < count ? numbers[j] : T{};
    }
    return true;
  }

  __device__ bool fetch_queries(Tile<T>& tile, const AttentionRows& from, int first, int head,
                                int column) const {
    return fetch(tile, from, m.queries.begin + first, queries(first), head, column);
  }

  __device__ bool fetch_keys(Tile<T>& tile, const AttentionRows& from, int first, int head,
                             int column) const {
    return fetch(tile, from, m.keys.begin + first, keys(first), head / (x.heads / x.kv_heads),
                 column);
  }

  // What was fetched is there for all warps.
  __device__ void arrive() const {
    wait_for_copies();
    __syncthreads();
  }

  // Products of the warp, by way of its rows of a tile, into `rows` rows from `first` on.
  __device__ void write(const Products& c, Tile<T>& tile, const AttentionRows& to, int64_t first,
                        int rows, int head, int column) const {
    tile.holds = nullptr;
    if (!has_rows(rows)) return;
    const int columns = width(column);
    T* staged = own(tile);
    __syncwarp();
    put(staged, c, columns);
    __syncwarp();
    constexpr int each = 16 / sizeof(T), per_row = kWidth / each;
    T* target = static_cast<T*>(to.data) + (first + 16 * warp) * to.row + head * to.head + column;
    for (int i = lane; i < 16 * per_row; i += 32) {
      const int r = i / per_row, c = i % per_row * each;
      if (16 * warp + r >= rows || c >= columns) continue;
      if (x.aligned)
        *reinterpret_cast<int4*>(target + r * to.row + c) =
            *reinterpret_cast<const int4*>(staged + r * kStride<T> + c);
      else
        for (int j = 0; j < min(each, columns - c); ++j)
          target[r * to.row + c + j] = staged[r * kStride<T> + c + j];
    }
    __syncwarp();
  }
};

// Logits of a tile in place of S: -inf where the query does not see the key.
__device__ inline void mask(Products& s, const int (&seen)[2], int first_key, int t, float scale) {
#pragma unroll
  for (int n = 0; n < kWidth / 8; ++n)
#pragma unroll
    for (int e = 0; e < 4; ++e)
      s[n][e] = first_key + 8 * n + t + e % 2 < seen[e / 2] ? s[n][e] * scale : -INFINITY;
}

__device__ inline void scale_rows(Products& c, const float (&factor)[2]) {
#pragma unroll
  for (int n = 0; n < kWidth / 8; ++n)
#pragma unroll
    for (int e = 0; e < 4; ++e) c[n][e] *= factor[e / 2];
}

template <class T>
struct Forward {
  static constexpr int kTiles = 4;

  const Block<T> b;
  Tile<T> q, k, v, p;

  __device__ Forward(const Attention& x, int64_t molecule, unsigned char* memory)
      : b(x, molecule), q(memory, 0), k(memory, 1), v(memory, 2), p(memory, 3) {}

  __device__ void run(int head) {
    for (int first = 0; first < b.m.queries.count; first += kTile) run_tile(head, first);
  }

 private:
  __device__ void run_tile(int head, int first) {
    const int rows = b.queries(first), all = b.m.keys.count;
    int seen[2];
    for (int half = 0; half < 2; ++half) seen[half] = b.m.visible(b.x, b.row(first, half));

    // Largest logit and sum of weights of every row, over all keys.
    Products s;
    float largest[2] = {-INFINITY, -INFINITY}, base[2] = {0, 0}, total[2] = {0, 0};
    for (int key = 0; key < all; key += kTile) {
      logits(s, head, first, key, seen);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float most = largest[half];
#pragma unroll
        for (int n = 0; n < kWidth / 8; ++n)
          most = fmaxf(most, fmaxf(s[n][2 * half], s[n][2 * half + 1]));
        most = row_max(most);
        base[half] = most == -INFINITY ? 0 : most;
        total[half] *= expf(largest[half] - base[half]);
        largest[half] = most;
      }
      weigh(s, base);
#pragma unroll
      for (int half = 0; half < 2; ++half)
#pragma unroll
        for (int n = 0; n < kWidth / 8; ++n) total[half] += s[n][2 * half] + s[n][2 * half + 1];
    }
    float inverse[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      total[half] = row_sum(total[half]);
      inverse[half] = total[half] == 0 ? 0 : 1 / total[half];
      const int row = b.row(first, half);
      if (b.t == 0 && row < b.m.queries.count)
        b.x.lse[(b.m.queries.begin + row) * b.x.heads + head] =
            total[half] == 0 ? -INFINITY : base[half] + logf(total[half]);
    }

    for (int column = 0; column < b.x.dim; column += kWidth) {
      Products o;
      clear(o);
      for (int key = 0; key < all; key += kTile) {
        const int keys = b.keys(key);
        if (all > kTile) {
          logits(s, head, first, key, seen);
          weigh(s, base);
        }
        if ((column == 0 || all > kTile) && b.has_rows(rows)) {
          scale_rows(s, inverse);
          __syncwarp();
          put(b.own(p), s, round_up(keys, 16));
          __syncwarp();
        }
        if (b.fetch_keys(v, b.x.v, key, head, column)) b.arrive();
        if (b.has_rows(rows)) multiply<false, false>(o, b.own(p), v.data, b.width(column), keys);
      }
      b.write(o, q, b.x.out, b.m.queries.begin + first, rows, head, column);
    }
  }

  __device__ void logits(Products& s, int head, int first, int key, const int (&seen)[2]) {
    clear(s);
    for (int column = 0; column < b.x.dim; column += kWidth) {
      bool fetched = b.fetch_queries(q, b.x.q, first, head, column);
      fetched |= b.fetch_keys(k, b.x.k, key, head, column);
      if (b.one_tile()) fetched |= b.fetch_keys(v, b.x.v, key, head, column);  // on the same way
      if (fetched) b.arrive();
      if (b.has_rows(b.queries(first)))
        multiply<false, true>(s, b.own(q), k.data, b.keys(key), b.width(column));
    }
    mask(s, seen, key, b.t, b.x.scale);
  }

  __device__ static void weigh(Products& s, const float (&base)[2]) {
#pragma unroll
    for (int n = 0; n < kWidth / 8; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e) s[n][e] = expf(s[n][e] - base[e / 2]);
  }
};

// A block serves one key head, with the query heads that read it.
template <class T>
struct Backward {
  static constexpr int kTiles = 6;

  const Block<T> b;
  Tile<T> q, grad, k, v, p, dx;  // dx: scale times the gradient of the logits

  __device__ Backward(const Attention& x, int64_t molecule, unsigned char* memory)
      : b(x, molecule),
        q(memory, 0),
        grad(memory, 1),
        k(memory, 2),
        v(memory, 3),
        p(memory, 4),
        dx(memory, 5) {}

  __device__ void run(int kv_head) {
    const int group = b.x.heads / b.x.kv_heads, head = kv_head * group;
    if (b.one_tile()) {
      run_one_tile(head, head + group);
    } else {
      run_queries(head, head + group);
      __syncthreads();  // what is known of the rows lies in global memory
      run_keys(head, head + group);
    }
  }

 private:
  // What a lane knows of its two rows: the weights of row r are e^(logit - lse), and with
  // inverse = 1 / sum(weights) and shift = dlse - rowsum(P dP),
  //   P = weights inverse,  dS = P (dP + shift).
  // The rounding of a large lse cancels in P.
  struct RowsOfLane {
    int seen[2];
    float lse[2], inverse[2], shift[2];
  };

  __device__ int64_t entry(int first, int half, int head) const {
    return (b.m.queries.begin + b.row(first, half)) * b.x.heads + head;
  }

  __device__ RowsOfLane rows_of_lane(int first, int head) const {
    RowsOfLane rows{};
    for (int half = 0; half < 2; ++half) {
      const int row = b.row(first, half);
      rows.seen[half] = b.m.visible(b.x, row);
      if (row < b.m.queries.count) {
        const float lse = b.x.lse[entry(first, half, head)];
        rows.lse[half] = lse == -INFINITY ? 0 : lse;
      }
    }
    return rows;
  }

  // Weights and dP of a tile of keys.
  __device__ void weigh(Products& weights, Products& dp, const RowsOfLane& rows, int head,
                        int first, int key) {
    clear(weights);
    clear(dp);
    for (int column = 0; column < b.x.dim; column += kWidth) {
      bool fetched = b.fetch_queries(q, b.x.q, first, head, column);
      fetched |= b.fetch_queries(grad, b.x.grad, first, head, column);
      fetched |= b.fetch_keys(k, b.x.k, key, head, column);
      fetched |= b.fetch_keys(v, b.x.v, key, head, column);
      if (fetched) b.arrive();
      if (!b.has_rows(b.queries(first))) continue;
      multiply<false, true>(weights, b.own(q), k.data, b.keys(key), b.width(column));
      multiply<false, true>(dp, b.own(grad), v.data, b.keys(key), b.width(column));
    }
    mask(weights, rows.seen, key, b.t, b.x.scale);
#pragma unroll
    for (int n = 0; n < kWidth / 8; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e) weights[n][e] = expf(weights[n][e] - rows.lse[e / 2]);
  }

  // Completes what is known of the rows; leaves weights and dP of the last tile of keys.
  __device__ void sum_rows(RowsOfLane& rows, Products& weights, Products& dp, int head, int first) {
    float total[2] = {}, product[2] = {};
    for (int key = 0; key < b.m.keys.count; key += kTile) {
      weigh(weights, dp, rows, head, first, key);
#pragma unroll
      for (int n = 0; n < kWidth / 8; ++n)
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          total[e / 2] += weights[n][e];
          product[e / 2] = fmaf(weights[n][e], dp[n][e], product[e / 2]);
        }
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      total[half] = row_sum(total[half]);
      product[half] = row_sum(product[half]);
      rows.inverse[half] = total[half] == 0 ? 0 : 1 / total[half];
      rows.shift[half] = -product[half] * rows.inverse[half];
      if (b.x.grad_lse && b.row(first, half) < b.m.queries.count)
        rows.shift[half] += b.x.grad_lse[entry(first, half, head)];
    }
  }

  // P and dx of the warp's rows into their tiles.
  __device__ void put_products(const RowsOfLane& rows, Products& weights, Products& dp, int queries,
                               int keys) {
#pragma unroll
    for (int n = 0; n < kWidth / 8; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        weights[n][e] *= rows.inverse[e / 2];
        dp[n][e] = weights[n][e] * (dp[n][e] + rows.shift[e / 2]) * b.x.scale;
      }
    if (!b.has_rows(queries)) return;
    put(b.own(p), weights, round_up(keys, 16));
    put(b.own(dx), dp, round_up(keys, 16));
  }

  // dV and dK of the warp's keys += what a tile of queries gives.
  __device__ void add_to_keys(Products& dk, Products& dv, int column, int queries, int keys) const {
    if (!b.has_rows(keys)) return;
    multiply<true, false>(dv, p.data + 16 * b.warp, grad.data, b.width(column), queries);
    multiply<true, false>(dk, dx.data + 16 * b.warp, q.data, b.width(column), queries);
  }

  // dQ of the warp's queries += what a tile of keys gives.
  __device__ void add_to_queries(Products& dq, int column, int queries, int keys) const {
    if (b.has_rows(queries)) multiply<false, false>(dq, b.own(dx), k.data, b.width(column), keys);
  }

  __device__ void write_queries(const Products& dq, int head, int first, int column) {
    b.write(dq, p, b.x.dq, b.m.queries.begin + first, b.queries(first), head, column);
  }

  __device__ void write_keys(const Products& dk, const Products& dv, int head, int key,
                             int column) {
    const int kv_head = head / (b.x.heads / b.x.kv_heads);
    b.write(dk, dx, b.x.dk, b.m.keys.begin + key, b.keys(key), kv_head, column);
    b.write(dv, p, b.x.dv, b.m.keys.begin + key, b.keys(key), kv_head, column);
  }

  // All three gradients, for keys that are one tile.
  __device__ void run_one_tile(int head, int last_head) {
    const int keys = b.m.keys.count;
    const int first_head = head;
    Products dk, dv;
    clear(dk);
    clear(dv);
    for (; head < last_head; ++head)
      for (int first = 0; first < b.m.queries.count; first += kTile) {
        const int queries = b.queries(first);
        Products weights, dp, dq;
        clear(weights);
        clear(dp);
        clear(dq);
        RowsOfLane rows = rows_of_lane(first, head);
        sum_rows(rows, weights, dp, head, first);
        put_products(rows, weights, dp, queries, keys);
        __syncthreads();
        add_to_keys(dk, dv, 0, queries, keys);
        add_to_queries(dq, 0, queries, keys);
        __syncthreads();
        write_queries(dq, head, first, 0);
      }
    write_keys(dk, dv, first_head, 0, 0);
  }

  // dQ, and what is known of every row.
  __device__ void run_queries(int head, int last_head) {
    for (; head < last_head; ++head)
      for (int first = 0; first < b.m.queries.count; first += kTile) {
        const int queries = b.queries(first);
        Products weights, dp;
        RowsOfLane rows = rows_of_lane(first, head);
        sum_rows(rows, weights, dp, head, first);
        for (int half = 0; half < 2; ++half)
          if (b.t == 0 && b.row(first, half) < b.m.queries.count) {
            float* sums = b.x.row_sums + 2 * entry(first, half, head);
            sums[0] = rows.inverse[half], sums[1] = rows.shift[half];
          }
        for (int column = 0; column < b.x.dim; column += kWidth) {
          Products dq;
          clear(dq);
          for (int key = 0; key < b.m.keys.count; key += kTile) {
            weigh(weights, dp, rows, head, first, key);
            put_products(rows, weights, dp, queries, b.keys(key));
            __syncwarp();
            if (b.fetch_keys(k, b.x.k, key, head, column)) b.arrive();
            add_to_queries(dq, column, queries, b.keys(key));
            __syncwarp();
          }
          write_queries(dq, head, first, column);
        }
      }
  }

  // dK and dV.
  __device__ void run_keys(int first_head, int last_head) {
    for (int key = 0; key < b.m.keys.count; key += kTile)
      for (int column = 0; column < b.x.dim; column += kWidth) {
        Products dk, dv;
        clear(dk);
        clear(dv);
        for (int head = first_head; head < last_head; ++head)
          for (int first = 0; first < b.m.queries.count; first += kTile) {
            const int queries = b.queries(first), keys = b.keys(key);
            RowsOfLane rows = rows_of_lane(first, head);
            for (int half = 0; half < 2; ++half)
              if (b.row(first, half) < b.m.queries.count) {
                const float* sums = b.x.row_sums + 2 * entry(first, half, head);
                rows.inverse[half] = sums[0], rows.shift[half] = sums[1];
              }
            Products weights, dp;
            weigh(weights, dp, rows, head, first, key);
            put_products(rows, weights, dp, queries, keys);
            bool fetched = b.fetch_queries(q, b.x.q, first, head, column);
            fetched |= b.fetch_queries(grad, b.x.grad, first, head, column);
            if (fetched) wait_for_copies();
            __syncthreads();
            add_to_keys(dk, dv, column, queries, keys);
            __syncthreads();
          }
        write_keys(dk, dv, first_head, key, column);
      }
  }
};

// The rows from the last offset on, which belong to no molecule.
template <class T>
__device__ void fill_tail(const AttentionRows& rows, const Offsets& offsets, int64_t molecules,
                          int64_t numbers, int block, int blocks) {
  T* data = static_cast<T*>(rows.data);
  const int64_t end = offsets.rows * numbers;
  for (int64_t i = offsets[molecules] * numbers + block * kThreads + threadIdx.x; i < end;
       i += static_cast<int64_t>(blocks) * kThreads)
    data[i] = T{};
}

// Blocks that fill tails; the others serve a molecule and head each.
constexpr int kTailBlocks = 32;

template <class T>
__global__ void __launch_bounds__(kThreads)
    ragged_attention_forward(const __grid_constant__ Attention x) {
  const int64_t task = blockIdx.x;
  if (task < x.molecules * x.heads) {
    Forward<T>(x, task / x.heads, dynamic_shared()).run(static_cast<int>(task % x.heads));
    return;
  }
  const int block = static_cast<int>(task - x.molecules * x.heads);
  fill_tail<T>(x.out, x.q_offsets, x.molecules, int64_t{x.heads} * x.dim, block, kTailBlocks);
  const int64_t end = x.q_offsets.rows * x.heads;
  for (int64_t i = x.q_offsets[x.molecules] * x.heads + block * kThreads + threadIdx.x; i < end;
       i += kTailBlocks * kThreads)
    x.lse[i] = -INFINITY;
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    ragged_attention_backward(const __grid_constant__ Attention x) {
  const int64_t task = blockIdx.x;
  if (task < x.molecules * x.kv_heads) {
    Backward<T>(x, task / x.kv_heads, dynamic_shared()).run(static_cast<int>(task % x.kv_heads));
    return;
  }
  const int block = static_cast<int>(task - x.molecules * x.kv_heads);
  const int64_t keys = int64_t{x.kv_heads} * x.dim;
  fill_tail<T>(x.dq, x.q_offsets, x.molecules, int64_t{x.heads} * x.dim, block, kTailBlocks);
  fill_tail<T>(x.dk, x.k_offsets, x.molecules, keys, block, kTailBlocks);
  fill_tail<T>(x.dv, x.k_offsets, x.molecules, keys, block, kTailBlocks);
}

}  // namespace edt
