// Vectors of one register, by GCC's vector extensions: one source for every instruction set.
// For *.isa.cpp files only, which see the width of their level; all names stay in their unit.
#pragma once

#include <cstddef>
#include <cstdint>
#include <iterator>
#include <type_traits>
#include <utility>

#if defined(EDT_ISA_avx2) || defined(EDT_ISA_avx512)
#include <immintrin.h>
#endif

namespace edt {
namespace {

#if defined(EDT_ISA_avx512)
constexpr int kVectorBytes = 64;
#elif defined(EDT_ISA_avx2)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

// Does fma round once?
#if defined(EDT_ISA_avx2) || defined(EDT_ISA_avx512)
constexpr bool kFused = true;
#else
constexpr bool kFused = false;
#endif

#define EDT_INLINE inline __attribute__((always_inline))

// Bits of a type, and the constants of its exp and log.
template <class T>
struct Float;

template <>
struct Float<float> {
  using Int = int32_t;
  static constexpr int kMantissaBits = 23, kExponentBias = 127;
  // Adding it rounds to an integer, which the low bits of the sum then hold.
  static constexpr float kRounder = 0x1.8p23f;
  static constexpr float kLn2High = 0x1.62e4p-1f, kLn2Low = 0x1.7f7d1cp-20f;
  static constexpr float kExpMin = -87, kExpMax = 89, kLargest = 0x1.fffffep127f;
  static constexpr float kExpZero = -88.03f;
  // exp(r) = 1 + r + r^2 p(r), |r| <= ln(2) / 2, highest power first: the least relative error.
  static constexpr float kExp[] = {0x1.6a23dp-10f, 0x1.123a2p-7f, 0x1.5558f2p-5f, 0x1.555492p-3f,
                                   0x1.fffffcp-2f};
  // log((1 + s) / (1 - s)) = 2 s + s z p(z), z = s^2, highest power first (fdlibm).
  static constexpr float kLog[] = {0xf89e26p-26f, 0x91e9eep-25f, 0xccce13p-25f, 0xaaaaaap-24f};
};

template <>
struct Float<double> {
  using Int = int64_t;
  static constexpr int kMantissaBits = 52, kExponentBias = 1023;
  static constexpr double kRounder = 0x1.8p52;
  static constexpr double kLn2High = 0x1.62e42feep-1, kLn2Low = 0x1.a39ef35793c76p-33;
  static constexpr double kExpMin = -708, kExpMax = 710, kLargest = 0x1.fffffffffffffp1023;
  static constexpr double kExpZero = -709.09;
  // Taylor: the first term left out is below 2^-57.
  static constexpr double kExp[] = {1 / 6227020800., 1 / 479001600., 1 / 39916800., 1 / 3628800.,
                                    1 / 362880.,     1 / 40320.,     1 / 5040.,     1 / 720.,
                                    1 / 120.,        1 / 24.,        1 / 6.,        1 / 2.};
  static constexpr double kLog[] = {1.479819860511658591e-01, 1.531383769920937332e-01,
                                    1.818357216161805012e-01, 2.222219843214978396e-01,
                                    2.857142874366239149e-01, 3.999999999940941908e-01,
                                    6.666666666666735130e-01};
};

template <class T>
struct VecTypes {
  typedef T Vec __attribute__((vector_size(kVectorBytes)));
  typedef typename Float<T>::Int Ints __attribute__((vector_size(kVectorBytes)));
  typedef T Unaligned __attribute__((vector_size(kVectorBytes), aligned(alignof(T)), may_alias));
};

// bfloat16 is the upper half of a float; there are no vectors of it.
struct BFloat16 {
  uint16_t bits;
};
template <>
struct VecTypes<BFloat16> {};

template <class T>
using Vec = typename VecTypes<T>::Vec;  // kLanes<T> numbers
template <class T>
using Ints = typename VecTypes<T>::Ints;  // as many integers of the same width

template <class T>
constexpr int kLanes = kVectorBytes / sizeof(T);

template <class T>
EDT_INLINE Vec<T> load(const T* from) {
  return *reinterpret_cast<const typename VecTypes<T>::Unaligned*>(from);
}

template <class T>
EDT_INLINE void store(T* to, Vec<T> x) {
  *reinterpret_cast<typename VecTypes<T>::Unaligned*>(to) = x;
}

template <class T>
EDT_INLINE Vec<T> broadcast(T x) {
  return x - Vec<T>{};
}

// a b + c, rounded once where the level has FMA.
EDT_INLINE Vec<float> fma(Vec<float> a, Vec<float> b, Vec<float> c) {
#if defined(EDT_ISA_avx512)
  return (Vec<float>)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(EDT_ISA_avx2)
  return (Vec<float>)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
  return a * b + c;
#endif
}

EDT_INLINE Vec<double> fma(Vec<double> a, Vec<double> b, Vec<double> c) {
#if defined(EDT_ISA_avx512)
  return (Vec<double>)_mm512_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)c);
#elif defined(EDT_ISA_avx2)
  return (Vec<double>)_mm256_fmadd_pd((__m256d)a, (__m256d)b, (__m256d)c);
#else
  return a * b + c;
#endif
}

