// Products of bfloat16 matrices that are packed into tiles. For *.bf16.cpp files only, which are
// compiled once for AMX and once for the dot products of AVX512_BF16.
//   A: rows of bfloat16, 32 to a step of the sum
//   B: tiles [steps][columns / 16], each 16 rows of 16 pairs: row r holds, column by column, what
//      rows 2 r and 2 r + 1 of the step multiply
//   C: rows of float
#pragma once

#include <cstdint>

#include "vec.h"

namespace edt {
namespace {

constexpr int64_t kTile = 16;    // rows of a tile, and its columns as float or pairs
constexpr int64_t kStep = 32;    // bfloat16 numbers of a tile's row
constexpr int64_t kPairs = 256;  // pairs of a tile

constexpr int64_t whole(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

}  // namespace
}  // namespace edt

#ifdef EDT_AMX
#include "amx.h"
#else
#include "dot.h"
#endif
