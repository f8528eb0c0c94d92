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
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "isa.h"
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
template <int kBits, typename Y>
void run(Layer layer, at::Tensor& out) {
  Y* y = out.data_ptr<Y>();
  const auto version = ARSP_VERSION(tiles<kBits, Y>);
  const int64_t tile_bytes = layer.columns * kTile * kBits / 8;
  const int64_t worth = worth_a_thread(kThreadBytes) / std::max<int64_t>(1, tile_bytes * layer.rows);
  at::parallel_for(0, (layer.outputs + kTile - 1) / kTile, std::max<int64_t>(4, worth),
                   [&](int64_t begin, int64_t end) { version(layer, begin, end, y); });
}

struct Optional {
  const std::optional<at::Tensor>&zeros, &bias, &offset, &rowsum;
};

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
  TORCH_CHECK(dtype == at::kFloat || dtype == at::kBFloat16, name, "results are float32 or bfloat16");
  c10::SmallVector<int64_t, 4> shape(xq.sizes().begin(), xq.sizes().end());
  shape.back() = N;
  at::Tensor out = at::empty(shape, xq.options().dtype(dtype));
  if (out.numel() == 0) return out;

  const at::Tensor x = K % step == 0 ? xq.contiguous() : padded(xq.reshape({M, K}), step);
  const at::Tensor sx_c = sx.contiguous(), weight_c = weight.contiguous(), scales_c = by_column(scales);
  const at::Tensor zeros_c = more.zeros ? by_column(*more.zeros) : at::Tensor();
  const at::Tensor bias_c = more.bias ? by_column(more.bias->to(at::kFloat)) : at::Tensor();
  const at::Tensor offset_c = more.offset ? more.offset->contiguous() : at::Tensor();
  const at::Tensor rowsum_c = more.rowsum ? by_column(*more.rowsum) : at::Tensor();
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
                    M, columns, N, groups, column_stride(scales_c), more.zeros ? column_stride(zeros_c) : 0};
  if (bits == 4) {
    dtype == at::kFloat ? run<4, float>(layer, out) : run<4, Bf16>(layer, out);
  } else {
    dtype == at::kFloat ? run<8, float>(layer, out) : run<8, Bf16>(layer, out);
  }
  return out;
}

at::Tensor w8a8_linear(const at::Tensor& xq, const at::Tensor& sx, const at::Tensor& weight, const at::Tensor& scale,
                       const std::optional<at::Tensor>& bias, at::ScalarType dtype, const std::optional<at::Tensor>& offset,
                       const std::optional<at::Tensor>& rowsum) {
  TORCH_CHECK(scale.dim() == 1, "w8a8_linear: expected scale (N)");
  return linear(8, xq, sx, weight, scale, {std::nullopt, bias, offset, rowsum}, dtype);
}

at::Tensor w4a8_linear(const at::Tensor& xq, const at::Tensor& sx, const at::Tensor& weight, const at::Tensor& scales,
                       const at::Tensor& zeros, const std::optional<at::Tensor>& bias, at::ScalarType dtype,
                       const std::optional<at::Tensor>& offset, const std::optional<at::Tensor>& rowsum) {
  TORCH_CHECK(scales.dim() == 2, "w4a8_linear: expected scales (N, G)");
  return linear(4, xq, sx, weight, scales, {zeros, bias, offset, rowsum}, dtype);
}

}  // namespace

TORCH_LIBRARY_IMPL(arsp, CPU, m) {
  m.impl("w8a8_linear", w8a8_linear);
  m.impl("w4a8_linear", w4a8_linear);
}
