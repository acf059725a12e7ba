// A block of rows is shrunk to the rank, by parts of the input's width, and expanded to the output,
// a tile at a time, which meets the base in registers. Every number is summed in the order of the
// columns, or of the rows, wherever blocks begin and end, so a molecule has the same bits in every
// batch.
#include "instance_lora.h"

#include "matrix.h"

namespace edt {
namespace {

constexpr int64_t kRows = 96;      // of a block: its part of x stays in the L2 cache
constexpr int64_t kDepth = 256;    // columns of x in a part
constexpr int64_t kColumns = 128;  // of the left of an outer sum

template <class T>
constexpr int64_t kPanel = kTileCols * kLanes<T>;
// Rows of an outer sum's left are no power of two apart, or they would share lines of the cache.
template <class T>
constexpr int64_t kLeftStride = kColumns + 2 * kLanes<T>;

int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// Blocks of a thread's scratch, one behind the other.
template <class T>
struct Blocks {
  T* end;

  T* take(int64_t count) {
    T* block = end;
    end += padded<T>(count);
    return block;
  }
  int64_t bytes() const { return reinterpret_cast<char*>(end) - static_cast<char*>(nullptr); }
};

template <class T>
struct AdaptScratch : Blocks<T> {
  T *x, *down, *shrunk, *up;

  AdaptScratch(void* memory, const Adapter& a) : Blocks<T>{static_cast<T*>(memory)} {
    const int64_t rank = padded<T>(a.rank);
    x = this->take(kRows * kDepth);
    down = this->take(kDepth * rank);
    shrunk = this->take(kRows * rank);
    up = this->take(a.out && a.up_step > 0 ? panels(a) * a.rank * kPanel<T> : 0);
  }

  static int64_t panels(const Adapter& a) { return (a.width + kPanel<T> - 1) / kPanel<T>; }
};

template <class T>
struct OuterScratch : Blocks<T> {
  T *left, *right, *sums;

