// The inner blocks of quantised_linear, written once with GCC vector extensions; each_isa.h includes it once per instruction set.

typedef int32_t ints __attribute__((vector_size(4 * ARSP_LANES)));
typedef int32_t ints_unaligned __attribute__((vector_size(4 * ARSP_LANES), aligned(1), may_alias));
typedef int16_t shorts __attribute__((vector_size(4 * ARSP_LANES)));
typedef uint8_t zeros __attribute__((vector_size(ARSP_LANES)));
typedef uint8_t zeros_unaligned __attribute__((vector_size(ARSP_LANES), aligned(1), may_alias));

// Rows of x and tiles of the weight whose sums fit in registers together.
#if defined(ARSP_VNNI_DOT)
constexpr int kRows = 6, kTiles = 4;
#elif ARSP_LANES == 16
constexpr int kRows = 4, kTiles = 4;
#elif ARSP_LANES == 8
constexpr int kRows = 4, kTiles = 1;
#else
constexpr int kRows = 2, kTiles = 1;
#endif
constexpr int kFew = 2;  // up to so many rows, tiles are read one after another: in a straight line through memory
constexpr int kParts = kTile / ARSP_LANES;  // registers that hold a number for every row of a tile

// A register of the values from `at` on, with zeros behind those that are left.
ARSP_TARGET inline vec take(Numbers from, int64_t at, int64_t left) {
  return from.narrow ? load_left(from.narrow + at, left) : load_left(from.wide + at, left);
}

ARSP_TARGET inline ints load_ints(const void* p) { return *static_cast<const ints_unaligned*>(p); }

// sum[lane] += sum over the four bytes of a lane of w (unsigned, at most 15 with 4 bits) times x (signed), exact.
template <int kBits>
ARSP_TARGET inline void dot(ints& sum, ints w, ints x) {
#if defined(ARSP_VNNI_DOT)
  // Not the intrinsic: with it gcc 12 copies the sums between registers.
  asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(w), "v"(x));
#elif ARSP_LANES == 16
  if (kBits == 4) {  // 2 * 15 * 128 fits in 16 bits
    sum += (ints)_mm512_madd_epi16(_mm512_maddubs_epi16((__m512i)w, (__m512i)x), _mm512_set1_epi16(1));
  } else {
    const shorts even = (shorts)x << 8 >> 8, odd = (shorts)x >> 8;
    sum += (ints)_mm512_madd_epi16((__m512i)(w & 0x00ff00ff), (__m512i)even);
    sum += (ints)_mm512_madd_epi16((__m512i)((w >> 8) & 0x00ff00ff), (__m512i)odd);
  }
#elif ARSP_LANES == 8
  if (kBits == 4) {
    sum += (ints)_mm256_madd_epi16(_mm256_maddubs_epi16((__m256i)w, (__m256i)x), _mm256_set1_epi16(1));
  } else {
    const shorts even = (shorts)x << 8 >> 8, odd = (shorts)x >> 8;
    sum += (ints)_mm256_madd_epi16((__m256i)(w & 0x00ff00ff), (__m256i)even);
    sum += (ints)_mm256_madd_epi16((__m256i)((w >> 8) & 0x00ff00ff), (__m256i)odd);
  }
#else
  for (int j = 0; j < 32; j += 8) sum += ((w >> j) & 0xff) * (x << (24 - j) >> 24);
#endif
}

ARSP_TARGET inline ints broadcast(const int8_t* x) {
  int32_t four;
  std::memcpy(&four, x, 4);
  return four - ints{};
}

