// What stands between the linear layers of a decoder, written once with GCC vector extensions; each_isa.h includes it once per
// instruction set. Tails shorter than a register are left to plain loops.

typedef int32_t lanes __attribute__((vector_size(4 * ARSP_LANES)));

ARSP_TARGET inline float sum_of(vec v) {
#pragma GCC unroll 4
  for (int width = ARSP_LANES / 2; width; width /= 2) {
    lanes other;
    for (int i = 0; i < ARSP_LANES; ++i) other[i] = i ^ width;
    v += __builtin_shuffle(v, other);
  }
  return v[0];
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

// Scores of one query against all keys that it sees, -inf for the others up to whole registers; returns their maximum.
template <typename T>
ARSP_TARGET float score(const float* query, const T* k, int64_t step, int64_t D, const bool* mask, int64_t mask_step, int64_t seen,
                        int64_t total, float* scores) {
  for (int64_t t = 0; t < seen; ++t, k += step) {
    vec sum = {};
    int64_t d = 0;
    for (; d + ARSP_LANES <= D; d += ARSP_LANES) sum += load(query + d) * load(k + d);
    float score = sum_of(sum);
    for (; d < D; ++d) score += query[d] * static_cast<float>(k[d]);
    scores[t] = score;
  }
  const float none = -std::numeric_limits<float>::infinity();
  for (int64_t t = seen; t < total; ++t) scores[t] = none;
  if (mask != nullptr)
    for (int64_t t = 0; t < seen; ++t) scores[t] = mask[t * mask_step] ? scores[t] : none;
  float most = none;
  for (int64_t t = 0; t < seen; ++t) most = scores[t] > most ? scores[t] : most;
  return most;
}

// The values of all keys times their weights, in `WIDE` registers from component d on.
template <int WIDE, typename T>
ARSP_TARGET inline void weigh(const float* weights, const T* v, int64_t step, int64_t num, float scale, T* out) {
  vec sum[WIDE] = {};
  for (int64_t t = 0; t < num; ++t, v += step) {
#pragma GCC unroll 4
    for (int i = 0; i < WIDE; ++i) sum[i] += load(v + i * ARSP_LANES) * weights[t];
  }
#pragma GCC unroll 4
  for (int i = 0; i < WIDE; ++i) store(out + i * ARSP_LANES, sum[i] * scale);
}

// All queries of one row and head, after its new keys and values are stored.
template <typename T>
ARSP_TARGET void attend_head(const Attention<T>& task, int64_t row, int64_t head, float* scratch) {
  const int64_t D = task.D, Dv = task.Dv;
  for (int64_t i = 0; i < task.queries; ++i) {
    std::memcpy(task.k_cache.at(row, head, task.start + i), task.k.at(row, head, i), D * sizeof(T));
    std::memcpy(task.v_cache.at(row, head, task.start + i), task.v.at(row, head, i), Dv * sizeof(T));
  }
  const T *k = task.k_cache.at(row, head, 0), *v = task.v_cache.at(row, head, 0);
  float *query = scratch, *scores = scratch + D;
  for (int64_t i = 0; i < task.queries; ++i) {
    const T* q = task.q.at(row, head, i);
    for (int64_t d = 0; d < D; ++d) query[d] = static_cast<float>(q[d]) * task.scale;
    const bool* mask = task.mask == nullptr ? nullptr : task.mask + row * task.mask_row + i * task.mask_query;
    const int64_t num = task.start + task.queries, seen = mask == nullptr ? task.start + i + 1 : num;
    const int64_t whole = (num + ARSP_LANES - 1) / ARSP_LANES * ARSP_LANES;
    const float most = score(query, k, task.k_cache.step, D, mask, task.mask_key, seen, whole, scores);
    vec total = {};
    for (int64_t t = 0; t < whole; t += ARSP_LANES) {
      const vec weight = exp_nonpositive(load(scores + t) - most);
      total += weight;
      store(scores + t, weight);
    }
    const float scale = 1 / sum_of(total);
    T* out = task.out.at(row, head, i);
    int64_t d = 0;
    for (; d + 4 * ARSP_LANES <= Dv; d += 4 * ARSP_LANES) weigh<4>(scores, v + d, task.v_cache.step, seen, scale, out + d);
    for (; d + ARSP_LANES <= Dv; d += ARSP_LANES) weigh<1>(scores, v + d, task.v_cache.step, seen, scale, out + d);
    for (; d < Dv; ++d) {
      float sum = 0;
      for (int64_t t = 0; t < seen; ++t) sum += scores[t] * static_cast<float>(v[t * task.v_cache.step + d]);
      out[d] = static_cast<T>(sum * scale);
    }
  }
}
