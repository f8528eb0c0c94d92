// One register of float32 values with GCC vector extensions. bfloat16 is widened when loaded and rounded when stored.

typedef float vec __attribute__((vector_size(4 * ARSP_LANES)));
typedef float vec_unaligned __attribute__((vector_size(4 * ARSP_LANES), aligned(4), may_alias));
typedef uint16_t half __attribute__((vector_size(2 * ARSP_LANES)));
typedef uint16_t half_unaligned __attribute__((vector_size(2 * ARSP_LANES), aligned(2), may_alias));
typedef uint32_t bits __attribute__((vector_size(4 * ARSP_LANES)));

ARSP_TARGET inline vec load(const float* p) { return *reinterpret_cast<const vec_unaligned*>(p); }

// bfloat16 is the upper half of a float32: widen the bits and shift them into place.
ARSP_TARGET inline vec load(const Bf16* p) {
  return (vec)(__builtin_convertvector(*reinterpret_cast<const half_unaligned*>(p), bits) << 16);
}

// Zeros behind the values that are left.
template <typename T>
ARSP_TARGET inline vec load_left(const T* p, int64_t left) {
  if (left >= ARSP_LANES) return load(p);
  float last[ARSP_LANES] = {};
  for (int64_t i = 0; i < left; ++i) last[i] = p[i];
  return load(last);
}

ARSP_TARGET inline void store(float* p, vec v) { *reinterpret_cast<vec_unaligned*>(p) = v; }

// To the nearest, ties to even; NaN stays NaN.
ARSP_TARGET inline void store(Bf16* p, vec v) {
  const bits raw = (bits)v;
  const bits nearest = (raw + 0x7fff + ((raw >> 16) & 1)) >> 16;
  *reinterpret_cast<half_unaligned*>(p) = __builtin_convertvector(v == v ? nearest : (raw >> 16) | 64, half);
}

ARSP_TARGET inline vec splat(float x) { return x - vec{}; }

// e^x for x <= 0 with a relative error below 1e-7; 0 below -86.9. The polynomial is that of Cephes' expf (public domain).
ARSP_TARGET inline vec exp_nonpositive(vec x) {
  const vec kept = x < -86.9f ? splat(-86.9f) : x;
  const vec shifted = kept * 1.44269504f + 12582912.f;  // 1.5 * 2^23: the low bits now hold round(x / ln 2)
  const vec n = shifted - 12582912.f;
  const vec r = (kept - n * 0.693359375f) + n * 2.12194440e-4f;
  vec poly = r * 1.9875691500e-4f + 1.3981999507e-3f;
  poly = poly * r + 8.3334519073e-3f;
  poly = poly * r + 4.1665795894e-2f;
  poly = poly * r + 1.6666665459e-1f;
  poly = poly * r + 5.0000001201e-1f;
  poly = poly * (r * r) + r + 1.f;
  return x < -86.9f ? vec{} : (vec)((bits)poly + ((bits)shifted << 23));
}

// 1 / (1 + e^-x)
ARSP_TARGET inline vec sigmoid(vec x) {
  const vec e = exp_nonpositive(x < 0 ? x : -x);
  return (x < 0 ? e : splat(1)) / (e + 1.f);
}

// GELU in its tanh form: (1 + tanh u) / 2 = sigmoid(2 u).
ARSP_TARGET inline vec gelu_of(vec x) { return x * sigmoid((x * x * x * 0.044715f + x) * 1.5957691216f); }