// inner[m][t][p] = sum over k of one group of x[m * stride + k] times the codes of NT tiles that lie tile_bytes apart.
template <int kBits, int MR, int NT>
ARSP_TARGET inline void group_sums(const uint8_t* w, int64_t tile_bytes, const int8_t* x, int64_t stride, int64_t size,
                                   ints (&inner)[MR][NT][kParts]) {
  constexpr int kStep = kBits == 4 ? 8 : 4;  // columns of a piece
#pragma GCC unroll 8
  for (int m = 0; m < MR; ++m)
#pragma GCC unroll 4
    for (int t = 0; t < NT; ++t)
#pragma GCC unroll 4
      for (int p = 0; p < kParts; ++p) inner[m][t][p] = ints{};
  for (int64_t k = 0; k < size; k += kStep, w += kPiece) {
    ints piece[NT][kParts];
#pragma GCC unroll 4
    for (int t = 0; t < NT; ++t) {
      // into the second-level cache: what comes next, the same place in the next NT tiles
      __builtin_prefetch(NT == 1 ? w + kAhead : w + (NT + t) * tile_bytes, 0, 2);
#pragma GCC unroll 4
      for (int p = 0; p < kParts; ++p) piece[t][p] = load_ints(w + t * tile_bytes + p * 4 * ARSP_LANES);
    }
#pragma GCC unroll 2
    for (int half = 0; half < kStep / 4; ++half) {
      ints bytes[NT][kParts];
#pragma GCC unroll 4
      for (int t = 0; t < NT; ++t)
#pragma GCC unroll 4
        for (int p = 0; p < kParts; ++p) {
          bytes[t][p] = kBits == 4 ? (piece[t][p] >> 4 * half) & 0x0f0f0f0f : piece[t][p];
          ARSP_IN_REGISTER(bytes[t][p]);
        }
#pragma GCC unroll 8
      for (int m = 0; m < MR; ++m) {
        const ints four = broadcast(x + m * stride + k + 4 * half);
#pragma GCC unroll 4
        for (int t = 0; t < NT; ++t)
#pragma GCC unroll 4
          for (int p = 0; p < kParts; ++p) dot<kBits>(inner[m][t][p], bytes[t][p], four);
      }
    }
  }
}

// MR rows of x from row m0 against NT tiles of the weight from tile t0, all groups.
template <int kBits, int MR, int NT, typename Y>
ARSP_TARGET void block(const Layer& layer, int64_t m0, int64_t t0, Y* out) {
  const int64_t groups = layer.groups, size = layer.columns / groups;
  const int64_t group_bytes = size / (kBits == 4 ? 8 : 4) * kPiece, tile_bytes = groups * group_bytes;
  const uint8_t* w = layer.weight + t0 * tile_bytes;
  const int8_t* x = layer.xq + m0 * layer.columns;
  vec total[MR][NT][kParts] = {};
  for (int64_t g = 0; g < groups; ++g) {
    ints inner[MR][NT][kParts];
    for (int t = NT; t < 2 * NT; ++t) __builtin_prefetch(layer.scales + g * layer.scale_stride + (t0 + t) * kTile);
    if (kBits == 4) __builtin_prefetch(layer.zeros + g * layer.zero_stride + (t0 + NT) * kTile);
    group_sums<kBits, MR, NT>(w + g * group_bytes, tile_bytes, x + g * size, layer.columns, size, inner);
#pragma GCC unroll 4
    for (int t = 0; t < NT; ++t)
#pragma GCC unroll 4
      for (int p = 0; p < kParts; ++p) {
        const int64_t n = (t0 + t) * kTile + p * ARSP_LANES;
        const vec scale = load(layer.scales + g * layer.scale_stride + n);
        ints zero = ints{} + 128;
        if constexpr (kBits == 4)
          zero = __builtin_convertvector(*reinterpret_cast<const zeros_unaligned*>(layer.zeros + g * layer.zero_stride + n), ints);
#pragma GCC unroll 8
        for (int m = 0; m < MR; ++m) {
          vec term = __builtin_convertvector(inner[m][t][p] - zero * layer.sums[(m0 + m) * groups + g], vec) * scale;
          ARSP_ROUNDED(term);
          total[m][t][p] += term;
        }
      }
  }
#pragma GCC unroll 8
  for (int m = 0; m < MR; ++m) {
    for (int t = 0; t < NT; ++t) {
      for (int p = 0; p < kParts; ++p) {
        const int64_t n = (t0 + t) * kTile + p * ARSP_LANES;
        if (n >= layer.outputs) break;
        vec y = total[m][t][p] * layer.sx[m0 + m];
        ARSP_ROUNDED(y);
        if (layer.bias != nullptr) y += load(layer.bias + n);
        if (layer.offset != nullptr) {
          vec term = load(layer.rowsum + n) * layer.offset[m0 + m];
          ARSP_ROUNDED(term);
          y += term;
        }
        Y* to = out + (m0 + m) * layer.outputs + n;
        if (n + ARSP_LANES <= layer.outputs) {
          store(to, y);
        } else {
          Y last[ARSP_LANES];
          store(last, y);
          std::memcpy(to, last, (layer.outputs - n) * sizeof(Y));
        }
      }
    }
  }
}

