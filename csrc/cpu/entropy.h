// Entropy of softmax over rows of logits, on raw pointers.
#pragma once

#include <cstdint>

#include "isa.h"

namespace edt {

// Per-row numbers (h, top, log_total, grad) are double for double logits, else float.
struct EntropyKernels {
  // `rows` rows of v logits: scale * entropy, row maximum m and ln sum e^(x-m).
  using Forward = void (*)(const void* logits, int64_t rows, int64_t v, double scale, void* h,
                           void* top, void* log_total);
  // dlogits = -grad p (scale ln p + h)
  using Backward = void (*)(const void* grad, const void* logits, const void* h, const void* top,
                            const void* log_total, int64_t rows, int64_t v, double scale,
                            void* dlogits);
  // By dtype: float, double, bfloat16, half.
  Forward forward[4];
  Backward backward[4];
};

EDT_KERNEL_TABLE(EntropyKernels, entropy_kernels)

}  // namespace edt