  OuterScratch(void* memory, const OuterSum& s) : Blocks<T>{static_cast<T*>(memory)} {
    const int64_t rank = padded<T>(s.rank);
    left = this->take(kRows * kLeftStride<T>);
    right = this->take(kRows * rank);
    sums = this->take(kColumns * rank);
  }
};

template <class Scratch, class X>
int64_t scratch_bytes(const X& x) {
  return Scratch(nullptr, x).bytes();
}

// `rows` rows of `width` numbers, `stride` apart, copied as T to rows of whole vectors.
template <class S, class T>
Matrix<T> copied(const S* from, int64_t stride, int64_t rows, int64_t width, Matrix<T> to) {
  for (int64_t i = 0; i < rows; ++i) widen(from + i * stride, width, to.data + i * to.stride);
  return to;
}

// Likewise, copied only where they are no whole vectors of T already.
template <class S, class T>
Matrix<T> whole_vectors(const S* from, int64_t rows, int64_t width, T* copy) {
  if constexpr (sizeof(S) == sizeof(T))
    if (width % kLanes<T> == 0) return {const_cast<S*>(from), width};
  return copied(from, width, rows, width, Matrix<T>{copy, padded<T>(width)});
}

template <class S, class T = typename ComputeType<S>::type>
void pack_panels(const S* up, int64_t width, int64_t rank, int64_t begin, int64_t end, T* packed) {
  constexpr int W = kLanes<T>;
  for (int64_t panel = begin; panel < end; ++panel)
    for (int64_t j = 0; j < kPanel<T>; j += W) {
      const int64_t first = panel * kPanel<T> + j, rows = least(width - first, W);
      T* to = packed + panel * rank * kPanel<T> + j;
      for (int64_t k = 0; k < rank; k += W) {
        const int64_t depth = least(rank - k, W);
        Vec<T> x[W] = {};
        for (int64_t i = 0; i < rows; ++i) {
          T row[W];
          widen(up + (first + i) * rank + k, depth, row);
          x[i] = load(row);
        }
        transpose_square<T>(x);
        for (int64_t i = 0; i < depth; ++i) store(to + (k + i) * kPanel<T>, x[i]);
      }
    }
}

template <class S, class T = typename ComputeType<S>::type>
void pack(const Adapter& a, int64_t begin, int64_t end, void* packed) {
  pack_panels(static_cast<const S*>(a.up), a.width, a.rank, begin, end, static_cast<T*>(packed));
}

// One row times a matrix that is read from beginning to end, as far as registers go: a step of
// decoding waits for memory. The sums are those of `multiply`.
template <bool ADD, int COLS = 8, class T>
void multiply_row(Factor<T> a, Matrix<T> b, T* c, int64_t cols, int64_t depth) {
  if constexpr (COLS > 0) {
    constexpr int64_t kStep = COLS * kLanes<T>;
    for (; cols >= kStep; cols -= kStep, b.data += kStep, c += kStep)
      multiply_tile<T, 1, COLS, ADD>(a, b, {c, 0}, depth);
    multiply_row<ADD, COLS - 1>(a, b, c, cols, depth);
  }
}

template <bool ADD, class T>
void multiply_rows(Factor<T> a, Matrix<T> b, Matrix<T> c, int64_t rows, int64_t depth) {
  if (rows == 1)
    multiply_row<ADD>(a, b, c.data, c.stride, depth);
  else
    multiply<ADD>(a, b, c, rows, c.stride, depth);
}

// to [rows, rank] = x D, for rows of one D.
template <class S, class T>
void shrink(const Adapter& a, const S* x, int64_t rows, const S* down, Matrix<T> to,
            const AdaptScratch<T>& scratch) {
  int64_t k = 0;
  do {  // once for no column, too: the product is then 0
    const int64_t depth = least(a.in - k, kDepth);
    Matrix<T> part;
    if constexpr (sizeof(S) == sizeof(T))
      part = {const_cast<S*>(x) + k, a.in};
    else
      part = copied(x + k, a.in, rows, depth, Matrix<T>{scratch.x, kDepth});
    const auto d = whole_vectors(down + k * a.rank, depth, a.rank, scratch.down);
    if (k == 0)
      multiply_rows<false>(plain(part), d, to, rows, depth);
    else
      multiply_rows<true>(plain(part), d, to, rows, depth);
    k += kDepth;
  } while (k < a.in);
}

// out = base - less, n numbers.
template <class S, class T>
void subtract(const S* base, const T* less, int64_t n, S* out) {
  constexpr int W = kLanes<T>;
  for (int64_t j = 0; j < n; j += W) {
    const int64_t bytes = least(n - j, W) * sizeof(S);
    S lanes[W] = {};
    if (base) std::memcpy(lanes, base + j, bytes);
    store(lanes, load(lanes) - load(less + j));
    std::memcpy(out + j, lanes, bytes);
  }
}

// ROWS rows of out = base - less U^T in the first `columns` of a panel; rows of base and out are
// `stride` apart.
template <class S, class T, int ROWS>
void expand_tile(Factor<T> less, const T* panel, int64_t rank, const S* base, S* out,
                 int64_t stride, int64_t columns) {
  constexpr int W = kLanes<T>;
  Vec<T> sum[ROWS][kTileCols] = {};
  for (int64_t k = 0; k < rank; ++k, panel += kPanel<T>) {
    Vec<T> u[kTileCols];
#pragma GCC unroll 8
    for (int j = 0; j < kTileCols; ++j) u[j] = load(panel + j * W);
#pragma GCC unroll 12
    for (int i = 0; i < ROWS; ++i) {
      const Vec<T> x = broadcast(less.data[i * less.row + k]);
#pragma GCC unroll 8
      for (int j = 0; j < kTileCols; ++j) sum[i][j] = fma(x, u[j], sum[i][j]);
    }
  }
#pragma GCC unroll 12
  for (int i = 0; i < ROWS; ++i) {
    const S* from = base ? base + i * stride : nullptr;
    if (columns < kPanel<T>) {
      T row[kPanel<T>];
#pragma GCC unroll 8
      for (int j = 0; j < kTileCols; ++j) store(row + j * W, sum[i][j]);
      subtract(from, row, columns, out + i * stride);
      continue;
    }
#pragma GCC unroll 8
    for (int j = 0; j < kTileCols; ++j)
      store(out + i * stride + j * W, (from ? load(from + j * W) : Vec<T>{}) - sum[i][j]);
  }
}

// The same for at most ROWS rows and all panels.
template <class S, class T, int ROWS>
void expand_group(const Adapter& a, Factor<T> less, int64_t rows, const T* packed, const S* base,
                  S* out) {
  if constexpr (ROWS > 0) {
    if (rows < ROWS) return expand_group<S, T, ROWS - 1>(a, less, rows, packed, base, out);
    for (int64_t j = 0; j < a.width; j += kPanel<T>)
      expand_tile<S, T, ROWS>(less, packed + j * a.rank, a.rank, base ? base + j : nullptr, out + j,
                              a.width, a.width - j);
  }
}

// Rows from `first` of out = base - less U^T, for rows of one U.
template <class S, class T>
void expand(const Adapter& a, int64_t first, int64_t rows, Matrix<T> less, const T* packed) {
  for (int64_t i = 0; i < rows; i += kTileRows) {
    const int64_t at = (first + i) * a.width;
    expand_group<S, T, kTileRows>(
        a, plain(Matrix<T>{less.data + i * less.stride, less.stride}), least(rows - i, kTileRows),
        packed, a.base ? static_cast<const S*>(a.base) + at : nullptr, static_cast<S*>(a.out) + at);
  }
}

// visit(molecule, begin, end) of rows [begin, end), the first of them of `molecule`.
template <class F>
void for_molecules(const int64_t* offsets, int64_t molecule, int64_t begin, int64_t end, F visit) {
  for (; begin < end; ++molecule) {
    const int64_t stop = least(offsets[molecule + 1], end);
    if (begin < stop) visit(molecule, begin, stop);
    begin = stop;
  }
}

template <class S, class T = typename ComputeType<S>::type>
void adapt(const Adapter& a, const int64_t* offsets, int64_t molecule, int64_t begin, int64_t end,
           void* memory) {
  const AdaptScratch<T> scratch(memory, a);
  const Matrix<T> shrunk{scratch.shrunk, padded<T>(a.rank)};
  int64_t in_scratch = -1;  // the molecule whose U it holds
  for (int64_t r = begin; r < end; r += kRows) {
    const int64_t stop = least(end, r + kRows);
    while (offsets[molecule + 1] <= r) ++molecule;
    const auto rows_from = [&](int64_t row) {
      return Matrix<T>{shrunk.data + (row - r) * shrunk.stride, shrunk.stride};
    };
    const auto shrink_rows = [&](int64_t m, int64_t p, int64_t q) {
      shrink(a, static_cast<const S*>(a.x) + p * a.in, q - p,
             static_cast<const S*>(a.down) + m * a.down_step, rows_from(p), scratch);
    };
    const auto expand_rows = [&](int64_t m, int64_t p, int64_t q) {
      if (!a.packed && m != in_scratch) {
        pack_panels(static_cast<const S*>(a.up) + m * a.up_step, a.width, a.rank, 0,
                    scratch.panels(a), scratch.up);
        in_scratch = m;
      }
      const T* packed = a.packed ? static_cast<const T*>(a.packed) : scratch.up;
      expand<S>(a, p, q - p, rows_from(p), packed);
    };

    if (a.down_step > 0)
      for_molecules(offsets, molecule, r, stop, shrink_rows);
    else
      shrink_rows(0, r, stop);
    for (int64_t i = 0; i < stop - r; ++i) {
      T* row = shrunk.data + i * shrunk.stride;
      if (a.shrunk) narrow(row, a.rank, static_cast<T*>(a.shrunk) + (r + i) * a.rank);
      // A sum of products with zeros is +0, and base - 0 is the base, also where that is -0.
      for (int64_t k = 0; k < a.rank; k += kLanes<T>)
        store(row + k, load(row + k) * static_cast<T>(-a.scale));
    }
    if (!a.out) continue;
    if (a.up_step > 0)
      for_molecules(offsets, molecule, r, stop, expand_rows);
    else
      expand_rows(0, r, stop);
  }
}

template <class S, class T = typename ComputeType<S>::type>
void outer(const OuterSum& s, int64_t first, int64_t begin, int64_t end, void* out, void* memory) {
  const OuterScratch<T> scratch(memory, s);
  const int64_t columns = least(s.width - first, kColumns), rank = padded<T>(s.rank);
  const Matrix<T> sums{scratch.sums, rank};
  std::memset(sums.data, 0, columns * rank * sizeof(T));
  for (int64_t r = begin; r < end; r += kRows) {
    const int64_t rows = least(end - r, kRows);
    const auto left = copied(static_cast<const S*>(s.left) + r * s.width + first, s.width, rows,
                             columns, Matrix<T>{scratch.left, kLeftStride<T>});
    const auto right =
        whole_vectors(static_cast<const T*>(s.right) + r * s.rank, rows, s.rank, scratch.right);
    multiply<true>(transposed(left), right, sums, columns, rank, rows);
  }
  for (int64_t i = 0; i < columns; ++i) {
    T* row = sums.data + i * rank;
    for (int64_t k = 0; k < rank; k += kLanes<T>)
      store(row + k, load(row + k) * static_cast<T>(s.scale));
    narrow(row, s.rank, static_cast<S*>(out) + (first + i) * s.rank);
  }
}

template <class S, class T = typename ComputeType<S>::type>
constexpr InstanceLoraKernels kernels = {kPanel<T>,
                                         kColumns,
                                         scratch_bytes<AdaptScratch<T>, Adapter>,
                                         scratch_bytes<OuterScratch<T>, OuterSum>,
                                         pack<S>,
                                         adapt<S>,
                                         outer<S>};

}  // namespace

namespace EDT_ISA {

const InstanceLoraTable instance_lora_kernels = {
    {kernels<float>, kernels<double>, kernels<BFloat16>, kernels<Half>}};

}  // namespace EDT_ISA
}  // namespace edt
