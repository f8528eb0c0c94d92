// arsp::keyed_argmax(log_w (R, V), seed, ids, positions, purpose, stream) -> codes (R): keyed Gumbel-argmax draws.
// arsp::verify(logits (R, V), drafts, temperature, top_k, top_p, seed, ids, positions, purpose, stream, uncond, scale, ramp, guided)
//   -> (codes, log_p, lse, threshold, last), each (R): the filtered law of a row, a keyed draw from it, and the draft's log-probability.
//
// A row is read once, with guidance both halves of it, into a copy that stays in the nearest caches while the steps pass over it: maximum, selection of the k-th
// logit, selection of the logit where the mass of top-p ends, and the draw. Nothing is sorted, and Philox words become noise only
// for the few codes that can win. Threads take rows, so a result depends on neither their number nor the other rows.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <optional>
#include <tuple>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "isa.h"

namespace {

using Bf16 = c10::BFloat16;

constexpr int64_t kThreadCodes = 1 << 13;  // least number of codes that is worth a thread
constexpr int64_t kMaxChunk = 64;          // what rows in Scratch are padded to a multiple of, at most
constexpr int64_t kMaxLanes = 16;
constexpr double kMinTemperature = 1e-5;   // as in reference.py

// Key of every round of Philox, and its counter but for the block of codes.
struct Key {
  uint64_t rounds[10][2], position, id, purpose;
};

// A row of logits as the model made it, and what comes before filters.
struct Logits {
  const void *cond, *uncond;  // float32, or Bf16; uncond null: no guidance
  bool narrow;                // Bf16
  bool ramp;
  float scale, gain;  // u + scale (c - u), or with ramp gain c - scale u
  float divisor;
};

struct Filters {
  bool greedy;
  int64_t top_k;
  double top_p;
};

// log p(x) = s[x] - lse for the codes kept, with s the logits divided by the temperature.
struct Law {
  float lse, threshold;
  int64_t last;
  bool keeps(float s, int64_t code) const { return s > threshold || (s == threshold && code <= last); }
};

// Where a selection ends: a value, the weight of all better ones, and the weight and number of those equal to it.
struct Cut {
  float value;
  double better, weight;
  int64_t equal;
};

struct Outcome {
  Law law;
  int64_t code;
  float log_p;
};

struct Scratch {
  std::unique_ptr<float[]> row, list, spare;
  Scratch(int64_t V, bool lists) : row(new float[V + kMaxChunk]) {
    if (!lists) return;
    list.reset(new float[V + kMaxChunk + kMaxLanes]);
    spare.reset(new float[V + kMaxChunk + kMaxLanes]);
  }
};

#define ARSP_BLOCK "verify_block.h"
#include "each_isa.h"

#if defined(__x86_64__)
#define ARSP_VERSION(function) (isa >= kAvx512 ? avx512::function : isa == kAvx2 ? avx2::function : portable::function)
#else
#define ARSP_VERSION(function) portable::function
#endif

// Rows of logits, float32 or bfloat16, whose codes are neighbours.
struct Matrix {
  at::Tensor values;
  Matrix(const char* op, const at::Tensor& values_, bool narrow) : values(values_) {
    TORCH_CHECK(values.dim() == 2 && (values.scalar_type() == at::kFloat || (narrow && values.scalar_type() == at::kBFloat16)) &&
                    values.size(1) > 0 && values.size(1) < INT32_MAX - kMaxChunk,
                op, ": expected float32", narrow ? " or bfloat16" : "", " rows of V >= 1 codes, got ", values.scalar_type(), " ", values.sizes());
    if (values.stride(1) != 1) values = values.contiguous();
  }
  const void* row(int64_t r) const {
    return static_cast<const char*>(values.const_data_ptr()) + r * values.stride(0) * static_cast<int64_t>(values.element_size());
  }
  bool narrow() const { return values.scalar_type() == at::kBFloat16; }
};

// What both ops take: rows of logits and one int64 a row.
struct Rows : Matrix {
  const char* op;
  at::Tensor ids, positions;
  Key all;  // what the keys of all rows share
  Rows(const char* op_, const at::Tensor& values_, bool narrow, int64_t seed, const at::Tensor& ids_, const at::Tensor& positions_,
       int64_t purpose, int64_t stream)
      : Matrix(op_, values_, narrow), op(op_) {
    for (uint32_t round = 0; round < 10; ++round) {
      all.rounds[round][0] = static_cast<uint32_t>(seed) + round * 0x9E3779B9;
      all.rounds[round][1] = static_cast<uint32_t>(seed >> 32) + round * 0xBB67AE85;
    }
    all.purpose = static_cast<uint32_t>(purpose | stream << 8);
    ids = checked("ids", ids_, at::kLong);
    positions = checked("positions", positions_, at::kLong);
  }
  at::Tensor checked(const char* name, const at::Tensor& t, at::ScalarType type) const {
    TORCH_CHECK(t.dim() == 1 && t.size(0) == num() && t.scalar_type() == type, op, ": expected ", type, " ", name, " (", num(), "), got ",
                t.scalar_type(), " ", t.sizes());
    return t.contiguous();
  }
  int64_t num() const { return values.size(0); }
  int64_t size() const { return values.size(1); }
  Key key(int64_t r) const {
    Key key = all;
    key.position = static_cast<uint32_t>(positions.const_data_ptr<int64_t>()[r]);
    key.id = static_cast<uint32_t>(ids.const_data_ptr<int64_t>()[r]);
    return key;
  }
  template <typename F>
  void each(bool lists, const F& work) const {
    at::parallel_for(0, num(), std::max<int64_t>(1, kThreadCodes / size()), [&](int64_t begin, int64_t end) {
      Scratch scratch(size(), lists);
      for (int64_t r = begin; r < end; ++r) work(r, scratch);
    });
  }
};

at::Tensor keyed_argmax(const at::Tensor& log_w, int64_t seed, const at::Tensor& ids, const at::Tensor& positions, int64_t purpose,
                        int64_t stream) {
  const Rows rows("keyed_argmax", log_w, false, seed, ids, positions, purpose, stream);
  const auto argmax_row = ARSP_VERSION(argmax_row);
  at::Tensor codes = at::empty({rows.num()}, ids.options());
  int64_t* const code = codes.mutable_data_ptr<int64_t>();
  rows.each(false, [&](int64_t r, Scratch& scratch) {
    code[r] = argmax_row({rows.row(r), nullptr, false, false, 1, 1, 1}, rows.size(), rows.key(r), scratch);
  });
  return codes;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> verify(
    const at::Tensor& logits, const at::Tensor& drafts, double temperature, int64_t top_k, double top_p, int64_t seed, const at::Tensor& ids,
    const at::Tensor& positions, int64_t purpose, int64_t stream, const std::optional<at::Tensor>& uncond, double scale, bool ramp,
    const std::optional<at::Tensor>& guided) {
  const Rows rows("verify", logits, true, seed, ids, positions, purpose, stream);
  const at::Tensor drafts_ = rows.checked("drafts", drafts, at::kLong);
  const int64_t* const draft = drafts_.const_data_ptr<int64_t>();
  for (int64_t r = 0; r < rows.num(); ++r)
    TORCH_CHECK(draft[r] < rows.size(), "verify: draft ", draft[r], " is not among ", rows.size(), " codes");
  const Matrix other("verify", uncond ? *uncond : logits, true);
  TORCH_CHECK(other.values.sizes() == logits.sizes() && other.narrow() == rows.narrow(), "verify: the halves differ");
  const at::Tensor guided_ = guided ? rows.checked("guided", *guided, at::kBool) : at::Tensor();
  const bool* const guides = guided ? guided_.const_data_ptr<bool>() : nullptr;
  const bool greedy = temperature == 0;
  const Filters filters{greedy, top_k, top_p};
  const float divisor = greedy ? 1.f : static_cast<float>(std::max(temperature, kMinTemperature));
  const auto verify_row = ARSP_VERSION(verify_row);
  const auto make = [&](at::ScalarType type) { return at::empty({rows.num()}, ids.options().dtype(type)); };
  const at::Tensor codes = make(at::kLong), log_p = make(at::kFloat), lse = make(at::kFloat), threshold = make(at::kFloat), last = make(at::kLong);
  rows.each(true, [&, code = codes.mutable_data_ptr<int64_t>(), p = log_p.mutable_data_ptr<float>(), l = lse.mutable_data_ptr<float>(),
                   t = threshold.mutable_data_ptr<float>(), i = last.mutable_data_ptr<int64_t>()](int64_t r, Scratch& scratch) {
    const void* const half = uncond && (!guides || guides[r]) ? other.row(r) : nullptr;
    const Logits row{rows.row(r), half, rows.narrow(), ramp, static_cast<float>(scale), static_cast<float>(1 + scale), divisor};
    const Outcome out = verify_row(row, rows.size(), draft[r], filters, rows.key(r), scratch);
    code[r] = out.code, p[r] = out.log_p, l[r] = out.law.lse, t[r] = out.law.threshold, i[r] = out.law.last;
  });
  return {codes, log_p, lse, threshold, last};
}

}  // namespace

TORCH_LIBRARY_IMPL(arsp, CPU, m) {
  m.impl("keyed_argmax", keyed_argmax);
  m.impl("verify", verify);
}
