// keyed_argmax and verify: the filtered law of a row of logits as three numbers, a keyed draw from it, and the log-probability of a
// draft. accept_scan and draw_residual: which drafts stand, and what becomes of the first that does not (reference.py has the definitions).
//
// A block is a row. The row, both halves of it with guidance, is read from memory once, into shared memory where it fits; nothing of its
// size is written. Top-k and
// top-p are one selection: a histogram of distances to the maximum, then histograms of the keys inside the bin where the cut lies, at most
// four in all. Masses are whole numbers of 2^-46 of the maximum's, so their sums depend on no order and the cut is the same in every run.
#include "device.cuh"

namespace {

constexpr int kThreads = 1024, kBins = 2048;
constexpr int kSharedCodes = 18432;  // rows up to here lie in shared memory: with the bins 96 KiB, which all supported devices have
constexpr float kBinsPerUnit = 64;
constexpr int kMassBits = 46;  // 2^16 codes of the largest mass still fit into 64 bits
constexpr float kInfinity = __builtin_inff();

using Mass = unsigned long long;

struct Key {
  uint64_t seed;
  const int64_t *ids, *positions;  // (R)
  uint32_t purpose;
};

// Logits as a model made them, and what comes before filters (class _Logits of arsp/kernels/cuda.py).
struct Logits {
  const void *cond, *uncond;  // (R, V); uncond null: no guidance
  const bool* guided;         // (R), null: all rows
  int64_t cond_stride, uncond_stride;
  int type, ramp;
  float scale, gain;       // u + scale (c - u), or with ramp gain c - scale u
  float divisor, inverse;  // then logits are divided by one, or multiplied by the other where it is not 0, as torch does it on the device
};

struct Filters {
  bool greedy;
  int64_t top_k;
  double top_p;
};

struct Law {
  float lse, threshold;
  int64_t last;
  ARSP_DEVICE bool keeps(float s, int64_t code) const { return s > threshold || (s == threshold && code <= last); }
  ARSP_DEVICE float log_p(float s, int64_t code) const { return keeps(s, code) ? s - lse : -kInfinity; }
};

// A row of logits, guided and divided by the temperature.
class Row {
 public:
  ARSP_DEVICE Row(const Logits& logits, int64_t r) : all(logits) {
    const int64_t size = logits.type == kFloat ? sizeof(float) : sizeof(Bf16);
    cond = {static_cast<const char*>(logits.cond) + r * logits.cond_stride * size, logits.type};
    const bool guided = logits.uncond != nullptr && (logits.guided == nullptr || logits.guided[r]);
    uncond = {guided ? static_cast<const char*>(logits.uncond) + r * logits.uncond_stride * size : nullptr, logits.type};
  }
  ARSP_DEVICE float operator[](int i) const { return copy != nullptr ? copy[i] : read(i); }

  // Copies the row to `to` (shared memory) where it is not null; returns its maximum, NaN where there is one.
  template <typename Shared>
  ARSP_DEVICE float stage(int V, float* to, Shared& shared) {
    float max = -kInfinity;
    for (int i = threadIdx.x; i < V; i += kThreads) {
      const float s = read(i);
      if (to != nullptr) to[i] = s;
      max = Max()(s, max);
    }
    copy = to;
    return block_reduce(max, Max(), shared.floats);
  }

