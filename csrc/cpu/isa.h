// Instruction sets: each kernel file is compiled once per level (EDT_ISA names the level and its
// namespace) and gives a table of function pointers; the level is chosen once, at run time.
// Products in bfloat16 (*.bf16.cpp) have two levels above AVX-512: its dot products, and AMX.
#pragma once

namespace edt {

enum class Isa { scalar, avx2, avx512, avx512_bf16, amx };

// The best level of this machine, or the one that EDT_CPU_ISA names.
Isa active_isa();

}  // namespace edt

// Declares `TABLE`, a constant of type TYPE in the namespace of every level, and edt::TABLE(),
// which returns the active one. Use inside namespace edt.
#ifdef EDT_X86
#define EDT_KERNEL_TABLE(TYPE, TABLE)                                        \
  namespace scalar {                                                         \
  extern const TYPE TABLE;                                                   \
  }                                                                          \
  namespace avx2 {                                                           \
  extern const TYPE TABLE;                                                   \
  }                                                                          \
  namespace avx512 {                                                         \
  extern const TYPE TABLE;                                                   \
  }                                                                          \
  inline const TYPE& TABLE() {                                               \
    static const TYPE& active = active_isa() >= Isa::avx512 ? avx512::TABLE  \
                                : active_isa() == Isa::avx2 ? avx2::TABLE    \
                                                            : scalar::TABLE; \
    return active;                                                           \
  }
#else
#define EDT_KERNEL_TABLE(TYPE, TABLE) \
  namespace scalar {                  \
  extern const TYPE TABLE;            \
  }                                   \
  inline const TYPE& TABLE() { return scalar::TABLE; }
#endif
