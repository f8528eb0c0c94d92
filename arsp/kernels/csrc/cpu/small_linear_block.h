// The inner block of small_linear, written once with GCC vector extensions; each_isa.h includes it once per instruction set.

// Weight rows held in registers beside MR rows of a large x.
#if ARSP_LANES == 16
#define ARSP_BLOCK_ROWS(MR) (MR == 1 ? 1 : MR == 2 ? 8 : MR == 3 ? 6 : MR <= 6 ? 4 : 3)
#else
#define ARSP_BLOCK_ROWS(MR) (MR == 1 ? 1 : MR <= 3 ? 4 : MR == 4 ? 3 : MR <= 6 ? 2 : 1)
#endif

#ifdef ARSP_BF16_DOT
// Both operands stay bfloat16: a register holds twice as many of them, and each float32 lane adds up two products.
typedef __m512bh operand;
constexpr int kStep = 2 * ARSP_LANES;

ARSP_TARGET inline operand load_operand(const Bf16* p) { return (operand)_mm512_loadu_si512(p); }

ARSP_TARGET inline vec multiply_add(operand a, operand b, vec sum) { return (vec)_mm512_dpbf16_ps((__m512)sum, a, b); }
#else
typedef vec operand;
constexpr int kStep = ARSP_LANES;

template <typename T>
ARSP_TARGET inline operand load_operand(const T* p) {
  return load(p);
}

ARSP_TARGET inline vec multiply_add(operand a, operand b, vec sum) { return a * b + sum; }
#endif

// Pairwise, in log2(lanes) steps.
ARSP_TARGET inline float horizontal_sum(vec v) {
  float lane[ARSP_LANES];
  std::memcpy(lane, &v, sizeof(v));
#if ARSP_LANES >= 16
  for (int i = 0; i < 8; ++i) lane[i] += lane[i + 8];
#endif
#if ARSP_LANES >= 8
  for (int i = 0; i < 4; ++i) lane[i] += lane[i + 4];
#endif
  return (lane[0] + lane[2]) + (lane[1] + lane[3]);
}

// The last K % kStep products of one result. Kept out of line: it would bloat every block.
template <typename W, typename X>
ARSP_TARGET __attribute__((noinline)) float remainder(const W* w, const X* x, int64_t num) {
  float total = 0;
  for (int64_t k = 0; k < num; ++k) total += to_float(w[k]) * to_float(x[k]);
  return total;
}

// out[m * out_stride + r] = sum_k w[r * K + k] x[m * K + k]: NR rows of the weight against MR rows of x, all sums in registers.
template <int NR, int MR, typename W, typename X>
ARSP_TARGET void block(const W* w, const X* x, int64_t K, float* out, int64_t out_stride) {
  vec sum[NR][MR] = {};
  int64_t k = 0;
  for (; k + kStep <= K; k += kStep) {
    operand w_k[NR];
#pragma GCC unroll 8
    for (int r = 0; r < NR; ++r) {
      __builtin_prefetch(reinterpret_cast<const char*>(w + r * K + k) + kPrefetchBytes);
      w_k[r] = load_operand(w + r * K + k);
    }
#pragma GCC unroll 8
    for (int m = 0; m < MR; ++m) {
      operand x_k = load_operand(x + m * K + k);
      ARSP_IN_REGISTER(x_k);
#pragma GCC unroll 8
      for (int r = 0; r < NR; ++r) sum[r][m] = multiply_add(w_k[r], x_k, sum[r][m]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < NR; ++r) {
#pragma GCC unroll 8
    for (int m = 0; m < MR; ++m) {
      float total = horizontal_sum(sum[r][m]);
      if (k < K) total += remainder(w + r * K + k, x + m * K + k, K - k);
      out[m * out_stride + r] = total;
    }
  }
}

// Weight rows [begin, end) against MR rows of x. While x stays in the first-level cache, one weight row at a time is best: the
// weights then stream from memory in one straight line. A larger x must not be read anew for every weight row.
template <int MR, typename W, typename X>
ARSP_TARGET void rows(const W* w, const X* x, int64_t K, float* out, int64_t out_stride, int64_t begin, int64_t end) {
  constexpr int NR = ARSP_BLOCK_ROWS(MR);
  int64_t n = begin;
  if (MR * K * static_cast<int64_t>(sizeof(X)) > kNearBytes) {
    for (; n + NR <= end; n += NR) block<NR, MR>(w + n * K, x, K, out + n, out_stride);
  }
  for (; n < end; ++n) block<1, MR>(w + n * K, x, K, out + n, out_stride);
}

#undef ARSP_BLOCK_ROWS
