// One tile of windowed_scale_attention, written once with GCC vector extensions; each_isa.h includes it once per instruction set.

constexpr int kSubtile = 4;                       // lanes whose values are summed together
constexpr int kWide = ARSP_LANES == 16 ? 4 : 2;  // registers of a value row beside them

// Lanes of two registers in a row, so that their off-diagonal blocks of `size` elements change places.
template <int size>
struct Exchange {
  int32_t low[ARSP_LANES], high[ARSP_LANES];
  constexpr Exchange() : low(), high() {
    for (int i = 0; i < ARSP_LANES; ++i) {
      low[i] = i & size ? ARSP_LANES + (i ^ size) : i;
      high[i] = i & size ? ARSP_LANES + i : i ^ size;
    }
  }
};

template <int size>
constexpr Exchange<size> kExchange;

template <int size = 1>
ARSP_TARGET inline void transpose(vec* rows) {
  typedef int32_t indices __attribute__((vector_size(4 * ARSP_LANES)));
  indices low, high;
  std::memcpy(&low, kExchange<size>.low, sizeof(low));
  std::memcpy(&high, kExchange<size>.high, sizeof(high));
#pragma GCC unroll 16
  for (int i = 0; i < ARSP_LANES; ++i) {
    if (i & size) continue;
    const vec a = rows[i], b = rows[i + size];
    rows[i] = __builtin_shuffle(a, b, low);
    rows[i + size] = __builtin_shuffle(a, b, high);
  }
  if constexpr (2 * size < ARSP_LANES) transpose<2 * size>(rows);
}

// queries[d * lanes + i] = component d of the query in lane i; lanes past the last one repeat it and keep no key.
template <typename T>
ARSP_TARGET void load_queries(const Problem<T>& problem, int64_t row, int64_t head, const Tile& tile, float* queries) {
  const T* from[ARSP_LANES];
  for (int i = 0; i < ARSP_LANES; ++i) from[i] = problem.q.at(row, head) + tile.query[std::min(i, tile.lanes - 1)] * problem.q.step;
  int64_t d = 0;
  for (; d + ARSP_LANES <= problem.D; d += ARSP_LANES) {
    vec square[ARSP_LANES];
#pragma GCC unroll 16
    for (int i = 0; i < ARSP_LANES; ++i) square[i] = load(from[i] + d);
    transpose(square);
#pragma GCC unroll 16
    for (int i = 0; i < ARSP_LANES; ++i) store(queries + (d + i) * ARSP_LANES, square[i]);
  }
  for (; d < problem.D; ++d) {
    for (int i = 0; i < ARSP_LANES; ++i) queries[d * ARSP_LANES + i] = static_cast<float>(from[i][d]);
  }
}

inline const float* widen(const float* key, int64_t, float*) { return key; }

ARSP_TARGET inline const float* widen(const Bf16* key, int64_t D, float* to) {
  int64_t d = 0;
  for (; d + ARSP_LANES <= D; d += ARSP_LANES) store(to + d, load(key + d));
  for (; d < D; ++d) to[d] = static_cast<float>(key[d]);
  return to;
}

// Scores of kGroup keys for all lanes, -inf where a lane does not keep the key; returns the maxima so far.
ARSP_TARGET inline vec score(const float* queries, const float* const* key, int64_t D, const uint32_t* lanes, float* scores, vec maxima) {
  const float *k0 = key[0], *k1 = key[1], *k2 = key[2], *k3 = key[3], *k4 = key[4], *k5 = key[5], *k6 = key[6], *k7 = key[7];
  vec sum[kGroup] = {};
#pragma GCC unroll 2
  for (int64_t d = 0; d < D; ++d) {
    const vec q = load(queries + d * ARSP_LANES);
    sum[0] += q * k0[d];
    sum[1] += q * k1[d];
    sum[2] += q * k2[d];
    sum[3] += q * k3[d];
    sum[4] += q * k4[d];
    sum[5] += q * k5[d];
    sum[6] += q * k6[d];
    sum[7] += q * k7[d];
  }
  bits lane;
#pragma GCC unroll 16
  for (int i = 0; i < ARSP_LANES; ++i) lane[i] = 1u << i;
#pragma GCC unroll 8
  for (int j = 0; j < kGroup; ++j) {
    const vec kept = (lane & lanes[j]) != 0 ? sum[j] : splat(-INFINITY);
    maxima = kept > maxima ? kept : maxima;  // a NaN shows in its own weight
    store(scores + j * ARSP_LANES, kept);
  }
  return maxima;
}

