// arsp::quantize_per_token and the producers that quantise what they make: rms_norm_quantize, modulate_quantize, swiglu_quantize,
// gelu_quantize. A row is made in float32, balanced where asked for, and becomes 8-bit codes before it leaves the nearest cache.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <optional>
#include <tuple>
#include <vector>

#include "isa.h"
#include "numbers.h"
#include "threads.h"

namespace {

using Bf16 = c10::BFloat16;

constexpr int64_t kThreadValues = 1 << 15;  // least values that are worth a thread
constexpr int64_t kMostLanes = 16;
constexpr float kShift = 0.17f;  // GELU is above -kShift, but for rounding

struct Balance {
  const float* smooth;  // or null
  const int8_t* signs;  // or null: no rotation
  int64_t block;        // the largest power of two that divides a row
  float root;           // block^-1/2
};

#define ARSP_BLOCK "quantise_block.h"
#include "each_isa.h"

#if defined(__x86_64__)
#define ARSP_VERSION(...) (isa >= kAvx512 ? avx512::__VA_ARGS__ : isa == kAvx2 ? avx2::__VA_ARGS__ : portable::__VA_ARGS__)
#else
#define ARSP_VERSION(...) (portable::__VA_ARGS__)
#endif

// The rows of a tensor (..., K): in place where they lie equally far apart.
class Rows {
 public:
  Rows(const char* op, const at::Tensor& t) {
    TORCH_CHECK(t.scalar_type() == at::kFloat || t.scalar_type() == at::kBFloat16, op, ": expected float32 or bfloat16, got ",
                t.scalar_type());
    TORCH_CHECK(t.dim() >= 1, op, ": expected rows (..., K), got a number");
    tensor_ = even(t) ? t : t.contiguous();
    stride_ = tensor_.dim() > 1 ? tensor_.stride(-2) : 0;
  }
  Numbers operator[](int64_t row) const {
    if (tensor_.scalar_type() == at::kFloat) return {tensor_.const_data_ptr<float>() + row * stride_, nullptr};
    return {nullptr, tensor_.const_data_ptr<Bf16>() + row * stride_};
  }

 private:
  static bool even(const at::Tensor& t) {
    if (t.stride(-1) != 1) return false;
    for (int64_t d = t.dim() - 3; d >= 0; --d)
      if (t.stride(d) != t.stride(d + 1) * t.size(d + 1)) return false;
    return true;
  }
  at::Tensor tensor_;
  int64_t stride_;
};

// Scratch of this thread for a row.
float* scratch(int64_t K) {
  thread_local std::vector<float> values;
  if (static_cast<int64_t>(values.size()) < K + kMostLanes) values.resize(K + kMostLanes);
  return values.data();
}

// Calls one(row) for every row, on several threads where that pays.
template <typename One>
void each_row(int64_t rows, int64_t K, One one) {
  at::parallel_for(0, rows, std::max<int64_t>(1, worth_a_thread(kThreadValues) / std::max<int64_t>(1, K)), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) one(row);
  });
}

at::Tensor scales_like(const at::Tensor& x) { return at::empty(x.sizes().slice(0, x.dim() - 1), x.options().dtype(at::kFloat)); }

void check_columns(const char* op, const char* name, const at::Tensor& t, int64_t K, at::ScalarType type) {
  TORCH_CHECK(t.dim() == 1 && t.size(0) == K && t.scalar_type() == type, op, ": ", name, " is ", t.scalar_type(), " ", t.sizes(),
              ", expected ", type, " (", K, ")");
}

// Codes and scales in the shape of x of the rows that produce(row, K, values) writes.
template <typename Produce>
std::tuple<at::Tensor, at::Tensor> quantise(const char* op, const at::Tensor& x, const std::optional<at::Tensor>& smooth,
                                            const std::optional<at::Tensor>& signs, const std::optional<at::Tensor>& scale,
                                            Produce produce) {
  const int64_t K = x.size(-1);
  at::Tensor xq = at::empty(x.sizes(), x.options().dtype(at::kChar)), sx = scales_like(x);
  const int64_t rows = sx.numel();
  Balance by{nullptr, nullptr, K & -K, static_cast<float>(std::pow(static_cast<double>(std::max<int64_t>(1, K & -K)), -0.5))};
  at::Tensor smooth_c, signs_c, scale_c;
  if (smooth) {
    check_columns(op, "smooth", *smooth, K, at::kFloat);
    smooth_c = smooth->contiguous();
    by.smooth = smooth_c.const_data_ptr<float>();
  }
  if (signs) {
    check_columns(op, "signs", *signs, K, at::kChar);
    signs_c = signs->contiguous();
    by.signs = signs_c.const_data_ptr<int8_t>();
  }
  if (scale) {
    TORCH_CHECK(scale->scalar_type() == at::kFloat && (scale->numel() == 1 || scale->numel() == rows), op, ": scale is ",
                scale->scalar_type(), " ", scale->sizes(), ", expected float32, one number or one for each of ", rows, " rows");
    scale_c = scale->contiguous();
  }
  const float* given = scale ? scale_c.const_data_ptr<float>() : nullptr;
  const int64_t step = scale && scale->numel() > 1;
  int8_t* to = xq.data_ptr<int8_t>();
  float* scales = sx.data_ptr<float>();
  const auto balance = ARSP_VERSION(balance);
  const auto codes_of = ARSP_VERSION(codes_of);
  each_row(rows, K, [&](int64_t row) {
    float* values = scratch(K);
    produce(row, K, values);
    balance(by, K, values);
    scales[row] = codes_of(values, K, given ? given + row * step : nullptr, to + row * K);
  });
  return {xq, sx};
}