 private:
  ARSP_DEVICE float read(int i) const {
    float x = cond[i];
    if (uncond.data != nullptr) {
      const float u = uncond[i];
      x = all.ramp ? __fsub_rn(__fmul_rn(all.gain, x), __fmul_rn(all.scale, u)) : __fadd_rn(u, __fmul_rn(all.scale, __fsub_rn(x, u)));
    }
    if (all.inverse != 0) x = __fmul_rn(x, all.inverse);
    else if (all.divisor != 1) x = __fdiv_rn(x, all.divisor);
    return __fadd_rn(x, 0.f);  // -0 becomes 0
  }
  const Logits& all;
  const float* copy = nullptr;
  Numbers cond, uncond;
};

// Orders floats as whole numbers.
ARSP_DEVICE uint32_t key_of(float x) {
  const uint32_t bits = __float_as_uint(x);
  return bits ^ (bits >> 31 ? 0xffffffffu : 0x80000000u);
}
ARSP_DEVICE float value_of(uint32_t key) { return __uint_as_float(key ^ (key >> 31 ? 0x80000000u : 0xffffffffu)); }

ARSP_DEVICE Mass mass_of(float x, float max) { return static_cast<Mass>(expf(x - max) * static_cast<float>(Mass(1) << kMassBits)); }

struct Shared {
  Mass mass[kBins];
  uint32_t count[kBins];
  Mass sums[kLanes];
  double doubles[kLanes];
  float floats[kLanes];
  int64_t codes[kLanes];
  uint32_t keys[kLanes];
  Mass prefix;
  int bin;
  int64_t last;
};

// ---- selection

// Where a selection ends: a value, the weight of all better ones, and the weight and number of those equal to it.
struct Cut {
  float value;
  Mass better, weight;
  uint32_t equal;
};

// The last bin that is not empty and whose better bins weigh at most `limit`; its prefix is left in shared.prefix. Bins weigh their
// count, or their mass with kByMass.
template <bool kByMass>
ARSP_DEVICE int find_bin(Shared& shared, Mass limit) {
  constexpr int kEach = kBins / kThreads;
  const int lane = threadIdx.x % kLanes, warp = threadIdx.x / kLanes, first = kEach * threadIdx.x;
  Mass weight[kEach], total = 0;
#pragma unroll
  for (int i = 0; i < kEach; ++i) total += weight[i] = kByMass ? shared.mass[first + i] : shared.count[first + i];
  Mass prefix = total;  // of this thread's bins and all before
#pragma unroll
  for (int distance = 1; distance < kLanes; distance *= 2) {
    const Mass before = __shfl_up_sync(kAllLanes, prefix, distance);
    if (lane >= distance) prefix += before;
  }
  if (lane == kLanes - 1) shared.sums[warp] = prefix;
  if (threadIdx.x == 0) shared.bin = -1;
  __syncthreads();
  for (int w = 0; w < warp; ++w) prefix += shared.sums[w];
  prefix -= total;
  int best = -1;
  Mass best_prefix = 0;
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    if (shared.count[first + i] != 0 && prefix <= limit) best = first + i, best_prefix = prefix;
    prefix += weight[i];
  }
  if (best >= 0) atomicMax(&shared.bin, best);
  __syncthreads();
  if (best == shared.bin) shared.prefix = best_prefix;
  __syncthreads();
  return shared.bin;
}

template <bool kByMass>
ARSP_DEVICE void clear(Shared& shared) {
  __syncthreads();
  for (int i = threadIdx.x; i < kBins; i += kThreads) {
    shared.count[i] = 0;
    if (kByMass) shared.mass[i] = 0;
  }
  __syncthreads();
}

template <bool kByMass>
ARSP_DEVICE void add(Shared& shared, int bin, float x, float max) {
  atomicAdd(&shared.count[bin], 1u);
  if (kByMass) {
    const Mass mass = mass_of(x, max);
    if (mass != 0) atomicAdd(&shared.mass[bin], mass);
  }
}

ARSP_DEVICE int distance_bin(float x, float max) { return static_cast<int>(fminf((max - x) * kBinsPerUnit, static_cast<float>(kBins - 1))); }

