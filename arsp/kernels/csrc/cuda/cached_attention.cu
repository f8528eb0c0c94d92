// cached_attention in bfloat16: a pass of few queries over a cache whose rows hold different numbers of slots (reference.py has the
// definition). How many is read on the device, so one launch, and one CUDA graph, serves all lengths and reads what a row holds.
//
// A block is one row and head, up to 64 queries, and one of `parts` equal shares of the row's slots. A warp of it has a tile of 16 queries, the
// rows of mma.m16n8k16, and takes 16 slots a step with an online softmax; warps with the same tile take steps in turn. What the warps found
// is merged in shared memory, what the parts found by a second kernel, both in a fixed order. The new keys and values are read where the
// layer left them and the first part stores them, so no slot is both read and written.
//
// Keys and values are read where they lie, without shared memory: the product does not mind in which order dimensions are summed or outputs
// numbered. A lane (group g = lane / 4, place p = lane % 4)
//   reads pieces p, p + 4, .. of key g, a piece being 8 or 4 dimensions, of which an instruction takes 4, and from the queries likewise;
//   reads pieces g, g + 8, .. of values 2 p, 2 p + 1, 2 p + 8, 2 p + 9, of which each instruction takes one dimension as its column g;
//   and so ends with pieces 2 p, 2 p + 1, 2 p + 8, 2 p + 9, .. of queries g and g + 8.
#include <type_traits>

#include "device.cuh"

