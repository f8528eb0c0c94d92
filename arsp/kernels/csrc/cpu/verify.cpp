// arsp::keyed_argmax(log_w (R, V), seed, ids, positions, purpose, stream) -> codes (R): keyed Gumbel-argmax draws.
// arsp::verify(logits (R, V), drafts, temperature, top_k, top_p, seed, ids, positions, purpose, stream, uncond, scale, ramp, guided)
//   -> (codes, log_p, lse, threshold, last), each (R): the filtered law of a row, a keyed draw from it, and the draft's log-probability.
//
// arsp::accept_scan: how many drafts of a row stand. arsp::draw_residual: keyed draws from max(0, p - q) where they do not.
//
// A row is read once, with guidance both halves of it, into a copy that stays in the nearest caches while the steps pass over it:
// maximum, selection of the k-th logit, selection of the logit where the mass of top-p ends, and the draw. Nothing is sorted, and Philox
// words become noise only for the few codes that can win. Threads take rows, so a result depends on neither their number nor the other
// rows.

#include <ATen/Parallel.h>
#include <ATen/core/List.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
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
constexpr double kMinTemperature = 1e-5;   // this and what follows are as in reference.py
constexpr double kResidualFloor = 1e-12;
constexpr int64_t kUniform = -2, kPrior = -3;

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

struct LawRow {
  Logits logits;
  Law law;
};

// A law that a draft may have come from that is not one of the recorded ones.
struct Draft {
  bool uniform;        // all codes alike
  const float* prior;  // given probabilities, or null
  int64_t certain;     // this code, or -1
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
  int64_t num() const { return values.size(0); }
  int64_t size() const { return values.size(1); }
};

// The keys of R draws.
struct Keys {
  const char* op;
  int64_t num;
  at::Tensor ids, positions;
  Key all;  // what they share
  Keys(const char* op_, int64_t num_, int64_t seed, const at::Tensor& ids_, const at::Tensor& positions_, int64_t purpose, int64_t stream)
      : op(op_), num(num_) {
    for (uint32_t round = 0; round < 10; ++round) {
      all.rounds[round][0] = static_cast<uint32_t>(seed) + round * 0x9E3779B9;
      all.rounds[round][1] = static_cast<uint32_t>(seed >> 32) + round * 0xBB67AE85;
    }
    all.purpose = static_cast<uint32_t>(purpose | stream << 8);
    ids = checked("ids", ids_, at::kLong);
    positions = checked("positions", positions_, at::kLong);
  }
  // One value for each draw.
  at::Tensor checked(const char* name, const at::Tensor& t, at::ScalarType type) const {
    TORCH_CHECK(t.dim() == 1 && t.size(0) == num && t.scalar_type() == type, op, ": expected ", type, " ", name, " (", num, "), got ",
                t.scalar_type(), " ", t.sizes());
    return t.contiguous();
  }
  Key key(int64_t r) const {
    Key key = all;
    key.position = static_cast<uint32_t>(positions.const_data_ptr<int64_t>()[r]);
    key.id = static_cast<uint32_t>(ids.const_data_ptr<int64_t>()[r]);
    return key;
  }
};

// work(r, scratch) for rows of V codes, by several threads where that pays.
template <typename F>
void each_row(int64_t num, int64_t V, bool lists, const F& work) {
  at::parallel_for(0, num, std::max<int64_t>(1, kThreadCodes / V), [&](int64_t begin, int64_t end) {
    Scratch scratch(V, lists);
    for (int64_t r = begin; r < end; ++r) work(r, scratch);
  });
}