// The smallest of the values not below `threshold` whose betters together weigh at most `limit`.
template <bool kByMass>
ARSP_DEVICE Cut select(const Row& row, int V, float max, float threshold, Mass limit, Shared& shared) {
  clear<kByMass>(shared);
  for (int x = threadIdx.x; x < V; x += kThreads) {
    const float s = row[x];
    if (s >= threshold) add<kByMass>(shared, distance_bin(s, max), s, max);
  }
  __syncthreads();
  const int outer = find_bin<kByMass>(shared, limit);
  Mass better = shared.prefix;
  uint32_t high = 0, low = 0xffffffffu;
  const auto member = [&](float s) { return s >= threshold && distance_bin(s, max) == outer; };
  for (int x = threadIdx.x; x < V; x += kThreads) {
    const float s = row[x];
    if (member(s)) high = high > key_of(s) ? high : key_of(s), low = low < key_of(s) ? low : key_of(s);
  }
  high = block_reduce(high, [](uint32_t a, uint32_t b) { return a > b ? a : b; }, shared.keys);
  low = block_reduce(low, [](uint32_t a, uint32_t b) { return a < b ? a : b; }, shared.keys);
  for (;;) {
    int shift = 0;
    while ((high - low) >> shift >= kBins) ++shift;
    clear<kByMass>(shared);
    for (int x = threadIdx.x; x < V; x += kThreads) {
      const float s = row[x];
      const uint32_t key = key_of(s);
      if (key >= low && key <= high && member(s)) add<kByMass>(shared, static_cast<int>((high - key) >> shift), s, max);
    }
    __syncthreads();
    const int bin = find_bin<kByMass>(shared, limit - better);
    better += shared.prefix;
    high -= static_cast<uint32_t>(bin) << shift;
    const uint32_t least = high - ((1u << shift) - 1);
    low = least > low && least <= high ? least : low;
    if (shift == 0) {
      const float value = value_of(high);
      return {value, better, mass_of(value, max), shared.count[bin]};
    }
  }
}

// The id of the num-th code whose value is `value`.
ARSP_DEVICE int64_t find_equal(const Row& row, int V, float value, uint32_t num, Shared& shared) {
  const int lane = threadIdx.x % kLanes, warp = threadIdx.x / kLanes;
  uint32_t before = 0;
  for (int first = 0; first < V; first += kThreads) {
    const int x = first + threadIdx.x;
    const unsigned equal = __ballot_sync(kAllLanes, x < V && row[x] == value);
    if (lane == 0) shared.keys[warp] = __popc(equal);
    __syncthreads();
    uint32_t earlier = before, all = before;
    for (int w = 0; w < kThreads / kLanes; ++w) {
      if (w < warp) earlier += shared.keys[w];
      all += shared.keys[w];
    }
    earlier += __popc(equal & ((1u << lane) - 1));
    if (equal >> lane & 1 && earlier + 1 == num) shared.last = x;
    __syncthreads();
    if (all >= num) break;
    before = all;
  }
  return shared.last;
}

// What top-k and then top-p leave of a row.
ARSP_DEVICE Law filter(const Row& row, int V, float max, const Filters& filters, Shared& shared) {
  Law law{0, -kInfinity, V - 1};
  if (filters.top_k > 0 && filters.top_k < V) law.threshold = select<false>(row, V, max, -kInfinity, filters.top_k - 1, shared).value;
  Mass total = 0;
  for (int x = threadIdx.x; x < V; x += kThreads) {
    const float s = row[x];
    if (s >= law.threshold) total += mass_of(s, max);
  }
  total = block_reduce(total, Sum(), shared.sums);
  if (filters.top_p < 1) {
    const Mass limit = static_cast<Mass>(filters.top_p * static_cast<double>(total));
    const Cut cut = select<true>(row, V, max, law.threshold, limit, shared);
    const Mass room = cut.weight > 0 ? (limit - cut.better) / cut.weight + 1 : cut.equal;
    const uint32_t ties = room < cut.equal ? static_cast<uint32_t>(room) : cut.equal;
    law.threshold = cut.value;
    if (ties < cut.equal) law.last = find_equal(row, V, cut.value, ties, shared);  // the cut goes through equal values: the smaller ids stay
    total = cut.better + ties * cut.weight;
  }
  law.lse = static_cast<float>(max + (log(static_cast<double>(total)) - kMassBits * 0.69314718055994531));
  return law;
}

// ---- draws

// Words of the codes 4 block .. 4 block + 3: Philox4x32-10 as in arsp/rng.py.
ARSP_DEVICE uint4 philox(uint32_t block, uint32_t position, uint32_t id, uint32_t purpose, uint64_t seed) {
  uint32_t c0 = block, c1 = position, c2 = id, c3 = purpose;
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
#pragma unroll
  for (int round = 0; round < 10; ++round) {
    const uint32_t high0 = __umulhi(0xD2511F53u, c0), low0 = 0xD2511F53u * c0, high1 = __umulhi(0xCD9E8D57u, c2), low1 = 0xCD9E8D57u * c2;
    c0 = high1 ^ c1 ^ k0, c1 = low1, c2 = high0 ^ c3 ^ k1, c3 = low0;
    k0 += 0x9E3779B9u, k1 += 0xBB67AE85u;
  }
  return make_uint4(c0, c1, c2, c3);
}

