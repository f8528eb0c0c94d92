// What all CUDA kernels share: the instructions that C++ has no word for, numbers in memory, reductions, and launching.
//
// With ARSP_EMULATE the same kernels are compiled by a C++ compiler; emulate.h then stands in for the device and defines the
// functions of the first part.
#pragma once

#include <cstddef>
#include <cstdint>

#ifdef ARSP_EMULATE
#include "emulate.h"
#else
#include <cuda_runtime.h>

#define ARSP_DEVICE __device__ __forceinline__
#define ARSP_DYNAMIC_SHARED(name) extern __shared__ __align__(16) unsigned char name[]

// c (16 x 8) += a (16 x 32) b (32 x 8) of signed bytes.
ARSP_DEVICE void mma_s8(int (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// c (16 x 8) += a (16 x 16) b (16 x 8) of bfloat16 pairs.
ARSP_DEVICE void mma_bf16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// 16 bytes that are read once: past the first-level cache.
ARSP_DEVICE uint4 load_once(const void* from) {
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(from));
  return v;
}

// 16 bytes on their way to shared memory; zeros where `valid` is false.
ARSP_DEVICE void copy_async(void* to_shared, const void* from, bool valid) {
  const uint32_t to = static_cast<uint32_t>(__cvta_generic_to_shared(to_shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(valid ? 16 : 0) : "memory");
}
ARSP_DEVICE void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kPending>
ARSP_DEVICE void copy_wait() { asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory"); }

// Two floats as bfloat16, the first one in the lower half, to the nearest, ties to even.
ARSP_DEVICE uint32_t pack_bf16(float low, float high) {
  uint32_t packed;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
}

// ---- wgmma: 4 warps multiply together and go on while the tensor cores work. To be used under ARSP_WGMMA alone.

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
#define ARSP_WGMMA
#endif

#define ARSP_SUMS \
  "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3]), "+r"(c[4]), "+r"(c[5]), "+r"(c[6]), "+r"(c[7]), \
  "+r"(c[8]), "+r"(c[9]), "+r"(c[10]), "+r"(c[11]), "+r"(c[12]), "+r"(c[13]), "+r"(c[14]), "+r"(c[15]), \
  "+r"(c[16]), "+r"(c[17]), "+r"(c[18]), "+r"(c[19]), "+r"(c[20]), "+r"(c[21]), "+r"(c[22]), "+r"(c[23]), \
  "+r"(c[24]), "+r"(c[25]), "+r"(c[26]), "+r"(c[27]), "+r"(c[28]), "+r"(c[29]), "+r"(c[30]), "+r"(c[31]), \
  "+r"(c[32]), "+r"(c[33]), "+r"(c[34]), "+r"(c[35]), "+r"(c[36]), "+r"(c[37]), "+r"(c[38]), "+r"(c[39]), \
  "+r"(c[40]), "+r"(c[41]), "+r"(c[42]), "+r"(c[43]), "+r"(c[44]), "+r"(c[45]), "+r"(c[46]), "+r"(c[47]), \
  "+r"(c[48]), "+r"(c[49]), "+r"(c[50]), "+r"(c[51]), "+r"(c[52]), "+r"(c[53]), "+r"(c[54]), "+r"(c[55]), \
  "+r"(c[56]), "+r"(c[57]), "+r"(c[58]), "+r"(c[59]), "+r"(c[60]), "+r"(c[61]), "+r"(c[62]), "+r"(c[63])

// c (64 x 128) += a (64 x 32) b (32 x 128) of signed bytes, c = a b where `add` is 0. Warp w has rows 16 w .. of a in registers, as mma_s8
// has them, and of c: c[4 j ..] is what mma_s8 has of columns 8 j .. . b lies in shared memory column by column (`columns_at`).
ARSP_DEVICE void wgmma_s8(int (&c)[64], const uint32_t (&a)[4], uint64_t b, int add) {
  asm volatile(
      "{\n"
      ".reg .pred p;\n"
      "setp.ne.b32 p, %69, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n128k32.s32.s8.s8 {"
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
      "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
      "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
      "}, {%64, %65, %66, %67}, %68, p;\n"
      "}"
      : ARSP_SUMS
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add));
}
ARSP_DEVICE void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }  // before every product: registers are ready
ARSP_DEVICE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
ARSP_DEVICE void wgmma_wait(int (&c)[64]) { asm volatile("wgmma.wait_group.sync.aligned 0;" : ARSP_SUMS : : "memory"); }  // c is there
#undef ARSP_SUMS
// What this thread wrote to shared memory may be read by wgmma, behind a barrier.
ARSP_DEVICE void fence_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
ARSP_DEVICE uint32_t shared_address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }
inline bool has_wgmma() {
  int device = 0, major = 0, minor = 0;
  const bool known = cudaGetDevice(&device) == cudaSuccess &&
                     cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) == cudaSuccess &&
                     cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device) == cudaSuccess;
  return known && major == 9 && minor == 0;
}

