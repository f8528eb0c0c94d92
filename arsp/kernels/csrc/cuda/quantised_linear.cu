// w4a8_linear and w8a8_linear: 8-bit rows times weights of 4 or 8 bits on the integer tensor cores (mma.m16n8k32, sm_80 and later).
//
// Weights lie as the CPU kernels read them (layouts.py): tiles of 16 rows, each a stream of 64-byte pieces with 4 bytes a row. That
// is a fragment order, too. A lane (group g = lane / 4, place p = lane % 4) takes 16 bytes of a piece, 4 neighbouring rows; two tiles
// together are a pair of 32 rows, where lane group g owns rows 4 g .. 4 g + 3. The product does not mind in which order columns
// are summed or rows are numbered, as long as both operands agree:
//   4 bits: piece 4 s + p holds columns 32 s + 8 p ..: low nibbles are k 4 p .. 4 p + 3 of the instruction, high nibbles k 16 + 4 p ..
//   8 bits: pieces 8 s + p and 8 s + 4 + p hold columns 32 s + 4 p .. and 32 s + 16 + 4 p ..
//   rows: instruction j (0, 1) takes row 4 g + 2 j as its row g and 4 g + 2 j + 1 as its row g + 8.
// In a SwiGLU layer the two tiles of a pair are the same tile of two weights: lanes 0 .. 15 have the rows of the gate, lanes 16 .. 31 the
// same rows of the other weight, and a shuffle brings them together.
// So weights are on the side of 16 and the rows of x on the side of 8: one row of x wastes 7 columns, not 15.
//
// Sums over a group of columns are whole numbers and exact; outside, every operation is rounded as in reference.py and groups are
// added in their order, so results equal the reference to the bit. Where several warps share the columns of an output (`decode`), every warp
// hands over its groups one by one and they are added in order.
#include "quantised_linear.cuh"

namespace {

constexpr int kWarps = 8;  // of `decode`

// 16 bytes of weights of a step: one piece of 4-bit codes, two of 8-bit codes.
template <bool k4>
struct Words {
  uint4 at[k4 ? 1 : 2];
};

// The operand of instruction j.
template <bool k4>
ARSP_DEVICE void operand(const Words<k4>& w, int j, uint32_t (&a)[4]) {
  const uint32_t first = j == 0 ? w.at[0].x : w.at[0].z, second = j == 0 ? w.at[0].y : w.at[0].w;
  if constexpr (k4) {
    a[0] = first & 0x0f0f0f0fu, a[1] = second & 0x0f0f0f0fu;
    a[2] = first >> 4 & 0x0f0f0f0fu, a[3] = second >> 4 & 0x0f0f0f0fu;
  } else {
    const uint32_t third = j == 0 ? w.at[1].x : w.at[1].z, fourth = j == 0 ? w.at[1].y : w.at[1].w;
    a[0] = first ^ 0x80808080u, a[1] = second ^ 0x80808080u;
    a[2] = third ^ 0x80808080u, a[3] = fourth ^ 0x80808080u;
  }
}

// The sum of the columns of x in every row of the result.
ARSP_DEVICE void add_columns(int (&sums)[4], uint2 x) {
  const uint32_t ones[4] = {0x01010101u, 0x01010101u, 0x01010101u, 0x01010101u};
  mma_s8(sums, ones, x.x, x.y);
}

// ---- few rows of x: bound by reading the weights

// A block owns kPairs pairs of tiles (32 rows of weights each) and all rows of x, at most 8 kCols. Its warps take units of kSteps steps
// (32 columns each) in turn, a unit being a group, and have kAhead of them in flight. With kWhole (one group a row) sums stay
// whole numbers until the end.
template <bool k4, bool kWhole, int kSteps, int kCols, int kPairs>
struct Decode {
  // what registers allow
  static constexpr int kAhead = kCols * kPairs >= 4 ? 1 : kSteps * (k4 ? 1 : 2) >= 4 ? 2 : kSteps + kCols > 2 ? 3 : 4;
  static constexpr int kRows = 32 * kPairs, kPitch = kRows + 4;  // of a column of results in shared memory; + 4: banks
  static constexpr int kSlot = 8 * kCols * kPitch;               // results of a warp
  static constexpr size_t kShared = (kWhole ? 1 : 2) * kWarps * kSlot * sizeof(float);
  static constexpr int kOutputs = kCols * kPairs;  // of a thread

