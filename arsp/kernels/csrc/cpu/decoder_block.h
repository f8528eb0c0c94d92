// What stands between the linear layers of a decoder, written once with GCC vector extensions; each_isa.h includes it once per
// instruction set. Tails shorter than a register are left to plain loops.

typedef int32_t lanes __attribute__((vector_size(4 * ARSP_LANES)));

// Lanes of two registers a and b: a where bit `width` of the lane is 0, b where it is 1; and the same with lanes `width` apart swapped.
template <int width>
struct Halves {
  int32_t own[ARSP_LANES], other[ARSP_LANES];
  constexpr Halves() : own(), other() {
    for (int i = 0; i < ARSP_LANES; ++i) {
      own[i] = i & width ? ARSP_LANES + i : i;
      other[i] = i & width ? ARSP_LANES + (i ^ width) : i ^ width;
    }
  }
};

template <int width>
constexpr Halves<width> kHalves;

// Lane i of the result is the sum of all lanes of sums[i].
template <int width = 1>
ARSP_TARGET inline vec sums_of(vec* sums) {
  lanes own, other;
  std::memcpy(&own, kHalves<width>.own, sizeof(own));
  std::memcpy(&other, kHalves<width>.other, sizeof(other));
#pragma GCC unroll 8
  for (int i = 0; i < ARSP_LANES; i += 2 * width)
    sums[i] = __builtin_shuffle(sums[i], sums[i + width], own) + __builtin_shuffle(sums[i], sums[i + width], other);
  if constexpr (2 * width < ARSP_LANES) {
    return sums_of<2 * width>(sums);
  } else {
    return sums[0];
  }
}

ARSP_TARGET inline float sum_of(vec v) {
  float lane[ARSP_LANES], total = 0;
  store(lane, v);
  for (int i = 0; i < ARSP_LANES; ++i) total += lane[i];
  return total;
}

// The first num < ARSP_LANES values, then zeros.
template <typename T>
ARSP_TARGET inline vec load_part(const T* p, int64_t num) {
  T part[ARSP_LANES] = {};
  std::memcpy(part, p, num * sizeof(T));
  return load(part);
}

template <typename T>
ARSP_TARGET void norm_row(const T* x, const T* weight, float eps, int64_t K, T* out) {
  vec squares[2] = {};
  int64_t k = 0;
  for (; k + 2 * ARSP_LANES <= K; k += 2 * ARSP_LANES) {
    const vec a = load(x + k), b = load(x + k + ARSP_LANES);
    squares[0] += a * a;
    squares[1] += b * b;
  }
  float total = sum_of(squares[0] + squares[1]);
  for (; k < K; ++k) total += static_cast<float>(x[k]) * static_cast<float>(x[k]);
  const float factor = 1 / std::sqrt(total / K + eps);
  for (k = 0; k + ARSP_LANES <= K; k += ARSP_LANES) {
    T normed[ARSP_LANES];  // in the precision of x, as the model has it
    store(normed, load(x + k) * factor);
    store(out + k, load(normed) * load(weight + k));
  }
  for (; k < K; ++k) out[k] = static_cast<T>(static_cast<float>(static_cast<T>(static_cast<float>(x[k]) * factor)) * static_cast<float>(weight[k]));
}

// Pairs (a, b) become (a cos - b sin, b cos + a sin); the table holds (cos, sin) a pair.
template <typename T>
ARSP_TARGET void rotate_row(const T* x, const float* table, int64_t D, T* out) {
  lanes swapped, even, odd;
  vec sign;
  for (int i = 0; i < ARSP_LANES; ++i) {
    swapped[i] = i ^ 1;
    even[i] = i & ~1;
    odd[i] = i | 1;
    sign[i] = i & 1 ? 1 : -1;
  }
  int64_t d = 0;
  for (; d + ARSP_LANES <= D; d += ARSP_LANES) {
    const vec v = load(x + d), turn = load(table + d);
    store(out + d, v * __builtin_shuffle(turn, even) + __builtin_shuffle(v, swapped) * (__builtin_shuffle(turn, odd) * sign));
  }
  for (; d < D; d += 2) {
    const float a = static_cast<float>(x[d]), b = static_cast<float>(x[d + 1]), cos = table[d], sin = table[d + 1];
    out[d] = static_cast<T>(a * cos - b * sin);
    out[d + 1] = static_cast<T>(b * cos + a * sin);
  }
}

// Scores of Q queries (rows of whole registers, zeros at the end) against the next ARSP_LANES / Q keys, at most the last one.
template <int Q, typename T>
ARSP_TARGET inline void score(const float* queries, int64_t width, const T* k, int64_t step, int64_t next, int64_t D, int64_t t, int64_t last,
                              float* scores, int64_t stride) {
  constexpr int kKeys = ARSP_LANES / Q;
  const T* key[kKeys];
#pragma GCC unroll 16
  for (int j = 0; j < kKeys; ++j) {
    key[j] = k + std::min(t + j, last) * step;
    for (int64_t d = 0; d < D; d += 64 / sizeof(T)) __builtin_prefetch(key[j] + next + d, 0, 2);  // the same key of the next head
  }
  vec sums[ARSP_LANES] = {};
  int64_t d = 0;
  for (; d + ARSP_LANES <= D; d += ARSP_LANES) {
    vec keys[kKeys];
#pragma GCC unroll 16
    for (int j = 0; j < kKeys; ++j) keys[j] = load(key[j] + d);
#pragma GCC unroll 4
    for (int i = 0; i < Q; ++i) {
      const vec query = load(queries + i * width + d);
#pragma GCC unroll 16
      for (int j = 0; j < kKeys; ++j) sums[i * kKeys + j] += query * keys[j];
    }
  }
  if (d < D) {
    for (int i = 0; i < Q; ++i)
      for (int j = 0; j < kKeys; ++j) sums[i * kKeys + j] += load(queries + i * width + d) * load_part(key[j] + d, D - d);
  }
  float found[ARSP_LANES];
  store(found, sums_of(sums));
#pragma GCC unroll 4
  for (int i = 0; i < Q; ++i) std::memcpy(scores + i * stride + t, found + i * kKeys, kKeys * sizeof(float));
}

