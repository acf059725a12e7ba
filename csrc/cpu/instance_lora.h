// Rows through low-rank adapters, and the sums of outer products that are their gradients, on raw
// pointers.
#pragma once

#include <cstdint>

#include "isa.h"

namespace edt {

// out = base + s (x D_m) U_m^T. The forward has a D for every molecule and one U for all, the
// gradient of x has it the other way round. All contiguous; sums are double where x is, else float.
struct Adapter {
  const void* x;     // [T, in]
  const void* down;  // D [in, rank]
  const void* up;    // U [out, rank]
  // From the matrix of a molecule to that of the next, in numbers; 0 where all have one.
  int64_t down_step, up_step;
  const void* packed;  // U as `pack` leaves it, where all have one
  const void* base;    // [T, out] or null
  void* out;           // [T, out] or null: then x D is all that is wanted
  void* shrunk;        // [T, rank], x D as sums, or null
  int64_t in, width, rank;
  double scale;
};

// sum over rows of left^T right: [width, rank].
struct OuterSum {
  const void* left;   // [T, width]
  const void* right;  // [T, rank], sums
  int64_t width, rank;
  double scale;
  void* out;
};

struct InstanceLoraKernels {
  // Rows of U in a panel; columns of `left` that a call of `outer` takes.
  int64_t panel, columns;
  // Bytes of scratch, aligned to 64.
  int64_t (*adapt_scratch)(const Adapter&);
  int64_t (*outer_scratch)(const OuterSum&);
  // Panels [begin, end) of U: [panels][rank][panel] as sums, zeros beyond its last row.
  void (*pack)(const Adapter&, int64_t begin, int64_t end, void* packed);
  // Rows [begin, end), the first of them of `molecule`.
  void (*adapt)(const Adapter&, const int64_t* offsets, int64_t molecule, int64_t begin,
                int64_t end, void* scratch);
  // Columns from `first` of the left of rows [begin, end): as many rows of `out`.
  void (*outer)(const OuterSum&, int64_t first, int64_t begin, int64_t end, void* out,
                void* scratch);
};

struct InstanceLoraTable {
  InstanceLoraKernels kernels[4];  // by float_index
};

EDT_KERNEL_TABLE(InstanceLoraTable, instance_lora_kernels)

}  // namespace edt
