// What the attention kernels see of a batch: pointers and strides, no tensors.
#pragma once

#include <cstdint>

#include "isa.h"

namespace edt {

// Rows [T, H, D] of one operand, D contiguous; strides in elements.
struct AttentionRows {
  void* data;
  int64_t row, head;
};

// What is known of every (query, key) pair, [pairs, H] contiguous; null where it is not asked for.
struct AttentionPairs {
  const void *bias, *grad_scores;
  void *scores, *dbias;
};

// A weight is kept, times `scale`, where the hash of its seed, head, query and key is at least
// `threshold`.
struct AttentionDropout {
  const int64_t* seeds;  // one, or one per molecule; null: nothing is dropped
  bool per_molecule;
  uint32_t threshold;
  double scale;
};

struct Attention {
  AttentionRows q, k, v;
  void* lse;          // [Tq, H], float or double: the forward writes it, the backward reads it
  AttentionRows out;  // forward only
  AttentionRows grad, dq, dk, dv;  // backward only
  const void* grad_lse;            // [Tq, H] or null
  AttentionPairs pairs;
  AttentionDropout dropout;
  int64_t heads, kv_heads, dim;
  bool causal;
  double scale;
};

// Rows of one molecule, and where its pairs begin.
struct AttentionMolecule {
  int64_t index, q_begin, queries, k_begin, keys, pair_begin;
};

// Key heads [begin, end), with the query heads that read them.
struct AttentionHeads {
  int64_t begin, end;
};

// Kernels of one element type. Each serves some heads of one molecule.
struct AttentionKernels {
  using Kernel = void (*)(const Attention&, const AttentionMolecule&, const AttentionHeads&,
                          void* scratch);
  // Bytes of scratch, aligned to 64, that any kernel needs.
  int64_t (*scratch_bytes)(const Attention&, const AttentionMolecule&, const AttentionHeads&);
  Kernel forward, backward;
  // The same with pairs and dropout.
  Kernel forward_pairs, backward_pairs;
  // Query heads that one call of forward or backward should have.
  int64_t heads_per_call = 1;
  // Around the calls of one thread, or null: processor state that they need.
  void (*begin_thread)() = nullptr;
  void (*end_thread)() = nullptr;
};

struct AttentionTable {
  AttentionKernels float32, bfloat16, float16, float64;
};

EDT_KERNEL_TABLE(AttentionTable, attention_kernels)

#ifdef EDT_X86
namespace avx512_bf16 {
extern const AttentionKernels attention_bfloat16;  // no pairs, no dropout
}
namespace amx {
extern const AttentionKernels attention_bfloat16;  // no pairs, no dropout
}
#endif

}  // namespace edt
