// arsp::windowed_scale_attention(q (B, H, n, D), k (B, H, T, D), v (G B, H, T, Dv), windows (H, s + 1), sides, s) -> (G B, H, n, Dv):
// attention of the queries of scale s to the maps of scales 0..s, each head restricted to a 2-D window in each map.
//
// A task is one tile of neighbouring queries of one row and head, one query to a lane of a vector register. Its windows overlap,
// so the keys that any of them keeps are few; they are listed with the lanes that keep them, and only they are read. Maximum and
// sum of the softmax are then lane by lane, without a step across lanes. Long lists pass in chunks (online softmax).
// q, k, v are float32 or bfloat16, sums are float32.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <atomic>
#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <map>
#include <utility>
#include <vector>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "isa.h"

namespace {

using Bf16 = c10::BFloat16;

constexpr int kGroup = 8;                   // keys whose scores are computed together
constexpr int kChunk = 256;                 // keys whose scores are held, a multiple of kGroup: they stay in the first-level cache
constexpr int kUnit = 8;                    // tiles that a thread takes at a time
constexpr int64_t kThreadPairs = 1 << 16;   // least number of query-key pairs, before windows, that is worth a thread

// Neighbouring queries, one to a lane: up to a register of them out of a band of map rows, column by column.
struct Tile {
  int lanes, y, height, x, width;     // number of queries, and the rectangle that holds them
  int query[16];                      // raster index of each in its map
  uint32_t row_lanes[4] = {}, column_lanes[16] = {};  // as bits, the lanes in each row and column of the rectangle
};

// Bands of equal height, four rows for 16 lanes: tiles are as square as they can be, and only the last one of a band is ragged.
std::vector<Tile> make_tiles(int side, int lanes) {
  const int bands = lanes == 16 ? (side + 3) / 4 : (side + 1) / 2;
  std::vector<Tile> tiles;
  for (int band = 0; band < bands; ++band) {
    const int y = band * side / bands, height = (band + 1) * side / bands - y, total = height * side;
    for (int first = 0; first < total; first += lanes) {
      const int num = std::min(lanes, total - first), x = first / height;
      Tile tile{num, y, height, x, (first + num - 1) / height - x + 1};
      for (int lane = 0; lane < num; ++lane) {
        const int row = (first + lane) % height, column = (first + lane) / height;
        tile.query[lane] = (y + row) * side + column;
        tile.row_lanes[row] |= 1u << lane;
        tile.column_lanes[column - x] |= 1u << lane;
      }
      tiles.push_back(tile);
    }
  }
  return tiles;
}

struct Range {
  int begin, end;
};

// Which rows (or columns) of each map a window holds, for each row (or column) of the queries.
class Windows {
 public:
  // windows: heads x sides.size(). -1 dense, 0 dropped, r >= 1: |key - centre| <= r with centre = (y + 0.5) side_u / side_s - 0.5.
  Windows(const int32_t* windows, int64_t heads, std::vector<int> sides) : windows_(windows), sides_(std::move(sides)) {
    for (int64_t head = 0; head < heads; ++head) {
      for (size_t u = 0; u < sides_.size(); ++u) {
        if (!is_dense(head, u) && radius(head, u) > 0) add(static_cast<int>(u), radius(head, u));
      }
    }
  }

  const std::vector<int>& sides() const { return sides_; }
  int radius(int64_t head, size_t u) const { return windows_[head * sides_.size() + u]; }
  bool is_dense(int64_t head, size_t u) const { return radius(head, u) < 0 || radius(head, u) >= sides_[u]; }
  const Range* ranges(int64_t head, size_t u) const { return ranges_.at({static_cast<int>(u), radius(head, u)}).data(); }

 private:
  void add(int u, int r) {
    std::vector<Range>& ranges = ranges_[{u, r}];
    if (!ranges.empty()) return;
    // In units of 1 / (2 side_s) everything is whole.
    const int64_t queries = sides_.back(), keys = sides_[u];
    for (int64_t y = 0; y < queries; ++y) {
      const int64_t centre = (2 * y + 1) * keys - queries, reach = 2 * queries * r;
      const int64_t above = std::max<int64_t>(centre - reach, 0), below = std::min(centre + reach, 2 * queries * (keys - 1));
      ranges.push_back({static_cast<int>((above + 2 * queries - 1) / (2 * queries)), static_cast<int>(below / (2 * queries)) + 1});
    }
  }