std::tuple<at::Tensor, at::Tensor> quantize_per_token(const at::Tensor& x, const std::optional<at::Tensor>& smooth,
                                                      const std::optional<at::Tensor>& signs, const std::optional<at::Tensor>& scale) {
  const Rows from("quantize_per_token", x);
  const auto copy = ARSP_VERSION(copy);
  return quantise("quantize_per_token", x, smooth, signs, scale,
                  [&](int64_t row, int64_t K, float* values) { copy(from[row], K, values); });
}

std::tuple<at::Tensor, at::Tensor> rms_norm_quantize(const at::Tensor& x, const at::Tensor& weight, double eps,
                                                     const std::optional<at::Tensor>& smooth, const std::optional<at::Tensor>& signs) {
  const Rows from("rms_norm_quantize", x), weights("rms_norm_quantize", weight);
  TORCH_CHECK(weight.dim() == 1 && weight.size(0) == x.size(-1), "rms_norm_quantize: weight has shape ", weight.sizes(), ", expected (",
              x.size(-1), ")");
  const auto rms_norm = ARSP_VERSION(rms_norm);
  return quantise("rms_norm_quantize", x, smooth, signs, std::nullopt, [&](int64_t row, int64_t K, float* values) {
    rms_norm(from[row], weights[0], static_cast<float>(eps), K, values);
  });
}

std::tuple<at::Tensor, at::Tensor> modulate_quantize(const at::Tensor& x, const at::Tensor& scale, const at::Tensor& shift, double eps,
                                                     const std::optional<at::Tensor>& smooth, const std::optional<at::Tensor>& signs) {
  TORCH_CHECK(x.dim() == 3, "modulate_quantize: expected x (R, n, K), got ", x.sizes());
  const int64_t R = x.size(0), n = x.size(1);
  for (const at::Tensor* t : {&scale, &shift})
    TORCH_CHECK(t->dim() == 3 && t->size(0) == R && t->size(1) == 1 && t->size(2) == x.size(2),
                "modulate_quantize: scale and shift have shapes ", scale.sizes(), " and ", shift.sizes(), ", expected (", R, ", 1, ",
                x.size(2), ")");
  const Rows from("modulate_quantize", x), scales("modulate_quantize", scale.squeeze(1)), shifts("modulate_quantize", shift.squeeze(1));
  const auto modulate = ARSP_VERSION(modulate);
  return quantise("modulate_quantize", x, smooth, signs, std::nullopt, [&](int64_t row, int64_t K, float* values) {
    modulate(from[row], scales[row / n], shifts[row / n], static_cast<float>(eps), K, values);
  });
}

std::tuple<at::Tensor, at::Tensor> swiglu_quantize(const at::Tensor& a, const at::Tensor& b, const std::optional<at::Tensor>& smooth,
                                                   const std::optional<at::Tensor>& signs) {
  TORCH_CHECK(a.sizes() == b.sizes(), "swiglu_quantize: a and b have shapes ", a.sizes(), " and ", b.sizes());
  const Rows gate("swiglu_quantize", a), up("swiglu_quantize", b);
  const auto swiglu = ARSP_VERSION(swiglu);
  return quantise("swiglu_quantize", a, smooth, signs, std::nullopt,
                  [&](int64_t row, int64_t K, float* values) { swiglu(gate[row], up[row], K, values); });
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> gelu_quantize(const at::Tensor& x) {
  const Rows from("gelu_quantize", x);
  const int64_t K = x.size(-1);
  at::Tensor xq = at::empty(x.sizes(), x.options().dtype(at::kChar)), sx = scales_like(x), offset = scales_like(x);
  int8_t* to = xq.data_ptr<int8_t>();
  float *scales = sx.data_ptr<float>(), *offsets = offset.data_ptr<float>();
  const auto gelu = ARSP_VERSION(gelu);
  const auto shifted_codes_of = ARSP_VERSION(shifted_codes_of);
  each_row(sx.numel(), K, [&](int64_t row) {
    float* values = scratch(K);
    gelu(from[row], K, values);
    scales[row] = shifted_codes_of(values, K, to + row * K);
    offsets[row] = 128 * scales[row] - kShift;
  });
  return {xq, sx, offset};
}

}  // namespace

TORCH_LIBRARY_IMPL(arsp, CPU, m) {
  m.impl("quantize_per_token", quantize_per_token);
  m.impl("rms_norm_quantize", rms_norm_quantize);
  m.impl("modulate_quantize", modulate_quantize);
  m.impl("swiglu_quantize", swiglu_quantize);
  m.impl("gelu_quantize", gelu_quantize);
}
