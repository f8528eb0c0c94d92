// windowed_scale_attention in bfloat16 with heads of 64: attention of the queries of one scale to windows in the maps of this and
// earlier scales (reference.py has the definition).
//
// A warp owns a tile of 4 x 4 neighbouring queries of one row and head, the 16 rows of mma.m16n8k16. Their windows overlap, so the
// keys that any of them keeps are few; the warp lists them with the queries that keep each (whole-number arithmetic) and passes over the list
// 16 keys at a time with an online softmax. Keys and values are read where they lie, 16 bytes a lane, without shared memory:
// the product does not mind in which order dimensions are summed or outputs numbered. A lane (group g = lane / 4, place p = lane % 4)
//   reads dimensions 16 p .. 16 p + 15 of key g, of which instruction i takes 4 i .. 4 i + 3, from the queries likewise;
//   reads dimensions 8 g .. 8 g + 7 of values 2 p, 2 p + 1, 2 p + 8, 2 p + 9, of which instruction j takes the j-th as its column g;
//   and so ends with dimensions 16 p .. 16 p + 15 of queries g and g + 8.
#include "device.cuh"

namespace {

constexpr int kHead = 64, kSide = 4, kWarps = 4;
constexpr int kList = 256;  // keys listed at once
constexpr int kMaxScales = 24;
constexpr float kInfinity = __builtin_inff();

struct Maps {
  int side[kMaxScales];
  int scale;  // of the queries; maps 0 .. scale hold the keys
};

struct Strides {  // of rows, heads and keys, in elements
  int64_t row, head, key;
};

ARSP_DEVICE int floor_divide(int a, int b) { return a >= 0 ? a / b : -((b - 1 - a) / b); }

// The keys along one direction that queries first .. last of a map of `queries` keep in a map of `keys` with radius r. A query's centre
// times 2 `queries` is (2 i + 1) keys - queries.
struct Range {
  int low, high;
};
ARSP_DEVICE Range range_of(int first, int last, int queries, int keys, int r) {
  const int unit = 2 * queries;
  const int low = floor_divide((2 * first + 1) * keys - queries - unit * r + unit - 1, unit);
  const int high = floor_divide((2 * last + 1) * keys - queries + unit * r, unit);
  return {low > 0 ? low : 0, high < keys - 1 ? high : keys - 1};
}
// As bits, which of the queries first .. first + 3 keep key i.
ARSP_DEVICE unsigned keepers(int i, int first, int queries, int keys, int r) {
  unsigned kept = 0;
#pragma unroll
  for (int j = 0; j < kSide; ++j) {
    const int distance = 2 * queries * i - ((2 * (first + j) + 1) * keys - queries);
    if (first + j < queries && (distance < 0 ? -distance : distance) <= 2 * queries * r) kept |= 1u << j;
  }
  return kept;
}

template <int kSets>
struct Tile {
  const Bf16 *k, *v;  // of this row and head
  int64_t k_stride, v_stride, v_set;
  uint32_t q[2][8];
  float max[2], sum[2];
  float out[kSets][8][4];
};

// 16 bytes of row `key` from dimension `from` on.
ARSP_DEVICE uint4 read(const Bf16* rows, int64_t stride, uint32_t key, int from) {
  return __ldg(reinterpret_cast<const uint4*>(rows + key * stride + from));
}

// Attends to the listed keys, a multiple of 16.
template <int kSets>
ARSP_DEVICE void attend(Tile<kSets>& tile, const uint2* list, int num) {
  const int lane = threadIdx.x % kLanes, g = lane / 4, p = lane % 4;
  for (int first = 0; first < num; first += 16) {
    float score[2][4] = {};
    uint2 column[4];  // keys 2 p, 2 p + 1, 2 p + 8, 2 p + 9: index and keepers
#pragma unroll
    for (int i = 0; i < 4; ++i) column[i] = list[first + i / 2 * 8 + 2 * p + i % 2];
#pragma unroll
    for (int b = 0; b < 2; ++b) {
      const uint32_t key = list[first + 8 * b + g].x;
      const uint4 low = read(tile.k, tile.k_stride, key, 16 * p), high = read(tile.k, tile.k_stride, key, 16 * p + 8);
      const uint32_t words[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const uint32_t a[4] = {tile.q[0][2 * i], tile.q[1][2 * i], tile.q[0][2 * i + 1], tile.q[1][2 * i + 1]};
        mma_bf16(score[b], a, words[2 * i], words[2 * i + 1]);
      }
    }
#pragma unroll
    for (int h = 0; h < 2; ++h) {  // queries g and g + 8
      float most = tile.max[h];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float& s = score[i / 2][2 * h + i % 2];
        if (!(column[i].y >> (g + 8 * h) & 1)) s = -kInfinity;
        most = Max()(s, most);
      }
      most = Max()(most, __shfl_xor_sync(kAllLanes, most, 1));
      most = Max()(most, __shfl_xor_sync(kAllLanes, most, 2));
      const float base = most == -kInfinity ? 0.f : most, shrink = __expf(tile.max[h] - base);
      tile.max[h] = most;
      tile.sum[h] *= shrink;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float& s = score[i / 2][2 * h + i % 2];
        s = __expf(s - base);
        tile.sum[h] += s;
      }
#pragma unroll
      for (int set = 0; set < kSets; ++set) {
#pragma unroll
        for (int j = 0; j < 8; ++j) tile.out[set][j][2 * h] *= shrink, tile.out[set][j][2 * h + 1] *= shrink;
      }
    }
    const uint32_t weights[4] = {pack_bf16(score[0][0], score[0][1]), pack_bf16(score[0][2], score[0][3]),
                                 pack_bf16(score[1][0], score[1][1]), pack_bf16(score[1][2], score[1][3])};
#pragma unroll
    for (int set = 0; set < kSets; ++set) {
      uint4 value[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) value[i] = read(tile.v + set * tile.v_set, tile.v_stride, column[i].x, 8 * g);
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        const unsigned halves = j % 2 ? 0x7632 : 0x5410;
        const auto word = [&](const uint4& x) { return j / 2 == 0 ? x.x : j / 2 == 1 ? x.y : j / 2 == 2 ? x.z : x.w; };
        mma_bf16(tile.out[set][j], weights, __byte_perm(word(value[0]), word(value[1]), halves), __byte_perm(word(value[2]), word(value[3]), halves));
      }
    }
  }
}