  const int32_t* windows_;
  std::vector<int> sides_;
  std::map<std::pair<int, int>, std::vector<Range>> ranges_;
};

// The keys that a tile needs: index of each along T, and the lanes that keep it as bits.
struct Keys {
  std::vector<int32_t> index;
  std::vector<uint32_t> lanes;
  std::vector<uint32_t> rows, columns;  // lanes that keep a row or a column of the map in hand
  int num = 0;

  explicit Keys(const std::vector<int>& sides) {
    int64_t total = 0;
    for (const int side : sides) total += int64_t{side} * side;
    index.resize(total + 1);  // the entry that an unwanted key overwrites
    lanes.resize(total + 1);
    const int largest = *std::max_element(sides.begin(), sides.end());
    rows.resize(largest);
    columns.resize(largest);
  }

  void list(const Windows& windows, int64_t head, const Tile& tile) {
    const uint32_t all = static_cast<uint32_t>((uint64_t{1} << tile.lanes) - 1);
    num = 0;
    int32_t offset = 0;
    for (size_t u = 0; u < windows.sides().size(); ++u) {
      const int side = windows.sides()[u];
      if (windows.is_dense(head, u)) {
        for (int i = 0; i < side * side; ++i, ++num) index[num] = offset + i, lanes[num] = all;
      } else if (windows.radius(head, u) > 0) {
        list_window(windows.ranges(head, u), tile, side, offset);
      }
      offset += side * side;
    }
  }

 private:
  void list_window(const Range* ranges, const Tile& tile, int side, int32_t offset) {
    const Range down = spread(ranges + tile.y, tile.row_lanes, tile.height, rows);
    const Range across = spread(ranges + tile.x, tile.column_lanes, tile.width, columns);
    for (int row = down.begin; row < down.end; ++row) {
      for (int column = across.begin; column < across.end; ++column) {
        const uint32_t kept = rows[row] & columns[column];
        index[num] = offset + row * side + column;
        lanes[num] = kept;
        num += kept != 0;
      }
    }
  }