// The larger one; b where either is NaN. GCC 12 does not find the instruction for every a > b ? a :
// b.
EDT_INLINE Vec<float> max(Vec<float> a, Vec<float> b) {
#if defined(EDT_ISA_avx512)
  return (Vec<float>)_mm512_maskz_max_ps(-1, (__m512)a, (__m512)b);
#elif defined(EDT_ISA_avx2)
  return (Vec<float>)_mm256_max_ps((__m256)a, (__m256)b);
#else
  return a > b ? a : b;
#endif
}

EDT_INLINE Vec<double> max(Vec<double> a, Vec<double> b) {
#if defined(EDT_ISA_avx512)
  return (Vec<double>)_mm512_maskz_max_pd(-1, (__m512d)a, (__m512d)b);
#elif defined(EDT_ISA_avx2)
  return (Vec<double>)_mm256_max_pd((__m256d)a, (__m256d)b);
#else
  return a > b ? a : b;
#endif
}

typedef uint16_t Halves __attribute__((vector_size(kVectorBytes / 2)));
typedef uint32_t Words __attribute__((vector_size(kVectorBytes)));

// GCC 12 converts long vectors in halves.
EDT_INLINE Words to_words(Halves x) {
#if defined(EDT_ISA_avx512)
  return (Words)_mm512_cvtepu16_epi32((__m256i)x);
#elif defined(EDT_ISA_avx2)
  return (Words)_mm256_cvtepu16_epi32((__m128i)x);
#else
  return __builtin_convertvector(x, Words);
#endif
}

EDT_INLINE Halves to_halves(Words x) {
#if defined(EDT_ISA_avx512)
  return (Halves)_mm512_cvtepi32_epi16((__m512i)x);
#else
  return __builtin_convertvector(x, Halves);
#endif
}

// Of words that are no longer than halves.
EDT_INLINE Halves pack_halves(Words x) {
#if defined(EDT_ISA_avx2)
  return (Halves)_mm_packus_epi32(_mm256_castsi256_si128((__m256i)x),
                                  _mm256_extracti128_si256((__m256i)x, 1));
#else
  return to_halves(x);
#endif
}

EDT_INLINE Vec<float> load(const BFloat16* from) {
  Halves bits;
  __builtin_memcpy(&bits, from, sizeof bits);
  return (Vec<float>)(to_words(bits) << 16);
}

// Rounds to nearest, ties to even.
EDT_INLINE void store(BFloat16* to, Vec<float> x) {
  const Words bits = (Words)x;
  const Words rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const Words quiet_nan = Words{} + 0x7fc0;
  const Halves out = pack_halves((Words)(x == x ? rounded : quiet_nan));
  __builtin_memcpy(to, &out, sizeof out);
}

template <class T>
EDT_INLINE Ints<T> iota() {
  Ints<T> out;
  for (int i = 0; i < kLanes<T>; ++i) out[i] = i;
  return out;
}