  struct Unit {
    Words<k4> w[kSteps][kPairs];
    uint2 x[kSteps][kCols];
    RowGroup rows[kPairs];
  };

  static ARSP_DEVICE void load(const Linear& l, int first_pair, int unit, Unit& u) {
    const int lane = threadIdx.x % kLanes, g = lane / 4, p = lane % 4;
#pragma unroll
    for (int s = 0; s < kSteps; ++s) {
      const int step = unit * kSteps + s;
#pragma unroll
      for (int r = 0; r < kPairs; ++r) {
        const int tile = row_of(l, first_pair + r, 4 * g) / kTile;
        const uint8_t* const codes = weight_of(l, 4 * g).codes;
#pragma unroll
        for (int h = 0; h < (k4 ? 1 : 2); ++h) {
          const int piece = k4 ? 4 * step + p : 8 * step + 4 * h + p;
          const int64_t at = (static_cast<int64_t>(tile) * l.pieces + piece) * kPieceBytes + g % 4 * 16;
          u.w[s][r].at[h] = tile < l.tiles && piece < l.pieces ? load_once(codes + at) : nothing();
        }
      }
#pragma unroll
      for (int c = 0; c < kCols; ++c) {
        const int m = 8 * c + g;
        const int8_t* row = l.x + static_cast<int64_t>(m) * l.width;
        u.x[s][c] = make_uint2(0, 0);
        if (m >= l.M) continue;
        if constexpr (k4) {
          const int k = 32 * step + 8 * p;
          if (k < l.width) u.x[s][c] = __ldg(reinterpret_cast<const uint2*>(row + k));
        } else {
          const int k = 32 * step + 4 * p;
          if (k < l.width) u.x[s][c].x = __ldg(reinterpret_cast<const uint32_t*>(row + k));
          if (k + 16 < l.width) u.x[s][c].y = __ldg(reinterpret_cast<const uint32_t*>(row + k + 16));
        }
      }
    }
#pragma unroll
    for (int r = 0; r < kPairs; ++r)
      if (!kWhole) u.rows[r] = load_rows(l, first_pair + r, 4 * g, unit);
  }

  static ARSP_DEVICE uint4 nothing() {  // codes of 0
    const uint32_t word = k4 ? 0 : 0x80808080u;
    return make_uint4(word, word, word, word);
  }

  // Adds the products of a unit to acc, and the sums of x to sums.
  static ARSP_DEVICE void multiply(const Unit& u, bool zeros, int (&acc)[kPairs][2][kCols][4], int (&sums)[kCols][4]) {
#pragma unroll
    for (int s = 0; s < kSteps; ++s) {
#pragma unroll
      for (int r = 0; r < kPairs; ++r) {
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          uint32_t a[4];
          operand<k4>(u.w[s][r], j, a);
#pragma unroll
          for (int c = 0; c < kCols; ++c) mma_s8(acc[r][j][c], a, u.x[s][c].x, u.x[s][c].y);
        }
      }
      if (zeros) {
#pragma unroll
        for (int c = 0; c < kCols; ++c) add_columns(sums[c], u.x[s][c]);
      }
    }
  }

