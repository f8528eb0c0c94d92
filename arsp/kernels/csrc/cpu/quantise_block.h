// Rows on their way to 8 bits, written once with GCC vector extensions; each_isa.h includes it once per instruction set.
//
// A producer writes a row of K float32 values to scratch that is filled up to whole registers; `codes_of` and `shifted_codes_of`
// make codes of it.

typedef int32_t ints __attribute__((vector_size(4 * ARSP_LANES)));
typedef int8_t codes __attribute__((vector_size(ARSP_LANES)));
typedef int8_t codes_unaligned __attribute__((vector_size(ARSP_LANES), aligned(1), may_alias));

// A register of the values from k on, with zeros behind the last of K.
ARSP_TARGET inline vec take(Numbers from, int64_t k, int64_t K) {
  return from.narrow ? load_left(from.narrow + k, K - k) : load_left(from.wide + k, K - k);
}

// Writes what lies behind the last of K values, to the end of its register.
ARSP_TARGET inline void fill_up(float* values, int64_t K, float with) {
  for (; K % ARSP_LANES; ++K) values[K] = with;
}

ARSP_TARGET inline float sum_of(vec v) {
  for (int width = ARSP_LANES / 2; width; width /= 2)
    for (int i = 0; i < width; ++i) v[i] += v[i + width];
  return v[0];
}

// The sum of term(k), a register of values from k on, over K values; in stretches, for the rounding error not to grow with K.
template <typename Term>
ARSP_TARGET inline float sum(int64_t K, Term term) {
  constexpr int64_t kStretch = 64 * ARSP_LANES;
  vec total = {};
  for (int64_t from = 0; from < K; from += kStretch) {
    vec part = {};
    for (int64_t k = from; k < std::min(from + kStretch, K); k += ARSP_LANES) part += term(k);
    total += part;
  }
  return sum_of(total);
}

ARSP_TARGET void copy(Numbers x, int64_t K, float* values) {
  for (int64_t k = 0; k < K; k += ARSP_LANES) store(values + k, take(x, k, K));
}

ARSP_TARGET void rms_norm(Numbers x, Numbers weight, float eps, int64_t K, float* values) {
  const float squares = sum(K, [&](int64_t k) ARSP_TARGET {
    const vec v = take(x, k, K);
    store(values + k, v);
    return v * v;
  });
  const float factor = 1 / std::sqrt(squares / K + eps);
  for (int64_t k = 0; k < K; k += ARSP_LANES) store(values + k, load(values + k) * factor * take(weight, k, K));
}

ARSP_TARGET void modulate(Numbers x, Numbers scale, Numbers shift, float eps, int64_t K, float* values) {
  const float mean = sum(K, [&](int64_t k) ARSP_TARGET {
    const vec v = take(x, k, K);
    store(values + k, v);
    return v;
  }) / K;
  fill_up(values, K, mean);
  const float squares = sum(K, [&](int64_t k) ARSP_TARGET {
    const vec v = load(values + k) - mean;
    store(values + k, v);
    return v * v;
  });
  const float factor = 1 / std::sqrt(squares / K + eps);
  for (int64_t k = 0; k < K; k += ARSP_LANES)
    store(values + k, load(values + k) * factor * (take(scale, k, K) + 1.f) + take(shift, k, K));
}

ARSP_TARGET void swiglu(Numbers a, Numbers b, int64_t K, float* values) {
  for (int64_t k = 0; k < K; k += ARSP_LANES) {
    const vec v = take(a, k, K);
    store(values + k, v * sigmoid(v) * take(b, k, K));
  }
}

ARSP_TARGET void gelu(Numbers x, int64_t K, float* values) {
  for (int64_t k = 0; k < K; k += ARSP_LANES) store(values + k, gelu_of(take(x, k, K)));
}

// Lanes `width` apart change places, and the upper of two changes sign.
template <int width>
struct Swap {
  int32_t other[ARSP_LANES], sign[ARSP_LANES];
  constexpr Swap() : other(), sign() {
    for (int i = 0; i < ARSP_LANES; ++i) {
      other[i] = i ^ width;
      sign[i] = i & width ? INT32_MIN : 0;
    }
  }
};

template <int width>
constexpr Swap<width> kSwap;

// Sums and differences of lanes 1, 2, 4, ... apart, within blocks.
template <int width = 1>
ARSP_TARGET inline vec butterflies(vec v, int64_t block) {
  if (width >= block) return v;
  ints other, sign;
  std::memcpy(&other, kSwap<width>.other, sizeof(other));
  std::memcpy(&sign, kSwap<width>.sign, sizeof(sign));
  v = __builtin_shuffle(v, other) + (vec)((ints)v ^ sign);
  if constexpr (2 * width < ARSP_LANES) {
    return butterflies<2 * width>(v, block);
  } else {
    return v;
  }
}

