// IEEE half precision as vectors of float. For *.isa.cpp files only.
#pragma once

#include "vec.h"

namespace edt {
namespace {

struct Half {
  uint16_t bits;
};
template <>
struct VecTypes<Half> {};  // there are no vectors of it

EDT_INLINE Vec<float> load(const Half* from) {
#if defined(EDT_ISA_avx512)
  return (Vec<float>)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
#elif defined(EDT_ISA_avx2)
  return (Vec<float>)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
#else
  _Float16 numbers[kLanes<float>];
  __builtin_memcpy(numbers, from, sizeof(numbers));
  Vec<float> out;
  for (int i = 0; i < kLanes<float>; ++i) out[i] = numbers[i];
  return out;
#endif
}

EDT_INLINE void store(Half* to, Vec<float> x) {
#if defined(EDT_ISA_avx512)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to),
                      _mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT));
#elif defined(EDT_ISA_avx2)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to),
                   _mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT));
#else
  _Float16 numbers[kLanes<float>];
  for (int i = 0; i < kLanes<float>; ++i) numbers[i] = static_cast<_Float16>(x[i]);
  __builtin_memcpy(to, numbers, sizeof(numbers));
#endif
}

}  // namespace
}  // namespace edt
