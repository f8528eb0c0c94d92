// A CUDA device in plain C++, for tests of kernels where there is none. Kernels are compiled as they are (device.cuh includes this with
// ARSP_EMULATE); blocks run one after another, and every thread of a block is a fiber that runs until it waits for others: at a
// barrier, or at an instruction that a whole warp executes together.
//
// What it finds: wrong indices and arithmetic, barriers and warp instructions that not all threads reach (an error instead of a hang), shared
// memory that is read before it is written (it starts as NaN), a missing barrier where the order of threads decides (`order` turns it
// around), data of cp.async read before the wait (it arrives no earlier). What it cannot find: anything of speed, of the memory model
// between blocks, of the real instructions.
#pragma once

#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <string>
#include <vector>

#define ARSP_DEVICE inline
#define ARSP_DYNAMIC_SHARED(name) unsigned char* name = emulate::device.shared.data()
#define __global__ static
#define __device__
#define __shared__ static
#define __launch_bounds__(...)
#define __grid_constant__

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(8) uint2 { uint32_t x, y; };
struct alignas(16) uint4 { uint32_t x, y, z, w; };
struct alignas(16) float4 { float x, y, z, w; };
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }
inline uint2 make_uint2(uint32_t x, uint32_t y) { return {x, y}; }

using cudaStream_t = void*;
constexpr int cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorUnknown = 999;