// Fills the list up to a multiple of 16 with keys that nobody keeps, and empties it.
template <int kSets>
ARSP_DEVICE void flush(Tile<kSets>& tile, uint2* list, int& num) {
  if (num == 0) return;
  const int lane = threadIdx.x % kLanes, whole = (num + 15) / 16 * 16;
  __syncwarp();
  const uint32_t last = list[num - 1].x;
  __syncwarp();
  if (num + lane < whole) list[num + lane] = make_uint2(last, 0);
  __syncwarp();
  attend(tile, list, whole);
  __syncwarp();
  num = 0;
}

template <int kSets>
__global__ void __launch_bounds__(kWarps* kLanes) windowed(const Bf16* q, const Bf16* k, const Bf16* v, Bf16* out, Strides qs, Strides ks, Strides vs,
                                                           const int* windows, const __grid_constant__ Maps maps, int rows) {
  __shared__ uint2 lists[kWarps][kList];
  const int lane = threadIdx.x % kLanes, g = lane / 4, p = lane % 4;
  const int side = maps.side[maps.scale], across = (side + kSide - 1) / kSide;
  const int index = kWarps * blockIdx.x + threadIdx.x / kLanes, head = blockIdx.y, heads = gridDim.y;
  const int64_t row = blockIdx.z;
  if (index >= across * across) return;
  const int top = index / across * kSide, left = index % across * kSide;
  uint2* const list = lists[threadIdx.x / kLanes];

  Tile<kSets> tile{k + row * ks.row + head * ks.head, v + row * vs.row + head * vs.head, ks.key, vs.key, rows * vs.row, {}, {-kInfinity, -kInfinity}, {}, {}};
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int y = top + (g + 8 * h) / kSide, x = left + g % kSide;
    if (y >= side || x >= side) continue;
    const Bf16* from = q + row * qs.row + head * qs.head + (y * side + x) * qs.key;
    const uint4 low = read(from, 0, 0, 16 * p), high = read(from, 0, 0, 16 * p + 8);
    const uint32_t words[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
#pragma unroll
    for (int i = 0; i < 8; ++i) tile.q[h][i] = words[i];
  }

  int num = 0, offset = 0;
  const int bottom = min(top + kSide, side) - 1, right = min(left + kSide, side) - 1;
  for (int u = 0; u <= maps.scale; ++u) {
    const int keys = maps.side[u], r = windows[head * (maps.scale + 1) + u];
    if (r != 0) {
      const Range down = r < 0 ? Range{0, keys - 1} : range_of(top, bottom, side, keys, r);
      const Range along = r < 0 ? Range{0, keys - 1} : range_of(left, right, side, keys, r);
      const int width = along.high - along.low + 1, all = width * (down.high - down.low + 1);
      for (int first = 0; first < all; first += kLanes) {
        if (num > kList - kLanes) flush(tile, list, num);
        unsigned kept = 0;
        int y = 0, x = 0;
        if (first + lane < all) {
          y = down.low + (first + lane) / width, x = along.low + (first + lane) % width;
          const unsigned by_row = r < 0 ? 0xf : keepers(y, top, side, keys, r), by_column = r < 0 ? 0xf : keepers(x, left, side, keys, r);
#pragma unroll
          for (int j = 0; j < kSide; ++j)
            if (by_row >> j & 1) kept |= by_column << kSide * j;
        }
        const unsigned lanes = __ballot_sync(kAllLanes, kept != 0);
        if (kept != 0) list[num + __popc(lanes & ((1u << lane) - 1))] = make_uint2(offset + y * keys + x, kept);
        num += __popc(lanes);
      }
    }
    offset += keys * keys;
  }
  flush(tile, list, num);

#pragma unroll
  for (int h = 0; h < 2; ++h) {
    float sum = tile.sum[h];
    sum += __shfl_xor_sync(kAllLanes, sum, 1);
    sum += __shfl_xor_sync(kAllLanes, sum, 2);
    const float factor = __fdiv_rn(1.f, sum);  // a query that keeps no key: 0 times infinity
    const int y = top + (g + 8 * h) / kSide, x = left + g % kSide;
    if (y >= side || x >= side) continue;
#pragma unroll
    for (int set = 0; set < kSets; ++set) {
      const auto& o = tile.out[set];
      uint4* const to = reinterpret_cast<uint4*>(out + ((((set * rows + row) * heads + head) * side + y) * side + x) * kHead + 16 * p);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int c = 2 * h + half;
        to[half] = make_uint4(pack_bf16(o[0][c] * factor, o[1][c] * factor), pack_bf16(o[2][c] * factor, o[3][c] * factor),
                              pack_bf16(o[4][c] * factor, o[5][c] * factor), pack_bf16(o[6][c] * factor, o[7][c] * factor));
      }
    }
  }
}

}  // namespace

