// w4a8_linear, w8a8_linear and their gated products for many rows of x with wgmma (sm_90a; elsewhere this is never launched).
//
// Weights are the operand in registers, 64 rows for 4 warps, x the operand in shared memory, 128 rows of it for all 8 warps of a block. A
// warp has 16 of the 32 rows of a pair (quantised_linear.cuh): fragment rows g and g + 8 are rows 2 g and 2 g + 1 of a tile, or,
// gated, the same row of both weights, so that what belongs together ends in one thread. x lies as it is, so columns are not
// renumbered: lane place p needs bytes 4 p .. and 16 + 4 p .. of 32, which with 4 bits are one half of the nibbles of two pieces.
// Zero points are taken off in registers, (code + 128 - zero) ^ 128 in every byte, exact for zero points up to 128.
//
// Sums of a group are exact, and groups are added in their order: results equal the reference to the bit.
#include "quantised_linear.cuh"

namespace {

template <bool k4, bool kWhole, int kSteps, bool kGated>
struct Wgmma {
  static constexpr int kStages = 4, kColumns = 128, kRowsX = 128, kPairs = 4, kThreads = 256;
  static constexpr int kPieces = kColumns / (k4 ? 8 : 4);  // of a stage
  static constexpr int kXBytes = kRowsX * kColumns, kStageBytes = kXBytes + 2 * kPairs * kPieces * kPieceBytes;
  static constexpr int kAtom = 1024;  // of the swizzle, whose pattern is that of addresses
  static constexpr size_t kShared = static_cast<size_t>(kStages) * kStageBytes + kAtom;
  static_assert(kStageBytes % kAtom == 0, "every stage begins with an atom");

  static ARSP_DEVICE int x_at(int row, int chunk) { return row * kColumns + (chunk ^ row % 8) * 16; }
  static ARSP_DEVICE int weight_at(int tile, int piece, int quad) {  // halves of every other two pieces change places: banks
    return kXBytes + (tile * kPieces + piece) * kPieceBytes + (quad ^ (piece >> 1 & 1) * 2) * 16;
  }

  static ARSP_DEVICE void fetch(const Linear& l, int block_pair, int first_m, int iteration, unsigned char* stage) {
    for (int i = threadIdx.x; i < kRowsX * 8; i += kThreads) {
      const int chunk = i % 8, row = i / 8, k = iteration * kColumns + chunk * 16;
      const bool valid = first_m + row < l.M && k < l.width;
      copy_async(stage + x_at(row, chunk), l.x + (valid ? static_cast<int64_t>(first_m + row) * l.width + k : 0), valid);
    }
    for (int i = threadIdx.x; i < 2 * kPairs * kPieces * 4; i += kThreads) {
      const int quad = i % 4, piece = i / 4 % kPieces, tile = i / 4 / kPieces, from = iteration * kPieces + piece;
      const int row = tile % 2 * kTile, source = row_of(l, block_pair + tile / 2, row) / kTile;
      const bool valid = source < l.tiles && from < l.pieces;
      const int64_t at = valid ? (static_cast<int64_t>(source) * l.pieces + from) * kPieceBytes + quad * 16 : 0;
      copy_async(stage + weight_at(tile, piece, quad), weight_of(l, row).codes + at, valid);  // not valid: x is 0 or the row is not stored
    }
  }

  struct Rows {
    float scale[2];
    uint32_t zero[2];  // in every byte
  };

  // Of fragment rows g and g + 8, in rows n of the weights.
  static ARSP_DEVICE Rows load_scales(const Linear& l, const int (&n)[2], int group) {
    Rows rows;
#pragma unroll
    for (int s = 0; s < 2; ++s) {
      const Weight weight = kGated && s == 1 ? l.up : l.weight;
      const bool valid = n[s] < l.N && group < l.groups;
      rows.scale[s] = valid ? __ldg(weight.scales + n[s] * l.scale_row + group * l.scale_group) : 0.f;
      rows.zero[s] = k4 && valid ? __ldg(weight.zeros + n[s] * l.zero_row + group * l.zero_group) * 0x01010101u : 0;
    }
    return rows;
  }

  // Four codes of both fragment rows from a piece of a stage.
  static ARSP_DEVICE void load_words(const unsigned char* stage, int pair, int half, int g, int piece, uint32_t (&words)[2]) {
    if constexpr (kGated) {
      const int row = 8 * half + g;
#pragma unroll
      for (int s = 0; s < 2; ++s)
        words[s] = *reinterpret_cast<const uint32_t*>(stage + weight_at(2 * pair + s, piece, row / 4) + row % 4 * 4);
    } else {
      const uint2 both = *reinterpret_cast<const uint2*>(stage + weight_at(2 * pair + half, piece, g / 2) + g % 2 * 8);
      words[0] = both.x, words[1] = both.y;
    }
  }

  static ARSP_DEVICE uint32_t signed_codes(uint32_t word, int shift, uint32_t zero) {
    if constexpr (k4) return ((word >> shift & 0x0f0f0f0fu | 0x80808080u) - zero) ^ 0x80808080u;
    return word ^ 0x80808080u;
  }

  // total += float(sums) scale.
  static ARSP_DEVICE void add_group(const Rows& rows, const int (&sums)[64], float (&total)[64]) {
#pragma unroll
    for (int i = 0; i < 64; ++i) total[i] = __fadd_rn(total[i], __fmul_rn(__int2float_rn(sums[i]), rows.scale[i / 2 % 2]));
  }

