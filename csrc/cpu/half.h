// Numbers of any dtype as vectors of the type they are computed in. For *.isa.cpp files only.
#pragma once

#include "vec.h"

namespace edt {
namespace {

struct Half {
  uint16_t bits;
};
typedef uint16_t Bits16 __attribute__((vector_size(kVectorBytes / 2)));

EDT_INLINE Vec<float> widen(const float* from) { return load(from); }
EDT_INLINE Vec<double> widen(const double* from) { return load(from); }
EDT_INLINE void narrow(float* to, Vec<float> x) { store(to, x); }
EDT_INLINE void narrow(double* to, Vec<double> x) { store(to, x); }

EDT_INLINE Vec<float> widen(const BFloat16* from) {
  Bits16 bits;
  __builtin_memcpy(&bits, from, sizeof(bits));
  return (Vec<float>)(__builtin_convertvector(bits, Ints<float>) << 16);
}

// Rounds to nearest, ties to even.
EDT_INLINE void narrow(BFloat16* to, Vec<float> x) {
  const Ints<float> bits = (Ints<float>)x;
  const Ints<float> rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const Bits16 out = __builtin_convertvector(x == x ? rounded : rounded * 0 + 0x7fc0, Bits16);
  __builtin_memcpy(to, &out, sizeof(out));
}

EDT_INLINE Vec<float> widen(const Half* from) {
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

EDT_INLINE void narrow(Half* to, Vec<float> x) {
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
