// Rows on their way to 8 bits: quantize_per_token and the producers that are fused with it (reference.py has their meaning).
//
// A block is a row, a thread holds one or two pieces of 8 neighbouring values in registers from the load to the codes; the row is
// read once and written once. Statistics are block reductions in a fixed order. A rotation does the three innermost levels of the
// Hadamard transform in registers and the others in shared memory, up to three levels at a time.
#include "device.cuh"

namespace {

constexpr int kPiece = 8;
constexpr int kMaxThreads = 1024, kMaxPieces = 2;  // so K <= 16384
constexpr float kGeluShift = 0.17f;                // as in reference.py

struct Balance {
  const float* smooth;  // (K) or null
  const int8_t* signs;  // (K) or null
  int block;            // of the rotation, a power of two
  float root;           // 1 / sqrt(block)
};

// Values at .. at + 7, zeros from `left` on.
ARSP_DEVICE void load_piece(Numbers x, int64_t at, int left, float (&v)[kPiece]) {
  if (x.type == kFloat) {
    const float* from = static_cast<const float*>(x.data) + at;
    if (left >= kPiece && reinterpret_cast<uintptr_t>(from) % 16 == 0) {
      const float4 a = reinterpret_cast<const float4*>(from)[0], b = reinterpret_cast<const float4*>(from)[1];
      v[0] = a.x, v[1] = a.y, v[2] = a.z, v[3] = a.w, v[4] = b.x, v[5] = b.y, v[6] = b.z, v[7] = b.w;
      return;
    }
  } else {
    const Bf16* from = static_cast<const Bf16*>(x.data) + at;
    if (left >= kPiece && reinterpret_cast<uintptr_t>(from) % 16 == 0) {
      const uint4 a = *reinterpret_cast<const uint4*>(from);
      const uint32_t pairs[4] = {a.x, a.y, a.z, a.w};
#pragma unroll
      for (int i = 0; i < 4; ++i) v[2 * i] = low_half(pairs[i]), v[2 * i + 1] = high_half(pairs[i]);
      return;
    }
  }
#pragma unroll
  for (int i = 0; i < kPiece; ++i) v[i] = i < left ? x[at + i] : 0.f;
}

template <int kPieces>
using Values = float[kPieces][kPiece];

template <int kPieces, typename F>
ARSP_DEVICE void each_piece(int K, const F& work) {
#pragma unroll
  for (int p = 0; p < kPieces; ++p) {
    const int k = kPiece * static_cast<int>(threadIdx.x + p * blockDim.x);
    if (k < K) work(p, k, K - k);
  }
}

template <int kPieces>
ARSP_DEVICE float sum_of_squares(const Values<kPieces>& v, float less, int K) {
  float sum = 0;
  each_piece<kPieces>(K, [&](int p, int, int left) {
#pragma unroll
    for (int i = 0; i < kPiece; ++i)
      if (i < left) sum += (v[p][i] - less) * (v[p][i] - less);
  });
  return sum;
}

// ---- sources: what a row is before it is balanced and quantised

struct Plain {
  Numbers x;
  int64_t stride;
  template <int kPieces>
  ARSP_DEVICE void load(int64_t row, int K, Values<kPieces>& v, float*) const {
    each_piece<kPieces>(K, [&](int p, int k, int left) { load_piece(x, row * stride + k, left, v[p]); });
  }
};

struct RmsNorm {
  Numbers x, weight;
  int64_t stride;
  float eps;
  template <int kPieces>
  ARSP_DEVICE void load(int64_t row, int K, Values<kPieces>& v, float* spare) const {
    Plain{x, stride}.load<kPieces>(row, K, v, spare);
    const float squares = block_reduce(sum_of_squares<kPieces>(v, 0.f, K), Sum(), spare);
    const float factor = rsqrtf(__fdiv_rn(squares, static_cast<float>(K)) + eps);
    each_piece<kPieces>(K, [&](int p, int k, int left) {
      float w[kPiece];
      load_piece(weight, k, left, w);
#pragma unroll
      for (int i = 0; i < kPiece; ++i) v[p][i] = v[p][i] * factor * w[i];
    });
  }
};

struct Modulate {
  Numbers x, scale, shift;
  int64_t stride, scale_stride, shift_stride, rows;  // `rows` neighbouring rows of x share scale and shift
  float eps;
  template <int kPieces>
  ARSP_DEVICE void load(int64_t row, int K, Values<kPieces>& v, float* spare) const {
    Plain{x, stride}.load<kPieces>(row, K, v, spare);
    float sum = 0;
    each_piece<kPieces>(K, [&](int p, int, int) {
#pragma unroll
      for (int i = 0; i < kPiece; ++i) sum += v[p][i];
    });
    const float mean = __fdiv_rn(block_reduce(sum, Sum(), spare), static_cast<float>(K));
    const float squares = block_reduce(sum_of_squares<kPieces>(v, mean, K), Sum(), spare);
    const float factor = rsqrtf(__fdiv_rn(squares, static_cast<float>(K)) + eps);
    each_piece<kPieces>(K, [&](int p, int k, int left) {
      float a[kPiece], b[kPiece];
      load_piece(scale, row / rows * scale_stride + k, left, a);
      load_piece(shift, row / rows * shift_stride + k, left, b);
#pragma unroll
      for (int i = 0; i < kPiece; ++i) v[p][i] = i < left ? (v[p][i] - mean) * factor * (1.f + a[i]) + b[i] : 0.f;
    });
  }
};

struct SwiGlu {
  Numbers a, b;
  int64_t a_stride, b_stride;
  template <int kPieces>
  ARSP_DEVICE void load(int64_t row, int K, Values<kPieces>& v, float*) const {
    each_piece<kPieces>(K, [&](int p, int k, int left) {
      float gate[kPiece];
      load_piece(a, row * a_stride + k, left, gate);
      load_piece(b, row * b_stride + k, left, v[p]);
#pragma unroll
      for (int i = 0; i < kPiece; ++i) v[p][i] *= gate[i] * sigmoid(gate[i]);
    });
  }
};

// GELU plus the shift that makes it positive.
struct Gelu {
  Numbers x;
  int64_t stride;
  template <int kPieces>
  ARSP_DEVICE void load(int64_t row, int K, Values<kPieces>& v, float* spare) const {
    Plain{x, stride}.load<kPieces>(row, K, v, spare);
    each_piece<kPieces>(K, [&](int p, int, int left) {
#pragma unroll
      for (int i = 0; i < kPiece; ++i) v[p][i] = i < left ? gelu(v[p][i]) + kGeluShift : 0.f;
    });
  }
};

// ---- rotation

// Sums and differences of values 1, 2, .. `levels` powers of two apart.
template <int kNum>
ARSP_DEVICE void butterflies(float (&v)[kNum], int num) {
#pragma unroll
  for (int width = 1; width < kNum; width *= 2) {
    if (width >= num) break;
#pragma unroll
    for (int i = 0; i < kNum; ++i)
      if ((i & width) == 0) {
        const float a = v[i], b = v[i + width];
        v[i] = a + b, v[i + width] = a - b;
      }
  }
}

ARSP_DEVICE int spread(int i) { return i + (i >> 6 << 3); }  // keeps strides of 8 and 64 off each other's banks

// Levels of distance width, 2 width, .. (kNum / 2) width of the values in shared memory.
template <int kNum>
ARSP_DEVICE void shared_butterflies(float* values, int K, int width) {
  for (int j = threadIdx.x; j < K / kNum; j += blockDim.x) {
    const int first = j / width * width * kNum + j % width;
    float v[kNum];
#pragma unroll
    for (int i = 0; i < kNum; ++i) v[i] = values[spread(first + i * width)];
    butterflies(v, kNum);
#pragma unroll
    for (int i = 0; i < kNum; ++i) values[spread(first + i * width)] = v[i];
  }
  __syncthreads();
}

template <int kPieces>
ARSP_DEVICE void rotate(Values<kPieces>& v, const Balance& by, int K, float* values) {
  each_piece<kPieces>(K, [&](int p, int k, int left) {
#pragma unroll
    for (int i = 0; i < kPiece; ++i)
      if (i < left) v[p][i] *= static_cast<float>(by.signs[k + i]);
    butterflies(v[p], by.block);
  });
  if (by.block > kPiece) {
    each_piece<kPieces>(K, [&](int p, int k, int) {
#pragma unroll
      for (int i = 0; i < kPiece; ++i) values[spread(k) + i] = v[p][i];
    });
    __syncthreads();
    int width = kPiece;
    for (; width * 8 <= by.block; width *= 8) shared_butterflies<8>(values, K, width);
    if (width * 4 <= by.block) {
      shared_butterflies<4>(values, K, width);
    } else if (width * 2 <= by.block) {
      shared_butterflies<2>(values, K, width);
    }
    each_piece<kPieces>(K, [&](int p, int k, int) {
#pragma unroll
      for (int i = 0; i < kPiece; ++i) v[p][i] = values[spread(k) + i];
    });
  }
  each_piece<kPieces>(K, [&](int p, int, int) {
#pragma unroll
    for (int i = 0; i < kPiece; ++i) v[p][i] *= by.root;
  });
}

// ---- codes

// x / scale to the nearest, ties to even. The product with the inverse is off by less than 1e-4, so it decides away from ties.
ARSP_DEVICE int nearest(float x, float scale, float inverse, float low, float high) {
  const float q = x * inverse;
  float r = rintf(q);
  if (!(fabsf(q - r) < 0.4995f)) r = rintf(__fdiv_rn(x, scale));  // also where the inverse is infinite
  return static_cast<int>(fminf(fmaxf(r, low), high));
}

struct Result {
  int8_t* codes;  // (M, K)
  float* scale;   // (M)
  float* offset;  // (M) of the shifted format, else null
};

template <typename Source, int kPieces>
__global__ void __launch_bounds__(kMaxThreads) quantize(Source source, Balance balance, const float* given, int given_step, int K, Result to) {
  __shared__ float spare[kLanes];
  ARSP_DYNAMIC_SHARED(values);
  const int64_t row = blockIdx.x;
  Values<kPieces> v;
  source.template load<kPieces>(row, K, v, spare);
  if (balance.smooth != nullptr) {
    each_piece<kPieces>(K, [&](int p, int k, int left) {
      float by[kPiece];
      load_piece({balance.smooth, kFloat}, k, left, by);
#pragma unroll
      for (int i = 0; i < kPiece; ++i) v[p][i] *= by[i];
    });
  }
  if (balance.signs != nullptr) rotate<kPieces>(v, balance, K, reinterpret_cast<float*>(values));
  const bool shifted = to.offset != nullptr;
  float most = 0;
  each_piece<kPieces>(K, [&](int p, int, int left) {
#pragma unroll
    for (int i = 0; i < kPiece; ++i)
      if (i < left) most = Max()(shifted ? v[p][i] : fabsf(v[p][i]), most);
  });
  most = block_reduce(most, Max(), spare);
  const float infinity = __uint_as_float(0x7f800000u);
  float scale = __fdiv_rn(most, shifted ? 255.f : 127.f);
  if (given != nullptr) scale = given[row * given_step];
  if (!(most < infinity) && (given != nullptr || shifted)) scale = __uint_as_float(0x7fc00000u);
  if (scale == 0) scale = 1;
  const bool finite = fabsf(scale) < infinity;
  const float inverse = __fdiv_rn(1.f, scale), low = shifted ? 0.f : -127.f, high = shifted ? 255.f : 127.f;
  each_piece<kPieces>(K, [&](int p, int k, int left) {
    alignas(8) int8_t codes[kPiece];
#pragma unroll
    for (int i = 0; i < kPiece; ++i)
      codes[i] = static_cast<int8_t>(finite ? nearest(v[p][i], scale, inverse, low, high) - (shifted ? 128 : 0) : 0);
    int8_t* out = to.codes + row * K + k;
    if (left >= kPiece && K % kPiece == 0) {
      *reinterpret_cast<uint2*>(out) = *reinterpret_cast<const uint2*>(codes);
    } else {
#pragma unroll
      for (int i = 0; i < kPiece; ++i)
        if (i < left) out[i] = codes[i];
    }
  });
  if (threadIdx.x == 0) {
    to.scale[row] = scale;
    if (shifted) to.offset[row] = __fsub_rn(__fmul_rn(128.f, scale), kGeluShift);
  }
}

template <typename Source>
int run(const Source& source, int64_t M, int64_t K, const float* smooth, const int8_t* signs, const float* given, int given_step,
        const Result& to, cudaStream_t stream) {
  if (K > kMaxThreads * kMaxPieces * kPiece) return cudaErrorInvalidValue;
  const int block = static_cast<int>(K & -K), pieces = static_cast<int>((K + kPiece - 1) / kPiece);
  const int each = pieces > kMaxThreads ? 2 : 1;
  const int threads = pieces == 0 ? kLanes : (pieces + each * kLanes - 1) / (each * kLanes) * kLanes;
  float root = 1;
  for (int b = block; b > 1; b /= 4) root *= b > 2 ? 0.5f : 0.70710678118654752f;
  const Balance balance{smooth, signs, block, root};
  const size_t shared = signs != nullptr && block > kPiece ? static_cast<size_t>(K + K / 8 + 8) * sizeof(float) : 0;
  const auto kernel = each == 1 ? quantize<Source, 1> : quantize<Source, 2>;
  return launch(kernel, dim3(static_cast<unsigned>(M)), threads, shared, stream, source, balance, given, given_step, static_cast<int>(K), to);
}

}  // namespace