  // Leaves what a warp has summed in its slot: rows 4 g .. 4 g + 3 of columns 2 p and 2 p + 1, a float or a whole number each.
  static ARSP_DEVICE void hand_over(uint32_t* slot, const RowGroup (&rows)[kPairs], int (&acc)[kPairs][2][kCols][4], int (&sums)[kCols][4]) {
    const int lane = threadIdx.x % kLanes, g = lane / 4, p = lane % 4;
#pragma unroll
    for (int r = 0; r < kPairs; ++r) {
#pragma unroll
      for (int c = 0; c < kCols; ++c) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          uint32_t out[4];
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const int inner = acc[r][i / 2][c][i % 2 * 2 + h] - rows[r].zero[i] * sums[c][h];
            out[i] = kWhole ? static_cast<uint32_t>(inner) : __float_as_uint(__fmul_rn(__int2float_rn(inner), rows[r].scale[i]));
          }
          *reinterpret_cast<uint4*>(slot + (8 * c + 2 * p + h) * kPitch + 32 * r + 4 * g) = make_uint4(out[0], out[1], out[2], out[3]);
        }
      }
    }
  }

  static ARSP_DEVICE void clear(int (&acc)[kPairs][2][kCols][4], int (&sums)[kCols][4]) {
#pragma unroll
    for (int c = 0; c < kCols; ++c) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        sums[c][i] = 0;
#pragma unroll
        for (int r = 0; r < kPairs; ++r) acc[r][0][c][i] = acc[r][1][c][i] = 0;
      }
    }
  }

  static ARSP_DEVICE void run(const Linear& l, unsigned char* memory) {
    uint32_t* const slots = reinterpret_cast<uint32_t*>(memory);
    const int warp = threadIdx.x / kLanes, first_pair = kPairs * blockIdx.x;
    const int units = (l.pieces + (k4 ? 4 : 8) * kSteps - 1) / ((k4 ? 4 : 8) * kSteps), rounds = (units + kWarps - 1) / kWarps;
    Unit ahead[kAhead];
#pragma unroll
    for (int i = 0; i < kAhead; ++i) load(l, first_pair, i * kWarps + warp, ahead[i]);
    int acc[kPairs][2][kCols][4], sums[kCols][4];
    clear(acc, sums);
    float total[kOutputs] = {};
    for (int start = 0; start < rounds; start += kAhead) {
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        const int round = start + i;
        if (round >= rounds) break;
        multiply(ahead[i], l.weight.zeros != nullptr, acc, sums);
        if constexpr (kWhole) {
          load(l, first_pair, (round + kAhead) * kWarps + warp, ahead[i]);
        } else {
          uint32_t* const half = slots + round % 2 * kWarps * kSlot;
          hand_over(half + warp * kSlot, ahead[i].rows, acc, sums);
          clear(acc, sums);
          load(l, first_pair, (round + kAhead) * kWarps + warp, ahead[i]);
          __syncthreads();  // slots of the round before last are free again: whoever is here has added them
          const int num = min(kWarps, units - round * kWarps);
#pragma unroll
          for (int o = 0; o < kOutputs; ++o) {
            const int at = threadIdx.x + o * kWarps * kLanes, from = at / kRows * kPitch + at % kRows;
            for (int w = 0; w < num; ++w) total[o] = __fadd_rn(total[o], __uint_as_float(half[w * kSlot + from]));
          }
        }
      }
    }
    if constexpr (kWhole) {
      RowGroup rows[kPairs];
#pragma unroll
      for (int r = 0; r < kPairs; ++r) rows[r] = load_rows(l, first_pair + r, threadIdx.x % kLanes / 4 * 4, 0);
      hand_over(slots + warp * kSlot, rows, acc, sums);
      __syncthreads();
#pragma unroll
      for (int o = 0; o < kOutputs; ++o) {
        const int at = threadIdx.x + o * kWarps * kLanes, row = at % kRows, from = at / kRows * kPitch + row;
        const int n = row_of(l, first_pair + row / 32, row % 32);
        int inner = 0;
        for (int w = 0; w < kWarps; ++w) inner += static_cast<int>(slots[w * kSlot + from]);
        total[o] = __fmul_rn(__int2float_rn(inner), n < l.N ? weight_of(l, row % 32).scales[n * l.scale_row] : 0.f);
      }
    }
#pragma unroll
    for (int o = 0; o < kOutputs; ++o) {
      const int at = threadIdx.x + o * kWarps * kLanes, m = at / kRows, row = at % kRows;
      const int n = row_of(l, first_pair + row / 32, row % 32);
      const bool valid = m < l.M && n < l.N;
      float y = valid ? finish(l, total[o], m, n) : 0.f;
      if (l.up.codes != nullptr) {  // row is that of the lane, modulo 32
        y = swiglu(y, __shfl_xor_sync(kAllLanes, y, 16));
        if (row % 32 >= 16) continue;
      }
      if (valid) store(l, y, m, n);
    }
  }
};

template <bool k4, bool kWhole, int kSteps, int kCols, int kPairs>
__global__ void __launch_bounds__(kWarps* kLanes) decode(Linear l) {
  ARSP_DYNAMIC_SHARED(memory);
  Decode<k4, kWhole, kSteps, kCols, kPairs>::run(l, memory);
}

// ---- many rows of x: tiles in shared memory