namespace {

constexpr int kTile = 16, kQueries = 64;  // of a warp, of a block
constexpr int kMergeThreads = 128;
constexpr float kInfinity = __builtin_inff();

struct Rows {  // of neighbouring dimensions, strides in elements
  const Bf16* data;
  int64_t row, head, step;
};

struct Task {
  Rows q, k, v, k_cache, v_cache;
  Bf16* out;            // (rows, queries, heads, width)
  float *values, *most;  // of more than one part: (rows, heads, parts, queries, width), and (.., 2) with maximum and sum of the weights
  const int64_t* starts;  // of each row, or null: all begin at `start`
  int64_t starts_step, start;
  float scale;
  int heads, queries, width, capacity, parts;
};

// What some slots give a query: the largest score, and sums of e^(score - max) without and with four dimensions of the values.
struct Found {
  float max, sum, value[4];
};

// Brings `num` findings together that lie `step` queries apart.
ARSP_DEVICE Found merge(const float* stats, const float* values, int64_t step, int width, int num) {
  Found all{-kInfinity, 0.f, {}};
  for (int i = 0; i < num; ++i) all.max = Max()(stats[2 * i * step], all.max);
  const float base = all.max == -kInfinity ? 0.f : all.max;
  for (int i = 0; i < num; ++i) {
    const float share = __expf(stats[2 * i * step] - base);
    const float4 value = *reinterpret_cast<const float4*>(values + i * step * width);
    all.sum += share * stats[2 * i * step + 1];
    all.value[0] += share * value.x, all.value[1] += share * value.y, all.value[2] += share * value.z, all.value[3] += share * value.w;
  }
  return all;
}

ARSP_DEVICE void finish(const Task& task, const Found& found, int64_t row, int head, int query, int d) {
  const float factor = __fdiv_rn(1.f, found.sum);  // a row whose slots are not in the cache: 0 times infinity
  *reinterpret_cast<uint2*>(task.out + ((row * task.queries + query) * task.heads + head) * task.width + d) =
      make_uint2(pack_bf16(found.value[0] * factor, found.value[1] * factor), pack_bf16(found.value[2] * factor, found.value[3] * factor));
}

template <int kPiece>
struct Piece {
  uint32_t words[kPiece / 2];
};

// Zeros where there is nothing to read.
template <int kPiece>
ARSP_DEVICE Piece<kPiece> read(const Bf16* from, bool valid) {
  if (!valid) return {};
  if constexpr (kPiece == 8) {
    const uint4 x = __ldg(reinterpret_cast<const uint4*>(from));
    return {x.x, x.y, x.z, x.w};
  } else {
    const uint2 x = __ldg(reinterpret_cast<const uint2*>(from));
    return {x.x, x.y};
  }
}

template <int kPiece>
ARSP_DEVICE void copy(Bf16* to, const Bf16* from) {
  using Word = std::conditional_t<kPiece == 8, uint4, uint2>;
  *reinterpret_cast<Word*>(to) = *reinterpret_cast<const Word*>(from);
}

// Heads of up to kMost dimensions, read kPiece at a time.
template <int kPiece, int kMost>
__global__ void __launch_bounds__(kMost == 64 ? 512 : 256) attend(const __grid_constant__ Task task) {
  ARSP_DYNAMIC_SHARED(shared);
  constexpr int kKeyReads = kMost / (4 * kPiece), kValueReads = kMost / (8 * kPiece);
  const int lane = threadIdx.x % kLanes, g = lane / 4, p = lane % 4, warp = threadIdx.x / kLanes, warps = blockDim.x / kLanes;
  const int part = blockIdx.x % task.parts, first = blockIdx.x / task.parts * kQueries, head = blockIdx.y;
  const int64_t row = blockIdx.z;
  const int queries = min(kQueries, task.queries - first), tiles = (queries + kTile - 1) / kTile, turns = warps / tiles;
  const int64_t given = task.starts == nullptr ? task.start : task.starts[row * task.starts_step];
  const bool fits = given >= 0 && given + task.queries <= task.capacity;
  const int start = fits ? static_cast<int>(given) : 0, length = fits ? start + task.queries : 0;

  const auto row_of = [&](const Rows& rows) { return rows.data + row * rows.row + head * rows.head; };
  const Bf16 *const q = row_of(task.q), *const k = row_of(task.k), *const v = row_of(task.v);
  const Bf16 *const k_cache = row_of(task.k_cache), *const v_cache = row_of(task.v_cache);
  if (fits && blockIdx.x == 0) {
    const int pieces = task.width / kPiece;
    for (int i = threadIdx.x; i < task.queries * pieces; i += blockDim.x) {
      const int d = i % pieces * kPiece;
      const int64_t from = i / pieces, to = start + from;
      copy<kPiece>(const_cast<Bf16*>(k_cache) + to * task.k_cache.step + d, k + from * task.k.step + d);
      copy<kPiece>(const_cast<Bf16*>(v_cache) + to * task.v_cache.step + d, v + from * task.v.step + d);
    }
  }

  const int own = first + warp % tiles * kTile;  // the first query of the tile
  const int last = start + min(own + kTile, task.queries) - 1, steps = (length + kTile - 1) / kTile;
  const int end = warp < tiles * turns ? min(steps * (part + 1) / task.parts, last / kTile + 1) : 0;
  Piece<kPiece> query[2][kKeyReads], keys[2][kKeyReads];
  float most[2] = {-kInfinity, -kInfinity}, sum[2] = {}, out[kValueReads * kPiece][4] = {};
#pragma unroll
  for (int h = 0; h < 2; ++h)
#pragma unroll
    for (int j = 0; j < kKeyReads; ++j) {
      const int i = own + g + 8 * h, d = (4 * j + p) * kPiece;
      query[h][j] = read<kPiece>(q + i * task.q.step + d, i < task.queries && d < task.width);
    }
  const auto read_keys = [&](int step) {
#pragma unroll
    for (int b = 0; b < 2; ++b) {
      const int slot = step * kTile + 8 * b + g;
      const Bf16* const from = slot < start ? k_cache + slot * task.k_cache.step : k + (slot - start) * task.k.step;
#pragma unroll
      for (int j = 0; j < kKeyReads; ++j) {
        const int d = (4 * j + p) * kPiece;
        keys[b][j] = read<kPiece>(from + d, slot < length && d < task.width);
      }
    }
  };

  int step = steps * part / task.parts + warp / tiles;
  if (step < end) read_keys(step);
  for (; step < end; step += turns) {
    Piece<kPiece> value[4][kValueReads];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int slot = step * kTile + i / 2 * 8 + 2 * p + i % 2;
      const Bf16* const from = slot < start ? v_cache + slot * task.v_cache.step : v + (slot - start) * task.v.step;
#pragma unroll
      for (int j = 0; j < kValueReads; ++j) {
        const int d = (8 * j + g) * kPiece;
        value[i][j] = read<kPiece>(from + d, slot < length && d < task.width);
      }
    }
    float score[2][4] = {};
#pragma unroll
    for (int b = 0; b < 2; ++b)
#pragma unroll
      for (int j = 0; j < kKeyReads; ++j)
#pragma unroll
        for (int w = 0; w < kPiece / 2; w += 2) {
          const uint32_t a[4] = {query[0][j].words[w], query[1][j].words[w], query[0][j].words[w + 1], query[1][j].words[w + 1]};
          mma_bf16(score[b], a, keys[b][j].words[w], keys[b][j].words[w + 1]);
        }
    if (step + turns < end) read_keys(step + turns);
#pragma unroll
    for (int h = 0; h < 2; ++h) {  // queries g and g + 8
      const int seen = start + own + g + 8 * h;
      float larger = most[h];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float& s = score[i / 2][2 * h + i % 2];
        const int slot = step * kTile + i / 2 * 8 + 2 * p + i % 2;
        s = slot <= seen && slot < length ? s * task.scale : -kInfinity;
        larger = Max()(s, larger);
      }
      larger = Max()(larger, __shfl_xor_sync(kAllLanes, larger, 1));
      larger = Max()(larger, __shfl_xor_sync(kAllLanes, larger, 2));
      const float base = larger == -kInfinity ? 0.f : larger, shrink = __expf(most[h] - base);
      most[h] = larger;
      sum[h] *= shrink;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float& s = score[i / 2][2 * h + i % 2];
        s = __expf(s - base);
        sum[h] += s;
      }
#pragma unroll
      for (int j = 0; j < kValueReads * kPiece; ++j) out[j][2 * h] *= shrink, out[j][2 * h + 1] *= shrink;
    }
    const uint32_t weights[4] = {pack_bf16(score[0][0], score[0][1]), pack_bf16(score[0][2], score[0][3]),
                                 pack_bf16(score[1][0], score[1][1]), pack_bf16(score[1][2], score[1][3])};
