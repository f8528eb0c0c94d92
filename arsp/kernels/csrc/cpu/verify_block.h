// One row of verify and keyed_argmax, written once with GCC vector extensions; each_isa.h includes it once per instruction set.
// Rows lie in Scratch, padded with -inf to a multiple of kChunk, so that loops over them have no remainder.

constexpr int kChunk = 4 * ARSP_LANES;  // codes whose noise is made together
constexpr int kQuads = ARSP_LANES / 4;

typedef int32_t ints __attribute__((vector_size(4 * ARSP_LANES)));
typedef uint64_t wide __attribute__((vector_size(4 * ARSP_LANES)));  // one block of Philox a lane
typedef float half_vec __attribute__((vector_size(2 * ARSP_LANES)));
typedef double doubles __attribute__((vector_size(4 * ARSP_LANES)));

// 0, 1, 2, ..
struct Lanes {
  int32_t lane[ARSP_LANES];
  constexpr Lanes() : lane() {
    for (int i = 0; i < ARSP_LANES; ++i) lane[i] = i;
  }
};

constexpr Lanes kLaneOrder;

ARSP_TARGET inline ints lanes() {
  ints order;
  std::memcpy(&order, kLaneOrder.lane, sizeof(order));
  return order;
}

constexpr uint32_t kAllLanes = (1u << ARSP_LANES) - 1;

// As bits, the lanes where a > b.
ARSP_TARGET inline uint32_t greater(vec a, vec b) {
#if ARSP_LANES == 16
  return _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_GT_OQ);
#elif ARSP_LANES == 8
  return _mm256_movemask_ps(_mm256_cmp_ps((__m256)a, (__m256)b, _CMP_GT_OQ));
#elif defined(__x86_64__)
  return _mm_movemask_ps(_mm_cmpgt_ps((__m128)a, (__m128)b));
#else
  uint32_t lanes = 0;
  for (int i = 0; i < ARSP_LANES; ++i) lanes |= (a[i] > b[i]) << i;
  return lanes;
#endif
}

#if ARSP_LANES == 8
struct Compaction {  // for every set of lanes, its members in front
  int32_t lane[256][8];
  constexpr Compaction() : lane() {
    for (int lanes = 0; lanes < 256; ++lanes) {
      for (int i = 0, num = 0; i < 8; ++i) {
        if (lanes >> i & 1) lane[lanes][num++] = i;
      }
    }
  }
};

constexpr Compaction kCompaction;
#endif

// Writes the chosen lanes one after another, overwriting up to a register behind `to`; returns how many they are.
ARSP_TARGET inline int compress(float* to, vec v, uint32_t lanes) {
#if ARSP_LANES == 16
  store(to, (vec)_mm512_maskz_compress_ps(static_cast<__mmask16>(lanes), (__m512)v));
  return __builtin_popcount(lanes);
#elif ARSP_LANES == 8
  store(to, (vec)_mm256_permutevar8x32_ps((__m256)v, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(kCompaction.lane[lanes]))));
  return __builtin_popcount(lanes);
#else
  int num = 0;
  for (int i = 0; i < ARSP_LANES; ++i) {
    to[num] = v[i];
    num += lanes >> i & 1;
  }
  return num;
#endif
}

// The product of the lower halves of 64-bit lanes; the upper halves may hold anything.
ARSP_TARGET inline wide multiply_lower(wide a, uint64_t factor) {
  const wide b = factor + wide{};
#if ARSP_LANES == 16
  return (wide)_mm512_mul_epu32((__m512i)a, (__m512i)b);
#elif ARSP_LANES == 8
  return (wide)_mm256_mul_epu32((__m256i)a, (__m256i)b);
#elif defined(__x86_64__)
  return (wide)_mm_mul_epu32((__m128i)a, (__m128i)b);
#else
  return (a & 0xffffffff) * b;
#endif
}