inline dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulate {

constexpr int kMaxThreads = 1024;
constexpr size_t kStack = 256 << 10, kMaxShared = 227 << 10;
constexpr int kSlot = 64;  // bytes that a lane gives to a warp instruction

struct Copy {
  void* to;
  unsigned char bytes[16];
};

// A product of wgmma that is not waited for yet.
struct Product {
  int* sums;                 // of this thread, not to be read
  int alone[64], value[64];  // the product, and what the sums will be
  uint64_t b;
  uint32_t a[4];
};

struct Fiber {
  ucontext_t start;
  jmp_buf at;
  bool entered = false, done = true;
  const uint64_t* waits_for = nullptr;
  uint64_t waits_while = 0;
  std::vector<std::vector<Copy>> groups;  // of cp.async, committed ones first, the open one last
  std::vector<Product> products;          // of wgmma, in their order
  size_t committed = 0, issued = 0;       // products
  bool registers_fenced = false, copies_fenced = true;
};

struct Warp {
  const void* instruction = nullptr;
  uint32_t arrived = 0;
  uint64_t generation = 0;
  alignas(16) unsigned char in[2][32][kSlot], out[2][32][kSlot];
};

struct Device {
  std::vector<Fiber> fibers{kMaxThreads};
  std::vector<Warp> warps{kMaxThreads / 32};
  std::vector<unsigned char> shared = std::vector<unsigned char>(kMaxShared);
  std::function<void()> body;
  jmp_buf scheduler;
  int current = 0, threads = 0, order = 0, arrived = 0;
  uint64_t barrier = 0;
  std::string error;
  std::vector<std::vector<uint64_t>> operands = std::vector<std::vector<uint64_t>>(kMaxThreads / 128);  // of wgmma, by warpgroup
};

inline Device device;

inline void switch_back() {
  Fiber& fiber = device.fibers[device.current];
  if (!_setjmp(fiber.at)) _longjmp(device.scheduler, 1);
}

[[noreturn]] inline void fail(const std::string& message) {
  if (device.error.empty()) device.error = message + " (thread " + std::to_string(device.current) + ")";
  for (;;) switch_back();
}

inline void wait_while(const uint64_t& counter, uint64_t value) {
  Fiber& fiber = device.fibers[device.current];
  fiber.waits_for = &counter;
  fiber.waits_while = value;
  switch_back();
  fiber.waits_for = nullptr;
}

inline void fiber_main() {
  for (;;) {
    device.body();
    device.fibers[device.current].done = true;
    switch_back();
  }
}

inline void enter(int thread) {
  Fiber& fiber = device.fibers[thread];
  device.current = thread;
  threadIdx = dim3(thread, 0, 0);
  if (_setjmp(device.scheduler)) return;
  if (fiber.entered) _longjmp(fiber.at, 1);
  fiber.entered = true;
  getcontext(&fiber.start);
  fiber.start.uc_stack.ss_sp = mmap(nullptr, kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  fiber.start.uc_stack.ss_size = kStack;
  makecontext(&fiber.start, fiber_main, 0);
  setcontext(&fiber.start);
}

inline bool run_block() {
  std::memset(device.shared.data(), 0xff, device.shared.size());
  for (Warp& warp : device.warps) warp.arrived = 0;
  device.arrived = 0;
  for (int t = 0; t < device.threads; ++t) {
    device.fibers[t].done = false;
    device.fibers[t].waits_for = nullptr;
    device.fibers[t].groups.assign(1, {});
    device.fibers[t].products.clear();
    device.fibers[t].committed = device.fibers[t].issued = 0;
    device.fibers[t].registers_fenced = false, device.fibers[t].copies_fenced = true;
  }
  for (auto& operands : device.operands) operands.clear();
  const int warps = device.threads / 32;
  for (int left = device.threads; left > 0;) {
    bool moved = false;
    for (int i = 0; i < warps; ++i) {
      const int first = 32 * (device.order == 1 ? warps - 1 - i : i);
      for (bool again = true; again;) {  // as far as a warp comes alone: others find what it has overwritten too early
        again = false;
        for (int j = 0; j < 32; ++j) {
          const int t = first + (device.order == 1 ? 31 - j : j);
          Fiber& fiber = device.fibers[t];
          if (fiber.done || (fiber.waits_for != nullptr && *fiber.waits_for == fiber.waits_while)) continue;
          moved = again = true;
          enter(t);
          if (!device.error.empty()) return false;
          left -= fiber.done;
        }
      }
    }
    if (!moved) {
      device.error = "threads wait for others that never come: a barrier or warp instruction is not reached by all";
      return false;
    }
  }
  return true;
}

// All lanes of a warp give `mine` and the last one to arrive computes every lane's result.
template <typename Out, typename In, typename F>
Out together(unsigned mask, const In& mine, const F& compute) {
  static_assert(sizeof(In) <= kSlot && sizeof(Out) <= kSlot, "slots are too small");
  static const char instruction = 0;
  Warp& warp = device.warps[device.current / 32];
  const int lane = device.current % 32, parity = warp.generation % 2;
  if (mask != 0xffffffffu) fail("only whole warps are emulated");
  if (warp.arrived == 0) warp.instruction = &instruction;
  if (warp.instruction != &instruction) fail("lanes of a warp execute different instructions together");
  std::memcpy(warp.in[parity][lane], &mine, sizeof(In));
  warp.arrived |= 1u << lane;
  if (warp.arrived == mask) {
    In in[32];
    Out out[32];
    for (int i = 0; i < 32; ++i) std::memcpy(&in[i], warp.in[parity][i], sizeof(In));
    compute(in, out);
    for (int i = 0; i < 32; ++i) std::memcpy(warp.out[parity][i], &out[i], sizeof(Out));
    warp.arrived = 0;
    ++warp.generation;
  } else {
    wait_while(warp.generation, warp.generation);
  }
  Out result;
  std::memcpy(&result, warp.out[parity][lane], sizeof(Out));
  return result;
}

inline float bf16_value(uint32_t half) {
  const uint32_t bits = half << 16;
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

}  // namespace emulate

inline void __syncthreads() {
  emulate::Device& d = emulate::device;
  if (++d.arrived == d.threads) {
    d.arrived = 0;
    ++d.barrier;
  } else {
    emulate::wait_while(d.barrier, d.barrier);
  }
}
inline int __syncthreads_count(int predicate) {
  static int count[2];
  const int parity = emulate::device.barrier % 4 / 2;
  count[parity] += predicate != 0;
  __syncthreads();
  const int result = count[parity];
  __syncthreads();
  count[parity] = 0;
  return result;
}
inline void __syncwarp(unsigned mask = 0xffffffffu) {
  emulate::together<int>(mask, 0, [](const int*, int* out) { std::fill(out, out + 32, 0); });
}

template <typename T>
T __shfl_xor_sync(unsigned mask, T x, int distance) {
  return emulate::together<T>(mask, x, [&](const T* in, T* out) {
    for (int i = 0; i < 32; ++i) out[i] = in[i ^ distance];
  });
}
template <typename T>
T __shfl_sync(unsigned mask, T x, int lane) {
  struct In { T x; int lane; };
  return emulate::together<T>(mask, In{x, lane}, [](const In* in, T* out) {
    for (int i = 0; i < 32; ++i) out[i] = in[in[i].lane & 31].x;
  });
}
template <typename T>
T __shfl_up_sync(unsigned mask, T x, int distance) {
  return emulate::together<T>(mask, x, [&](const T* in, T* out) {
    for (int i = 0; i < 32; ++i) out[i] = in[i >= distance ? i - distance : i];
  });
}
inline unsigned __ballot_sync(unsigned mask, int predicate) {
  return emulate::together<unsigned>(mask, predicate, [](const int* in, unsigned* out) {
    unsigned lanes = 0;
    for (int i = 0; i < 32; ++i) lanes |= static_cast<unsigned>(in[i] != 0) << i;
    std::fill(out, out + 32, lanes);
  });
}

// Fragments as in the description of mma.m16n8k32 and mma.m16n8k16 (PTX ISA): lane = 4 group + place.
inline void mma_s8(int (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  struct In { uint32_t a[4], b[2]; int c[4]; };
  struct Out { int c[4]; };
  const Out out = emulate::together<Out>(0xffffffffu, In{{a[0], a[1], a[2], a[3]}, {b0, b1}, {c[0], c[1], c[2], c[3]}}, [](const In* in, Out* out) {
    int A[16][32], B[32][8];
    for (int lane = 0; lane < 32; ++lane)
      for (int i = 0; i < 4; ++i) {
        const int group = lane / 4, place = lane % 4;
        for (int r = 0; r < 4; ++r) A[group + r % 2 * 8][r / 2 * 16 + place * 4 + i] = static_cast<int8_t>(in[lane].a[r] >> 8 * i);
        for (int r = 0; r < 2; ++r) B[r * 16 + place * 4 + i][group] = static_cast<int8_t>(in[lane].b[r] >> 8 * i);
      }
    for (int lane = 0; lane < 32; ++lane)
      for (int r = 0; r < 4; ++r) {
        int sum = in[lane].c[r];
        for (int k = 0; k < 32; ++k) sum += A[lane / 4 + r / 2 * 8][k] * B[k][lane % 4 * 2 + r % 2];
        out[lane].c[r] = sum;
      }
  });
  std::copy(out.c, out.c + 4, c);
}
inline void mma_bf16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  struct In { uint32_t a[4], b[2]; float c[4]; };
  struct Out { float c[4]; };
  const Out out = emulate::together<Out>(0xffffffffu, In{{a[0], a[1], a[2], a[3]}, {b0, b1}, {c[0], c[1], c[2], c[3]}}, [](const In* in, Out* out) {
    float A[16][16], B[16][8];
    for (int lane = 0; lane < 32; ++lane)
      for (int i = 0; i < 2; ++i) {
        const int group = lane / 4, place = lane % 4;
        for (int r = 0; r < 4; ++r) A[group + r % 2 * 8][r / 2 * 8 + place * 2 + i] = emulate::bf16_value(in[lane].a[r] >> 16 * i & 0xffff);
        for (int r = 0; r < 2; ++r) B[r * 8 + place * 2 + i][group] = emulate::bf16_value(in[lane].b[r] >> 16 * i & 0xffff);
      }
    for (int lane = 0; lane < 32; ++lane)
      for (int r = 0; r < 4; ++r) {
        float sum = in[lane].c[r];
        for (int k = 0; k < 16; ++k) sum += A[lane / 4 + r / 2 * 8][k] * B[k][lane % 4 * 2 + r % 2];
        out[lane].c[r] = sum;
      }
  });
  std::copy(out.c, out.c + 4, c);
}

inline uint4 load_once(const void* from) {
  if (reinterpret_cast<uintptr_t>(from) % 16) emulate::fail("a load of 16 bytes is not aligned");
  uint4 v;
  std::memcpy(&v, from, 16);
  return v;
}
inline void copy_async(void* to, const void* from, bool valid) {
  if ((reinterpret_cast<uintptr_t>(to) | (valid ? reinterpret_cast<uintptr_t>(from) : 0)) % 16) emulate::fail("cp.async is not aligned");
  emulate::Copy copy{to, {}};
  if (valid) std::memcpy(copy.bytes, from, 16);
  std::memset(to, 0xaa, 16);  // what was there is gone, what comes is not there yet
  emulate::device.fibers[emulate::device.current].groups.back().push_back(copy);
}
inline void copy_commit() { emulate::device.fibers[emulate::device.current].groups.emplace_back(); }
template <int kPending>
void copy_wait() {
  auto& groups = emulate::device.fibers[emulate::device.current].groups;
  while (groups.size() > kPending + 1) {
    for (const emulate::Copy& copy : groups.front()) {
      std::memcpy(copy.to, copy.bytes, 16);
      emulate::device.fibers[emulate::device.current].copies_fenced = false;
    }
    groups.erase(groups.begin());
  }
}

// wgmma as the PTX ISA describes it. A product is computed when it is asked for and again when it is waited for: shared memory that
// changes in between is an error. Until then the sums hold nonsense.
#define ARSP_WGMMA
namespace emulate {

constexpr uint32_t kSharedStart = 4096 + 16;  // of dynamic shared memory, in shared addresses

// Byte k of column n of an operand in shared memory whose rows of k are contiguous ("K-major"), of a matrix of k 0 .. 31.
inline int8_t operand_byte(uint64_t descriptor, int n, int k) {
  const uint32_t start = (descriptor & 0x3fff) << 4, leading = (descriptor >> 16 & 0x3fff) << 4, stride = (descriptor >> 32 & 0x3fff) << 4;
  const int mode = descriptor >> 62;
  uint32_t at;
  if (mode == 0) {  // no swizzle: blocks of 8 columns x 16 bytes
    at = start + n / 8 * stride + k / 16 * leading + n % 8 * 16 + k % 16;
  } else if (mode == 1) {  // 128-byte swizzle: bits 4 .. 6 of an address are changed by bits 7 .. 9
    if ((start >> 7 & 7) != (descriptor >> 49 & 7)) fail("an operand with 128-byte swizzle does not begin at a multiple of 1024 bytes");
    at = start + n / 8 * stride + n % 8 * 128 + k;
    at ^= (at >> 7 & 7) << 4;
  } else {
    fail("this swizzle is not emulated");
  }
  if (at < kSharedStart || at >= kSharedStart + kMaxShared) fail("an operand of wgmma lies outside of shared memory");
  return static_cast<int8_t>(device.shared[at - kSharedStart]);
}

struct Operands { uint32_t a[4]; uint64_t b; };
struct Sums { int value[16]; };

}  // namespace emulate

inline uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(static_cast<const unsigned char*>(p) - emulate::device.shared.data()) + emulate::kSharedStart;
}
inline bool has_wgmma() { return true; }

namespace emulate {

// One product, 16 of the 64 sums of a thread at a time. A warp has 16 rows of a and of the sums and needs no other.
inline void multiply(const uint32_t (&a)[4], uint64_t b, int (&sums)[64]) {
  for (int part = 0; part < 4; ++part) {
    const Sums out = together<Sums>(0xffffffffu, Operands{{a[0], a[1], a[2], a[3]}, b}, [&](const Operands* in, Sums* out) {
      int8_t A[16][32], B[32][32];
      for (int lane = 0; lane < 32; ++lane) {
        if (in[lane].b != b) fail("lanes of a warp give wgmma different operands");
        for (int i = 0; i < 16; ++i)  // a_i of the description
          A[lane / 4 + (i / 4 % 2 == 0 ? 0 : 8)][lane % 4 * 4 + i % 4 + (i < 8 ? 0 : 16)] = static_cast<int8_t>(in[lane].a[i / 4] >> i % 4 * 8);
      }
      for (int n = 0; n < 32; ++n)
        for (int k = 0; k < 32; ++k) B[n][k] = operand_byte(b, 32 * part + n, k);
      for (int lane = 0; lane < 32; ++lane)
        for (int i = 0; i < 16; ++i) {  // d_(16 part + i) of the description
          const int row = lane / 4 + (i / 2 % 2 == 0 ? 0 : 8), column = i / 4 * 8 + lane % 4 * 2 + i % 2;
          out[lane].value[i] = 0;
          for (int k = 0; k < 32; ++k) out[lane].value[i] += A[row][k] * B[column][k];
        }
    });
    std::copy(out.value, out.value + 16, sums + 16 * part);
  }
}

}  // namespace emulate

inline void wgmma_fence() { emulate::device.fibers[emulate::device.current].registers_fenced = true; }
inline void fence_async() { emulate::device.fibers[emulate::device.current].copies_fenced = true; }
inline void wgmma_s8(int (&c)[64], const uint32_t (&a)[4], uint64_t b, int add) {
  emulate::Device& d = emulate::device;
  emulate::Fiber& fiber = d.fibers[d.current];
  if (!fiber.registers_fenced) emulate::fail("wgmma without a fence of its registers");
  fiber.registers_fenced = false;
  for (int t = 0; t < d.threads; ++t)
    if (!d.fibers[t].copies_fenced) emulate::fail("wgmma reads what a thread has written without a fence");
  std::vector<uint64_t>& operands = d.operands[d.current / 128];
  if (operands.size() == fiber.issued) operands.push_back(b);
  if (operands[fiber.issued++] != b) emulate::fail("warps of a warpgroup give wgmma different operands");
  emulate::Product product{c, {}, {}, b, {a[0], a[1], a[2], a[3]}};
  int before[64];
  std::copy(c, c + 64, before);
  for (const emulate::Product& earlier : fiber.products)
    if (earlier.sums == c) std::copy(earlier.value, earlier.value + 64, before);
  emulate::multiply(a, b, product.alone);
  for (int i = 0; i < 64; ++i) {
    product.value[i] = product.alone[i] + (add ? before[i] : 0);
    c[i] = 0x7eadbeef;
  }
  d.fibers[d.current].products.push_back(product);
}
inline void wgmma_commit() {
  emulate::Fiber& fiber = emulate::device.fibers[emulate::device.current];
  fiber.committed = fiber.products.size();
}
inline void wgmma_wait(int (&)[64]) {
  emulate::Fiber& fiber = emulate::device.fibers[emulate::device.current];
  for (size_t i = 0; i < fiber.committed; ++i) {
    const emulate::Product& product = fiber.products[i];
    int again[64];
    emulate::multiply(product.a, product.b, again);
    if (!std::equal(again, again + 64, product.alone)) emulate::fail("shared memory changed while wgmma read it");
    std::copy(product.value, product.value + 64, product.sums);
  }
  fiber.products.erase(fiber.products.begin(), fiber.products.begin() + fiber.committed);
  fiber.committed = 0;
}

inline uint32_t __float_as_uint(float x) { uint32_t u; std::memcpy(&u, &x, 4); return u; }
inline float __uint_as_float(uint32_t u) { float x; std::memcpy(&x, &u, 4); return x; }
inline uint32_t pack_bf16(float low, float high) {
  const auto half = [](float x) -> uint32_t {
    if (x != x) return 0x7fff;
    const uint32_t u = __float_as_uint(x);
    return (u + 0x7fff + (u >> 16 & 1)) >> 16;
  };
  return half(low) | half(high) << 16;
}
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __int2float_rn(int x) { return static_cast<float>(x); }
inline float __uint2float_rn(uint32_t x) { return static_cast<float>(x); }
inline float __expf(float x) { return std::exp(x); }
inline float rsqrtf(float x) { return 1 / std::sqrt(x); }
inline uint32_t __umulhi(uint32_t a, uint32_t b) { return static_cast<uint64_t>(a) * b >> 32; }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline uint32_t __byte_perm(uint32_t a, uint32_t b, uint32_t selector) {
  const uint64_t bytes = static_cast<uint64_t>(b) << 32 | a;
  uint32_t result = 0;
  for (int i = 0; i < 4; ++i) result |= static_cast<uint32_t>(bytes >> 8 * (selector >> 4 * i & 7) & 0xff) << 8 * i;
  return result;
}
template <typename T>
T __ldg(const T* from) { return *from; }
template <typename T, typename V>
T atomicAdd(T* to, V x) { const T old = *to; *to += x; return old; }
template <typename T>
T atomicMax(T* to, T x) { const T old = *to; *to = std::max(old, x); return old; }
template <typename T>
T atomicMin(T* to, T x) { const T old = *to; *to = std::min(old, x); return old; }
using std::max;
using std::min;

inline const char* error_string(int status) { return status == cudaErrorUnknown ? emulate::device.error.c_str() : "arguments are refused"; }

template <typename... P, typename... A>
int launch(void (*kernel)(P...), dim3 grid, int threads, size_t shared, cudaStream_t, A... arguments) {
  emulate::Device& d = emulate::device;
  if (threads % 32 || threads > emulate::kMaxThreads || shared > emulate::kMaxShared) return cudaErrorInvalidValue;
  d.error.clear();
  d.threads = threads;
  d.body = [&] { kernel(static_cast<P>(arguments)...); };
  gridDim = grid;
  blockDim = dim3(threads);
  for (unsigned z = 0; z < grid.z; ++z)
    for (unsigned y = 0; y < grid.y; ++y)
      for (unsigned x = 0; x < grid.x; ++x) {
        blockIdx = dim3(x, y, z);
        if (emulate::run_block()) continue;
        for (emulate::Fiber& fiber : d.fibers) fiber.entered = false;  // they are somewhere inside the kernel: start again on the same stacks
        for (emulate::Warp& warp : d.warps) warp = {};
        return cudaErrorUnknown;
      }
  return cudaSuccess;
}