// A block owns kWarpsN x 32 kPairs rows of weights and kWarpsM x 32 rows of x, a warp 32 kPairs x 32. Both operands come in steps of 64
// columns through a ring of kStages in shared memory. 16-byte words are placed so that the lanes of a load meet all banks.
template <bool k4, bool kWhole, int kSteps, int kPairs, int kWarpsN, int kWarpsM>
struct Tiles {
  static constexpr int kStages = 4, kColumns = 64;
  static constexpr int kThreads = kWarpsN * kWarpsM * kLanes;
  static constexpr int kWeightTiles = 2 * kPairs * kWarpsN, kRowsX = 32 * kWarpsM;
  static constexpr int kPieces = kColumns / (k4 ? 8 : 4);  // of a stage
  static constexpr int kWeightBytes = kWeightTiles * kPieces * kPieceBytes, kStageBytes = kWeightBytes + kRowsX * kColumns;
  static constexpr size_t kShared = static_cast<size_t>(kStages) * kStageBytes;

  static ARSP_DEVICE int weight_at(int tile, int piece, int quad) {
    return (tile * kPieces + piece) * kPieceBytes + (quad ^ (piece >> 1 & 1) * 2) * 16;
  }
  static ARSP_DEVICE int x_at(int row, int chunk) {  // chunks of 16 columns
    return kWeightBytes + row * kColumns + (chunk ^ (k4 ? (row >> 1 & 1) * 2 : row >> 1 & 3)) * 16;
  }

  static ARSP_DEVICE void fetch(const Linear& l, int first_pair, int first_m, int iteration, unsigned char* stage) {
    for (int i = threadIdx.x; i < kWeightBytes / 16; i += kThreads) {
      const int quad = i % 4, piece = i / 4 % kPieces, tile = i / 4 / kPieces, from = iteration * kPieces + piece;
      const int row = tile % 2 * kTile, source = row_of(l, first_pair + tile / 2, row) / kTile;
      const bool valid = source < l.tiles && from < l.pieces;
      const int64_t at = valid ? (static_cast<int64_t>(source) * l.pieces + from) * kPieceBytes + quad * 16 : 0;
      copy_async(stage + weight_at(tile, piece, quad), weight_of(l, row).codes + at, valid);  // not valid: x is 0 or the row is not stored
    }
    for (int i = threadIdx.x; i < kRowsX * 4; i += kThreads) {
      const int chunk = i % 4, row = i / 4, k = iteration * kColumns + chunk * 16;
      const bool valid = first_m + row < l.M && k < l.width;
      copy_async(stage + x_at(row, chunk), l.x + (valid ? static_cast<int64_t>(first_m + row) * l.width + k : 0), valid);
    }
  }

