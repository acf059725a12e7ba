// Bundles: what kernels over segments work on at a time. Either a block of columns of one segment,
// or segments of a single column, one in every lane. Lanes never meet, so a segment has the same
// bits in both. For *.isa.cpp files only.
#pragma once

#include "half.h"
#include "segment_rows.h"

namespace edt {
namespace {

// What numbers of T are computed in: float for half types.
template <class T>
using Wide = std::remove_cvref_t<decltype(load(static_cast<const T*>(nullptr))[0])>;

template <class T>
EDT_INLINE T widen(T x) {
  return x;
}

EDT_INLINE float widen(BFloat16 x) { return __builtin_bit_cast(float, x.bits << 16); }

EDT_INLINE float widen(Half x) { return __builtin_bit_cast(_Float16, x.bits); }

// A vector's worth of numbers in memory.
template <class T>
struct Copy {
  static constexpr int kCount = kVectorBytes / (sizeof(T) == 2 ? 4 : sizeof(T));
  T numbers[kCount] = {};
};

// Moves of the first n numbers, 0 < n < kCount, that touch no others: `masked_load` leaves 0 there.
#if defined(EDT_ISA_avx512)
template <class T>
EDT_INLINE void masked_load(Copy<T>* to, const T* from, int64_t n) {
  const auto lanes = static_cast<__mmask16>((1 << n) - 1);
  if constexpr (sizeof(T) == 2)
    _mm256_storeu_si256((__m256i*)to, _mm256_maskz_loadu_epi16(lanes, from));
  else if constexpr (sizeof(T) == 4)
    _mm512_storeu_si512(to, _mm512_maskz_loadu_epi32(lanes, from));
  else
    _mm512_storeu_si512(to, _mm512_maskz_loadu_epi64(lanes, from));
}

template <class T>
EDT_INLINE void masked_store(T* to, const Copy<T>& from, int64_t n) {
  const auto lanes = static_cast<__mmask16>((1 << n) - 1);
  if constexpr (sizeof(T) == 2)
    _mm256_mask_storeu_epi16(to, lanes, _mm256_loadu_si256((const __m256i*)&from));
  else if constexpr (sizeof(T) == 4)
    _mm512_mask_storeu_epi32(to, lanes, _mm512_loadu_si512(&from));
  else
    _mm512_mask_storeu_epi64(to, lanes, _mm512_loadu_si512(&from));
}
#else
template <class T>
EDT_INLINE void masked_load(Copy<T>* to, const T* from, int64_t n) {
#if defined(EDT_ISA_avx2)
  if constexpr (sizeof(T) > 2) {
    using Number = std::conditional_t<sizeof(T) == 4, float, double>;
    const auto lanes = (__m256i)(iota<Number>() < static_cast<typename Float<Number>::Int>(n));
    if constexpr (sizeof(T) == 4)
      _mm256_storeu_si256((__m256i*)to, _mm256_maskload_epi32((const int*)from, lanes));
    else
      _mm256_storeu_si256((__m256i*)to, _mm256_maskload_epi64((const long long*)from, lanes));
    return;
  }
#endif
  __builtin_memcpy(to, from, n * sizeof(T));
}

template <class T>
EDT_INLINE void masked_store(T* to, const Copy<T>& from, int64_t n) {
  __builtin_memcpy(to, &from, n * sizeof(T));
}
#endif

// Vectors that are worked on together: with as many sums beside them they fill 16 registers.
constexpr int kBlockVectors = 8;

// A segment, its places, and those of them that are in the share.
struct Segment {
  int64_t segment, begin, end, share_begin, share_end;
};

// COUNT vectors of columns of one segment; with !WHOLE the `lanes` last columns.
template <class W, int COUNT, bool WHOLE>
struct ColumnBlock : Segment {
  static constexpr bool kSegments = false;  // do lanes hold segments?
  static constexpr int kCount = COUNT;      // vectors
  using Row = int64_t;

  int64_t dim, column, lanes;

  EDT_INLINE int64_t rounds() const { return end - begin; }
  EDT_INLINE int64_t first_round() const { return share_begin - begin; }
  EDT_INLINE int64_t last_round() const { return share_end - begin; }
  EDT_INLINE W length() const { return static_cast<W>(end - begin); }

  // The row that round i meets.
  EDT_INLINE Row row(const int64_t* order, int64_t i) const {
    return order ? order[begin + i] : begin + i;
  }

  EDT_INLINE Ints<W> index(Row row) const {
    return Ints<W>{} + static_cast<typename Float<W>::Int>(row);
  }

  // x where a lane has a row, `rest` elsewhere.
  EDT_INLINE Vec<W> keep(Vec<W> x, Row, W) const { return x; }

  // One number of the row, for all columns.
  template <class T>
  EDT_INLINE W number(const T* from, Row row) const {
    return widen(from[row]);
  }

