// csrc/cuda/instructions.cuh on a CPU, by what the PTX manual says of the instructions.
#pragma once

#include <cuda_runtime.h>

#include <cmath>
#include <cstdint>
#include <cstring>

namespace edt {

struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

inline float widen(float x) { return x; }
inline double widen(double x) { return x; }
inline float widen(BFloat16 x) {
  const uint32_t bits = uint32_t{x.bits} << 16;
  float out;
  std::memcpy(&out, &bits, sizeof(out));
  return out;
}
inline float widen(Half x) {
  const int exponent = x.bits >> 10 & 31, fraction = x.bits & 1023;
  const float size = exponent == 31 ? (fraction ? NAN : INFINITY)
                     : exponent == 0
                         ? std::ldexp(static_cast<float>(fraction), -24)
                         : std::ldexp(static_cast<float>(fraction + 1024), exponent - 25);
  return x.bits >> 15 ? -size : size;
}

template <class T>
uint16_t narrow(float x);
template <>
inline uint16_t narrow<BFloat16>(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  return std::isnan(x) ? 0x7fff : static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
template <>
inline uint16_t narrow<Half>(float x) {
  const uint16_t sign = std::signbit(x) ? 0x8000 : 0;
  if (std::isnan(x)) return 0x7fff;
  if (std::fabs(x) >= 65520.0f) return sign | 0x7c00;  // rounds to infinity
  int exponent = -13;                                  // below it numbers are 2^-24 apart
  if (x != 0) std::frexp(x, &exponent);
  exponent = std::max(exponent, -13);
  const auto units = static_cast<uint16_t>(std::nearbyint(std::ldexp(std::fabs(x), 11 - exponent)));
  // 1024 units to 2048, the next exponent, follow one another as the bits do.
  return sign | static_cast<uint16_t>(units + ((exponent + 13) << 10));
}

template <class T>
uint32_t pack(float low, float high) {
  return narrow<T>(low) | uint32_t{narrow<T>(high)} << 16;
}

template <class T>
float part(uint32_t pair, int which) {
  return widen(T{static_cast<uint16_t>(pair >> 16 * which)});
}

template <class T>
void multiply_add(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  struct Record {
    float c[4];
    uint32_t a[4], b[2];
  } mine;
  std::memcpy(mine.c, c, sizeof(c));
  std::memcpy(mine.a, a, sizeof(a));
  std::memcpy(mine.b, b, sizeof(b));
  mine = emulated::exchange(mine, [](int lane, Record& mine, const Record* all) {
    for (int e = 0; e < 4; ++e) {
      const int row = lane / 4 + 8 * (e / 2), column = 2 * (lane % 4) + e % 2;
      for (int k = 0; k < 16; ++k) {
        // A[row][k] lies in register (row / 8) + 2 (k / 8) of the lane of that row and k pair.
        const Record& of_a = all[4 * (row % 8) + k % 8 / 2];
        const Record& of_b = all[4 * column + k % 8 / 2];
        const float x = part<T>(of_a.a[row / 8 + 2 * (k / 8)], k % 2);
        mine.c[e] = std::fma(x, part<T>(of_b.b[k / 8], k % 2), mine.c[e]);
      }
    }
  });
  std::memcpy(c, mine.c, sizeof(c));
}

template <bool TRANSPOSED, int N>
void load_matrices(uint32_t (&out)[N], const void* row) {
  if (threadIdx.x % emulated::kLanes < 8 * N)
    emulated::must_be_aligned(row, "a row of a matrix in shared memory");
  struct Record {
    const uint16_t* row;
    uint32_t out[N];
  };
  const Record found = emulated::exchange(
      Record{static_cast<const uint16_t*>(row), {}}, [](int lane, Record& mine, const Record* all) {
        for (int matrix = 0; matrix < N; ++matrix)
          for (int j = 0; j < 2; ++j) {
            const int along = lane / 4, pair = 2 * (lane % 4) + j;
            const int r = TRANSPOSED ? pair : along, c = TRANSPOSED ? along : pair;
            mine.out[matrix] |= uint32_t{all[8 * matrix + r].row[c]} << 16 * j;
          }
      });
  std::memcpy(out, found.out, sizeof(out));
}

inline void copy_async(void* shared, const void* global, int bytes) {
  emulated::copy_later(shared, global, bytes);
}
inline void wait_for_copies() { emulated::copy_now(); }

inline unsigned char* dynamic_shared() { return emulated::shared_memory(); }

}  // namespace edt