  static ARSP_DEVICE void run(const Linear& l, unsigned char* memory) {
    const int warp = threadIdx.x / kLanes, lane = threadIdx.x % kLanes, g = lane / 4, p = lane % 4;
    const int warp_n = warp % kWarpsN, warp_m = warp / kWarpsN;
    const int block_pair = kWeightTiles / 2 * blockIdx.x, first_pair = block_pair + kPairs * warp_n, first_m = kRowsX * blockIdx.y;
    const int iterations = (l.pieces + kPieces - 1) / kPieces;
    int acc[kPairs][2][4][4] = {}, sums[4][4] = {};
    float total[kPairs][2][4][4] = {};
    RowGroup rows[kPairs];
#pragma unroll
    for (int i = 0; i < kStages - 1; ++i) {
      if (i < iterations) fetch(l, block_pair, first_m, i, memory + i * kStageBytes);
      copy_commit();
    }
    for (int iteration = 0; iteration < iterations; ++iteration) {
      copy_wait<kStages - 2>();
      __syncthreads();
      const int next = iteration + kStages - 1;
      if (next < iterations) fetch(l, block_pair, first_m, next, memory + next % kStages * kStageBytes);
      copy_commit();
      const unsigned char* const stage = memory + iteration % kStages * kStageBytes;
#pragma unroll
      for (int s = 0; s < 2; ++s) {
        const int step = 2 * iteration + s;
        if (!kWhole && step % kSteps == 0) {
#pragma unroll
          for (int r = 0; r < kPairs; ++r) rows[r] = load_rows(l, first_pair + r, 4 * g, step / kSteps);
        }
        uint2 x[4];
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          const int row = 32 * warp_m + 8 * c + g;
          if constexpr (k4) {
            x[c] = *reinterpret_cast<const uint2*>(stage + x_at(row, 2 * s + p / 2) + p % 2 * 8);
          } else {
            x[c].x = *reinterpret_cast<const uint32_t*>(stage + x_at(row, 2 * s) + 4 * p);
            x[c].y = *reinterpret_cast<const uint32_t*>(stage + x_at(row, 2 * s + 1) + 4 * p);
          }
        }
#pragma unroll
        for (int r = 0; r < kPairs; ++r) {
          Words<k4> w;
#pragma unroll
          for (int h = 0; h < (k4 ? 1 : 2); ++h) {
            const int piece = k4 ? 4 * s + p : 8 * s + 4 * h + p;
            w.at[h] = *reinterpret_cast<const uint4*>(stage + weight_at(2 * (kPairs * warp_n + r) + g / 4, piece, g % 4));
          }
#pragma unroll
          for (int j = 0; j < 2; ++j) {
            uint32_t a[4];
            operand<k4>(w, j, a);
#pragma unroll
            for (int c = 0; c < 4; ++c) mma_s8(acc[r][j][c], a, x[c].x, x[c].y);
          }
        }
        if (l.weight.zeros != nullptr) {
#pragma unroll
          for (int c = 0; c < 4; ++c) add_columns(sums[c], x[c]);
        }
        if (!kWhole && (step + 1) % kSteps == 0) add_group(rows, acc, sums, total);
      }
    }
    if (kWhole) {
#pragma unroll
      for (int r = 0; r < kPairs; ++r) rows[r] = load_rows(l, first_pair + r, 4 * g, 0);
      add_group(rows, acc, sums, total);
    }
#pragma unroll
    for (int r = 0; r < kPairs; ++r) {
      const int n = row_of(l, first_pair + r, 4 * g);
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        const int m = first_m + 32 * warp_m + 8 * c + 2 * p;
        float y[2][4];
#pragma unroll
        for (int h = 0; h < 2; ++h) {
#pragma unroll
          for (int i = 0; i < 4; ++i)
            y[h][i] = m + h < l.M && n + i < l.N ? finish(l, total[r][i / 2][c][i % 2 * 2 + h], m + h, n + i) : 0.f;
        }
        if (l.up.codes != nullptr) {  // lanes of the gate do column m, those of the other weight column m + 1
          const bool second = g >= 4;
          float both[4];
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const float theirs = __shfl_xor_sync(kAllLanes, second ? y[0][i] : y[1][i], 16);
            both[i] = second ? swiglu(theirs, y[1][i]) : swiglu(y[0][i], theirs);
          }
          store_rows(l, both, m + second, n);
        } else {
          store_rows(l, y[0], m, n);
          store_rows(l, y[1], m + 1, n);
        }
      }
    }
  }

  // total += float(acc - zero sums) scale, and both sums start again.
  static ARSP_DEVICE void add_group(const RowGroup (&rows)[kPairs], int (&acc)[kPairs][2][4][4], int (&sums)[4][4], float (&total)[kPairs][2][4][4]) {
#pragma unroll
    for (int r = 0; r < kPairs; ++r) {
#pragma unroll
      for (int c = 0; c < 4; ++c) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            int& sum = acc[r][i / 2][c][i % 2 * 2 + h];
            float& t = total[r][i / 2][c][i % 2 * 2 + h];
            t = __fadd_rn(t, __fmul_rn(__int2float_rn(sum - rows[r].zero[i] * sums[c][h]), rows[r].scale[i]));
            sum = 0;
          }
        }
      }
    }
#pragma unroll
    for (int c = 0; c < 4; ++c) {
#pragma unroll
      for (int i = 0; i < 4; ++i) sums[c][i] = 0;
    }
  }

  // Four neighbouring outputs at once where they lie so.
  static ARSP_DEVICE void store_rows(const Linear& l, const float (&y)[4], int m, int n) {
    if (m >= l.M) return;
    const int64_t at = static_cast<int64_t>(m) * l.N + n;
    if (n + 4 <= l.N && l.N % 4 == 0) {
      if (l.y_type == kFloat) {
        *reinterpret_cast<uint4*>(static_cast<float*>(l.y) + at) =
            make_uint4(__float_as_uint(y[0]), __float_as_uint(y[1]), __float_as_uint(y[2]), __float_as_uint(y[3]));
      } else {
        *reinterpret_cast<uint2*>(static_cast<Bf16*>(l.y) + at) = make_uint2(pack_bf16(y[0], y[1]), pack_bf16(y[2], y[3]));
      }
      return;
    }
#pragma unroll
    for (int i = 0; i < 4; ++i)
      if (n + i < l.N) store(l, y[i], m, n + i);
  }
};

