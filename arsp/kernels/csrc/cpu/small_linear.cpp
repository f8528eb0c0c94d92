// arsp::small_linear(x (M, K), weight (N, K)) -> (M, N) for few rows: y = x weight^T with float32 accumulation.
//
// Decoding is bound by reading the weights. A matrix product made for many rows reads or repacks them at a cost that grows with
// the rows; here every weight comes from memory once for all rows.
// x and weight are float32 or bfloat16, the result has the dtype of x. One binary holds the versions for all instruction sets;
// the processor is asked once, when the library is loaded.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "isa.h"
#include "threads.h"

namespace {

using Bf16 = c10::BFloat16;

constexpr int64_t kMaxGroup = 8;            // rows of x whose sums fit in registers
constexpr int64_t kNearBytes = 22 << 10;    // rows of x up to this size stay in the first-level cache beside the stream of weights
constexpr int64_t kChunkBytes = 48 << 10;   // weights that stay in the nearest caches while several groups of x pass over them
constexpr int64_t kThreadBytes = 64 << 10;  // least weight traffic that is worth a thread
constexpr int kPrefetchBytes = 2048;        // how far ahead of the loads, along each row of the weight

inline float to_float(float w) { return w; }
inline float to_float(Bf16 w) { return static_cast<float>(w); }

#define ARSP_BLOCK "small_linear_block.h"
#include "each_isa.h"

template <typename W, typename X>
using Rows = void (*)(const W* w, const X* x, int64_t K, float* out, int64_t out_stride, int64_t begin, int64_t end);

// Versions for 1 .. kMaxGroup rows of x.
template <typename W, typename X>
struct Versions {
  Rows<W, X> rows[kMaxGroup];
};

#define ARSP_VERSIONS(ISA, W, X)                                                                                        \
  Versions<W, X> {                                                                                                      \
    { ISA::rows<1, W, X>, ISA::rows<2, W, X>, ISA::rows<3, W, X>, ISA::rows<4, W, X>, ISA::rows<5, W, X>, ISA::rows<6, W, X>, \
      ISA::rows<7, W, X>, ISA::rows<8, W, X> }                                                                          \
  }

template <typename W>
Versions<W, float> versions() {
#if defined(__x86_64__)
  if (isa >= kAvx512) return ARSP_VERSIONS(avx512, W, float);
  if (isa == kAvx2) return ARSP_VERSIONS(avx2, W, float);
#endif
  return ARSP_VERSIONS(portable, W, float);
}

// Threads split the rows of the weight, so each result is one thread's sum in one fixed order: it depends on neither their
// number nor the other rows of x.
template <typename W, typename X>
void run(const Versions<W, X>& versions, const at::Tensor& weight, const at::Tensor& x, at::Tensor& out) {
  const W* w = weight.const_data_ptr<W>();
  const X* x_data = x.const_data_ptr<X>();
  float* y = out.data_ptr<float>();
  const int64_t M = x.size(0), K = x.size(1), N = weight.size(0);
  const int64_t row_bytes = std::max<int64_t>(1, K * static_cast<int64_t>(sizeof(W)));
  const int64_t groups = (M + kMaxGroup - 1) / kMaxGroup;
  at::parallel_for(0, N, std::max<int64_t>(16, worth_a_thread(kThreadBytes, 32) / row_bytes), [&](int64_t begin, int64_t end) {
    const int64_t chunk = groups == 1 ? end - begin : std::max<int64_t>(12, kChunkBytes / row_bytes / 12 * 12);
    for (int64_t n = begin; n < end; n += chunk) {
      for (int64_t g = 0; g < groups; ++g) {
        const int64_t from = g * M / groups, to = (g + 1) * M / groups;
        versions.rows[to - from - 1](w, x_data + from * K, K, y + from * N, N, n, std::min(n + chunk, end));
      }
    }
  });
}

at::Tensor small_linear(const at::Tensor& x, const at::Tensor& weight) {
  TORCH_CHECK(x.dim() == 2 && weight.dim() == 2 && x.size(1) == weight.size(1),
              "small_linear: expected x (M, K) and weight (N, K), got ", x.sizes(), " and ", weight.sizes());
  const auto supported = [](const at::Tensor& t) { return t.scalar_type() == at::kFloat || t.scalar_type() == at::kBFloat16; };
  TORCH_CHECK(supported(x) && supported(weight), "small_linear: expected float32 or bfloat16, got x ", x.scalar_type(),
              " and weight ", weight.scalar_type());
  const at::Tensor w = weight.contiguous();
  at::Tensor out = at::empty({x.size(0), w.size(0)}, x.options().dtype(at::kFloat));
  const bool bf16_weight = w.scalar_type() == at::kBFloat16;
  if (out.numel() == 0) return out.to(x.scalar_type());
#if defined(__x86_64__)
  if (isa == kAvx512Bf16 && bf16_weight && x.scalar_type() == at::kBFloat16) {
    run(ARSP_VERSIONS(avx512_bf16, Bf16, Bf16), w, x.contiguous(), out);
    return out.to(at::kBFloat16);
  }
#endif
  const at::Tensor x_float = x.to(at::kFloat).contiguous();
  if (bf16_weight) {
    run(versions<Bf16>(), w, x_float, out);
  } else {
    run(versions<float>(), w, x_float, out);
  }
  return out.to(x.scalar_type());
}

}  // namespace

TORCH_LIBRARY_IMPL(arsp, CPU, m) { m.impl("small_linear", small_linear); }