  template <class T>
  EDT_INLINE void write_number(T* to, Row row, W x) const {
    Copy<T> copy;
    store(copy.numbers, broadcast(x));
    to[row] = copy.numbers[0];
  }

  // The sum over columns, from the first to those of this block, in lane order; `sum` carries it
  // from block to block.
  EDT_INLINE W add_columns(Vec<W> x, W* sum) const {
    return *sum = (column == 0 ? 0 : *sum) + reduce_sum<W>(x);
  }

  template <class T>
  EDT_INLINE Vec<W> read(const T* from, Row row, int j) const {
    from += row * dim + column;
    if constexpr (WHOLE) return load(from + j * kLanes<W>);
    Copy<T> copy;
    masked_load(&copy, from, lanes);
    return load(copy.numbers);
  }

  template <class T>
  EDT_INLINE void write(T* to, Row row, int j, Vec<W> x) const {
    to += row * dim + column;
    if constexpr (WHOLE) return store(to + j * kLanes<W>, x);
    Copy<T> copy;
    store(copy.numbers, x);
    masked_store(to, copy, lanes);
  }
};

#if defined(EDT_ISA_avx512)
// Words of W at from + SCALE index.
template <int SCALE, class W>
EDT_INLINE Vec<W> gather_words(const void* from, Ints<W> index, Ints<W> on) {
  if constexpr (sizeof(W) == 8)
    return (Vec<W>)_mm512_mask_i64gather_pd(_mm512_setzero_pd(), _mm512_movepi64_mask((__m512i)on),
                                            (__m512i)index, from, SCALE);
  else
    return (Vec<W>)_mm512_mask_i32gather_ps(_mm512_setzero_ps(), _mm512_movepi32_mask((__m512i)on),
                                            (__m512i)index, from, SCALE);
}
#elif defined(EDT_ISA_avx2)
template <int SCALE, class W>
EDT_INLINE Vec<W> gather_words(const void* from, Ints<W> index, Ints<W> on) {
  if constexpr (sizeof(W) == 8)
    return (Vec<W>)_mm256_mask_i64gather_pd(_mm256_setzero_pd(), (const double*)from,
                                            (__m256i)index, (__m256d)on, SCALE);
  else
    return (Vec<W>)_mm256_mask_i32gather_ps(_mm256_setzero_ps(), (const float*)from, (__m256i)index,
                                            (__m256)on, SCALE);
}
#endif

// Without a branch, which would often be mispredicted.
template <class T>
EDT_INLINE T* choose(intptr_t on, T* a, T* b) {
  return reinterpret_cast<T*>((reinterpret_cast<intptr_t>(a) & on) |
                              (reinterpret_cast<intptr_t>(b) & ~on));
}

// Numbers from[index], of at least two, in the lanes that are on (-1, else 0); 0 in the others.
template <class T>
EDT_INLINE Vec<Wide<T>> gather(const T* from, Ints<Wide<T>> index, Ints<Wide<T>> on) {
#if defined(EDT_ISA_avx512) || defined(EDT_ISA_avx2)
  if constexpr (sizeof(T) == 8) {
    return gather_words<8, double>(from, index, on);
  } else if constexpr (sizeof(T) == 4) {
    return gather_words<4, float>(from, index, on);
  } else {
    // Two neighbours at a time: the wanted number is the later one, but for the very first.
    const Ints<float> later = index > 0;
    const auto pairs = (Words)gather_words<2, float>(from, index + later, on);
    Copy<T> copy;
    const Halves bits = to_halves(later ? pairs >> 16 : pairs);
    __builtin_memcpy(&copy, &bits, sizeof bits);
    return load(copy.numbers);
  }
#else
  const T nothing{};
  Copy<T> copy;
  for (int lane = 0; lane < kLanes<Wide<T>>; ++lane)
    copy.numbers[lane] = *choose(on[lane], from + index[lane], &nothing);
  return load(copy.numbers);
#endif
}

// The other way round.
template <class T>
EDT_INLINE void scatter(T* to, Ints<Wide<T>> index, Ints<Wide<T>> on, Vec<Wide<T>> x) {
#if defined(EDT_ISA_avx512)
  if constexpr (sizeof(T) == 8)
    return _mm512_mask_i64scatter_pd(to, _mm512_movepi64_mask((__m512i)on), (__m512i)index,
                                     (__m512d)x, 8);
  else if constexpr (sizeof(T) == 4)
    return _mm512_mask_i32scatter_ps(to, _mm512_movepi32_mask((__m512i)on), (__m512i)index,
                                     (__m512)x, 4);
#endif
  T nowhere;
  Copy<T> copy;
  store(copy.numbers, x);
  for (int lane = 0; lane < kLanes<Wide<T>>; ++lane)
    *choose(on[lane], to + index[lane], &nowhere) = copy.numbers[lane];
}

// Segments of a single column, one in every lane.
template <class W>
struct SegmentLanes {
  static constexpr bool kSegments = true;
  static constexpr int kCount = 1;
  // Most rows of a batch, which are indices of 32 bits; and of a bundle, whose lengths are floats.
  static constexpr int64_t kMostRows = INT32_MAX, kMostPlaces = 1 << 24;
  using Int = typename Float<W>::Int;
  struct Row {
    Ints<W> index, on;
  };

