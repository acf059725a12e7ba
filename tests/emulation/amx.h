// AMX tiles for processors without them; see avx512.h. Tiles are of 16 rows and 64 bytes, a
// thread's own, and lost where it releases them.
#pragma once

#include <cstdio>
#include <cstdlib>

#include "avx512.h"

namespace edt {
namespace {

struct Tile {
  uint32_t rows[16][16];  // a float, or a pair of bfloat16
};

inline thread_local Tile tiles[8];
inline thread_local bool tiles_configured = false;

// As the processor would, which knows no such instruction then.
inline void require_tiles() {
  if (tiles_configured) return;
  std::fputs("a tile is used that is not configured\n", stderr);
  std::abort();
}

inline void configure_tiles() {
  std::memset(tiles, 0, sizeof tiles);
  tiles_configured = true;
}

inline void release_tiles() { tiles_configured = false; }

template <int TILE>
void tile_zero() {
  require_tiles();
  std::memset(&tiles[TILE], 0, sizeof(Tile));
}

template <int TILE>
void tile_load(const void* from, int64_t bytes) {
  require_tiles();
  for (int i = 0; i < 16; ++i)
    std::memcpy(tiles[TILE].rows[i], static_cast<const char*>(from) + i * bytes, 64);
}

template <int TILE>
void tile_store(void* to, int64_t bytes) {
  require_tiles();
  for (int i = 0; i < 16; ++i)
    std::memcpy(static_cast<char*>(to) + i * bytes, tiles[TILE].rows[i], 64);
}

// The even and the odd numbers of the pairs are summed apart, then the two sums and C.
template <int C, int A, int B>
void tile_multiply() {
  require_tiles();
  for (int i = 0; i < 16; ++i)
    for (int j = 0; j < 16; ++j) {
      float sums[2] = {};
      for (int k = 0; k < 16; ++k)
        for (int odd = 0; odd < 2; ++odd) {
          const uint32_t a = tiles[A].rows[i][k] >> 16 * odd, b = tiles[B].rows[k][j] >> 16 * odd;
          sums[odd] =
              emulated::fma_pair(static_cast<uint16_t>(a), static_cast<uint16_t>(b), sums[odd]);
        }
      const float before = emulated::read<float>(&tiles[C].rows[i][j], 0);
      emulated::write(
          &tiles[C].rows[i][j], 0,
          emulated::flushed(emulated::flushed(before) + emulated::flushed(sums[0] + sums[1])));
    }
}

}  // namespace
}  // namespace edt
