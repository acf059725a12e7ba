// AVX-512 for processors without it: what the kernels use of it, lane by lane, so that their tests
// run everywhere (-DEDT_EMULATE=ON). Slow; the same numbers as the instructions, and a sanitizer
// sees every access. Included before every source of those levels.
#pragma once

#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

namespace edt {
namespace {
namespace emulated {

// One lane's worth of memory, of any alignment.
template <class T>
T read(const void* from, int64_t i) {
  T x;
  std::memcpy(&x, static_cast<const char*>(from) + i * static_cast<int64_t>(sizeof(T)), sizeof(T));
  return x;
}

template <class T>
void write(void* to, int64_t i, T x) {
  std::memcpy(static_cast<char*>(to) + i * static_cast<int64_t>(sizeof(T)), &x, sizeof(T));
}

// V from its lanes of T, each the result of a function of its place.
template <class V, class T, class F>
V lanes(F lane) {
  V out;
  for (int i = 0; i < static_cast<int>(sizeof(V) / sizeof(T)); ++i) write<T>(&out, i, lane(i));
  return out;
}

template <class T, class V>
T lane(const V& x, int i) {
  return read<T>(&x, i);
}

template <class V>
V load(const void* from) {
  V out;
  std::memcpy(&out, from, sizeof out);
  return out;
}

template <class V>
void store(void* to, V x) {
  std::memcpy(to, &x, sizeof x);
}

// Lanes whose bit is 0 are neither read nor written.
template <class V, class T>
V masked_load(uint64_t mask, const void* from) {
  return lanes<V, T>([&](int i) { return mask >> i & 1 ? read<T>(from, i) : T{}; });
}

template <class V, class T>
void masked_store(void* to, uint64_t mask, V x) {
  for (int i = 0; i < static_cast<int>(sizeof(V) / sizeof(T)); ++i)
    if (mask >> i & 1) write<T>(to, i, lane<T>(x, i));
}

// Numbers T at `from` + SCALE index.
template <class V, class T>
V gather(V rest, uint64_t mask, __m512i index, const void* from, int scale) {
  using Index = std::conditional_t<sizeof(T) == 8, int64_t, int32_t>;
  return lanes<V, T>([&](int i) {
    if (!(mask >> i & 1)) return lane<T>(rest, i);
    const int64_t bytes = static_cast<int64_t>(lane<Index>(index, i)) * scale;
    return read<T>(static_cast<const char*>(from) + bytes, 0);
  });
}

template <class V, class T>
void scatter(void* to, uint64_t mask, __m512i index, V x, int scale) {
  using Index = std::conditional_t<sizeof(T) == 8, int64_t, int32_t>;
  for (int i = 0; i < static_cast<int>(sizeof(V) / sizeof(T)); ++i)
    if (mask >> i & 1)
      write<T>(static_cast<char*>(to) + static_cast<int64_t>(lane<Index>(index, i)) * scale, 0,
               lane<T>(x, i));
}

template <class T>
uint16_t signs(__m512i x) {
  uint16_t mask = 0;
  for (int i = 0; i < static_cast<int>(sizeof(x) / sizeof(T)); ++i)
    mask |= static_cast<uint16_t>((lane<T>(x, i) < 0) << i);
  return mask;
}

template <class V, class T>
V fma(V a, V b, V c) {
  return lanes<V, T>([&](int i) { return std::fma(lane<T>(a, i), lane<T>(b, i), lane<T>(c, i)); });
}

// The second one where either is NaN, and of two zeros.
template <class V, class T>
V max(V a, V b) {
  return lanes<V, T>(
      [&](int i) { return lane<T>(a, i) > lane<T>(b, i) ? lane<T>(a, i) : lane<T>(b, i); });
}

// x 2^floor(n), rounded once.
template <class V, class T>
V scalef(V x, V n) {
  return lanes<V, T>([&](int i) {
    const T most = 4096, power = std::floor(lane<T>(n, i));
    if (!(power == power)) return power;
    const T within = power > most ? most : power < -most ? -most : power;
    return std::ldexp(lane<T>(x, i), static_cast<int>(within));
  });
}

// These instructions take subnormal numbers for zeros and give none.
inline float flushed(float x) {
  return std::fpclassify(x) == FP_SUBNORMAL ? std::copysign(0.0f, x) : x;
}

inline float widened(uint16_t x) {
  const uint32_t bits = static_cast<uint32_t>(x) << 16;
  return read<float>(&bits, 0);
}

inline uint16_t rounded(float x) {
  x = flushed(x);
  const uint32_t bits = read<uint32_t>(&x, 0);
  if (x != x) return static_cast<uint16_t>(bits >> 16 | 0x40);
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

// a b + c of numbers of bfloat16.
inline float fma_pair(uint16_t a, uint16_t b, float c) {
  return flushed(std::fma(flushed(widened(a)), flushed(widened(b)), flushed(c)));
}

inline __m512 dot_pairs(__m512 sum, __m512bh a, __m512bh b) {
  return lanes<__m512, float>([&](int i) {
    const float odd =
        fma_pair(lane<uint16_t>(a, 2 * i + 1), lane<uint16_t>(b, 2 * i + 1), lane<float>(sum, i));
    return fma_pair(lane<uint16_t>(a, 2 * i), lane<uint16_t>(b, 2 * i), odd);
  });
}

inline __m256bh to_bfloat16(__m512 x) {
  return lanes<__m256bh, uint16_t>([&](int i) { return rounded(lane<float>(x, i)); });
}

inline __m512bh to_bfloat16(__m512 high, __m512 low) {
  return lanes<__m512bh, uint16_t>(
      [&](int i) { return rounded(i < 16 ? lane<float>(low, i) : lane<float>(high, i - 16)); });
}

inline __m512i widen_halves(__m256i x) {
  return lanes<__m512i, uint32_t>([&](int i) { return lane<uint16_t>(x, i); });
}

inline __m256i narrow_words(__m512i x) {
  return lanes<__m256i, uint16_t>([&](int i) { return lane<uint32_t>(x, i); });
}

inline __m512i shift_left(__m512i x, int bits) {
  return lanes<__m512i, uint32_t>([&](int i) { return lane<uint32_t>(x, i) << bits; });
}

inline __m512 from_half(__m256i x) {
  return lanes<__m512, float>([&](int i) { return _cvtsh_ss(lane<uint16_t>(x, i)); });
}

inline __m256i to_half(__m512 x) {
  return lanes<__m256i, uint16_t>(
      [&](int i) { return _cvtss_sh(lane<float>(x, i), _MM_FROUND_TO_NEAREST_INT); });
}

template <class V, class T>
V broadcast(T x) {
  return lanes<V, T>([&](int) { return x; });
}

}  // namespace emulated
}  // namespace
}  // namespace edt

#define _mm512_loadu_ps edt::emulated::load<__m512>
#define _mm512_loadu_si512 edt::emulated::load<__m512i>
#define _mm512_storeu_ps edt::emulated::store<__m512>
#define _mm512_storeu_si512 edt::emulated::store<__m512i>
#define _mm256_maskz_loadu_epi16 edt::emulated::masked_load<__m256i, int16_t>
#define _mm512_maskz_loadu_epi16 edt::emulated::masked_load<__m512i, int16_t>
#define _mm512_maskz_loadu_epi32 edt::emulated::masked_load<__m512i, int32_t>
#define _mm512_maskz_loadu_epi64 edt::emulated::masked_load<__m512i, int64_t>
#define _mm256_mask_storeu_epi16 edt::emulated::masked_store<__m256i, int16_t>
#define _mm512_mask_storeu_epi16 edt::emulated::masked_store<__m512i, int16_t>
#define _mm512_mask_storeu_epi32 edt::emulated::masked_store<__m512i, int32_t>
#define _mm512_mask_storeu_epi64 edt::emulated::masked_store<__m512i, int64_t>
#define _mm512_mask_i32gather_ps edt::emulated::gather<__m512, float>
#define _mm512_mask_i64gather_pd edt::emulated::gather<__m512d, double>
#define _mm512_mask_i32scatter_ps edt::emulated::scatter<__m512, float>
#define _mm512_mask_i64scatter_pd edt::emulated::scatter<__m512d, double>
#define _mm512_movepi32_mask edt::emulated::signs<int32_t>
#define _mm512_movepi64_mask edt::emulated::signs<int64_t>
#define _mm512_setzero_ps() \
  __m512 {}
#define _mm512_setzero_pd() \
  __m512d {}
#define _mm512_setzero_si512() \
  __m512i {}
#define _mm512_set1_epi32 edt::emulated::broadcast<__m512i, int32_t>
#define _mm512_fmadd_ps edt::emulated::fma<__m512, float>
#define _mm512_fmadd_pd edt::emulated::fma<__m512d, double>
#define _mm512_maskz_max_ps(MASK, A, B) edt::emulated::max<__m512, float>(A, B)
#define _mm512_maskz_max_pd(MASK, A, B) edt::emulated::max<__m512d, double>(A, B)
#define _mm512_maskz_scalef_ps(MASK, X, N) edt::emulated::scalef<__m512, float>(X, N)
#define _mm512_maskz_scalef_pd(MASK, X, N) edt::emulated::scalef<__m512d, double>(X, N)
#define _mm512_or_si512(A, B) ((A) | (B))
#define _mm512_slli_epi32 edt::emulated::shift_left
#define _mm512_cvtepu16_epi32 edt::emulated::widen_halves
#define _mm512_cvtepi32_epi16 edt::emulated::narrow_words
#define _mm512_cvtph_ps edt::emulated::from_half
#define _mm512_cvtps_ph(X, ROUNDING) edt::emulated::to_half(X)
#define _mm512_cvtneps_pbh edt::emulated::to_bfloat16
#define _mm512_cvtne2ps_pbh edt::emulated::to_bfloat16
#define _mm512_dpbf16_ps edt::emulated::dot_pairs
