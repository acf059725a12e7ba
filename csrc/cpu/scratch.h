// Memory that a thread keeps between molecules and calls.
#pragma once

#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <cstdlib>
#include <memory>

#include "poison.h"

namespace edt {

// At least `bytes`, aligned to 64; grows to the most that this thread has asked for. One user at a
// time.
inline void* thread_scratch(int64_t bytes) {
  struct Free {
    void operator()(void* memory) const { std::free(memory); }
  };
  thread_local std::unique_ptr<void, Free> memory;
  thread_local int64_t size = 0;
  if (bytes > size) {
    memory.reset();
    size = (bytes + 63) / 64 * 64;
    memory.reset(std::aligned_alloc(64, size));
    if (!memory) size = 0;
    STD_TORCH_CHECK(memory, "no memory for the scratch of a molecule");
  }
  poison(memory.get(), bytes);
  return memory.get();
}

}  // namespace edt
