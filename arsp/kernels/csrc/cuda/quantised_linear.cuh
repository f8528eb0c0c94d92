// What the kernels of quantised linear layers share: the layer, where its rows are, and what follows the sum over columns.
#pragma once

#include "device.cuh"

constexpr int kPieceBytes = 64, kTile = 16;  // as in layouts.py

struct Weight {
  const uint8_t* codes;  // null: none
  const float* scales;
  const uint8_t* zeros;  // null: none
};

struct Linear {
  const int8_t* x;  // (M, width), 16-byte aligned rows, zeros behind the columns of the weight
  const float* sx;
  Weight weight, up;  // with `up` the result is silu(weight x) (up x), and there is nothing of what follows
  Numbers bias;       // these may be null, data of Numbers
  const float* offset;
  const float* rowsum;
  Numbers gain, residual;
  void* y;
  int M, N, width, tiles, pieces, groups;  // tiles: of one weight
  int64_t scale_row, scale_group, zero_row, zero_group, gain_stride;  // strides of scales, zeros and rows of the gain
  int gain_rows;                                                      // rows of x that share a row of the gain
  int y_type;
  bool gelu;
};

enum Format : int { kGroups32, kGroups64, kGroups128, kRows4, kRows8 };  // of a weight: 4 bits in groups, 4 and 8 bits with one group a row

int run_wgmma(const Linear& l, Format format, cudaStream_t stream);  // many rows of x, where has_wgmma()

// Tiles are taken in pairs, two of a weight or the same of both: 32 rows, of which this is where row `row` of pair `pair` is.
ARSP_DEVICE int row_of(const Linear& l, int pair, int row) { return l.up.codes == nullptr ? 32 * pair + row : kTile * pair + row % kTile; }
ARSP_DEVICE Weight weight_of(const Linear& l, int row) { return l.up.codes == nullptr || row < kTile ? l.weight : l.up; }
inline int pairs_of(const Linear& l) { return l.up.codes == nullptr ? (l.tiles + 1) / 2 : l.tiles; }

// y of one output; `total` is the sum over the groups.
ARSP_DEVICE float finish(const Linear& l, float total, int m, int n) {
  float y = __fmul_rn(total, l.sx[m]);
  if (l.bias.data != nullptr) y = __fadd_rn(y, l.bias[n]);
  if (l.offset != nullptr) y = __fadd_rn(y, __fmul_rn(l.offset[m], l.rowsum[n]));
  if (l.gelu) y = gelu(y);
  if (l.gain.data != nullptr) y = __fmul_rn(y, l.gain[m / l.gain_rows * l.gain_stride + n]);
  if (l.residual.data != nullptr) y = __fadd_rn(y, l.residual[static_cast<int64_t>(m) * l.N + n]);
  return y;
}

ARSP_DEVICE float swiglu(float gate, float up) { return gate * sigmoid(gate) * up; }

ARSP_DEVICE void store(const Linear& l, float y, int m, int n) {
  const int64_t at = static_cast<int64_t>(m) * l.N + n;
  if (l.y_type == kFloat) {
    put(static_cast<float*>(l.y) + at, y);
  } else {
    put(static_cast<Bf16*>(l.y) + at, y);
  }
}

// Scales and zero points of 4 neighbouring rows of a pair.
struct RowGroup {
  float scale[4];
  int zero[4];
};

ARSP_DEVICE RowGroup load_rows(const Linear& l, int pair, int row, int group) {
  RowGroup rows;
  const Weight weight = weight_of(l, row);
  const int n = row_of(l, pair, row);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const bool valid = n + i < l.N && group < l.groups;
    rows.scale[i] = valid ? __ldg(weight.scales + (n + i) * l.scale_row + group * l.scale_group) : 0.f;
    rows.zero[i] = valid && weight.zeros != nullptr ? __ldg(weight.zeros + (n + i) * l.zero_row + group * l.zero_group) : 0;
  }
  return rows;
}
