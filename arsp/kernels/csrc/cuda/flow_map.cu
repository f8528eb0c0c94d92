// flow_map: the rectified flow of a noise vector towards the vectors of a codebook, integrated for a batch of rows in one launch
// (arsp/distill/flow.py has the definition).
//
// A block is a row. It lists the codes that the law has left, in order, and then evaluates the posterior over them step after step: a
// thread sums weights and weighted vectors of its share of the list, relative to a maximum of its own that moves only when a logarithm
// is more than kSlack above it, and the block adds up in a fixed order. The state stays in registers; a row ends as soon as its largest weight is
// decisive.
#include "device.cuh"

namespace {

template <int kWidth>
constexpr int kThreadsOf = kWidth > 16 ? 256 : 512;  // what registers allow
constexpr float kSlack = 20;  // e^20 times 65536 codes is far from the largest float
constexpr float kInfinity = __builtin_inff();

enum Solver : int { kEuler = 0, kTwoStep = 1, kMidpoint = 2 };

// FlowStep of reference.py.
struct Step {
  float t, inner, square;     // log w = log p + inner <x, c> - square |c|^2
  float ratio, slope, width;  // t' / t, weight of the last difference of means, t' - t
  float middle, middle_ratio, middle_inner, middle_square;
};

template <int kWidth>
struct Shared {
  static constexpr int kWarps = kThreadsOf<kWidth> / kLanes;
  float max[kWarps], best[kWarps], sums[kWarps][kWidth + 1], total[kWidth + 1];
  int code[kWarps], best_code, count[kWarps];
  float best_log;
};

template <int kWidth>
struct Posterior {
  float mean[kWidth], weight;  // of the likeliest code
  int code;
};

// Codes with log p above -inf and their log p, in order; returns their number.
template <int kWidth>
ARSP_DEVICE int list_codes(const float* logp, int U, int* codes, float* logs, Shared<kWidth>& shared) {
  constexpr int kThreads = kThreadsOf<kWidth>, kWarps = kThreads / kLanes;
  const int lane = threadIdx.x % kLanes, warp = threadIdx.x / kLanes;
  int num = 0;
  for (int first = 0; first < U; first += kThreads) {
    const int u = first + threadIdx.x;
    const float log_p = u < U ? logp[u] : -kInfinity;
    const unsigned lanes = __ballot_sync(kAllLanes, log_p > -kInfinity);
    if (lane == 0) shared.count[warp] = __popc(lanes);
    __syncthreads();
    int at = num + __popc(lanes & ((1u << lane) - 1));
    for (int w = 0; w < kWarps; ++w) {
      if (w < warp) at += shared.count[w];
      num += shared.count[w];
    }
    if (log_p > -kInfinity) codes[at] = u, logs[at] = log_p;
    __syncthreads();
  }
  return num;
}

// The posterior over the listed codes at x; the same in all threads.
template <int kWidth>
ARSP_DEVICE void evaluate(const float* vectors, const int* codes, const float* logs, int num, const float (&x)[kWidth], float inner, float square,
                          Shared<kWidth>& shared, Posterior<kWidth>& out) {
  constexpr int kThreads = kThreadsOf<kWidth>, kWarps = kThreads / kLanes;
  const int lane = threadIdx.x % kLanes, warp = threadIdx.x / kLanes;
  float scaled[kWidth], sums[kWidth + 1] = {}, max = -kInfinity, best = -kInfinity;
  int code = 0x7fffffff;
#pragma unroll
  for (int e = 0; e < kWidth; ++e) scaled[e] = inner * x[e];
  for (int i = threadIdx.x; i < num; i += kThreads) {
    const int u = codes[i];
    float c[kWidth], log_w = logs[i];
#pragma unroll
    for (int e = 0; e < kWidth; e += 4) {
      const float4 four = __ldg(reinterpret_cast<const float4*>(vectors + static_cast<int64_t>(u) * kWidth + e));
      c[e] = four.x, c[e + 1] = four.y, c[e + 2] = four.z, c[e + 3] = four.w;
    }
#pragma unroll
    for (int e = 0; e < kWidth; ++e) log_w += c[e] * (scaled[e] - square * c[e]);
    if (log_w > best) best = log_w, code = u;
    if (log_w > max + kSlack) {
      const float shrink = expf(max - log_w);
      max = log_w;
#pragma unroll
      for (int e = 0; e <= kWidth; ++e) sums[e] *= shrink;
    }
    const float w = expf(log_w - max);
#pragma unroll
    for (int e = 0; e < kWidth; ++e) sums[e] += w * c[e];
    sums[kWidth] += w;
  }
  float most = warp_reduce(max, Max());
  if (lane == 0) shared.max[warp] = most;
  __syncthreads();
  most = shared.max[0];
  for (int w = 1; w < kWarps; ++w) most = Max()(most, shared.max[w]);
  const float shrink = max == -kInfinity ? 0.f : expf(max - most);
#pragma unroll
  for (int e = 0; e <= kWidth; ++e) {
    const float sum = warp_reduce(sums[e] * shrink, Sum());
    if (lane == 0) shared.sums[warp][e] = sum;
  }
#pragma unroll
  for (int distance = kLanes / 2; distance; distance /= 2) {
    const float other = __shfl_xor_sync(kAllLanes, best, distance);
    const int other_code = __shfl_xor_sync(kAllLanes, code, distance);
    if (other > best || (other == best && other_code < code)) best = other, code = other_code;
  }
  if (lane == 0) shared.best[warp] = best, shared.code[warp] = code;
  __syncthreads();
  if (threadIdx.x <= kWidth) {
    float total = 0;
    for (int w = 0; w < kWarps; ++w) total += shared.sums[w][threadIdx.x];
    shared.total[threadIdx.x] = total;
  } else if (threadIdx.x == 2 * kLanes) {  // of another warp
    for (int w = 0; w < kWarps; ++w) {
      if (w == 0 || shared.best[w] > best || (shared.best[w] == best && shared.code[w] < code)) best = shared.best[w], code = shared.code[w];
    }
    shared.best_log = best, shared.best_code = code;
  }
  __syncthreads();
  const float total = shared.total[kWidth];
#pragma unroll
  for (int e = 0; e < kWidth; ++e) out.mean[e] = __fdiv_rn(shared.total[e], total);
  out.weight = __fdiv_rn(expf(shared.best_log - most), total);
  out.code = shared.best_code;
}

template <int kWidth>
__global__ void __launch_bounds__(kThreadsOf<kWidth>)
    integrate(const float* logp, const float* noise, const float* vectors, const float* stop_at, const Step* grid, int solver, int steps, int U,
              int* codes, float* logs, int64_t* group, float* stop_t, float* weight, float* evaluations, float* state) {
  __shared__ Shared<kWidth> shared;
  const int64_t row = blockIdx.x;
  codes += row * U, logs += row * U;
  const int num = list_codes<kWidth>(logp + row * U, U, codes, logs, shared);  // ends with a barrier
  float x[kWidth], previous[kWidth];
#pragma unroll
  for (int e = 0; e < kWidth; ++e) x[e] = noise[row * kWidth + e];
  Posterior<kWidth> at;
  int count = 0;
  for (int i = 0;; ++i) {
    const Step step = grid[i];
    evaluate<kWidth>(vectors, codes, logs, num, x, step.inner, step.square, shared, at);
    ++count;
    if (i == steps || at.weight >= stop_at[row]) {
#pragma unroll
      for (int e = 0; e < kWidth; ++e)
        if (static_cast<int>(threadIdx.x) == e) state[row * kWidth + e] = x[e];
      if (threadIdx.x == 0) group[row] = at.code, stop_t[row] = step.t, weight[row] = at.weight, evaluations[row] = static_cast<float>(count);
      return;
    }
    if (solver == kMidpoint) {
      float half[kWidth];
#pragma unroll
      for (int e = 0; e < kWidth; ++e) half[e] = at.mean[e] + step.middle_ratio * (x[e] - at.mean[e]);
      evaluate<kWidth>(vectors, codes, logs, num, half, step.middle_inner, step.middle_square, shared, at);
      ++count;
#pragma unroll
      for (int e = 0; e < kWidth; ++e) x[e] += step.width * __fdiv_rn(half[e] - at.mean[e], step.middle);
      continue;
    }
#pragma unroll
    for (int e = 0; e < kWidth; ++e) {
      const float target = solver == kTwoStep && i > 0 ? at.mean[e] + step.slope * (at.mean[e] - previous[e]) : at.mean[e];
      x[e] = target + step.ratio * (x[e] - target);
      previous[e] = at.mean[e];
    }
  }
}

}  // namespace

// width: of noise (N, width), vectors (U, width) and state, 8, 16 or 32. grid: steps + 1 of Step. codes and logs: (N, U), scratch.
ARSP_EXPORT int arsp_flow_map(const float* logp, const float* noise, const float* vectors, const float* stop_at, const float* grid, int solver, int steps,
                              int64_t N, int64_t U, int width, int* codes, float* logs, int64_t* group, float* stop_t, float* weight,
                              float* evaluations, float* state, cudaStream_t stream) {
  const auto kernel = width == 8 ? integrate<8> : width == 16 ? integrate<16> : width == 32 ? integrate<32> : nullptr;
  if (kernel == nullptr) return cudaErrorInvalidValue;
  return launch(kernel, dim3(static_cast<unsigned>(N)), width == 32 ? kThreadsOf<32> : kThreadsOf<8>, 0, stream, logp, noise, vectors, stop_at, reinterpret_cast<const Step*>(grid), solver,
                steps, static_cast<int>(U), codes, logs, group, stop_t, weight, evaluations, state);
}