ARSP_DEVICE float noise(uint32_t word) {
  const float u = (__uint2float_rn(word >> 9) + 0.5f) * 1.1920928955078125e-07f;
  return -logf(-logf(u));
}

struct Best {
  float value;
  int64_t code;
};

// argmax_x(score(x) + noise(x)) over the codes whose score is above -inf, the smallest on ties; -1 where there is none.
template <typename Score>
ARSP_DEVICE int64_t draw(const Score& score, int V, const Key& key, int64_t r, Shared& shared) {
  const uint32_t position = static_cast<uint32_t>(key.positions[r]), id = static_cast<uint32_t>(key.ids[r]);
  Best best{-kInfinity, -1};
  for (int block = threadIdx.x; 4 * block < V; block += kThreads) {
    float scores[4];
    bool any = false;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      scores[i] = 4 * block + i < V ? score(4 * block + i) : -kInfinity;
      any |= scores[i] > -kInfinity;
    }
    if (!any) continue;
    const uint4 philoxed = philox(block, position, id, key.purpose, key.seed);
    const uint32_t words[4] = {philoxed.x, philoxed.y, philoxed.z, philoxed.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (!(scores[i] > -kInfinity)) continue;
      const float value = scores[i] + noise(words[i]);
      if (value > best.value) best = {value, 4 * block + i};
    }
  }
  const int lane = threadIdx.x % kLanes, warp = threadIdx.x / kLanes;
  const auto better = [](const Best& a, const Best& b) {
    return a.value > b.value || (a.value == b.value && static_cast<uint64_t>(a.code) < static_cast<uint64_t>(b.code)) ? a : b;
  };
  const auto of_warp = [&](Best mine) {
#pragma unroll
    for (int distance = kLanes / 2; distance; distance /= 2) {
      const float value = __shfl_xor_sync(kAllLanes, mine.value, distance);
      const int64_t code = __shfl_xor_sync(kAllLanes, static_cast<long long>(mine.code), distance);
      mine = better(mine, {value, code});
    }
    return mine;
  };
  best = of_warp(best);
  __syncthreads();
  if (lane == 0) shared.floats[warp] = best.value, shared.codes[warp] = best.code;
  __syncthreads();
  return of_warp({shared.floats[lane], shared.codes[lane]}).code;
}

// ---- rows

__global__ void __launch_bounds__(kThreads) keyed_argmax(Logits log_w, int V, bool copied, Key key, int64_t* codes) {
  ARSP_DYNAMIC_SHARED(memory);
  Shared& shared = *reinterpret_cast<Shared*>(memory);
  const int64_t r = blockIdx.x;
  Row row(log_w, r);
  const float max = row.stage(V, copied ? reinterpret_cast<float*>(&shared + 1) : nullptr, shared);
  const bool finite = fabsf(max) < kInfinity;
  const int64_t code = finite ? draw([&](int x) { return row[x]; }, V, key, r, shared) : -1;
  if (threadIdx.x == 0) codes[r] = code;
}

struct Results {
  int64_t* codes;
  float *log_p, *lse, *threshold;
  int64_t* last;
};

