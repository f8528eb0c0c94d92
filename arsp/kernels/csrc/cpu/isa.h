// The instruction set in use, one for the whole library: asked of the processor once, when the library is loaded.

#pragma once

#include <algorithm>

enum Isa : int { kPortable = 0, kAvx2 = 1, kAvx512 = 2, kAvx512Vnni = 3, kAvx512Bf16 = 4 };  // as in the list ISA of build.py

inline Isa detect_isa() {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512dq")) {
    if (!__builtin_cpu_supports("avx512vnni")) return kAvx512;
    return __builtin_cpu_supports("avx512bf16") ? kAvx512Bf16 : kAvx512Vnni;
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return kAvx2;
#endif
  return kPortable;
}

inline const Isa best_isa = detect_isa();
inline Isa isa = best_isa;

// Keeps a value that is used several times in its register; without it the compiler loads it anew for every use.
#if defined(__x86_64__)
#define ARSP_IN_REGISTER(v) asm("" : "+v"(v))
#else
#define ARSP_IN_REGISTER(v)
#endif

// Rounds a float32 product before it is added: the compiler may not fuse the two.
#if defined(__x86_64__)
#define ARSP_ROUNDED(v) asm("" : "+v"(v))
#else
#define ARSP_ROUNDED(v) asm("" : "+m"(v))
#endif