  Row segment;
  Ints<W> begin, end;
  int64_t longest;

  // Segments first, first + 1, ...
  EDT_INLINE SegmentLanes(const int64_t* offsets, int64_t first)
      : segment{iota<W>() + static_cast<Int>(first), Ints<W>{} - 1} {
    typedef int64_t Offsets __attribute__((vector_size(kLanes<W> * sizeof(int64_t))));
    Offsets begins, ends;
    __builtin_memcpy(&begins, offsets + first, sizeof begins);
    __builtin_memcpy(&ends, offsets + first + 1, sizeof ends);
    begin = __builtin_convertvector(begins, Ints<W>);
    end = __builtin_convertvector(ends, Ints<W>);
    longest = static_cast<int64_t>(reduce_max<W>(length()));
  }

  EDT_INLINE int64_t rounds() const { return longest; }
  EDT_INLINE int64_t first_round() const { return 0; }
  EDT_INLINE int64_t last_round() const { return longest; }
  EDT_INLINE Vec<W> length() const { return __builtin_convertvector(end - begin, Vec<W>); }

  EDT_INLINE Row row(const int64_t* order, int64_t i) const {
    Row row{begin + static_cast<Int>(i), {}};
    row.on = row.index < end;
    if (order)
      for (int lane = 0; lane < kLanes<W>; ++lane)
        row.index[lane] = static_cast<Int>(order[row.index[lane] & row.on[lane]]);
    return row;
  }

  EDT_INLINE Ints<W> index(Row row) const { return row.on ? row.index : Ints<W>{} - 1; }

  EDT_INLINE Vec<W> keep(Vec<W> x, Row row, W rest) const { return row.on ? x : broadcast(rest); }

  template <class T>
  EDT_INLINE Vec<W> number(const T* from, Row row) const {
    return gather(from, row.index, row.on);
  }

  template <class T>
  EDT_INLINE void write_number(T* to, Row row, Vec<W> x) const {
    scatter(to, row.index, row.on, x);
  }

  EDT_INLINE Vec<W> add_columns(Vec<W> x, W*) const { return x; }

  template <class T>
  EDT_INLINE Vec<W> read(const T* from, Row row, int) const {
    return gather(from, row.index, row.on);
  }

  template <class T>
  EDT_INLINE void write(T* to, Row row, int, Vec<W> x) const {
    scatter(to, row.index, row.on, x);
  }
};

// visit(bundle) for all of the share.
template <class W, class F>
EDT_INLINE void for_bundles(SegmentRows x, Share share, F visit) {
  using Lanes = SegmentLanes<W>;
  constexpr int n = kLanes<W>, kBlock = kBlockVectors * n;
  const int64_t last_column = share.column_end;
  const bool single =
      x.dim == 1 && share.column_begin < last_column && x.rows > 1 && x.rows <= Lanes::kMostRows;
  for (int64_t p = share.first; p < share.last;) {
    const int64_t begin = x.offsets[p], end = x.offsets[p + 1];
    if (single && p + n <= share.last) {
      const Lanes lanes(x.offsets, p);
      const int64_t last = x.offsets[p + n], places = last - begin;
      const bool whole = share.place_begin <= begin && last <= share.place_end;
      // Lanes wait for the longest: worth it where most have something to do.
      if (whole && places <= Lanes::kMostPlaces && lanes.longest * n <= 4 * places + n) {
        visit(lanes);
        p += n;
        continue;
      }
    }
    const Segment segment{p, begin, end, begin < share.place_begin ? share.place_begin : begin,
                          end < share.place_end ? end : share.place_end};
    int64_t column = share.column_begin;
    for (; column + kBlock <= last_column; column += kBlock)
      visit(ColumnBlock<W, kBlockVectors, true>{segment, x.dim, column, n});
    for (; column + n <= last_column; column += n)
      visit(ColumnBlock<W, 1, true>{segment, x.dim, column, n});
    if (column < last_column)
      visit(ColumnBlock<W, 1, false>{segment, x.dim, column, last_column - column});
    ++p;
  }
}

// Sums of 64 rows are added up in a second level, so that long segments lose no digits.
constexpr int64_t kRowBlock = 64;

// visit(first, last) for the blocks of `rounds` rows.
template <class F>
EDT_INLINE void for_blocks(int64_t rounds, F visit) {
  for (int64_t i = 0; i < rounds; i += kRowBlock)
    visit(i, rounds - i < kRowBlock ? rounds : i + kRowBlock);
}

}  // namespace
}  // namespace edt