__global__ void __launch_bounds__(kThreads)
    verify(Logits logits, int V, bool copied, const int64_t* drafts, Filters filters, Key key, Results to) {
  ARSP_DYNAMIC_SHARED(memory);
  Shared& shared = *reinterpret_cast<Shared*>(memory);
  const int64_t r = blockIdx.x, draft = drafts[r];
  Row row(logits, r);
  const float max = row.stage(V, copied ? reinterpret_cast<float*>(&shared + 1) : nullptr, shared);
  const float nan = __uint_as_float(0x7fc00000u);
  Law law{nan, nan, -1};
  int64_t code = -1;
  float log_p = draft < 0 ? 0.f : nan;
  if (fabsf(max) < kInfinity) {
    if (filters.greedy) {
      uint32_t first = 0xffffffffu;
      for (int x = threadIdx.x; x < V; x += kThreads)
        if (row[x] == max) first = first < static_cast<uint32_t>(x) ? first : x;
      code = block_reduce(first, [](uint32_t a, uint32_t b) { return a < b ? a : b; }, shared.keys);
      law = {max, max, code};
    } else {
      law = filter(row, V, max, filters, shared);
      code = draw([&](int x) { return law.log_p(row[x], x); }, V, key, r, shared);
    }
    if (draft >= 0 && draft < V) log_p = law.log_p(row[static_cast<int>(draft)], draft);
  }
  if (threadIdx.x == 0) {
    to.codes[r] = code, to.log_p[r] = log_p, to.lse[r] = law.lse, to.threshold[r] = law.threshold, to.last[r] = law.last;
  }
}

// ---- drafts

struct Codes {
  const int64_t* data;
  int64_t stride;
};
struct Floats {
  const float* data;
  int64_t stride;
};

// A warp is a row.
__global__ void __launch_bounds__(kLanes)
    accept_scan(Codes drafts, Codes drawn, Floats ratio, Floats uniform, const int64_t* known, int m, int64_t* counts) {
  const int64_t b = blockIdx.x;
  int count = m;
  for (int first = 0; first < m; first += kLanes) {
    const int i = first + threadIdx.x;
    bool stands = i >= m || i < known[b];
    if (!stands && ratio.data != nullptr) stands = uniform.data[b * uniform.stride + i] < ratio.data[b * ratio.stride + i];
    else if (!stands) stands = drafts.data[b * drafts.stride + i] == drawn.data[b * drawn.stride + i];
    const unsigned fallen = __ballot_sync(kAllLanes, !stands);
    if (fallen != 0) {
      count = first + __popc((fallen & (0u - fallen)) - 1);
      break;
    }
  }
  if (threadIdx.x == 0) counts[b] = count;
}

// Laws that verify found (class _Laws of arsp/kernels/cuda.py).
struct Laws {
  Logits logits;
  const float *lse, *threshold;
  const int64_t* last;
  int64_t num;
};

constexpr int64_t kUniform = -2, kPrior = -3;  // as in reference.py; others are rows of the recorded laws, or a certain draft

struct Drafts {
  const int64_t *sources, *codes;  // (R)
  const float* prior;              // (Y, V), or null
  const int64_t* places;           // (R) rows of it
  int64_t num_places;
  ARSP_DEVICE bool has_place(int64_t r) const { return prior != nullptr && places[r] >= 0 && places[r] < num_places; }
};

constexpr double kResidualFloor = 1e-12;

__global__ void __launch_bounds__(kThreads, 1) draw_residual(Laws target, const int64_t* rows, Laws recorded, Drafts drafts, int V, bool copied, Key key,
                                                          int64_t* codes) {
  ARSP_DYNAMIC_SHARED(memory);
  Shared& shared = *reinterpret_cast<Shared*>(memory);
  const int64_t r = blockIdx.x, at = rows[r], source = drafts.sources[r];
  const bool outside = at >= target.num || source >= recorded.num || (source == kPrior && !drafts.has_place(r));
  if (at < 0 || outside) {  // nothing was rejected here, or there is no such law
    if (threadIdx.x == 0) codes[r] = at < 0 ? 0 : -1;
    return;
  }
  const int64_t from = source >= 0 ? source : 0, draft = drafts.codes[r];
  const Row p_row(target.logits, at), q_row(recorded.logits, from);
  const Law p_law{target.lse[at], target.threshold[at], target.last[at]};
  Law q_law{0, kInfinity, -1};
  if (source >= 0) q_law = {recorded.lse[from], recorded.threshold[from], recorded.last[from]};
  const float* const prior = source == kPrior ? drafts.prior + drafts.places[r] * V : nullptr;
  const float uniform = static_cast<float>(1.0 / V);
  const auto p = [&](int x) { return expf(p_law.log_p(p_row[x], x)); };
  const auto rest = [&](int x) {
    float q = x == draft ? 1.f : 0.f;
    if (source >= 0) q = expf(q_law.log_p(q_row[x], x));
    else if (source == kUniform) q = uniform;
    else if (source == kPrior) q = prior[x];
    return fmaxf(__fsub_rn(p(x), q), 0.f);
  };
  float* const kept = copied ? reinterpret_cast<float*>(&shared + 1) : nullptr;
  double mass = 0;
  for (int x = threadIdx.x; x < V; x += kThreads) {
    const float w = rest(x);
    if (copied) kept[x] = w;
    mass += w;
  }
  const bool empty = block_reduce(mass, Sum(), shared.doubles) < kResidualFloor;
  const int64_t code = draw([&](int x) { return logf(empty ? p(x) : copied ? kept[x] : rest(x)); }, V, key, r, shared);
  if (threadIdx.x == 0) codes[r] = code;
}

