// Products of bfloat16 matrices by AMX tiles of 16 rows and 64 bytes. Through tiles.h only.
#pragma once

#include "tiles.h"

#ifdef EDT_EMULATE
#include "../../tests/emulation/amx.h"
#else

namespace edt {
namespace {

struct TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// Own assembler: the compiler's intrinsics do not say which memory they read.
inline void configure_tiles() {
  static const TileConfig config;
  asm volatile("ldtilecfg %0" ::"m"(config));
}

inline void release_tiles() { asm volatile("tilerelease" ::: "memory"); }

template <int TILE>
EDT_INLINE void tile_zero() {
  asm volatile("tilezero %%tmm%c0" ::"i"(TILE));
}

template <int TILE>
EDT_INLINE void tile_load(const void* from, int64_t bytes) {
  asm volatile("tileloadd (%1,%2,1), %%tmm%c0" ::"i"(TILE), "r"(from), "r"(bytes) : "memory");
}

template <int TILE>
EDT_INLINE void tile_store(void* to, int64_t bytes) {
  asm volatile("tilestored %%tmm%c0, (%1,%2,1)" ::"i"(TILE), "r"(to), "r"(bytes) : "memory");
}

template <int C, int A, int B>
EDT_INLINE void tile_multiply() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
}

}  // namespace
}  // namespace edt

#endif

namespace edt {
namespace {

constexpr int64_t kRowUnit = kTile;   // rows of A come in whole tiles
constexpr int64_t kHeadsPerCall = 4;  // what one head has just stored, another need not wait for

// One or two rows of tiles by one or two columns; tiles 0 to 3 are C, 4 and 5 A, 6 and 7 B.
template <bool ADD, int ROWS, int COLS>
void multiply_tiles(const BFloat16* a, int64_t a_stride, const uint32_t* b, int64_t b_step,
                    float* c, int64_t c_stride, int64_t steps) {
  const int64_t c_bytes = c_stride * 4, a_bytes = a_stride * 2;
  float* c1 = c + kTile * c_stride;
  if constexpr (ADD) {
    tile_load<0>(c, c_bytes);
    if constexpr (COLS > 1) tile_load<1>(c + kTile, c_bytes);
    if constexpr (ROWS > 1) tile_load<2>(c1, c_bytes);
    if constexpr (ROWS > 1 && COLS > 1) tile_load<3>(c1 + kTile, c_bytes);
  } else {
    tile_zero<0>();
    if constexpr (COLS > 1) tile_zero<1>();
    if constexpr (ROWS > 1) tile_zero<2>();
    if constexpr (ROWS > 1 && COLS > 1) tile_zero<3>();
  }
  for (int64_t k = 0; k < steps; ++k, a += kStep, b += b_step) {
    tile_load<4>(a, a_bytes);
    if constexpr (ROWS > 1) tile_load<5>(a + kTile * a_stride, a_bytes);
    tile_load<6>(b, 64);
    tile_multiply<0, 4, 6>();
    if constexpr (ROWS > 1) tile_multiply<2, 5, 6>();
    if constexpr (COLS > 1) {
      tile_load<7>(b + kPairs, 64);
      tile_multiply<1, 4, 7>();
      if constexpr (ROWS > 1) tile_multiply<3, 5, 7>();
    }
  }
  tile_store<0>(c, c_bytes);
  if constexpr (COLS > 1) tile_store<1>(c + kTile, c_bytes);
  if constexpr (ROWS > 1) tile_store<2>(c1, c_bytes);
  if constexpr (ROWS > 1 && COLS > 1) tile_store<3>(c1 + kTile, c_bytes);
}

// C [rows, cols] = A B, or += with ADD; rows and cols are whole tiles, depth whole steps.
template <bool ADD>
void multiply(const BFloat16* a, int64_t a_stride, const uint32_t* b, float* c, int64_t c_stride,
              int64_t rows, int64_t cols, int64_t depth) {
  const int64_t steps = depth / kStep, b_step = cols / kTile * kPairs;
  for (int64_t j = 0; j < cols; j += 2 * kTile)
    for (int64_t i = 0; i < rows; i += 2 * kTile) {
      const auto kernel = rows - i > kTile   ? cols - j > kTile ? multiply_tiles<ADD, 2, 2>
                                                                : multiply_tiles<ADD, 2, 1>
                          : cols - j > kTile ? multiply_tiles<ADD, 1, 2>
                                             : multiply_tiles<ADD, 1, 1>;
      kernel(a + i * a_stride, a_stride, b + j / kTile * kPairs, b_step, c + i * c_stride + j,
             c_stride, steps);
    }
}

}  // namespace
}  // namespace edt