  static ARSP_DEVICE void run(const Linear& l, unsigned char* memory) {
    memory += -shared_address(memory) & (kAtom - 1);
    const int warp = threadIdx.x / kLanes, lane = threadIdx.x % kLanes, g = lane / 4, p = lane % 4;
    const int pair = warp / 2, half = warp % 2, block_pair = kPairs * blockIdx.x, first_m = kRowsX * blockIdx.y;
    const int n[2] = {row_of(l, block_pair + pair, kGated ? 8 * half + g : kTile * half + 2 * g),
                      row_of(l, block_pair + pair, kGated ? kTile + 8 * half + g : kTile * half + 2 * g + 1)};
    const int shift = p % 2 * 4, steps = l.groups * kSteps, iterations = (l.pieces + kPieces - 1) / kPieces;
    int sums[64] = {};
    float total[64] = {};
    Rows rows = load_scales(l, n, 0), next = rows;
#pragma unroll
    for (int i = 0; i < kStages - 1; ++i) {
      if (i < iterations) fetch(l, block_pair, first_m, i, memory + i * kStageBytes);
      copy_commit();
    }
    for (int iteration = 0; iteration < iterations; ++iteration) {
      copy_wait<kStages - 2>();
      fence_async();
      __syncthreads();
      const int ahead = iteration + kStages - 1;
      if (ahead < iterations) fetch(l, block_pair, first_m, ahead, memory + ahead % kStages * kStageBytes);
      copy_commit();
      const unsigned char* const stage = memory + iteration % kStages * kStageBytes;
      const uint32_t x = shared_address(stage);
#pragma unroll
      for (int s = 0; s < kColumns / 32; ++s) {
        const int step = kColumns / 32 * iteration + s;
        if (!kWhole && s % kSteps == 0 && step >= steps) break;
        if (!kWhole && s % kSteps == 0) rows = next, next = load_scales(l, n, step / kSteps + 1);
        uint32_t first[2], second[2], a[4];
        load_words(stage, pair, half, g, k4 ? 4 * s + p / 2 : 8 * s + p, first);
        load_words(stage, pair, half, g, k4 ? 4 * s + 2 + p / 2 : 8 * s + 4 + p, second);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          a[i] = signed_codes(first[i], shift, rows.zero[i]);
          a[2 + i] = signed_codes(second[i], shift, rows.zero[i]);
        }
        wgmma_fence();
        wgmma_s8(sums, a, columns_at(x + 32 * s), kWhole ? step > 0 : s % kSteps > 0);
        wgmma_commit();
        if (!kWhole && s % kSteps == kSteps - 1) {
          wgmma_wait(sums);
          add_group(rows, sums, total);
        }
      }
      if (kWhole) wgmma_wait(sums);  // the stage is filled again after the next barrier
    }
    if (kWhole) add_group(rows, sums, total);
#pragma unroll
    for (int c = 0; c < kRowsX / 8; ++c) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int m = first_m + 8 * c + 2 * p + h;
        if (m >= l.M || n[0] >= l.N) continue;
        const float y = finish(l, total[4 * c + h], m, n[0]);
        if constexpr (kGated) {
          store(l, swiglu(y, finish(l, total[4 * c + 2 + h], m, n[1])), m, n[0]);
        } else if (n[1] < l.N) {
          store_two(l, y, finish(l, total[4 * c + 2 + h], m, n[1]), m, n[0]);
        } else {
          store(l, y, m, n[0]);
        }
      }
    }
  }

  // Two neighbouring outputs, at once where they lie so.
  static ARSP_DEVICE void store_two(const Linear& l, float first, float second, int m, int n) {
    if (l.N % 2) return store(l, first, m, n), store(l, second, m, n + 1);
    const int64_t at = static_cast<int64_t>(m) * l.N + n;
    if (l.y_type == kFloat) {
      *reinterpret_cast<uint2*>(static_cast<float*>(l.y) + at) = make_uint2(__float_as_uint(first), __float_as_uint(second));
    } else {
      *reinterpret_cast<uint32_t*>(static_cast<Bf16*>(l.y) + at) = pack_bf16(first, second);
    }
  }
};

template <bool k4, bool kWhole, int kSteps, bool kGated>
__global__ void __launch_bounds__(256, 1) wgmma(Linear l) {
#ifdef ARSP_WGMMA
  ARSP_DYNAMIC_SHARED(memory);
  Wgmma<k4, kWhole, kSteps, kGated>::run(l, memory);
#else
  __trap();
#endif
}

template <bool k4, bool kWhole, int kSteps, bool kGated>
int start(const Linear& l, cudaStream_t stream) {
  using W = Wgmma<k4, kWhole, kSteps, kGated>;
  const dim3 grid((pairs_of(l) + W::kPairs - 1) / W::kPairs, (l.M + W::kRowsX - 1) / W::kRowsX);
  return launch(wgmma<k4, kWhole, kSteps, kGated>, grid, W::kThreads, W::kShared, stream, l);
}

template <bool kGated>
int choose(const Linear& l, Format format, cudaStream_t stream) {
  switch (format) {
    case kGroups32: return start<true, false, 1, kGated>(l, stream);
    case kGroups64: return start<true, false, 2, kGated>(l, stream);
    case kGroups128: return start<true, false, 4, kGated>(l, stream);
    case kRows4: return start<true, true, 4, kGated>(l, stream);
    default: return start<false, true, 4, kGated>(l, stream);
  }
}

}  // namespace

int run_wgmma(const Linear& l, Format format, cudaStream_t stream) {
  return l.up.codes == nullptr ? choose<false>(l, format, stream) : choose<true>(l, format, stream);
}
