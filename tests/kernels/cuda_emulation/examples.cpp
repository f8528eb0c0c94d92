// Small kernels, right and wrong, that show what the emulated device notices.
#include "device.cuh"

namespace {

// Every thread reads what its neighbour wrote; without the barrier this depends on who runs first.
__global__ void rotate(int* out, bool barrier) {
  __shared__ int values[64];
  __syncthreads();
  values[threadIdx.x] = -1;
  __syncthreads();
  values[threadIdx.x] = static_cast<int>(threadIdx.x);
  if (barrier) __syncthreads();
  out[threadIdx.x] = values[(threadIdx.x + 1) % blockDim.x];
}

__global__ void half_a_barrier() {
  if (threadIdx.x < 32) __syncthreads();
}

__global__ void half_a_warp(int* out) {
  if (threadIdx.x < 16) out[threadIdx.x] = __shfl_xor_sync(kAllLanes, 1, 1);
}

__global__ void copied(const uint4* from, uint4* out, bool wait) {
  ARSP_DYNAMIC_SHARED(memory);
  uint4* const values = reinterpret_cast<uint4*>(memory);
  copy_async(values + threadIdx.x, from + threadIdx.x, threadIdx.x % 2 == 0);
  copy_commit();
  if (wait) copy_wait<0>();
  out[threadIdx.x] = values[threadIdx.x];
}

__global__ void unwritten(float* out) {
  ARSP_DYNAMIC_SHARED(memory);
  out[threadIdx.x] = reinterpret_cast<float*>(memory)[threadIdx.x];
}

__global__ void sums(const float* x, float* out, int* count) {
  __shared__ float spare[kLanes];
  out[threadIdx.x] = block_reduce(x[threadIdx.x], Sum(), spare);
  count[threadIdx.x] = __syncthreads_count(x[threadIdx.x] > 0) + 1000 * __syncthreads_count(x[threadIdx.x] > 1);
}

// c = a b of bytes, a (16, 32) and b (32, 8) row by row.
__global__ void product(const int8_t* a, const int8_t* b, int* out) {
  const int g = threadIdx.x / 4, p = threadIdx.x % 4;
  uint32_t left[4] = {}, right[2] = {};
  for (int i = 0; i < 4; ++i) {
    for (int r = 0; r < 4; ++r) left[r] |= static_cast<uint32_t>(static_cast<uint8_t>(a[(g + r % 2 * 8) * 32 + r / 2 * 16 + 4 * p + i])) << 8 * i;
    for (int r = 0; r < 2; ++r) right[r] |= static_cast<uint32_t>(static_cast<uint8_t>(b[(r * 16 + 4 * p + i) * 8 + g])) << 8 * i;
  }
  int c[4] = {};
  mma_s8(c, left, right[0], right[1]);
  for (int r = 0; r < 4; ++r) out[(g + r / 2 * 8) * 8 + 2 * p + r % 2] = c[r];
}

}  // namespace

ARSP_EXPORT int rotate_example(int* out, int barrier, int order) {
  emulate::device.order = order;
  return launch(rotate, 1, 64, 0, nullptr, out, barrier != 0);
}
ARSP_EXPORT int half_a_barrier_example() { return launch(half_a_barrier, 1, 64, 0, nullptr); }
ARSP_EXPORT int half_a_warp_example(int* out) { return launch(half_a_warp, 1, 32, 0, nullptr, out); }
ARSP_EXPORT int copied_example(const void* from, void* out, int wait) {
  return launch(copied, 1, 32, 512, nullptr, static_cast<const uint4*>(from), static_cast<uint4*>(out), wait != 0);
}
ARSP_EXPORT int unwritten_example(float* out) { return launch(unwritten, 2, 32, 128, nullptr, out); }
ARSP_EXPORT int sums_example(const float* x, float* out, int* count) { return launch(sums, 1, 96, 0, nullptr, x, out, count); }
ARSP_EXPORT int product_example(const int8_t* a, const int8_t* b, int* out) { return launch(product, 1, 32, 0, nullptr, a, b, out); }
ARSP_EXPORT const char* what() { return emulate::device.error.c_str(); }
