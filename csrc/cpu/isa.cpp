#include "isa.h"

#if defined(EDT_X86) && !defined(EDT_EMULATE)
#include <cpuid.h>
#endif
#ifdef __linux__
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <cstdlib>
#include <cstring>

#include "poison.h"

namespace edt {
namespace {

#if defined(EDT_X86) && !defined(EDT_EMULATE)
// The processor has dot products of bfloat16.
bool has_avx512_bf16() {
  unsigned a, b, c, d;
  return __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 5 & 1);
}

// The processor has AMX, and the system lets this process use its tiles (Linux since 5.16: asked
// for once, then held by every thread).
bool amx_is_granted() {
#ifdef __linux__
  unsigned a, b, c, d;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d >> 22 & 1) || !(d >> 24 & 1)) return false;
  constexpr int kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}
#endif

Isa best_isa() {
#ifdef EDT_EMULATE
  return Isa::amx;
#elif defined(EDT_X86)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
    return !has_avx512_bf16() ? Isa::avx512 : amx_is_granted() ? Isa::amx : Isa::avx512_bf16;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return Isa::avx2;
#endif
  return Isa::scalar;
}

constexpr const char* kNames[] = {"scalar", "avx2", "avx512", "avx512_bf16", "amx"};

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