template <bool k4, bool kWhole, int kSteps, int kPairs, int kWarpsN, int kWarpsM>
__global__ void __launch_bounds__(kWarpsN* kWarpsM* kLanes) tiles(Linear l) {
  ARSP_DYNAMIC_SHARED(memory);
  Tiles<k4, kWhole, kSteps, kPairs, kWarpsN, kWarpsM>::run(l, memory);
}

// ---- choice

template <bool k4, bool kWhole, int kSteps, int kCols, int kPairs>
int run_decode(const Linear& l, cudaStream_t stream) {
  const dim3 grid((pairs_of(l) + kPairs - 1) / kPairs);
  constexpr size_t shared = Decode<k4, kWhole, kSteps, kCols, kPairs>::kShared;
  return launch(decode<k4, kWhole, kSteps, kCols, kPairs>, grid, kWarps * kLanes, shared, stream, l);
}

template <bool k4, bool kWhole, int kSteps, int kPairs, int kWarpsN, int kWarpsM>
int run_tiles(const Linear& l, cudaStream_t stream) {
  using T = Tiles<k4, kWhole, kSteps, kPairs, kWarpsN, kWarpsM>;
  const dim3 grid((2 * pairs_of(l) + T::kWeightTiles - 1) / T::kWeightTiles, (l.M + T::kRowsX - 1) / T::kRowsX);
  return launch(tiles<k4, kWhole, kSteps, kPairs, kWarpsN, kWarpsM>, grid, T::kThreads, T::kShared, stream, l);
}

constexpr int kWideN = 8192;  // from here on 64 rows of weights a block still give more blocks than there are multiprocessors

template <bool k4, bool kWhole, int kSteps>
int run(const Linear& l, int wgmma, cudaStream_t stream) {
  if (l.M == 0 || l.N == 0) return cudaSuccess;
  if (wgmma && l.M > 64 && has_wgmma()) {
    return run_wgmma(l, !k4 ? kRows8 : kWhole ? kRows4 : kSteps == 1 ? kGroups32 : kSteps == 2 ? kGroups64 : kGroups128, stream);
  }
  constexpr int few = k4 ? kSteps : 2;  // 8-bit codes fill the registers twice as fast
  if (l.M <= 8) return run_decode<k4, kWhole, few, 1, 1>(l, stream);
  if (l.M <= 16) return 32 * pairs_of(l) >= kWideN ? run_decode<k4, kWhole, few, 2, 2>(l, stream) : run_decode<k4, kWhole, few, 2, 1>(l, stream);
  if (l.M <= 32) return run_decode<k4, kWhole, few, 4, 1>(l, stream);
  if (l.M <= 64) return run_tiles<k4, kWhole, kSteps, 1, 2, 2>(l, stream);
  return run_tiles<k4, kWhole, kSteps, 2, 2, 4>(l, stream);
}

}  // namespace

namespace {

int run_w4(Linear& l, int group, int wgmma, cudaStream_t stream) {
  l.groups = group > 0 ? 8 * l.pieces / group : 1;
  switch (group) {
    case 32: return run<true, false, 1>(l, wgmma, stream);
    case 64: return run<true, false, 2>(l, wgmma, stream);
    case 128: return run<true, false, 4>(l, wgmma, stream);
    case -1: return run<true, true, 4>(l, wgmma, stream);
    default: return cudaErrorInvalidValue;
  }
}

Linear product(const int8_t* x, int64_t width, const float* sx, int64_t tiles, int64_t pieces, void* y, int y_type, int64_t M, int64_t N) {
  Linear l{};
  l.x = x, l.width = static_cast<int>(width), l.sx = sx, l.tiles = static_cast<int>(tiles), l.pieces = static_cast<int>(pieces);
  l.y = y, l.y_type = y_type, l.M = static_cast<int>(M), l.N = static_cast<int>(N), l.groups = 1;
  return l;
}

void set_end(Linear& l, const void* bias, int bias_type, const float* offset, const float* rowsum, int gelu, const void* gain, int gain_type,
             int64_t gain_stride, int64_t gain_rows, const void* residual, int residual_type) {
  l.bias = {bias, bias_type}, l.offset = offset, l.rowsum = rowsum, l.gelu = gelu != 0;
  l.gain = {gain, gain_type}, l.gain_stride = gain_stride, l.gain_rows = static_cast<int>(gain_rows), l.residual = {residual, residual_type};
}

}  // namespace