at::Tensor keyed_argmax(const at::Tensor& log_w, int64_t seed, const at::Tensor& ids, const at::Tensor& positions, int64_t purpose,
                        int64_t stream) {
  const Matrix rows("keyed_argmax", log_w, false);
  const Keys keys("keyed_argmax", rows.num(), seed, ids, positions, purpose, stream);
  const auto argmax_row = ARSP_VERSION(argmax_row);
  at::Tensor codes = at::empty({rows.num()}, ids.options());
  int64_t* const code = codes.mutable_data_ptr<int64_t>();
  each_row(rows.num(), rows.size(), false, [&](int64_t r, Scratch& scratch) {
    code[r] = argmax_row({rows.row(r), nullptr, false, false, 1, 1, 1}, rows.size(), keys.key(r), scratch);
  });
  return codes;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> verify(
    const at::Tensor& logits, const at::Tensor& drafts, double temperature, int64_t top_k, double top_p, int64_t seed, const at::Tensor& ids,
    const at::Tensor& positions, int64_t purpose, int64_t stream, const std::optional<at::Tensor>& uncond, double scale, bool ramp,
    const std::optional<at::Tensor>& guided) {
  const Matrix rows("verify", logits, true);
  const Keys keys("verify", rows.num(), seed, ids, positions, purpose, stream);
  const at::Tensor drafts_ = keys.checked("drafts", drafts, at::kLong);
  const int64_t* const draft = drafts_.const_data_ptr<int64_t>();
  for (int64_t r = 0; r < rows.num(); ++r)
    TORCH_CHECK(draft[r] < rows.size(), "verify: draft ", draft[r], " is not among ", rows.size(), " codes");
  const Matrix other("verify", uncond ? *uncond : logits, true);
  TORCH_CHECK(other.values.sizes() == logits.sizes() && other.narrow() == rows.narrow(), "verify: the halves differ");
  const at::Tensor guided_ = guided ? keys.checked("guided", *guided, at::kBool) : at::Tensor();
  const bool* const guides = guided ? guided_.const_data_ptr<bool>() : nullptr;
  const bool greedy = temperature == 0;
  const Filters filters{greedy, top_k, top_p};
  const float divisor = greedy ? 1.f : static_cast<float>(std::max(temperature, kMinTemperature));
  const auto verify_row = ARSP_VERSION(verify_row);
  const auto make = [&](at::ScalarType type) { return at::empty({rows.num()}, ids.options().dtype(type)); };
  const at::Tensor codes = make(at::kLong), log_p = make(at::kFloat), lse = make(at::kFloat), threshold = make(at::kFloat), last = make(at::kLong);
  each_row(rows.num(), rows.size(), true, [&, code = codes.mutable_data_ptr<int64_t>(), p = log_p.mutable_data_ptr<float>(), l = lse.mutable_data_ptr<float>(),
                   t = threshold.mutable_data_ptr<float>(), i = last.mutable_data_ptr<int64_t>()](int64_t r, Scratch& scratch) {
    const void* const half = uncond && (!guides || guides[r]) ? other.row(r) : nullptr;
    const Logits row{rows.row(r), half, rows.narrow(), ramp, static_cast<float>(scale), static_cast<float>(1 + scale), divisor};
    const Outcome out = verify_row(row, rows.size(), draft[r], filters, keys.key(r), scratch);
    code[r] = out.code, p[r] = out.log_p, l[r] = out.law.lse, t[r] = out.law.threshold, i[r] = out.law.last;
  });
  return {codes, log_p, lse, threshold, last};
}

at::Tensor accept_scan(const at::Tensor& drafts, const at::Tensor& drawn, const at::Tensor& known, const std::optional<at::Tensor>& ratio,
                       const std::optional<at::Tensor>& uniform) {
  const bool by_ratio = ratio && uniform;
  const auto rows = [&](const at::Tensor& t, at::ScalarType type) {
    TORCH_CHECK(t.dim() == 2 && t.sizes() == drafts.sizes() && t.scalar_type() == type, "accept_scan: expected ", type, " ", drafts.sizes(),
                ", got ", t.scalar_type(), " ", t.sizes());
    return t.contiguous();
  };
  const at::Tensor a = by_ratio ? rows(*uniform, at::kFloat) : rows(drafts, at::kLong), b = by_ratio ? rows(*ratio, at::kFloat) : rows(drawn, at::kLong);
  TORCH_CHECK(known.dim() == 1 && known.size(0) == drafts.size(0) && known.scalar_type() == at::kLong, "accept_scan: expected known (",
              drafts.size(0), "), got ", known.sizes());
  const at::Tensor known_ = known.contiguous(), counts = at::empty({drafts.size(0)}, known.options());
  const int64_t m = drafts.size(1);
  for (int64_t r = 0; r < drafts.size(0); ++r) {
    int64_t i = std::min(m, std::max<int64_t>(0, known_.const_data_ptr<int64_t>()[r]));
    if (by_ratio) while (i < m && a.const_data_ptr<float>()[r * m + i] < b.const_data_ptr<float>()[r * m + i]) ++i;
    else while (i < m && a.const_data_ptr<int64_t>()[r * m + i] == b.const_data_ptr<int64_t>()[r * m + i]) ++i;
    counts.mutable_data_ptr<int64_t>()[r] = i;
  }
  return counts;
}

using Optionals = c10::List<std::optional<at::Tensor>>;

// Laws of verify: (logits, uncond, guided, lse, threshold, last) and (scale, ramp, temperature).
struct Laws {
  Matrix cond, uncond;
  at::Tensor guided, lse, threshold, last;
  bool both;
  at::ArrayRef<double> how;
  Laws(const Optionals& law, at::ArrayRef<double> how_)
      : cond("draw_residual", *law.get(0), true), uncond("draw_residual", law.get(1) ? *law.get(1) : *law.get(0), true), both(law.get(1)), how(how_) {
    TORCH_CHECK(law.size() == 6 && how.size() == 3 && uncond.narrow() == cond.narrow() && uncond.values.sizes() == cond.values.sizes(),
                "draw_residual: a law is six tensors and three numbers, and its halves are alike");
    if (law.get(2)) guided = checked(*law.get(2), at::kBool);
    lse = checked(*law.get(3), at::kFloat), threshold = checked(*law.get(4), at::kFloat), last = checked(*law.get(5), at::kLong);
  }
  at::Tensor checked(const at::Tensor& t, at::ScalarType type) const {
    TORCH_CHECK(t.numel() == num() && t.scalar_type() == type, "draw_residual: expected ", type, " for each of ", num(), " laws, got ", t.sizes());
    return t.contiguous();
  }
  int64_t num() const { return cond.values.size(0); }
  LawRow operator[](int64_t r) const {
    const void* const half = both && (!guided.defined() || guided.const_data_ptr<bool>()[r]) ? uncond.row(r) : nullptr;
    const Logits logits{cond.row(r), half, cond.narrow(), how[1] != 0, static_cast<float>(how[0]), static_cast<float>(1 + how[0]),
                        static_cast<float>(how[2])};
    return {logits, {lse.const_data_ptr<float>()[r], threshold.const_data_ptr<float>()[r], last.const_data_ptr<int64_t>()[r]}};
  }
};

at::Tensor draw_residual(const Optionals& p, at::ArrayRef<double> p_how, const at::Tensor& rows, const Optionals& q, at::ArrayRef<double> q_how,
                         const at::Tensor& sources, const at::Tensor& drafts, const std::optional<at::Tensor>& prior,
                         const std::optional<at::Tensor>& places, int64_t seed, const at::Tensor& ids, const at::Tensor& positions, int64_t purpose,
                         int64_t stream) {
  const Laws target(p, p_how);
  const std::optional<Laws> recorded = q.empty() ? std::nullopt : std::optional<Laws>(std::in_place, q, q_how);
  const int64_t V = target.cond.values.size(1), num = rows.size(0);
  const Keys keys("draw_residual", num, seed, ids, positions, purpose, stream);
  const at::Tensor rows_ = keys.checked("rows", rows, at::kLong), sources_ = keys.checked("sources", sources, at::kLong);
  const at::Tensor drafts_ = keys.checked("drafts", drafts, at::kLong), codes = at::zeros({num}, ids.options());
  const at::Tensor prior_ = prior ? prior->contiguous() : at::Tensor(), places_ = places ? keys.checked("places", *places, at::kLong) : at::Tensor();
  TORCH_CHECK(!prior || (places && prior->dim() == 2 && prior->size(1) == V && prior->scalar_type() == at::kFloat),
              "draw_residual: the prior is float32 (Y, V), with a place for each draw");
  const auto place = [&](int64_t r) { return places_.const_data_ptr<int64_t>()[r]; };
  const int64_t *const row = rows_.const_data_ptr<int64_t>(), *const source = sources_.const_data_ptr<int64_t>();
  TORCH_CHECK(!recorded || recorded->cond.size() == V, "draw_residual: laws of ", V, " codes and of others");
  for (int64_t r = 0; r < num; ++r) {
    const int64_t code = drafts_.const_data_ptr<int64_t>()[r];
    const bool known = source[r] >= 0 ? recorded && source[r] < recorded->num()
                       : source[r] == kPrior ? prior && 0 <= place(r) && place(r) < prior->size(0)
                                             : source[r] == kUniform || (0 <= code && code < V);
    TORCH_CHECK(row[r] < target.num() && (row[r] < 0 || known), "draw_residual: draw ", r, " is from law ", row[r], " and source ", source[r]);
  }
  const auto residual_row = ARSP_VERSION(residual_row);
  int64_t* const to = codes.mutable_data_ptr<int64_t>();
  each_row(num, V, true, [&](int64_t r, Scratch& scratch) {
    if (row[r] < 0) return;
    const bool has_law = source[r] >= 0;
    const LawRow from = has_law ? (*recorded)[source[r]] : LawRow{};
    const float* const given = source[r] == kPrior ? prior_.const_data_ptr<float>() + place(r) * V : nullptr;
    const bool certain = !has_law && given == nullptr && source[r] != kUniform;
    const Draft draft{source[r] == kUniform, given, certain ? drafts_.const_data_ptr<int64_t>()[r] : -1};
    to[r] = residual_row(target[row[r]], has_law ? &from : nullptr, draft, V, keys.key(r), scratch);
  });
  return codes;
}

}  // namespace

TORCH_LIBRARY_IMPL(arsp, CPU, m) {
  m.impl("keyed_argmax", keyed_argmax);
  m.impl("verify", verify);
  m.impl("accept_scan", accept_scan);
  m.impl("draw_residual", draw_residual);
}