// The values of all keys times the weights of Q queries, W registers from component d on.
template <int Q, int W, typename T>
ARSP_TARGET inline void weigh(const float* weights, int64_t stride, const T* v, int64_t step, int64_t next, int64_t num, const float* scale,
                              T* out, int64_t out_step) {
  vec sum[Q][W] = {};
  for (int64_t t = 0; t < num; ++t, v += step) {
    vec value[W];
    for (int w = 0; w < W; w += std::max<int>(1, 64 / sizeof(T) / ARSP_LANES)) __builtin_prefetch(v + next + w * ARSP_LANES, 0, 2);
#pragma GCC unroll 4
    for (int w = 0; w < W; ++w) value[w] = load(v + w * ARSP_LANES);
#pragma GCC unroll 4
    for (int i = 0; i < Q; ++i)
#pragma GCC unroll 4
      for (int w = 0; w < W; ++w) sum[i][w] += value[w] * weights[i * stride + t];
  }
#pragma GCC unroll 4
  for (int i = 0; i < Q; ++i)
#pragma GCC unroll 4
    for (int w = 0; w < W; ++w) store(out + i * out_step + w * ARSP_LANES, sum[i][w] * scale[i]);
}

// Q queries from `first` on, of one row and head.
template <int Q, typename T>
ARSP_TARGET void attend(const Attention<T>& task, int64_t row, int64_t head, int64_t first, float* scratch) {
  const int64_t D = task.D, start = task.start_of(row), num = start + task.queries;
  const int64_t width = (D + ARSP_LANES - 1) / ARSP_LANES * ARSP_LANES, stride = (num + ARSP_LANES - 1) / ARSP_LANES * ARSP_LANES;
  float *queries = scratch, *scores = scratch + Q * width, scale[Q];
  const T *k = task.k_cache.at(row, head, 0), *v = task.v_cache.at(row, head, 0);
  for (int i = 0; i < Q; ++i) {
    const T* q = task.q.at(row, head, first + i);
    for (int64_t d = 0; d < width; ++d) queries[i * width + d] = d < D ? static_cast<float>(q[d]) * task.scale : 0;
  }
  for (int64_t t = 0; t < num; t += ARSP_LANES / Q) score<Q>(queries, width, k, task.k_cache.step, task.k_cache.head, D, t, num - 1, scores, stride);
  for (int i = 0; i < Q; ++i) {
    float* own = scores + i * stride;
    const int64_t seen = task.mask == nullptr ? start + first + i + 1 : num;
    std::fill(own + seen, own + stride, -std::numeric_limits<float>::infinity());
    if (task.mask != nullptr) {
      const bool* mask = task.mask + row * task.mask_row + (first + i) * task.mask_query;
      for (int64_t t = 0; t < num; ++t) own[t] = mask[t * task.mask_key] ? own[t] : -std::numeric_limits<float>::infinity();
    }
    vec most = splat(-std::numeric_limits<float>::infinity()), total = {};
    for (int64_t t = 0; t < stride; t += ARSP_LANES) most = load(own + t) > most ? load(own + t) : most;
    for (int lane = 1; lane < ARSP_LANES; ++lane) most[0] = std::max(most[0], most[lane]);
    for (int64_t t = 0; t < stride; t += ARSP_LANES) {
      const vec weight = exp_nonpositive(load(own + t) - most[0]);
      total += weight;
      store(own + t, weight);
    }
    scale[i] = 1 / sum_of(total);
  }
  T* out = task.out.at(row, head, first);
  int64_t d = 0;
  for (; d + 4 * ARSP_LANES <= task.Dv; d += 4 * ARSP_LANES)
    weigh<Q, 4>(scores, stride, v + d, task.v_cache.step, task.v_cache.head, num, scale, out + d, task.out.step);
  for (; d + ARSP_LANES <= task.Dv; d += ARSP_LANES)
    weigh<Q, 1>(scores, stride, v + d, task.v_cache.step, task.v_cache.head, num, scale, out + d, task.out.step);
  for (; d < task.Dv; ++d) {
    for (int i = 0; i < Q; ++i) {
      float sum = 0;
      for (int64_t t = 0; t < num; ++t) sum += scores[i * stride + t] * static_cast<float>(v[t * task.v_cache.step + d]);
      out[i * task.out.step + d] = static_cast<T>(sum * scale[i]);
    }
  }
}

// All queries of one row and head, after its new keys and values are stored.
template <typename T>
ARSP_TARGET void attend_head(const Attention<T>& task, int64_t row, int64_t head, float* scratch) {
  const int64_t start = task.start_of(row);
  for (int64_t i = 0; i < task.queries; ++i) {
    std::memcpy(task.k_cache.at(row, head, start + i), task.k.at(row, head, i), task.D * sizeof(T));
    std::memcpy(task.v_cache.at(row, head, start + i), task.v.at(row, head, i), task.Dv * sizeof(T));
  }
  int64_t first = 0;
  for (; first + kQueries <= task.queries; first += kQueries) attend<kQueries>(task, row, head, first, scratch);
  for (; first < task.queries; ++first) attend<1>(task, row, head, first, scratch);
}