size_t shared_bytes(int64_t V, bool copied) { return sizeof(Shared) + (copied ? V * sizeof(float) : 0); }

}  // namespace

ARSP_EXPORT int arsp_keyed_argmax(const float* log_w, int64_t stride, int64_t R, int64_t V, int64_t seed, const int64_t* ids, const int64_t* positions,
                                  int64_t purpose, int64_t* codes, cudaStream_t stream) {
  const bool copied = V <= kSharedCodes;
  const Logits logits{log_w, nullptr, nullptr, stride, 0, kFloat, 0, 1, 1, 1, 0};
  const Key key{static_cast<uint64_t>(seed), ids, positions, static_cast<uint32_t>(purpose)};
  return launch(keyed_argmax, dim3(static_cast<unsigned>(R)), kThreads, shared_bytes(V, copied), stream, logits, static_cast<int>(V), copied, key,
                codes);
}

ARSP_EXPORT int arsp_verify(const Logits* logits, int64_t R, int64_t V, const int64_t* drafts, int greedy, int64_t top_k, double top_p, int64_t seed,
                            const int64_t* ids, const int64_t* positions, int64_t purpose, int64_t* codes, float* log_p, float* lse,
                            float* threshold, int64_t* last, cudaStream_t stream) {
  const bool copied = V <= kSharedCodes;
  const Filters filters{greedy != 0, top_k, top_p};
  const Key key{static_cast<uint64_t>(seed), ids, positions, static_cast<uint32_t>(purpose)};
  return launch(verify, dim3(static_cast<unsigned>(R)), kThreads, shared_bytes(V, copied), stream, *logits, static_cast<int>(V), copied, drafts,
                filters, key, Results{codes, log_p, lse, threshold, last});
}

// ratio and uniform may be null.
ARSP_EXPORT int arsp_accept_scan(const int64_t* drafts, int64_t drafts_stride, const int64_t* drawn, int64_t drawn_stride, const float* ratio,
                                 int64_t ratio_stride, const float* uniform, int64_t uniform_stride, const int64_t* known, int64_t B, int64_t m,
                                 int64_t* counts, cudaStream_t stream) {
  return launch(accept_scan, dim3(static_cast<unsigned>(B)), kLanes, 0, stream, Codes{drafts, drafts_stride}, Codes{drawn, drawn_stride},
                Floats{ratio, ratio_stride}, Floats{uniform, uniform_stride}, known, static_cast<int>(m), counts);
}

// recorded, prior and places may be null.
ARSP_EXPORT int arsp_draw_residual(const Laws* target, const Laws* recorded, const int64_t* rows, const int64_t* sources, const int64_t* drafts,
                                   const float* prior, const int64_t* places, int64_t num_places, int64_t R, int64_t V, int64_t seed, const int64_t* ids,
                                   const int64_t* positions, int64_t purpose, int64_t* codes, cudaStream_t stream) {
  const bool copied = V <= kSharedCodes;
  const Key key{static_cast<uint64_t>(seed), ids, positions, static_cast<uint32_t>(purpose)};
  return launch(draw_residual, dim3(static_cast<unsigned>(R)), kThreads, shared_bytes(V, copied), stream, *target, rows,
                recorded == nullptr ? Laws{} : *recorded, Drafts{sources, drafts, prior, places, num_places}, static_cast<int>(V), copied, key, codes);
}