// Sums and differences of registers that lie `width` values apart, for two widths at once where the block has room for both.
ARSP_TARGET inline void wide_butterflies(float* x, int64_t block) {
  int64_t width = ARSP_LANES;
  for (; 4 * width <= block; width *= 4) {
    for (int64_t from = 0; from < block; from += 4 * width) {
      for (int64_t k = from; k < from + width; k += ARSP_LANES) {
        const vec a = load(x + k), b = load(x + k + width), c = load(x + k + 2 * width), d = load(x + k + 3 * width);
        store(x + k, (a + b) + (c + d));
        store(x + k + width, (a - b) + (c - d));
        store(x + k + 2 * width, (a + b) - (c + d));
        store(x + k + 3 * width, (a - b) - (c - d));
      }
    }
  }
  for (; 2 * width <= block; width *= 2) {
    for (int64_t from = 0; from < block; from += 2 * width) {
      for (int64_t k = from; k < from + width; k += ARSP_LANES) {
        const vec a = load(x + k), b = load(x + k + width);
        store(x + k, a + b);
        store(x + k + width, a - b);
      }
    }
  }
}

// Channel balancing: times `smooth`, times `signs`, and Hadamard transforms of `block` values, orthonormal up to `root`.
ARSP_TARGET void balance(const Balance& by, int64_t K, float* values) {
  if (by.smooth == nullptr && by.signs == nullptr) return;
  for (int64_t k = 0; k < K; k += ARSP_LANES) {
    vec v = load(values + k);
    if (by.smooth != nullptr) v *= take({by.smooth, nullptr}, k, K);
    if (by.signs != nullptr) {
      codes sign = {};
      if (k + ARSP_LANES <= K) {
        sign = *reinterpret_cast<const codes_unaligned*>(by.signs + k);
      } else {
        std::memcpy(&sign, by.signs + k, K - k);
      }
      v = butterflies(v * __builtin_convertvector(__builtin_convertvector(sign, ints), vec), by.block);
    }
    store(values + k, v);
  }
  if (by.signs == nullptr) return;
  if (by.block > ARSP_LANES)
    for (int64_t from = 0; from < K; from += by.block) wide_butterflies(values + from, by.block);
  for (int64_t k = 0; k < K; k += ARSP_LANES) store(values + k, load(values + k) * by.root);
}

// `offset` plus the nearest whole numbers (ties to even) of values / scale, kept between low and high.
ARSP_TARGET inline void encode(const float* values, float scale, float low, float high, int offset, int64_t K, int8_t* to) {
  const vec divisor = splat(scale);
  for (int64_t k = 0; k < K; k += ARSP_LANES) {
    vec q = load(values + k) / divisor;
    q = q > high ? splat(high) : q < low ? splat(low) : q;
    const ints whole = __builtin_convertvector(q + 12582912.f - 12582912.f, ints) + offset;  // 1.5 * 2^23 rounds to even
    const codes code = __builtin_convertvector(whole, codes);
    if (k + ARSP_LANES <= K) {
      *reinterpret_cast<codes_unaligned*>(to + k) = code;
    } else {
      std::memcpy(to + k, &code, K - k);
    }
  }
}

// Symmetric codes; returns the scale, which is `given` where that is not null.
ARSP_TARGET float codes_of(float* values, int64_t K, const float* given, int8_t* to) {
  fill_up(values, K, 0);
  // The bits of |x| in the order of whole numbers: that of the values, with NaN above all of them.
  ints largest = {};
  for (int64_t k = 0; k < K; k += ARSP_LANES) {
    const ints magnitude = (ints)load(values + k) & 0x7fffffff;
    largest = magnitude > largest ? magnitude : largest;
  }
  int32_t most = 0;
  for (int i = 0; i < ARSP_LANES; ++i) most = std::max(most, largest[i]);
  float scale;
  std::memcpy(&scale, &most, 4);
  const bool finite = scale <= std::numeric_limits<float>::max();
  if (given != nullptr) {
    scale = finite ? *given : std::numeric_limits<float>::quiet_NaN();
  } else {
    scale /= 127.f;
  }
  if (scale == 0) scale = 1;
  if (finite) {
    encode(values, scale, -127, 127, 0, K, to);
  } else {
    std::memset(to, 0, K);
  }
  return scale;
}

// Codes of values from -kShift on; returns the scale.
ARSP_TARGET float shifted_codes_of(float* values, int64_t K, int8_t* to) {
  fill_up(values, K, -kShift);
  vec largest = splat(-kShift), sum = {};
  for (int64_t k = 0; k < K; k += ARSP_LANES) {
    const vec v = load(values + k);
    largest = v > largest ? v : largest;
    sum += v * 0.f;
    store(values + k, v + kShift);
  }
  float most = -kShift;
  for (int i = 0; i < ARSP_LANES; ++i) most = std::max(most, largest[i]);
  float scale = (most + kShift) / 255.f + sum_of(sum);  // NaN where a value is not finite
  if (scale == 0) scale = 1;
  if (scale == scale) {
    encode(values, scale, 0, 255, -128, K, to);
  } else {
    std::memset(to, 0, K);
  }
  return scale;
}
