// Rows of any width as blocks of vectors, single vectors, and the first lanes of a last vector; and
// segments of any length as blocks of rows.
// For *.isa.cpp files only.
#pragma once

#include "half.h"

namespace edt {
namespace {

// What numbers of T are computed in: float for half types.
template <class T>
using Wide = std::remove_cvref_t<decltype(load(static_cast<const T*>(nullptr))[0])>;

// A vector's worth of numbers in memory; room for the whole register that a masked move writes.
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

// Columns [at, at + COUNT vectors) of a row, or with !WHOLE the `lanes` last columns.
template <class W, int COUNT, bool WHOLE>
struct Columns {
  static constexpr int kCount = COUNT;
  int64_t at, lanes;

  template <class T>
  EDT_INLINE Vec<W> read(const T* row, int j) const {
    if constexpr (WHOLE) {
      return load(row + at + j * kLanes<W>);
    } else {
      Copy<T> copy;
      masked_load(&copy, row + at, lanes);
      return load(copy.numbers);
    }
  }

  template <class T>
  EDT_INLINE void write(T* row, int j, Vec<W> x) const {
    if constexpr (WHOLE) {
      store(row + at + j * kLanes<W>, x);
    } else {
      Copy<T> copy;
      store(copy.numbers, x);
      masked_store(row + at, copy, lanes);
    }
  }
};

// Vectors that are worked on together: with as many sums beside them they fill the registers.
#if defined(EDT_ISA_avx512)
constexpr int kColumnBlock = 8;
#else
constexpr int kColumnBlock = 4;
#endif

// visit(columns) for all columns [begin, end) in order.
template <class W, class F>
EDT_INLINE void for_columns(int64_t begin, int64_t end, F visit) {
  constexpr int kBlock = kColumnBlock * kLanes<W>;
  for (; begin + kBlock <= end; begin += kBlock)
    visit(Columns<W, kColumnBlock, true>{begin, kLanes<W>});
  for (; begin + kLanes<W> <= end; begin += kLanes<W>) visit(Columns<W, 1, true>{begin, kLanes<W>});
  if (begin < end) visit(Columns<W, 1, false>{begin, end - begin});
}

// Sums of 64 rows are added up in a second level, so that long segments lose no digits.
constexpr int64_t kRowBlock = 64;

// visit(first, last) for the blocks of rows [begin, end).
template <class F>
EDT_INLINE void for_blocks(int64_t begin, int64_t end, F visit) {
  for (; begin < end; begin += kRowBlock)
    visit(begin, end - begin < kRowBlock ? end : begin + kRowBlock);
}

}  // namespace
}  // namespace edt