// The first n lanes of x; `rest` in the others.
template <class T>
EDT_INLINE Vec<T> first(Vec<T> x, int64_t n, T rest) {
  using Int = typename Float<T>::Int;
  const Int count = n < 0 ? 0 : n < kLanes<T> ? static_cast<Int>(n) : kLanes<T>;
  return iota<T>() < count ? x : broadcast<T>(rest);
}

// Lane i and lane i ^ DISTANCE change places.
template <int DISTANCE, class V, int... I>
EDT_INLINE V swap_lanes(V x, std::integer_sequence<int, I...>) {
  return __builtin_shufflevector(x, x, (I ^ DISTANCE)...);
}

// x_0 o x_1 o ... as a tree, the same for every call.
template <class T, int DISTANCE = kLanes<T> / 2, class F>
EDT_INLINE T reduce(Vec<T> x, F combine) {
  if constexpr (DISTANCE == 0) {
    return x[0];
  } else {
    using Lanes = std::make_integer_sequence<int, kLanes<T>>;
    return reduce<T, DISTANCE / 2>(combine(x, swap_lanes<DISTANCE>(x, Lanes{})), combine);
  }
}

template <class T>
EDT_INLINE T reduce_max(Vec<T> x) {
  return reduce<T>(x, [](Vec<T> a, Vec<T> b) __attribute__((always_inline)) { return max(a, b); });
}

template <class T>
EDT_INLINE T reduce_sum(Vec<T> x) {
  return reduce<T>(x, [](Vec<T> a, Vec<T> b) __attribute__((always_inline)) { return a + b; });
}

template <class T, std::size_t N>
EDT_INLINE Vec<T> polynomial(Vec<T> x, const T (&coefficients)[N]) {
  Vec<T> sum = broadcast(coefficients[0]);
#pragma GCC unroll 16
  for (std::size_t i = 1; i < N; ++i) sum = fma(sum, x, broadcast(coefficients[i]));
  return sum;
}

// x 2^n for integers n, also where 2^n is no normal number.
#if defined(EDT_ISA_avx512)
EDT_INLINE Vec<float> times_power(Vec<float> x, Vec<float> n) {
  return (Vec<float>)_mm512_maskz_scalef_ps(-1, (__m512)x, (__m512)n);
}

EDT_INLINE Vec<double> times_power(Vec<double> x, Vec<double> n) {
  return (Vec<double>)_mm512_maskz_scalef_pd(-1, (__m512d)x, (__m512d)n);
}
#else
template <class V>
EDT_INLINE V times_power(V x, V n) {
  using T = std::remove_reference_t<decltype(x[0])>;
  using C = Float<T>;
  const Ints<T> power = (Ints<T>)(n + C::kRounder) - (Ints<T>)broadcast(C::kRounder);
  const Ints<T> half = power >> 1;
  const Ints<T> low = (half + C::kExponentBias) << C::kMantissaBits;
  const Ints<T> high = (power - half + C::kExponentBias) << C::kMantissaBits;
  return x * (Vec<T>)low * (Vec<T>)high;
}
#endif

// e^x within 2 ulp, 0 where it is hardly a normal number (x < kExpMin): an underflow costs the
// processor a hundred times the rest. e^-inf = 0, overflow is inf, NaN stays NaN.
template <class T>
EDT_INLINE Vec<T> exp(Vec<T> x) {
  using C = Float<T>;
  const auto vanishes = x < C::kExpMin;
  x = vanishes ? broadcast(C::kExpMin) : x;
  x = x > C::kExpMax ? broadcast(C::kExpMax) : x;
  const T log2e = static_cast<T>(1.4426950408889634074);
  const Vec<T> rounded = fma(x, broadcast(log2e), broadcast(C::kRounder));
  const Vec<T> n = rounded - C::kRounder;
  Vec<T> r = fma(n, broadcast(-C::kLn2High), x);
  r = fma(n, broadcast(-C::kLn2Low), r);
  const Vec<T> e = fma(fma(polynomial<T>(r, C::kExp), r, broadcast(T(1))), r, broadcast(T(1)));
  return vanishes ? Vec<T>{} : times_power(e, n);
}

