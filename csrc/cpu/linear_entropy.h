// Entropy of softmax(h W^T + b) by tiles of logits, on raw pointers.
#pragma once

#include <cstdint>

#include "isa.h"

namespace edt {

// All contiguous. Per-row numbers are double where hidden is, else float.
struct LinearEntropy {
  const void *hidden, *weight, *bias;  // [N, D], [V, D], [V] or null
  int64_t width, tokens;               // D, V
  double scale;                        // of the entropy in nats
  void *h, *top, *log_total;           // [N]: written by the forward, read by the backward
  const void* grad;                    // [N], backward only
  void* dhidden;                       // [N, D]
};

struct LinearEntropyKernels {
  // Columns of a tile of logits: a panel of the weight.
  int64_t panel;
  // Bytes of scratch, aligned to 64, that any kernel needs.
  int64_t (*scratch_bytes)(const LinearEntropy&);
  using Rows = void (*)(const LinearEntropy&, int64_t begin, int64_t end, void* scratch);
  Rows forward, backward_hidden;
  // The sums over rows [begin, end) for the tokens of one panel: dweight [panel, D] and dbias
  // [panel], of the type of per-row numbers.
  void (*backward_weight)(const LinearEntropy&, int64_t first_token, int64_t begin, int64_t end,
                          void* dweight, void* dbias, void* scratch);
  // out[i] = sum over c of parts[c stride + i], in the order of c; out has the type of hidden.
  void (*add_parts)(const void* parts, int64_t count, int64_t stride, int64_t begin, int64_t end,
                    void* out);
};

struct LinearEntropyTable {
  LinearEntropyKernels float32, bfloat16, float16, float64;
};

EDT_KERNEL_TABLE(LinearEntropyTable, linear_entropy_kernels)

}  // namespace edt
