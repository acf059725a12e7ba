// Entropy of softmax(h W^T + b) by tiles of logits, on raw pointers.
#pragma once

#include <cstdint>

#include "isa.h"

namespace edt {

// Numbers that rows of kept logits are filled up to: whole vectors of any level.
constexpr int64_t kKeptMultiple = 16;

// All contiguous. Per-row numbers are double where hidden is, else float.
struct LinearEntropy {
  const void *hidden, *weight, *bias;  // [N, D], [V, D], [V] or null
  int64_t rows, width, tokens;         // N, D, V
  double scale;                        // of the entropy in nats
  void *h, *top, *log_total;           // [N]: written by the forward, read by the backward
  // [N, stride], of the type of per-row numbers, or null: likewise; else the backward makes them
  // again. The stride is a multiple of kKeptMultiple.
  void* logits;
  int64_t logit_stride;
  const void* grad;  // [N], backward only
  void* dhidden;     // [N, D], or null
};

// What one task of the backward computes: the share of some rows and some tokens in the gradients.
// Numbers of `sums` have the type of per-row numbers, and rows of them are `padded_width` long.
struct LinearEntropyShare {
  int64_t begin, end, first, last;  // rows, tokens
  void* dhidden_sums;               // [end - begin, D], or null: `dhidden` itself is written
  void* dweight_sums;               // [V, D], or null: not wanted
  void* dbias_sums;                 // [padded V]
  bool add;                         // to the sums for weight and bias
};

struct LinearEntropyKernels {
  // Rows of a tile of logits, and its tokens, a panel; shares of tokens begin at a multiple.
  int64_t tile_rows, panel;
  // Numbers in a vector: what padded lengths are a multiple of.
  int64_t lanes;
  // Rows that a panel of the weight is made ready for.
  int64_t (*chunk)(const LinearEntropy&);
  // Bytes of scratch, aligned to 64, that any kernel needs.
  int64_t (*scratch_bytes)(const LinearEntropy&);
  // What the tokens [first, last) give to the entropy of the rows [begin, end): sums [3, N].
  void (*forward)(const LinearEntropy&, int64_t first, int64_t last, int64_t begin, int64_t end,
                  void* sums, void* scratch);
  // The entropy of the rows [begin, end) from sums [spans, 3, N], in the order of spans.
  void (*finish)(const LinearEntropy&, const void* sums, int64_t spans, int64_t begin, int64_t end);
  void (*backward)(const LinearEntropy&, const LinearEntropyShare&, void* scratch);
  // Rows [begin, end) of out [., width], of the type of hidden: the sum over c of parts [count,
  // rows, padded width], in the order of c.
  void (*add_parts)(const void* parts, int64_t count, int64_t rows, int64_t width, int64_t begin,
                    int64_t end, void* out);
};

struct LinearEntropyTable {
  LinearEntropyKernels float32, bfloat16, float16, float64;
};

EDT_KERNEL_TABLE(LinearEntropyTable, linear_entropy_kernels)

}  // namespace edt