// Strides in elements: rows, heads, keys of q, k and v. sets: 1, or 2 with rows b and `rows` + b of v sharing a map.
ARSP_EXPORT int arsp_windowed_scale_attention(const void* q, const void* k, const void* v, void* out, int64_t q_row, int64_t q_head, int64_t q_key,
                                              int64_t k_row, int64_t k_head, int64_t k_key, int64_t v_row, int64_t v_head, int64_t v_key,
                                              const int* windows, const int* sides, int scale, int sets, int64_t rows, int64_t heads,
                                              cudaStream_t stream) {
  if (scale >= kMaxScales || (sets != 1 && sets != 2)) return cudaErrorInvalidValue;
  Maps maps{};
  for (int u = 0; u <= scale; ++u) maps.side[u] = sides[u];
  maps.scale = scale;
  const int across = (sides[scale] + kSide - 1) / kSide;
  const dim3 grid((across * across + kWarps - 1) / kWarps, static_cast<unsigned>(heads), static_cast<unsigned>(rows));
  const Strides qs{q_row, q_head, q_key}, ks{k_row, k_head, k_key}, vs{v_row, v_head, v_key};
  return launch(sets == 1 ? windowed<1> : windowed<2>, grid, kWarps * kLanes, 0, stream, static_cast<const Bf16*>(q), static_cast<const Bf16*>(k),
                static_cast<const Bf16*>(v), static_cast<Bf16*>(out), qs, ks, vs, windows, maps, static_cast<int>(rows));
}
