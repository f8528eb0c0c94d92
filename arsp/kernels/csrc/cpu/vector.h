// One register of float32 values with GCC vector extensions; bfloat16 is widened when loaded and rounded when stored.

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

ARSP_TARGET inline void store(float* p, vec v) { *reinterpret_cast<vec_unaligned*>(p) = v; }

// To the nearest, ties to even; NaN stays NaN.
ARSP_TARGET inline void store(Bf16* p, vec v) {
  const bits raw = (bits)v;
  const bits nearest = (raw + 0x7fff + ((raw >> 16) & 1)) >> 16;
  *reinterpret_cast<half_unaligned*>(p) = __builtin_convertvector(v == v ? nearest : (raw >> 16) | 64, half);
}