#pragma unroll
    for (int j = 0; j < kValueReads; ++j)
#pragma unroll
      for (int e = 0; e < kPiece; ++e) {
        const unsigned halves = e % 2 ? 0x7632 : 0x5410;
        mma_bf16(out[j * kPiece + e], weights, __byte_perm(value[0][j].words[e / 2], value[1][j].words[e / 2], halves),
                 __byte_perm(value[2][j].words[e / 2], value[3][j].words[e / 2], halves));
      }
  }

  // By warp and query of its tile: maximum and sum, then the values.
  const int each = min(kTile, task.queries);
  float* const stats = reinterpret_cast<float*>(shared);
  float* const values = stats + (2 * warps * each + 3) / 4 * 4;
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    sum[h] += __shfl_xor_sync(kAllLanes, sum[h], 1);
    sum[h] += __shfl_xor_sync(kAllLanes, sum[h], 2);
    const int i = g + 8 * h;
    if (i >= each || warp >= tiles * turns) continue;
    if (p == 0) stats[2 * (warp * each + i)] = most[h], stats[2 * (warp * each + i) + 1] = sum[h];
#pragma unroll
    for (int j = 0; j < kValueReads; ++j)
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        const int d = (8 * j + 2 * p + c) * kPiece;
        if (d >= task.width) continue;