// values[i * Dv + ...] of kSubtile lanes from `lane` on: scaled by `fade`, plus the listed keys' rows of v weighted with their lane's weight.
template <int WIDE, typename T>
ARSP_TARGET inline void add_values(const T* v, int64_t step, const int32_t* index, const uint16_t* list, int num, const float* weights,
                                   const float* fade, float* values, int64_t Dv) {
  vec sum[kSubtile][WIDE];
#pragma GCC unroll 4
  for (int i = 0; i < kSubtile; ++i) {
#pragma GCC unroll 4
    for (int c = 0; c < WIDE; ++c) sum[i][c] = load(values + i * Dv + c * ARSP_LANES) * fade[i];
  }
  for (int n = 0; n < num; ++n) {
    const T* row = v + index[list[n]] * step;
    const float* weight = weights + list[n] * ARSP_LANES;
    vec value[WIDE];
#pragma GCC unroll 4
    for (int c = 0; c < WIDE; ++c) {
      value[c] = load(row + c * ARSP_LANES);
      ARSP_IN_REGISTER(value[c]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < kSubtile; ++i) {
#pragma GCC unroll 4
      for (int c = 0; c < WIDE; ++c) sum[i][c] += value[c] * weight[i];
    }
  }
#pragma GCC unroll 4
  for (int i = 0; i < kSubtile; ++i) {
#pragma GCC unroll 4
    for (int c = 0; c < WIDE; ++c) store(values + i * Dv + c * ARSP_LANES, sum[i][c]);
  }
}

// The last Dv % lanes components.
template <typename T>
ARSP_TARGET __attribute__((noinline)) void add_last_values(const T* v, int64_t step, const int32_t* index, const uint16_t* list, int num,
                                                           const float* weights, const float* fade, float* values, int64_t Dv, int64_t from) {
  for (int i = 0; i < kSubtile; ++i) {
    for (int64_t d = from; d < Dv; ++d) {
      float sum = values[i * Dv + d] * fade[i];
      for (int n = 0; n < num; ++n) sum += static_cast<float>(v[index[list[n]] * step + d]) * weights[list[n] * ARSP_LANES + i];
      values[i * Dv + d] = sum;
    }
  }
}

// The weighted values of one chunk of keys. Each sub-tile passes over the keys that one of its lanes keeps.
template <typename T>
ARSP_TARGET void add_chunk(const Problem<T>& problem, int64_t row, int64_t head, const int32_t* index, const uint32_t* lanes, int num,
                           const float* weights, vec fade, float* values) {
  float fade_of[ARSP_LANES];
  store(fade_of, fade);
  const int64_t Dv = problem.Dv, step = problem.v.step;
  for (int lane = 0; lane < ARSP_LANES; lane += kSubtile) {
    uint16_t list[kChunk + 1];
    int kept = 0;
    for (int n = 0; n < num; ++n) {
      list[kept] = static_cast<uint16_t>(n);
      kept += (lanes[n] >> lane & ((1 << kSubtile) - 1)) != 0;
    }
    for (int64_t set = 0; set < problem.value_sets; ++set) {
      const T* v = problem.v.at(set * problem.rows + row, head);
      float* to = values + (set * ARSP_LANES + lane) * Dv;
      int64_t d = 0;
      for (; d + kWide * ARSP_LANES <= Dv; d += kWide * ARSP_LANES)
        add_values<kWide>(v + d, step, index, list, kept, weights + lane, fade_of + lane, to + d, Dv);
      for (; d + ARSP_LANES <= Dv; d += ARSP_LANES)
        add_values<1>(v + d, step, index, list, kept, weights + lane, fade_of + lane, to + d, Dv);
      if (d < Dv) add_last_values(v, step, index, list, kept, weights + lane, fade_of + lane, to, Dv, d);
    }
  }
}

template <typename T>
ARSP_TARGET void attend_tile(const Problem<T>& problem, int64_t row, int64_t head, const Tile& tile, const Keys& keys, Scratch& scratch) {
  float *queries = scratch.queries.data(), *scores = scratch.scores.data(), *values = scratch.values.data();
  load_queries(problem, row, head, tile, queries);
  std::fill(scratch.values.begin(), scratch.values.end(), 0.f);
  const T* k = problem.k.at(row, head);
  vec maxima = splat(-FLT_MAX), total = {};
  for (int begin = 0; begin < keys.num; begin += kChunk) {
    const int num = std::min(kChunk, keys.num - begin);
    const int32_t* index = keys.index.data() + begin;
    const uint32_t* lanes = keys.lanes.data() + begin;
    vec new_maxima = maxima;
    for (int n = 0; n < num; n += kGroup) {
      const float* key[kGroup];
      uint32_t kept[kGroup];
      for (int j = 0; j < kGroup; ++j) {  // past the end: the last key again, kept by no lane
        const int m = std::min(n + j, num - 1);
        key[j] = widen(k + index[m] * problem.k.step, problem.D, scratch.keys.data() + j * problem.D);
        kept[j] = n + j < num ? lanes[m] : 0;
      }
      new_maxima = score(queries, key, problem.D, kept, scores + n * ARSP_LANES, new_maxima);
    }
    const vec fade = exp_nonpositive(maxima - new_maxima);
    vec sum = {};
    for (int n = 0; n < num; ++n) {
      const vec weight = exp_nonpositive(load(scores + n * ARSP_LANES) - new_maxima);
      sum += weight;
      store(scores + n * ARSP_LANES, weight);
    }
    total = total * fade + sum;
    maxima = new_maxima;
    add_chunk(problem, row, head, index, lanes, num, scores, fade, values);
  }
  float total_of[ARSP_LANES];
  store(total_of, total);
  for (int64_t set = 0; set < problem.value_sets; ++set) {
    T* out = problem.out.at(set * problem.rows + row, head);
    for (int lane = 0; lane < tile.lanes; ++lane) {
      const float* from = values + (set * ARSP_LANES + lane) * problem.Dv;
      T* to = out + tile.query[lane] * problem.out.step;
      const float scale = 1 / total_of[lane];
      int64_t d = 0;
      for (; d + ARSP_LANES <= problem.Dv; d += ARSP_LANES) store(to + d, load(from + d) * scale);
      for (; d < problem.Dv; ++d) to[d] = static_cast<T>(from[d] * scale);
    }
  }
}