// Which block each lane counts, so that words come out in the order of their codes, and the shuffles that bring them there.
struct Order {
  uint64_t block[2 * kQuads], low[2 * kQuads], high[2 * kQuads];
  constexpr Order() : block(), low(), high() {
    for (int i = 0; i < 2 * kQuads; ++i) {
      block[i] = i / 2 + i % 2 * kQuads;
      low[i] = i % 2 ? 2 * kQuads + i - 1 : i;
      high[i] = i % 2 ? 2 * kQuads + i : i + 1;
    }
  }
};

constexpr Order kOrder;

// Words of kChunk codes from `first` on: Philox4x32-10 as in arsp/rng.py, in two halves that fill each other's waits.
ARSP_TARGET inline void make_words(const Key& key, int64_t first, bits* words) {
  wide order, low, high, c0[2], c1[2], c2[2], c3[2];
  std::memcpy(&order, kOrder.block, sizeof(order));
  std::memcpy(&low, kOrder.low, sizeof(low));
  std::memcpy(&high, kOrder.high, sizeof(high));
#pragma GCC unroll 2
  for (int h = 0; h < 2; ++h) {
    c0[h] = order + static_cast<uint64_t>(first / 4 + 2 * kQuads * h);
    c1[h] = key.position + wide{};
    c2[h] = key.id + wide{};
    c3[h] = key.purpose + wide{};
  }
#pragma GCC unroll 10
  for (int round = 0; round < 10; ++round) {  // words are the lower halves of lanes, the upper halves are left dirty
#pragma GCC unroll 2
    for (int h = 0; h < 2; ++h) {
      const wide a = multiply_lower(c0[h], 0xD2511F53), b = multiply_lower(c2[h], 0xCD9E8D57);
      c0[h] = (b >> 32) ^ c1[h] ^ key.rounds[round][0];
      c1[h] = b;
      c2[h] = (a >> 32) ^ c3[h] ^ key.rounds[round][1];
      c3[h] = a;
    }
  }
#pragma GCC unroll 2
  for (int h = 0; h < 2; ++h) {
    const wide words01 = (c0[h] & 0xffffffff) | (c1[h] << 32), words23 = (c2[h] & 0xffffffff) | (c3[h] << 32);
    words[2 * h] = (bits)__builtin_shuffle(words01, words23, low);
    words[2 * h + 1] = (bits)__builtin_shuffle(words01, words23, high);
  }
}

// Not below the Gumbel noise of a word, and at most 0.09 above it where the noise is above 3: with v = 1 - u,
// -log(-log u) <= -log v, and a float's bits read as a whole number give its logarithm to base 2 by linear interpolation.
ARSP_TARGET inline vec noise_bound(bits word) {
  const vec v = __builtin_convertvector((ints)(~word >> 9), vec) + 0.5f;  // times 2^23
  const vec log2_v = __builtin_convertvector((ints)v, vec);               // times 2^23, plus 127 + 23
  return log2_v * static_cast<float>(-M_LN2 / (1 << 23)) + static_cast<float>(150 * M_LN2 + 1e-4);
}

inline float noise(uint32_t word) {
  const float u = (static_cast<float>(word >> 9) + 0.5f) * 0x1p-23f;
  return -std::log(-std::log(u));
}

// The codes that a law keeps, s their logits.
struct Kept {
  const float* s;
  Law law;
  ARSP_TARGET vec log_p(int64_t x) const {
    const vec v = load(s + x);
    const ints allowed = lanes() <= static_cast<int32_t>(law.last - x);
    return (v > law.threshold) | ((v == law.threshold) & allowed) ? v - law.lse : splat(-INFINITY);
  }
  ARSP_TARGET vec bound(int64_t x) const { return log_p(x); }
  float score(int64_t x) const { return s[x] - law.lse; }
};

// Codes with weights whose logarithms are known up to 0.06 before they are taken: the bits of a float read as a whole number.
struct Weighted {
  const float* w;
  ARSP_TARGET vec bound(int64_t x) const {
    const vec v = load(w + x), log2_v = __builtin_convertvector((ints)v, vec);  // times 2^23, plus 127
    return v > 0.f ? log2_v * static_cast<float>(M_LN2 / (1 << 23)) + static_cast<float>(0.0861 * M_LN2 - 127 * M_LN2) : splat(-INFINITY);
  }
  float score(int64_t x) const { return std::log(w[x]); }
};

