// arsp::w8a8_linear and arsp::w4a8_linear: linear layers of 8-bit activations and 8- or 4-bit weights.
//
// The weight lies in tiles of 16 rows (arsp/kernels/layouts.py): a register of it is 16 rows by 4 columns of unsigned bytes, met by 4
// signed bytes of a row of x that fill another register. 4-bit codes become bytes in registers only. The sum of a group is exact; what
// follows is float32, rounded operation by operation in the order of the reference, so every version gives the same bits. 8-bit codes
// are stored plus 128, which is one group with the zero point 128.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/empty.h>
#include <c10/util/SmallVector.h>
#include <torch/library.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <optional>
#include <type_traits>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "isa.h"
#include "numbers.h"
#include "threads.h"

namespace {

using Bf16 = c10::BFloat16;

constexpr int64_t kTile = 16;               // rows of a tile
constexpr int64_t kPiece = 4 * kTile;       // bytes: 4 columns of 8-bit or 8 columns of 4-bit codes
constexpr int64_t kAhead = 16 << 10;        // bytes from a load to its prefetch, where tiles are read one after another
constexpr int64_t kThreadBytes = 32 << 10;  // least weight traffic, times the rows of x, that is worth a thread
constexpr int64_t kThreadValues = 1 << 15;  // least values of x to add up that are worth a thread

struct Layer {
  const int8_t* xq;
  const float* sx;
  const int32_t* sums;  // (rows, groups): sums of the codes of x
  const uint8_t* weight;
  const float* scales;   // groups of whole tiles, scale_stride apart
  const uint8_t* zeros;  // likewise; not read with 8 bits
  const float* bias;     // whole tiles, or null
  const float* offset;   // of the rows of x, or null; then
  const float* rowsum;   // whole tiles
  int64_t rows, columns, outputs, groups, scale_stride, zero_stride;
  bool gelu;
  Numbers gain, residual;  // or null; rows of the gain are gain_stride apart, each for gain_rows rows of x
  int64_t gain_stride, gain_rows;
};

#define ARSP_BLOCK "quantised_linear_block.h"
#define ARSP_BLOCK_USES_VNNI
#include "each_isa.h"

#if defined(__x86_64__)
#define ARSP_VERSION(...)                                 \
  (isa >= kAvx512Vnni ? avx512_vnni::__VA_ARGS__          \
   : isa == kAvx512   ? avx512::__VA_ARGS__               \
   : isa == kAvx2     ? avx2::__VA_ARGS__                 \
                      : portable::__VA_ARGS__)
#else
#define ARSP_VERSION(...) (portable::__VA_ARGS__)
#endif

// Without gaps, rows filled up with zeros to a multiple; the tensor itself where it lies so already.
at::Tensor padded(const at::Tensor& t, int64_t multiple) {
  const int64_t more = (multiple - t.size(1) % multiple) % multiple;
  return more ? at::constant_pad_nd(t, {0, more}) : t.contiguous();
}

// (N) or (N, G) with every column in whole tiles of adjacent numbers: in place where it lies so, rows of a larger tensor included.
at::Tensor by_column(const at::Tensor& t) {
  if (t.size(0) % kTile == 0 && t.stride(0) == 1) return t;
  return padded(t.dim() == 2 ? t.t() : t.unsqueeze(0), kTile).t();
}

int64_t column_stride(const at::Tensor& t) { return t.dim() == 2 ? t.stride(1) : 0; }

// Threads split the tiles, so each result is one thread's sum in one fixed order.
template <typename Each>
void each_thread(const Layer& layer, int bits, Each each) {
  const int64_t tile_bytes = layer.columns * kTile * bits / 8;
  const int64_t worth = worth_a_thread(kThreadBytes) / std::max<int64_t>(1, tile_bytes * layer.rows);
  at::parallel_for(0, (layer.outputs + kTile - 1) / kTile, std::max<int64_t>(4, worth), each);
}

template <int kBits, typename Y>
void run(const Layer& layer, at::Tensor& out) {
  Y* y = out.data_ptr<Y>();
  if (!layer.gelu && !layer.gain && !layer.residual) {
    const auto version = ARSP_VERSION(tiles<kBits, Y>);
    return each_thread(layer, kBits, [&](int64_t begin, int64_t end) { version(layer, begin, end, y); });
  }
  const at::Tensor products = std::is_same_v<Y, float> ? out : at::empty(out.sizes(), out.options().dtype(at::kFloat));
  float* sums = products.data_ptr<float>();
  const auto version = ARSP_VERSION(tiles<kBits, float>);
  const auto finish = ARSP_VERSION(end<Y>);
  each_thread(layer, kBits, [&](int64_t begin, int64_t end) {
    version(layer, begin, end, sums);
    finish(layer, sums, begin * kTile, std::min(end * kTile, layer.outputs), y);
  });
}

struct Optional {
  const std::optional<at::Tensor>&zeros, &bias, &offset, &rowsum;
  bool gelu;
  const std::optional<at::Tensor>&gain, &residual;
};

Numbers floats(const at::Tensor& t) {
  if (!t.defined()) return {nullptr, nullptr};
  if (t.scalar_type() == at::kFloat) return {t.const_data_ptr<float>(), nullptr};
  return {nullptr, t.const_data_ptr<Bf16>()};
}

at::Tensor linear(int bits, const at::Tensor& xq, const at::Tensor& sx, const at::Tensor& weight, const at::Tensor& scales,
                  const Optional& more, at::ScalarType dtype) {
  const char* const name = "quantised linear: ";
  TORCH_CHECK(xq.dim() >= 1 && xq.scalar_type() == at::kChar && sx.scalar_type() == at::kFloat &&
                  sx.sizes() == xq.sizes().slice(0, xq.dim() - 1),
              name, "expected xq int8 (..., K) and sx float32 (...), got ", xq.scalar_type(), " ", xq.sizes(), " and ", sx.scalar_type(),
              " ", sx.sizes());
  const int64_t M = sx.numel(), K = xq.size(-1), N = scales.size(0), groups = bits == 4 ? scales.size(1) : 1, step = bits == 4 ? 8 : 4;
  TORCH_CHECK(weight.scalar_type() == at::kByte && weight.dim() == 3 && weight.size(0) == (N + kTile - 1) / kTile &&
                  weight.size(1) == (K + step - 1) / step && weight.size(2) == kPiece,
              name, "the weight is not the packed layout of N = ", N, ", K = ", K);
  TORCH_CHECK(scales.scalar_type() == at::kFloat && groups > 0 && K < 65536 && (bits == 8 || K % (groups * step) == 0), name, groups,
              " groups of float32 scales do not fit K = ", K);
  TORCH_CHECK(!more.zeros || (more.zeros->scalar_type() == at::kByte && more.zeros->sizes() == scales.sizes()), name,
              "expected zeros uint8 in the shape of the scales");
  TORCH_CHECK(!more.bias || (more.bias->dim() == 1 && more.bias->size(0) == N), name, "expected bias (N)");
  TORCH_CHECK(more.offset.has_value() == more.rowsum.has_value(), name, "offset and rowsum come together");
  TORCH_CHECK(!more.offset || (more.offset->scalar_type() == at::kFloat && more.offset->sizes() == sx.sizes() &&
                               more.rowsum->scalar_type() == at::kFloat && more.rowsum->dim() == 1 && more.rowsum->size(0) == N),
              name, "expected offset float32 in the shape of sx and rowsum float32 (N)");
  for (const auto* t : {&more.gain, &more.residual})
    TORCH_CHECK(!*t || (*t)->scalar_type() == at::kFloat || (*t)->scalar_type() == at::kBFloat16, name,
                "gain and residual are float32 or bfloat16");
  TORCH_CHECK(!more.gain || (xq.dim() == 3 && more.gain->sizes() == at::IntArrayRef({xq.size(0), 1, N})), name,
              "expected a gain (R, 1, N) for xq (R, n, K)");
  TORCH_CHECK(dtype == at::kFloat || dtype == at::kBFloat16, name, "results are float32 or bfloat16");
  c10::SmallVector<int64_t, 4> shape(xq.sizes().begin(), xq.sizes().end());
  shape.back() = N;
  TORCH_CHECK(!more.residual || more.residual->sizes() == shape, name, "expected a residual in the shape of the result");
  at::Tensor out = at::empty(shape, xq.options().dtype(dtype));
  if (out.numel() == 0) return out;

  const at::Tensor x = K % step == 0 ? xq.contiguous() : padded(xq.reshape({M, K}), step);
  const at::Tensor sx_c = sx.contiguous(), weight_c = weight.contiguous(), scales_c = by_column(scales);
  const at::Tensor zeros_c = more.zeros ? by_column(*more.zeros) : at::Tensor();
  const at::Tensor bias_c = more.bias ? by_column(more.bias->to(at::kFloat)) : at::Tensor();
  const at::Tensor offset_c = more.offset ? more.offset->contiguous() : at::Tensor();
  const at::Tensor rowsum_c = more.rowsum ? by_column(*more.rowsum) : at::Tensor();
  const at::Tensor gain_c = !more.gain ? at::Tensor() : more.gain->stride(2) == 1 ? *more.gain : more.gain->contiguous();
  const at::Tensor residual_c = more.residual ? more.residual->contiguous() : at::Tensor();
  const auto numbers = [](const at::Tensor& t) { return t.defined() ? t.const_data_ptr<float>() : nullptr; };
  const int64_t columns = x.size(-1);
  c10::SmallVector<int32_t, 256> sums(M * groups);
  const auto sum = ARSP_VERSION(sum_groups);
  const int64_t worth = worth_a_thread(kThreadValues) / std::max<int64_t>(1, columns);
  at::parallel_for(0, M, std::max<int64_t>(1, worth), [&](int64_t begin, int64_t end) {
    for (int64_t m = begin; m < end; ++m)
      sum(x.const_data_ptr<int8_t>() + m * columns, columns / groups, groups, sums.data() + m * groups);
  });

  const Layer layer{x.const_data_ptr<int8_t>(),
                    numbers(sx_c),
                    sums.data(),
                    weight_c.const_data_ptr<uint8_t>(),
                    numbers(scales_c),
                    more.zeros ? zeros_c.const_data_ptr<uint8_t>() : nullptr,
                    numbers(bias_c),
                    numbers(offset_c),
                    numbers(rowsum_c),
                    M, columns, N, groups, column_stride(scales_c), more.zeros ? column_stride(zeros_c) : 0,
                    more.gelu,
                    floats(gain_c),
                    floats(residual_c),
                    more.gain ? gain_c.stride(0) : 0,
                    more.gain ? xq.size(1) : 1};
  if (bits == 4) {
    dtype == at::kFloat ? run<4, float>(layer, out) : run<4, Bf16>(layer, out);
  } else {
    dtype == at::kFloat ? run<8, float>(layer, out) : run<8, Bf16>(layer, out);
  }
  return out;
}

// silu(a) b of two products with the same rows of x.
at::Tensor swiglu_of(const at::Tensor& a, const at::Tensor& b, at::ScalarType dtype) {
  TORCH_CHECK(a.sizes() == b.sizes(), "swiglu: the weights have different numbers of rows");
  at::Tensor out = dtype == at::kFloat ? a : at::empty(a.sizes(), a.options().dtype(dtype));
  const float *gate = a.const_data_ptr<float>(), *up = b.const_data_ptr<float>();
  at::parallel_for(0, a.numel(), worth_a_thread(kThreadValues), [&](int64_t begin, int64_t end) {
    if (dtype == at::kFloat) {
      ARSP_VERSION(swiglu<float>)(gate + begin, up + begin, end - begin, out.data_ptr<float>() + begin);
    } else {
      ARSP_VERSION(swiglu<Bf16>)(gate + begin, up + begin, end - begin, out.data_ptr<Bf16>() + begin);
    }
  });
  return out;
}

at::Tensor w8a8_linear(const at::Tensor& xq, const at::Tensor& sx, const at::Tensor& weight, const at::Tensor& scale,
                       const std::optional<at::Tensor>& bias, at::ScalarType dtype, const std::optional<at::Tensor>& offset,
                       const std::optional<at::Tensor>& rowsum, bool gelu, const std::optional<at::Tensor>& gain,
                       const std::optional<at::Tensor>& residual) {
  TORCH_CHECK(scale.dim() == 1, "w8a8_linear: expected scale (N)");
  return linear(8, xq, sx, weight, scale, {std::nullopt, bias, offset, rowsum, gelu, gain, residual}, dtype);
}

at::Tensor w4a8_linear(const at::Tensor& xq, const at::Tensor& sx, const at::Tensor& weight, const at::Tensor& scales,
                       const at::Tensor& zeros, const std::optional<at::Tensor>& bias, at::ScalarType dtype,
                       const std::optional<at::Tensor>& offset, const std::optional<at::Tensor>& rowsum, bool gelu,
                       const std::optional<at::Tensor>& gain, const std::optional<at::Tensor>& residual) {
  TORCH_CHECK(scales.dim() == 2, "w4a8_linear: expected scales (N, G)");
  return linear(4, xq, sx, weight, scales, {zeros, bias, offset, rowsum, gelu, gain, residual}, dtype);
}

const std::optional<at::Tensor> kNone;

at::Tensor w8a8_swiglu(const at::Tensor& xq, const at::Tensor& sx, const at::Tensor& gate, const at::Tensor& gate_scale, const at::Tensor& up,
                       const at::Tensor& up_scale, at::ScalarType dtype) {
  return swiglu_of(w8a8_linear(xq, sx, gate, gate_scale, kNone, at::kFloat, kNone, kNone, false, kNone, kNone),
                   w8a8_linear(xq, sx, up, up_scale, kNone, at::kFloat, kNone, kNone, false, kNone, kNone), dtype);
}

at::Tensor w4a8_swiglu(const at::Tensor& xq, const at::Tensor& sx, const at::Tensor& gate, const at::Tensor& gate_scales,
                       const at::Tensor& gate_zeros, const at::Tensor& up, const at::Tensor& up_scales, const at::Tensor& up_zeros,
                       at::ScalarType dtype) {
  return swiglu_of(w4a8_linear(xq, sx, gate, gate_scales, gate_zeros, kNone, at::kFloat, kNone, kNone, false, kNone, kNone),
                   w4a8_linear(xq, sx, up, up_scales, up_zeros, kNone, at::kFloat, kNone, kNone, false, kNone, kNone), dtype);
}

}  // namespace

TORCH_LIBRARY_IMPL(arsp, CPU, m) {
  m.impl("w8a8_linear", w8a8_linear);
  m.impl("w4a8_linear", w4a8_linear);
  m.impl("w8a8_swiglu", w8a8_swiglu);
  m.impl("w4a8_swiglu", w4a8_swiglu);
}
