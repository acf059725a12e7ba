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
  AttentionRows out;  // forward only, else null
  AttentionRows grad, dq, dk, dv;  // backward only, else null
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

// Rows that the next call reads or writes, asked of memory a few at a time between the products of
// this one: a head's rows are islands that the hardware does not see coming.
struct AttentionAhead {
  struct Rows {
    const char* next;
    int64_t count, stride, lines;  // rows, bytes from one to the next, cache lines of each
  };
  Rows operands[8];
  int64_t per_step = 0;
  int begin = 0, end = 0;

  // Before a call that has so many steps.
  void spread(int64_t steps) {
    int64_t rows = 0;
    for (int i = begin; i < end; ++i) rows += operands[i].count;
    per_step = steps == 0 ? rows : (rows + steps - 1) / steps;
  }

  void operator()() { fetch(per_step); }

  void fetch(int64_t rows) {
    for (; begin < end; ++begin) {
      Rows& from = operands[begin];
      for (; from.count > 0; --from.count, from.next += from.stride) {
        if (rows-- == 0) return;
        for (int64_t line = 0; line < from.lines; ++line)
          __builtin_prefetch(from.next + 64 * line, 0, 2);
      }
    }
  }
};

// Kernels of one element type. Each serves some heads of one molecule.
struct AttentionKernels {
  using Kernel = void (*)(const Attention&, const AttentionMolecule&, const AttentionHeads&,
                          void* scratch, AttentionAhead&);
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