// argmax_x(score(x) + noise(x)) over the codes whose bound, which is not below the score, is above -inf; the smallest on ties. Only codes
// whose sum is above `best` are found. Noise has its two logarithms taken only for codes that win if it is as large as its bound.
template <typename Codes>
ARSP_TARGET int64_t draw(const Codes& codes, int64_t padded, float best, const Key& key) {
  int64_t code = -1;
  for (int64_t first = 0; first < padded; first += kChunk) {
    vec bounds[4], highest = splat(-INFINITY);
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      bounds[j] = codes.bound(first + j * ARSP_LANES);
      highest = bounds[j] > highest ? bounds[j] : highest;
    }
    if (!greater(highest + 16.7f, splat(best))) continue;  // noise is below 16.64
    bits words[4];
    make_words(key, first, words);
    uint64_t possible = 0;  // as bits, the codes of the chunk that may win
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j)
      possible |= static_cast<uint64_t>(greater(bounds[j] + noise_bound(words[j]), splat(best))) << (j * ARSP_LANES);
    if (!possible) continue;
    uint32_t word[kChunk];
    std::memcpy(word, words, sizeof(word));
    for (; possible; possible &= possible - 1) {
      const int i = __builtin_ctzll(possible);
      const float value = codes.score(first + i) + noise(word[i]);
      if (value > best) best = value, code = first + i;
    }
  }
  return code;
}

// The same for a law whose best logit is `max`.
ARSP_TARGET int64_t draw(const float* s, int64_t padded, float max, const Law& law, const Key& key) {
  return draw(Kept{s, law}, padded, std::nextafter(max - law.lse - 3.f, -INFINITY), key);  // noise is above -2.82
}

// The first `num` values, fewer than a register holds, zeros behind them.
template <typename T>
ARSP_TARGET inline vec load_some(const T* p, int64_t num) {
  T some[ARSP_LANES] = {};
  std::copy(p, p + num, some);
  return load(some);
}

// The value itself, rounded: no multiply-add takes it in.
ARSP_TARGET inline vec rounded(vec x) {
#if defined(__has_builtin) && __has_builtin(__builtin_assoc_barrier)
  return __builtin_assoc_barrier(x);
#else
  asm("" : "+m"(x));
  return x;
#endif
}

// Copies a row, guided and divided by the temperature, into s, padded with -inf; returns its maximum, or NaN where there is one.
template <typename T, bool kGuided>
ARSP_TARGET float scale_as(const Logits& row, int64_t V, float* s, int64_t padded) {
  const T *const cond = static_cast<const T*>(row.cond), *const uncond = static_cast<const T*>(row.uncond);
  const float factor = row.scale, gain = row.gain, divisor = row.divisor;
  const bool ramp = row.ramp, divides = divisor != 1;
  const auto made = [=](vec c, vec u) ARSP_TARGET {
    if (kGuided) c = ramp ? rounded(gain * c) - rounded(factor * u) : u + rounded(factor * (c - u));
    if (divides) c /= divisor;
    return c;
  };
  vec maxima = splat(-INFINITY);
  ints invalid = {};
  int64_t x = 0;
  for (; x + ARSP_LANES <= V; x += ARSP_LANES) {
    const vec v = made(load(cond + x), kGuided ? load(uncond + x) : vec{});
    store(s + x, v);
    maxima = v > maxima ? v : maxima;
    invalid |= v != v;
  }
  for (; x < padded; x += ARSP_LANES) {
    vec v = splat(-INFINITY);
    if (x < V) v = lanes() < static_cast<int32_t>(V - x) ? made(load_some(cond + x, V - x), kGuided ? load_some(uncond + x, V - x) : vec{}) : v;
    store(s + x, v);
    maxima = v > maxima ? v : maxima;
    invalid |= v != v;
  }
  float max = -INFINITY;
  for (int i = 0; i < ARSP_LANES; ++i) {
    if (invalid[i]) return NAN;
    max = std::max(max, maxima[i]);
  }
  return max;
}