  // Gives each of num ranges' lanes to the cells it covers; returns the cells covered in all.
  static Range spread(const Range* ranges, const uint32_t* of_range, int num, std::vector<uint32_t>& cells) {
    const Range all{ranges[0].begin, ranges[num - 1].end};
    std::fill(cells.begin() + all.begin, cells.begin() + all.end, 0);
    for (int i = 0; i < num; ++i) {
      for (int cell = ranges[i].begin; cell < ranges[i].end; ++cell) cells[cell] |= of_range[i];
    }
    return all;
  }
};

// A (B, H, n, D) tensor with adjacent last dimension.
template <typename T>
struct View {
  T* data;
  int64_t row_stride, head_stride, step;
  explicit View(const at::Tensor& t) : data(t.data_ptr<T>()), row_stride(t.stride(0)), head_stride(t.stride(1)), step(t.stride(2)) {}
  T* at(int64_t row, int64_t head) const { return data + row * row_stride + head * head_stride; }
};

template <typename T>
struct Problem {
  View<T> q, k, v, out;
  int64_t rows, value_sets, D, Dv;
  int side;
};

// One thread's working memory, in floats.
struct Scratch {
  std::vector<float> queries;  // D x lanes
  std::vector<float> scores;   // kChunk x lanes: scores, then their exponentials
  std::vector<float> values;   // value_sets x lanes x Dv
  std::vector<float> keys;     // kGroup x D, widened to float32
  Scratch(int64_t lanes, int64_t value_sets, int64_t D, int64_t Dv)
      : queries(D * lanes), scores(kChunk * lanes), values(value_sets * lanes * Dv), keys(kGroup * D) {}
};

#define ARSP_BLOCK "windowed_scale_attention_block.h"
#include "each_isa.h"

template <typename T>
using AttendTile = void (*)(const Problem<T>&, int64_t row, int64_t head, const Tile&, const Keys&, Scratch&);

template <typename T>
std::pair<AttendTile<T>, int> version() {
#if defined(__x86_64__)
  if (isa == kAvx512Bf16) return {avx512_bf16::attend_tile<T>, 16};
  if (isa >= kAvx512) return {avx512::attend_tile<T>, 16};
  if (isa == kAvx2) return {avx2::attend_tile<T>, 8};
#endif
  return {portable::attend_tile<T>, 4};
}

// Heads differ in cost and threads in speed, so threads take units of tiles as they get free. A tile is computed by one thread
// in one fixed order: the result does not depend on their number.
template <typename T>
void run(const Problem<T>& problem, const Windows& windows, int64_t heads, int64_t total_keys) {
  const auto [attend_tile, lanes] = version<T>();
  const std::vector<Tile> tiles = make_tiles(problem.side, lanes);
  const int64_t num_tiles = static_cast<int64_t>(tiles.size()), units = (num_tiles + kUnit - 1) / kUnit;
  const int64_t num = problem.rows * heads * units;
  const int64_t pairs = problem.rows * heads * problem.side * problem.side * total_keys;
  const int64_t workers = std::clamp<int64_t>(pairs / kThreadPairs, 1, std::min<int64_t>(num, at::get_num_threads()));
  std::atomic<int64_t> next{0};
  at::parallel_for(0, workers, 1, [&](int64_t, int64_t) {
    Keys keys(windows.sides());
    Scratch scratch(lanes, problem.value_sets, problem.D, problem.Dv);
    for (int64_t task = next++; task < num; task = next++) {
      const int64_t row = task / units / heads, head = task / units % heads, first = task % units * kUnit;
      for (int64_t i = first; i < std::min(first + kUnit, num_tiles); ++i) {
        keys.list(windows, head, tiles[i]);
        attend_tile(problem, row, head, tiles[i], keys, scratch);
      }
    }
  });
}

at::Tensor windowed_scale_attention(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& windows,
                                    at::IntArrayRef sides, int64_t scale_index) {
  const char* const name = "windowed_scale_attention: ";
  TORCH_CHECK(q.dim() == 4 && k.dim() == 4 && v.dim() == 4, name, "expected q (B, H, n, D), k (B, H, T, D), v (G B, H, T, Dv), got ",
              q.sizes(), ", ", k.sizes(), ", ", v.sizes());
  TORCH_CHECK(scale_index >= 0 && scale_index < static_cast<int64_t>(sides.size()), name, "scale ", scale_index, " of ", sides.size());
  std::vector<int> seen;
  int64_t total = 0;
  for (const int64_t side : sides.slice(0, scale_index + 1)) {
    TORCH_CHECK(side >= 1 && side <= 4096, name, "sides must be 1..4096, got ", side);
    seen.push_back(static_cast<int>(side));
    total += side * side;
  }
  TORCH_CHECK(total < INT32_MAX, name, "too many keys: ", total);
  const int64_t B = q.size(0), H = q.size(1), side = seen.back();
  TORCH_CHECK(q.size(2) == side * side && k.size(2) == total && v.size(2) == total, name, "scale ", scale_index, " has ", side * side,
              " queries and ", total, " keys, got q ", q.sizes(), ", k ", k.sizes(), ", v ", v.sizes());
  TORCH_CHECK(k.size(0) == B && k.size(1) == H && v.size(1) == H && k.size(3) == q.size(3) && (v.size(0) == B || v.size(0) == 2 * B),
              name, "rows, heads or widths differ: q ", q.sizes(), ", k ", k.sizes(), ", v ", v.sizes());
  TORCH_CHECK(windows.dim() == 2 && windows.size(0) == H && windows.size(1) == scale_index + 1 && windows.scalar_type() == at::kInt,
              name, "expected int32 windows (", H, ", ", scale_index + 1, "), got ", windows.scalar_type(), " ", windows.sizes());
  const auto type = q.scalar_type();
  TORCH_CHECK((type == at::kFloat || type == at::kBFloat16) && k.scalar_type() == type && v.scalar_type() == type, name,
              "expected q, k, v of one type, float32 or bfloat16, got ", type, ", ", k.scalar_type(), ", ", v.scalar_type());
  at::Tensor out = at::empty({v.size(0), H, side * side, v.size(3)}, q.options());
  if (out.numel() == 0) return out;
  const auto adjacent = [](const at::Tensor& t) { return t.stride(3) == 1 || t.size(3) <= 1 ? t : t.contiguous(); };
  const at::Tensor q_ = adjacent(q), k_ = adjacent(k), v_ = adjacent(v), windows_ = windows.contiguous();
  const Windows ranges(windows_.const_data_ptr<int32_t>(), H, std::move(seen));
  const auto run_as = [&](auto zero) {
    using T = decltype(zero);
    run(Problem<T>{View<T>(q_), View<T>(k_), View<T>(v_), View<T>(out), B, v.size(0) / B, q.size(3), v.size(3), static_cast<int>(side)},
        ranges, H, total);
  };
  type == at::kFloat ? run_as(float{}) : run_as(Bf16{});
  return out;
}

}  // namespace

TORCH_LIBRARY_IMPL(arsp, CPU, m) { m.impl("windowed_scale_attention", windowed_scale_attention); }