ARSP_EXPORT int arsp_quantize_per_token(const void* x, int type, int64_t stride, int64_t M, int64_t K, const float* smooth, const int8_t* signs,
                                        const float* given, int given_step, int8_t* codes, float* scale, cudaStream_t stream) {
  return run(Plain{{x, type}, stride}, M, K, smooth, signs, given, given_step, {codes, scale, nullptr}, stream);
}

ARSP_EXPORT int arsp_rms_norm_quantize(const void* x, int type, int64_t stride, const void* weight, int weight_type, float eps, int64_t M, int64_t K,
                                       const float* smooth, const int8_t* signs, int8_t* codes, float* scale, cudaStream_t stream) {
  return run(RmsNorm{{x, type}, {weight, weight_type}, stride, eps}, M, K, smooth, signs, nullptr, 0, {codes, scale, nullptr}, stream);
}

ARSP_EXPORT int arsp_modulate_quantize(const void* x, int type, int64_t stride, const void* scale_by, const void* shift, int by_type,
                                       int64_t scale_stride, int64_t shift_stride, int64_t rows, float eps, int64_t M, int64_t K, const float* smooth,
                                       const int8_t* signs, int8_t* codes, float* scale, cudaStream_t stream) {
  const Modulate source{{x, type}, {scale_by, by_type}, {shift, by_type}, stride, scale_stride, shift_stride, rows, eps};
  return run(source, M, K, smooth, signs, nullptr, 0, {codes, scale, nullptr}, stream);
}

ARSP_EXPORT int arsp_swiglu_quantize(const void* a, int64_t a_stride, const void* b, int64_t b_stride, int type, int64_t M, int64_t K,
                                     const float* smooth, const int8_t* signs, int8_t* codes, float* scale, cudaStream_t stream) {
  return run(SwiGlu{{a, type}, {b, type}, a_stride, b_stride}, M, K, smooth, signs, nullptr, 0, {codes, scale, nullptr}, stream);
}

ARSP_EXPORT int arsp_gelu_quantize(const void* x, int type, int64_t stride, int64_t M, int64_t K, int8_t* codes, float* scale, float* offset,
                                   cudaStream_t stream) {
  return run(Gelu{{x, type}, stride}, M, K, nullptr, nullptr, nullptr, 0, {codes, scale, offset}, stream);
}