ARSP_TARGET float scale(const Logits& row, int64_t V, float* s, int64_t padded) {
  if (row.uncond == nullptr) return row.narrow ? scale_as<Bf16, false>(row, V, s, padded) : scale_as<float, false>(row, V, s, padded);
  return row.narrow ? scale_as<Bf16, true>(row, V, s, padded) : scale_as<float, true>(row, V, s, padded);
}

// Sum of e^(list[i] - max) in float64; -inf follows the list up to a whole register.
ARSP_TARGET double mass(const float* list, int64_t num, float max) {
  doubles sums[2] = {};
  for (int64_t i = 0; i < num; i += ARSP_LANES) {
    const vec e = exp_nonpositive(load(list + i) - max);
    half_vec halves[2];
    std::memcpy(halves, &e, sizeof(e));
    sums[0] += __builtin_convertvector(halves[0], doubles);
    sums[1] += __builtin_convertvector(halves[1], doubles);
  }
  double sum = 0;
  for (int i = 0; i < ARSP_LANES / 2; ++i) sum += sums[0][i] + sums[1][i];
  return sum;
}

// The smallest of the listed values whose betters together weigh at most `limit`, by quickselect: a value v weighs e^(v - max), or
// 1 without kByMass, where it is the k-th largest for a limit of k - 1. Overwrites both lists.
template <bool kByMass>
ARSP_TARGET Cut select(float* list, float* spare, int64_t num, double limit, float max) {
  double above = 0;  // what the values weigh that were dropped because they are better than all listed
  for (;;) {
    const float a = list[num / 4], b = list[num / 2], c = list[num - 1 - num / 4];
    const float pivot = std::max(std::min(a, b), std::min(std::max(a, b), c));
    int64_t more = 0, less = 0;
    for (int64_t i = 0; i < num; i += ARSP_LANES) {
      const vec v = load(list + i);
      const uint32_t valid = num - i < ARSP_LANES ? (1u << (num - i)) - 1 : kAllLanes;
      more += compress(spare + more, v, greater(v, splat(pivot)) & valid);
      less += compress(list + less, v, greater(splat(pivot), v) & valid);  // overwrites only what was read
    }
    store(spare + more, splat(-INFINITY));
    const double better = above + (kByMass ? mass(spare, more, max) : more);
    if (better > limit) {
      std::swap(list, spare);
      num = more;
      continue;
    }
    const int64_t equal = num - more - less;
    const double weight = kByMass ? exp_nonpositive(splat(pivot - max))[0] : 1;
    if (less == 0 || better + equal * weight > limit) return {pivot, better, weight, equal};
    above = better + equal * weight;
    num = less;
  }
}

// Lists the values of s that are not below the threshold, followed by -inf up to a whole register; returns their number.
ARSP_TARGET int64_t list_kept(const float* s, int64_t padded, float threshold, float* list) {
  int64_t num = 0;
  for (int64_t x = 0; x < padded; x += ARSP_LANES) {
    const vec v = load(s + x);
    num += compress(list + num, v, ~greater(splat(threshold), v) & kAllLanes);
  }
  store(list + num, splat(-INFINITY));
  return num;
}

// What top-k and then top-p leave of a row.
ARSP_TARGET Law filter(const float* s, int64_t V, int64_t padded, float max, const Filters& filters, Scratch& scratch) {
  float* const list = scratch.list.get();
  Law law{0, -INFINITY, V - 1};
  if (filters.top_k > 0 && filters.top_k < V) {
    std::copy(s, s + padded, list);
    law.threshold = select<false>(list, scratch.spare.get(), padded, static_cast<double>(filters.top_k - 1), max).value;
  }
  const bool whole = law.threshold == -INFINITY && filters.top_p >= 1;
  const int64_t num = whole ? padded : list_kept(s, padded, law.threshold, list);
  double total = mass(whole ? s : list, num, max);
  if (filters.top_p < 1) {
    const double limit = filters.top_p * total;
    const Cut cut = select<true>(list, scratch.spare.get(), num, limit, max);
    const double room = cut.weight > 0 ? std::floor((limit - cut.better) / cut.weight) + 1 : INFINITY;
    const int64_t ties = room < cut.equal ? static_cast<int64_t>(room) : cut.equal;
    law.threshold = cut.value;
    if (ties < cut.equal) {  // the cut goes through equal values: the smaller ids stay
      law.last = -1;
      for (int64_t left = ties; left > 0; left -= s[law.last] == cut.value) ++law.last;
    }
    total = cut.better + ties * cut.weight;
  }
  law.lse = static_cast<float>(max + std::log(total));
  return law;
}

