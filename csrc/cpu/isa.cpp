#include "isa.h"

#include <cstdlib>
#include <cstring>

#include "poison.h"

namespace edt {
namespace {

Isa best_isa() {
#ifdef EDT_X86
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
    return Isa::avx512;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return Isa::avx2;
#endif
  return Isa::scalar;
}

constexpr const char* kNames[] = {"scalar", "avx2", "avx512"};

// An unknown or unsupported name never reaches an illegal instruction: the best level stays, and
// edt_kernels raises the error, for only Python can say it well.
Isa choose_isa() {
  const Isa best = best_isa();
  const char* wanted = std::getenv("EDT_CPU_ISA");
  for (int level = 0; wanted && level <= static_cast<int>(best); ++level)
    if (std::strcmp(wanted, kNames[level]) == 0) return static_cast<Isa>(level);
  return best;
}

}  // namespace

Isa active_isa() {
  static const Isa active = choose_isa();
  return active;
}

}  // namespace edt

extern "C" __attribute__((visibility("default"))) const char* edt_cpu_isa() {
  return edt::kNames[static_cast<int>(edt::active_isa())];
}

extern "C" __attribute__((visibility("default"))) void edt_poison(bool on) {
  edt::poison_memory = on;
}

extern "C" __attribute__((visibility("default"))) const char* edt_sources() { return EDT_SOURCES; }
