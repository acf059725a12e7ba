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

struct Attention {
  AttentionRows q, k, v;
  void* lse;          // [Tq, H], float or double: the forward writes it, the backward reads it
  AttentionRows out;  // forward only
  AttentionRows grad, dq, dk, dv;  // backward only
  const void* grad_lse;            // [Tq, H] or null
  int64_t heads, kv_heads, dim;
  bool causal;
  double scale;
};

// Rows of one molecule.
struct AttentionMolecule {
  int64_t q_begin, queries, k_begin, keys;
};

// Kernels of one element type. Each serves one molecule and one key head with its query heads.
struct AttentionKernels {
  using Kernel = void (*)(const Attention&, const AttentionMolecule&, int64_t kv_head,
                          void* scratch);
  // Bytes of scratch, aligned to 64, that either kernel needs.
  int64_t (*scratch_bytes)(const Attention&, const AttentionMolecule&);
  Kernel forward, backward;
};

struct AttentionTable {
  AttentionKernels float32, bfloat16, float16, float64;
};

EDT_KERNEL_TABLE(AttentionTable, attention_kernels)

}  // namespace edt