inline const char* error_string(int status) { return cudaGetErrorString(static_cast<cudaError_t>(status)); }

template <typename... P, typename... A>
int launch(void (*kernel)(P...), dim3 grid, int threads, size_t shared, cudaStream_t stream, A... arguments) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return cudaSuccess;
  if (shared > 48 * 1024) {
    const cudaError_t refused = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared));
    if (refused != cudaSuccess) return refused;
  }
  kernel<<<grid, threads, shared, stream>>>(static_cast<P>(arguments)...);
  return cudaGetLastError();
}
#endif

// The operand b of wgmma: columns of 128 bytes of which it reads 32, eight columns to 1024 bytes, 16-byte word i of column j at word i ^ j % 8
// (the 128-byte swizzle). `at` is a shared address, a multiple of 1024 plus the first byte of k. Bits 0 .. 13 are the address, 32 .. 45 the
// distance of eight columns, both over 16; bits 62 and 63 the swizzle; the distance in bits 16 .. 29 is not used with it.
ARSP_DEVICE uint64_t columns_at(uint32_t at) {
  return static_cast<uint64_t>((at & 0x3ffff) >> 4) | static_cast<uint64_t>(1) << 16 | static_cast<uint64_t>(1024 >> 4) << 32 |
         static_cast<uint64_t>(1) << 62;
}

#define ARSP_EXPORT extern "C" __attribute__((visibility("default")))

// ---- numbers in memory

struct Bf16 {
  uint16_t bits;
};

enum Type : int { kFloat = 0, kBf16 = 1 };  // as in arsp/kernels/cuda.py

ARSP_DEVICE float to_float(float x) { return x; }
ARSP_DEVICE float to_float(Bf16 x) { return __uint_as_float(static_cast<uint32_t>(x.bits) << 16); }
ARSP_DEVICE float low_half(uint32_t pair) { return __uint_as_float(pair << 16); }
ARSP_DEVICE float high_half(uint32_t pair) { return __uint_as_float(pair & 0xffff0000u); }
ARSP_DEVICE void put(float* to, float x) { *to = x; }
ARSP_DEVICE void put(Bf16* to, float x) { to->bits = static_cast<uint16_t>(pack_bf16(x, 0.f)); }

// A vector of floats or bfloat16 that is known when the kernel runs.
struct Numbers {
  const void* data;
  int type;
  ARSP_DEVICE float operator[](int64_t i) const {
    return type == kFloat ? static_cast<const float*>(data)[i] : to_float(static_cast<const Bf16*>(data)[i]);
  }
};

// ---- functions of one number

ARSP_DEVICE float sigmoid(float x) { return __fdiv_rn(1.f, 1.f + expf(-x)); }

// GELU in its tanh form: (1 + tanh u) / 2 = sigmoid(2 u).
ARSP_DEVICE float gelu(float x) { return x * sigmoid(1.5957691216f * (x + 0.044715f * x * x * x)); }

// ---- threads of a block

constexpr unsigned kAllLanes = 0xffffffffu;
constexpr int kLanes = 32;

struct Sum {
  template <typename T>
  ARSP_DEVICE T operator()(T a, T b) const { return a + b; }
};
struct Max {  // NaN wins
  ARSP_DEVICE float operator()(float a, float b) const { return a > b || a != a ? a : b; }
};

template <typename T, typename Op>
ARSP_DEVICE T warp_reduce(T x, Op op) {
#pragma unroll
  for (int distance = kLanes / 2; distance; distance /= 2) x = op(x, __shfl_xor_sync(kAllLanes, x, distance));
  return x;
}

// The same value in all threads, combined in the same order whatever runs first. `spare` has room for 32 of T; a barrier precedes
// its use, so consecutive calls may share it.
template <typename T, typename Op>
ARSP_DEVICE T block_reduce(T x, Op op, T* spare) {
  const int warp = threadIdx.x / kLanes, warps = blockDim.x / kLanes;
  x = warp_reduce(x, op);
  __syncthreads();
  if (threadIdx.x % kLanes == 0) spare[warp] = x;
  __syncthreads();
  T total = spare[0];
  for (int i = 1; i < warps; ++i) total = op(total, spare[i]);
  return total;
}
