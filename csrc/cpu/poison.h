// Fresh memory filled with ones, a NaN in every float type, when tests ask for it: what a kernel
// does not write, or reads too early, shows.
#pragma once

#include <cstdint>
#include <cstring>

namespace edt {

inline bool poison_memory = false;

inline void poison(void* memory, int64_t bytes) {
  if (poison_memory && bytes > 0) std::memset(memory, 0xff, bytes);
}

}  // namespace edt