template <int kBits, int MR, typename Y>
ARSP_TARGET void rows(const Layer& layer, int64_t m, int64_t begin, int64_t end, Y* out) {
  int64_t t = begin;
  if constexpr (MR > kFew) {
    for (; t + kTiles <= end; t += kTiles) block<kBits, MR, kTiles>(layer, m, t, out);
    if constexpr (kTiles > 2)
      if (t + 2 <= end) block<kBits, MR, 2>(layer, m, t, out), t += 2;
  }
  for (; t < end; ++t) block<kBits, MR, 1>(layer, m, t, out);
}

// All rows of x against tiles [begin, end): kTiles of them at a time meet every row of x, so the weight comes from memory once.
template <int kBits, typename Y>
ARSP_TARGET void tiles(const Layer& layer, int64_t begin, int64_t end, Y* out) {
  const int64_t blocks = (layer.rows + kRows - 1) / kRows;
  for (int64_t t = begin; t < end; t += kTiles) {
    const int64_t to = std::min<int64_t>(t + kTiles, end);
    for (int64_t b = 0; b < blocks; ++b) {
      const int64_t m = b * layer.rows / blocks;
      switch ((b + 1) * layer.rows / blocks - m) {
        case 1: rows<kBits, 1>(layer, m, t, to, out); break;
        case 2: rows<kBits, 2>(layer, m, t, to, out); break;
#if ARSP_LANES >= 8
        case 3: rows<kBits, 3>(layer, m, t, to, out); break;
        case 4: rows<kBits, 4>(layer, m, t, to, out); break;
#endif
#if defined(ARSP_VNNI_DOT)
        case 5: rows<kBits, 5>(layer, m, t, to, out); break;
        case 6: rows<kBits, 6>(layer, m, t, to, out); break;
#endif
      }
    }
  }
}

// sums[g] = sum of the codes of group g.
ARSP_TARGET void sum_groups(const int8_t* x, int64_t size, int64_t groups, int32_t* sums) {
  for (int64_t g = 0; g < groups; ++g, x += size) {
    int32_t sum = 0;
    for (int64_t k = 0; k < size; ++k) sum += x[k];
    sums[g] = sum;
  }
}

// The first `left` values of a register.
template <typename Y>
ARSP_TARGET inline void store_left(Y* to, vec y, int64_t left) {
  if (left >= ARSP_LANES) return store(to, y);
  Y last[ARSP_LANES];
  store(last, y);
  std::memcpy(to, last, left * sizeof(Y));
}

// GELU, gain and residual behind columns [first, last) of the products.
template <typename Y>
ARSP_TARGET void end(const Layer& layer, const float* products, int64_t first, int64_t last, Y* out) {
  for (int64_t m = 0; m < layer.rows; ++m) {
    const int64_t row = m * layer.outputs, gains = m / layer.gain_rows * layer.gain_stride;
    for (int64_t n = first; n < last; n += ARSP_LANES) {
      vec y = load_left(products + row + n, last - n);
      if (layer.gelu) y = gelu_of(y);
      if (layer.gain) {
        y *= take(layer.gain, gains + n, last - n);
        ARSP_ROUNDED(y);
      }
      if (layer.residual) y += take(layer.residual, row + n, last - n);
      store_left(out + row + n, y, last - n);
    }
  }
}

// out = silu(a) b of as many values.
template <typename Y>
ARSP_TARGET void swiglu(const float* a, const float* b, int64_t num, Y* out) {
  for (int64_t i = 0; i < num; i += ARSP_LANES) {
    const vec v = load_left(a + i, num - i);
    store_left(out + i, v * sigmoid(v) * load_left(b + i, num - i), num - i);
  }
}