ARSP_TARGET int64_t argmax_row(const Logits& log_w, int64_t V, const Key& key, Scratch& scratch) {
  const int64_t padded = (V + kChunk - 1) / kChunk * kChunk;
  const float max = scale(log_w, V, scratch.row.get(), padded);
  return std::isfinite(max) ? draw(scratch.row.get(), padded, max, {0, -INFINITY, V - 1}, key) : -1;
}

ARSP_TARGET Outcome verify_row(const Logits& logits, int64_t V, int64_t draft, const Filters& filters, const Key& key, Scratch& scratch) {
  const int64_t padded = (V + kChunk - 1) / kChunk * kChunk;
  const float* const s = scratch.row.get();
  const float max = scale(logits, V, scratch.row.get(), padded);
  if (!std::isfinite(max)) return {{NAN, NAN, -1}, -1, draft < 0 ? 0 : NAN};
  Outcome out{};
  if (filters.greedy) {
    out.code = std::find(s, s + V, max) - s;
    out.law = {max, max, out.code};
  } else {
    out.law = filter(s, V, padded, max, filters, scratch);
    out.code = draw(s, padded, max, out.law, key);
  }
  if (draft >= 0) out.log_p = out.law.keeps(s[draft], draft) ? s[draft] - out.law.lse : -INFINITY;
  return out;
}

// The law of a row densely, zeros behind it. The logits are what scale() made of them.
ARSP_TARGET void probabilities(float* s, int64_t padded, const Law& law) {
  const Kept kept{s, law};
  for (int64_t x = 0; x < padded; x += ARSP_LANES) {
    const vec log_p = kept.log_p(x);
    store(s + x, log_p > -INFINITY ? exp_nonpositive(log_p) : vec{});
  }
}

// draw_residual of one row; q is where the draft's law is one of the recorded ones.
ARSP_TARGET int64_t residual_row(const LawRow& p, const LawRow* q, const Draft& draft, int64_t V, const Key& key, Scratch& scratch) {
  const int64_t padded = (V + kChunk - 1) / kChunk * kChunk;
  float *const of_p = scratch.row.get(), *const rest = scratch.list.get();
  scale(p.logits, V, of_p, padded);
  probabilities(of_p, padded, p.law);
  if (q != nullptr) {
    scale(q->logits, V, rest, padded);
    probabilities(rest, padded, q->law);
  } else {
    std::fill(rest, rest + padded, draft.uniform ? static_cast<float>(1.0 / V) : 0.f);
    if (draft.prior != nullptr) std::copy(draft.prior, draft.prior + V, rest);
    if (draft.certain >= 0) rest[draft.certain] = 1;
  }
  doubles sums[2] = {};
  for (int64_t x = 0; x < padded; x += ARSP_LANES) {
    const vec less = load(of_p + x) - load(rest + x), w = less > 0.f ? less : vec{};
    store(rest + x, w);
    half_vec halves[2];
    std::memcpy(halves, &w, sizeof(w));
    sums[0] += __builtin_convertvector(halves[0], doubles);
    sums[1] += __builtin_convertvector(halves[1], doubles);
  }
  double mass = 0;
  for (int i = 0; i < ARSP_LANES / 2; ++i) mass += sums[0][i] + sums[1][i];
  return draw(Weighted{mass < kResidualFloor ? of_p : rest}, padded, -INFINITY, key);
}
