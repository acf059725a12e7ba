// Rows copied as bytes.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

namespace edt {

// Rows of some bytes that make a thread worth waking.
inline int64_t copy_grain(int64_t bytes) { return 1 + 131072 / std::max<int64_t>(bytes, 1); }

inline void copy_bytes(char* to, const char* from, int64_t bytes) {
  if (bytes > 0) std::memcpy(to, from, bytes);  // an empty tensor has no address
}

inline void clear_bytes(char* to, int64_t bytes) {
  if (bytes > 0) std::memset(to, 0, bytes);
}

}  // namespace edt
