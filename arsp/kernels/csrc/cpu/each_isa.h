// Includes the file named by ARSP_BLOCK once per instruction set, each time in a namespace of its own (so neither has an include
// guard), after vector.h and with
//   ARSP_TARGET    the target attribute that every function there needs
//   ARSP_LANES     floats in a vector register
//   ARSP_BF16_DOT  only where the processor multiplies pairs of bfloat16 itself
//   ARSP_VNNI_DOT  only where it adds up four products of bytes itself; that version takes the place of the one for bfloat16 where
//                  ARSP_BLOCK_USES_VNNI is defined
// Include it inside an anonymous namespace, after <cstdint> and c10::BFloat16 (as Bf16).

#if defined(__x86_64__)
#ifdef ARSP_BLOCK_USES_VNNI
namespace avx512_vnni {
#define ARSP_TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,fma")))
#define ARSP_LANES 16
#define ARSP_VNNI_DOT
#include "vector.h"
#include ARSP_BLOCK
#undef ARSP_TARGET
#undef ARSP_LANES
#undef ARSP_VNNI_DOT
}  // namespace avx512_vnni
#else
namespace avx512_bf16 {
#define ARSP_TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,fma")))
#define ARSP_LANES 16
#define ARSP_BF16_DOT
#include "vector.h"
#include ARSP_BLOCK
#undef ARSP_TARGET
#undef ARSP_LANES
#undef ARSP_BF16_DOT
}  // namespace avx512_bf16
#endif
namespace avx512 {
#define ARSP_TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,fma")))
#define ARSP_LANES 16
#include "vector.h"
#include ARSP_BLOCK
#undef ARSP_TARGET
#undef ARSP_LANES
}  // namespace avx512
namespace avx2 {
#define ARSP_TARGET __attribute__((target("avx2,fma")))
#define ARSP_LANES 8
#include "vector.h"
#include ARSP_BLOCK
#undef ARSP_TARGET
#undef ARSP_LANES
}  // namespace avx2
#endif
namespace portable {
#define ARSP_TARGET
#define ARSP_LANES 4
#include "vector.h"
#include ARSP_BLOCK
#undef ARSP_TARGET
#undef ARSP_LANES
}  // namespace portable