// group: columns that share a scale, 32, 64 or 128; -1: all of a row. wgmma: not 0 to use it where the device has it.
ARSP_EXPORT int arsp_w4a8_linear(const int8_t* x, int64_t width, const float* sx, const uint8_t* weight, int64_t tiles, int64_t pieces,
                                 const float* scales, int64_t scale_row, int64_t scale_group, const uint8_t* zeros, int64_t zero_row,
                                 int64_t zero_group, int group, const void* bias, int bias_type, const float* offset, const float* rowsum,
                                 int gelu, const void* gain, int gain_type, int64_t gain_stride, int64_t gain_rows, const void* residual,
                                 int residual_type, void* y, int y_type, int64_t M, int64_t N, int wgmma, cudaStream_t stream) {
  Linear l = product(x, width, sx, tiles, pieces, y, y_type, M, N);
  l.weight = {weight, scales, zeros};
  l.scale_row = scale_row, l.scale_group = scale_group, l.zero_row = zero_row, l.zero_group = zero_group;
  set_end(l, bias, bias_type, offset, rowsum, gelu, gain, gain_type, gain_stride, gain_rows, residual, residual_type);
  return run_w4(l, group, wgmma, stream);
}

ARSP_EXPORT int arsp_w8a8_linear(const int8_t* x, int64_t width, const float* sx, const uint8_t* weight, int64_t tiles, int64_t pieces,
                                 const float* scale, int64_t scale_row, const void* bias, int bias_type, const float* offset,
                                 const float* rowsum, int gelu, const void* gain, int gain_type, int64_t gain_stride, int64_t gain_rows,
                                 const void* residual, int residual_type, void* y, int y_type, int64_t M, int64_t N, int wgmma, cudaStream_t stream) {
  Linear l = product(x, width, sx, tiles, pieces, y, y_type, M, N);
  l.weight = {weight, scale, nullptr}, l.scale_row = scale_row;
  set_end(l, bias, bias_type, offset, rowsum, gelu, gain, gain_type, gain_stride, gain_rows, residual, residual_type);
  return run<false, true, 4>(l, wgmma, stream);
}

// Scales and zero points of both weights have the same strides.
ARSP_EXPORT int arsp_w4a8_swiglu(const int8_t* x, int64_t width, const float* sx, const uint8_t* gate, int64_t tiles, int64_t pieces,
                                 const float* gate_scales, int64_t scale_row, int64_t scale_group, const uint8_t* gate_zeros, int64_t zero_row,
                                 int64_t zero_group, const uint8_t* up, const float* up_scales, const uint8_t* up_zeros, int group, void* y,
                                 int y_type, int64_t M, int64_t N, int wgmma, cudaStream_t stream) {
  Linear l = product(x, width, sx, tiles, pieces, y, y_type, M, N);
  l.weight = {gate, gate_scales, gate_zeros}, l.up = {up, up_scales, up_zeros};
  l.scale_row = scale_row, l.scale_group = scale_group, l.zero_row = zero_row, l.zero_group = zero_group;
  return run_w4(l, group, wgmma, stream);
}

ARSP_EXPORT int arsp_w8a8_swiglu(const int8_t* x, int64_t width, const float* sx, const uint8_t* gate, int64_t tiles, int64_t pieces,
                                 const float* gate_scale, int64_t scale_row, const uint8_t* up, const float* up_scale, void* y, int y_type,
                                 int64_t M, int64_t N, int wgmma, cudaStream_t stream) {
  Linear l = product(x, width, sx, tiles, pieces, y, y_type, M, N);
  l.weight = {gate, gate_scale, nullptr}, l.up = {up, up_scale, nullptr}, l.scale_row = scale_row;
  return run<false, true, 4>(l, wgmma, stream);
}