// x where exp_falling is not 0, and no infinity elsewhere: e^x x is then 0 at -inf. NaN stays NaN.
template <class T>
EDT_INLINE Vec<T> finite(Vec<T> x) {
  return max(broadcast(Float<T>::kExpZero), x);
}

// e^x of `finite` x <= 0, or hardly above, where rounding has lifted x: within 2 ulp, 5 of them
// for floats near the end, where e^x becomes 0. A few vectors go step by step, so that none waits
// for itself.
template <class T, int N>
EDT_INLINE void exp_falling(const Vec<T> (&x)[N], Vec<T> (&e)[N]) {
  using C = Float<T>;
  // The low bits of the sum are the exponent field of 2^n, 0 at kExpZero.
  constexpr T rounder = C::kRounder + C::kExponentBias;
  const T log2e = static_cast<T>(1.4426950408889634074);
  Vec<T> rounded[N], r[N];
#pragma GCC unroll 4
  for (int i = 0; i < N; ++i) rounded[i] = fma(x[i], broadcast(log2e), broadcast(rounder));
#pragma GCC unroll 4
  for (int i = 0; i < N; ++i) {
    const Vec<T> n = rounded[i] - rounder;
    // The float next to ln 2 is near enough for n < 128, if the product is exact.
    if constexpr (kFused && sizeof(T) == 4)
      r[i] = fma(n, broadcast(T(-0.693147180559945309417)), x[i]);
    else
      r[i] = fma(n, broadcast(-C::kLn2Low), fma(n, broadcast(-C::kLn2High), x[i]));
    e[i] = broadcast(C::kExp[0]);
  }
#pragma GCC unroll 16
  for (std::size_t k = 1; k < std::size(C::kExp); ++k)
#pragma GCC unroll 4
    for (int i = 0; i < N; ++i) e[i] = fma(e[i], r[i], broadcast(C::kExp[k]));
#pragma GCC unroll 2
  for (int k = 0; k < 2; ++k)
#pragma GCC unroll 4
    for (int i = 0; i < N; ++i) e[i] = fma(e[i], r[i], broadcast(T(1)));
#pragma GCC unroll 4
  for (int i = 0; i < N; ++i) e[i] *= (Vec<T>)((Ints<T>)rounded[i] << C::kMantissaBits);
}

template <class T>
EDT_INLINE Vec<T> exp_falling(Vec<T> x) {
  const Vec<T> one[1] = {finite<T>(x)};
  Vec<T> e[1];
  exp_falling<T>(one, e);
  return e[0];
}

// ln x of positive normal x within 1 ulp; NaN stays NaN.
template <class T>
EDT_INLINE Vec<T> log(Vec<T> x) {
  using C = Float<T>;
  // x = 2^k (1 + f), sqrt(1/2) <= 1 + f < sqrt(2)
  const Vec<T> root = broadcast(static_cast<T>(0.70710678118654752440));
  const Ints<T> shifted = (Ints<T>)x - (Ints<T>)root;
  const Ints<T> k = shifted >> C::kMantissaBits;
  const Vec<T> f = (Vec<T>)((Ints<T>)x - (k << C::kMantissaBits)) - T(1);
  const Vec<T> exponent = (Vec<T>)(k + (Ints<T>)broadcast(C::kRounder)) - C::kRounder;

  const Vec<T> half_square = f * f * T(0.5);
  const Vec<T> s = f / (f + T(2));
  const Vec<T> z = s * s;
  const Vec<T> tail = s * (half_square + z * polynomial<T>(z, C::kLog));
  const Vec<T> low = fma(exponent, broadcast(C::kLn2Low), tail) - half_square;
  const Vec<T> out = fma(exponent, broadcast(C::kLn2High), low + f);
  return x == x ? out : x;
}

}  // namespace
}  // namespace edt