#pragma unroll
        for (int e = 0; e < kPiece; e += 4)
          *reinterpret_cast<float4*>(values + (warp * each + i) * task.width + d + e) =
              float4{out[j * kPiece + e][2 * h + c], out[j * kPiece + e + 1][2 * h + c], out[j * kPiece + e + 2][2 * h + c],
                     out[j * kPiece + e + 3][2 * h + c]};
      }
  }
  __syncthreads();
  const int quads = task.width / 4;
  for (int i = threadIdx.x; i < queries * quads; i += blockDim.x) {
    const int query = i / quads, d = i % quads * 4, at = query / kTile * each + query % kTile;
    const Found found = merge(stats + 2 * at, values + at * task.width + d, tiles * each, task.width, turns);
    if (task.parts == 1) {
      finish(task, found, row, head, first + query, d);
      continue;
    }
    const int64_t to = ((row * task.heads + head) * task.parts + part) * task.queries + first + query;
    if (d == 0) task.most[2 * to] = found.max, task.most[2 * to + 1] = found.sum;
    *reinterpret_cast<float4*>(task.values + to * task.width + d) =
        float4{found.value[0], found.value[1], found.value[2], found.value[3]};
  }
}

__global__ void __launch_bounds__(kMergeThreads) merge_parts(const __grid_constant__ Task task) {
  const int quads = task.width / 4, i = blockIdx.x * kMergeThreads + threadIdx.x, head = blockIdx.y;
  const int64_t row = blockIdx.z;
  if (i >= task.queries * quads) return;
  const int query = i / quads, d = i % quads * 4;
  const int64_t at = (row * task.heads + head) * task.parts * task.queries + query;
  finish(task, merge(task.most + 2 * at, task.values + at * task.width + d, task.queries, task.width, task.parts), row, head, query, d);
}

}  // namespace

// Strides in elements: rows, heads and slots of q, k, v and the caches; `starts` or null. piece: dimensions read at once, 8 or 4, which divides
// `width` and all strides. values, most: scratch of more than one part.
ARSP_EXPORT int arsp_cached_attention(const void* q, const void* k, const void* v, void* k_cache, void* v_cache, void* out, void* values, void* most,
                                      int64_t q_row, int64_t q_head, int64_t q_step, int64_t k_row, int64_t k_head, int64_t k_step, int64_t v_row,
                                      int64_t v_head, int64_t v_step, int64_t k_cache_row, int64_t k_cache_head, int64_t k_cache_step,
                                      int64_t v_cache_row, int64_t v_cache_head, int64_t v_cache_step, const int64_t* starts, int64_t starts_step,
                                      int64_t start, float scale, int64_t rows, int heads, int queries, int width, int capacity, int parts,
                                      int warps, int piece, cudaStream_t stream) {
  const int most_width = width <= 64 ? 64 : 128, most_warps = width <= 64 ? 16 : 8;
  if (width > most_width || (piece != 4 && piece != 8) || width % piece || warps < kQueries / kTile || warps > most_warps || parts < 1)
    return cudaErrorInvalidValue;
  const auto bf16 = [](const void* data) { return static_cast<const Bf16*>(data); };
  const Task task{{bf16(q), q_row, q_head, q_step},
                  {bf16(k), k_row, k_head, k_step},
                  {bf16(v), v_row, v_head, v_step},
                  {bf16(k_cache), k_cache_row, k_cache_head, k_cache_step},
                  {bf16(v_cache), v_cache_row, v_cache_head, v_cache_step},
                  static_cast<Bf16*>(out),
                  static_cast<float*>(values),
                  static_cast<float*>(most),
                  starts,
                  starts_step,
                  start,
                  scale,
                  heads,
                  queries,
                  width,
                  capacity,
                  parts};
  const auto kernel = width <= 64 ? piece == 8 ? attend<8, 64> : attend<4, 64> : piece == 8 ? attend<8, 128> : attend<4, 128>;
  const int each = queries < kTile ? queries : kTile, groups = (queries + kQueries - 1) / kQueries;
  const size_t shared = sizeof(float) * ((2 * warps * each + 3) / 4 * 4 + static_cast<size_t>(warps) * each * width);
  const dim3 by_head(1, static_cast<unsigned>(heads), static_cast<unsigned>(rows));
  const int refused = launch(kernel, dim3(groups * parts, by_head.y, by_head.z), warps * kLanes, shared, stream, task);
  if (refused || parts == 1) return refused;
  const int blocks = (queries * width / 4 + kMergeThreads - 1) / kMergeThreads;
  return launch(merge_parts, dim3(blocks, by_head.y, by_head.z), kMergeThreads, 0, stream, task);
}
