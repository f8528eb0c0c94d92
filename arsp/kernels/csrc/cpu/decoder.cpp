// arsp::rms_norm, arsp::apply_rope and arsp::cached_attention: what a decoder computes between its linear layers. With few rows these
// are many small operators in torch, and calling them takes longer than what they do.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <optional>
#include <vector>

#include "isa.h"
#include "threads.h"

namespace {

using Bf16 = c10::BFloat16;

constexpr int64_t kThreadValues = 1 << 15;    // least values that are worth a thread
constexpr int64_t kThreadProducts = 1 << 17;  // least products of an attention that are worth a thread
constexpr int64_t kMostLanes = 16;
constexpr int kQueries = 4;  // attended together

// A tensor with rows, heads and steps of adjacent components.
template <typename T>
struct View {
  T* data;
  int64_t row, head, step;
  T* at(int64_t r, int64_t h, int64_t i) const { return data + r * row + h * head + i * step; }
};

template <typename T>
struct Attention {
  View<T> q, k, v, k_cache, v_cache, out;
  const bool* mask;  // or null: each query sees the slots up to its own
  int64_t mask_row, mask_query, mask_key;
  const int64_t* starts;  // of each row, or null: all begin at `start`
  int64_t queries, start, D, Dv;
  float scale;
  int64_t start_of(int64_t row) const { return starts == nullptr ? start : starts[row]; }
};

#define ARSP_BLOCK "decoder_block.h"
#include "each_isa.h"

#if defined(__x86_64__)
#define ARSP_VERSION(...) (isa >= kAvx512 ? avx512::__VA_ARGS__ : isa == kAvx2 ? avx2::__VA_ARGS__ : portable::__VA_ARGS__)
#else
#define ARSP_VERSION(...) (portable::__VA_ARGS__)
#endif

at::Tensor adjacent(const at::Tensor& t) { return t.stride(-1) == 1 || t.size(-1) <= 1 ? t : t.contiguous(); }

void check_type(const char* op, const at::Tensor& t, at::ScalarType type) {
  TORCH_CHECK(type == at::kFloat || type == at::kBFloat16, op, ": expected float32 or bfloat16, got ", type);
  TORCH_CHECK(t.scalar_type() == type, op, ": tensors of ", type, " and ", t.scalar_type());
}

// run_as(T{}) with the C++ type of a float32 or bfloat16 tensor.
template <typename Run>
void dispatch(at::ScalarType type, Run run_as) {
  type == at::kFloat ? run_as(float{}) : run_as(Bf16{});
}

at::Tensor rms_norm(const at::Tensor& x, const at::Tensor& weight, double eps) {
  TORCH_CHECK(x.dim() >= 1 && weight.dim() == 1 && weight.size(0) == x.size(-1), "rms_norm: expected x (..., K) and weight (K), got ",
              x.sizes(), " and ", weight.sizes());
  check_type("rms_norm", weight, x.scalar_type());
  const at::Tensor x_c = x.contiguous(), weight_c = weight.contiguous();
  at::Tensor out = at::empty(x.sizes(), x.options());
  const int64_t K = x.size(-1), rows = K ? x.numel() / K : 0;
  dispatch(x.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const T *from = x_c.const_data_ptr<T>(), *w = weight_c.const_data_ptr<T>();
    T* to = out.data_ptr<T>();
    const auto version = ARSP_VERSION(norm_row<T>);
    const int64_t worth = worth_a_thread(kThreadValues) / std::max<int64_t>(1, K);
    at::parallel_for(0, rows, std::max<int64_t>(1, worth), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) version(from + i * K, w, static_cast<float>(eps), K, to + i * K);
    });
  });
  return out;
}

at::Tensor apply_rope(const at::Tensor& x, const at::Tensor& table) {
  TORCH_CHECK(x.dim() == 4 && x.size(3) % 2 == 0, "apply_rope: expected x (B, n, H, D) with even D, got ", x.sizes());
  const int64_t B = x.size(0), n = x.size(1), H = x.size(2), D = x.size(3);
  const bool by_row = table.dim() == 4;
  TORCH_CHECK(table.scalar_type() == at::kFloat && (table.dim() == 3 || (by_row && table.size(0) == B)) && table.size(-3) == n &&
                  table.size(-2) == D / 2 && table.size(-1) == 2,
              "apply_rope: expected a table float32 (n, D / 2, 2) or (B, n, D / 2, 2) for x ", x.sizes(), ", got ", table.scalar_type(),
              " ", table.sizes());
  check_type("apply_rope", x, x.scalar_type());
  const at::Tensor x_c = adjacent(x), table_c = table.contiguous();
  at::Tensor out = at::empty(x.sizes(), x.options());
  dispatch(x.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const T* from = x_c.const_data_ptr<T>();
    const float* turns = table_c.const_data_ptr<float>();
    T* to = out.data_ptr<T>();
    const auto version = ARSP_VERSION(rotate_row<T>);
    const int64_t worth = worth_a_thread(kThreadValues) / std::max<int64_t>(1, H * D);
    at::parallel_for(0, B * n, std::max<int64_t>(1, worth), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i)
        for (int64_t h = 0; h < H; ++h)
          version(from + i / n * x_c.stride(0) + i % n * x_c.stride(1) + h * x_c.stride(2), turns + (by_row ? i : i % n) * D, D,
                  to + (i * H + h) * D);
    });
  });
  return out;
}

at::Tensor cached_attention(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, at::Tensor k_cache, at::Tensor v_cache,
                            int64_t start, const std::optional<at::Tensor>& mask, std::optional<double> scale,
                            const std::optional<at::Tensor>& starts) {
  const char* const name = "cached_attention";
  for (const at::Tensor* t : {&q, &k, &v, &static_cast<const at::Tensor&>(k_cache), &static_cast<const at::Tensor&>(v_cache)}) {
    TORCH_CHECK(t->dim() == 4, name, ": expected tensors (B, H, n, D), got ", t->sizes());
    check_type(name, *t, q.scalar_type());
  }
  const int64_t B = q.size(0), H = q.size(1), n = q.size(2), D = q.size(3), Dv = v.size(3);
  TORCH_CHECK(k.sizes() == q.sizes() && v.size(0) == B && v.size(1) == H && v.size(2) == n, name, ": q ", q.sizes(), ", k ", k.sizes(),
              ", v ", v.sizes(), " differ");
  at::Tensor starts_c;
  int64_t least = start, most = start;
  if (starts) {
    TORCH_CHECK(starts->scalar_type() == at::kLong && starts->dim() == 1 && starts->size(0) == B && !mask, name,
                ": expected starts int64 (", B, ") and no mask, got ", starts->scalar_type(), " ", starts->sizes());
    starts_c = starts->contiguous();
    const int64_t* each = starts_c.const_data_ptr<int64_t>();
    least = B ? *std::min_element(each, each + B) : 0;
    most = B ? *std::max_element(each, each + B) : 0;
  }
  for (const auto& [cache, width] : {std::pair(&k_cache, D), std::pair(&v_cache, Dv)})
    TORCH_CHECK(cache->size(0) >= B && cache->size(1) == H && cache->size(3) == width && least >= 0 && most + n <= cache->size(2) &&
                    (cache->stride(3) == 1 || width <= 1),
                name, ": slots ", least, "..", most + n, " of ", B, " rows do not fit a cache ", cache->sizes());
  TORCH_CHECK(!mask || (mask->scalar_type() == at::kBool && mask->dim() == 4 && (mask->size(0) == B || mask->size(0) == 1) &&
                        mask->size(1) == 1 && mask->size(2) == n && mask->size(3) == start + n),
              name, ": expected a mask bool (B | 1, 1, ", n, ", ", start + n, ")");
  at::Tensor out = at::empty({B, n, H, Dv}, q.options()).transpose(1, 2);
  const at::Tensor q_c = adjacent(q), k_c = adjacent(k), v_c = adjacent(v);
  const int64_t products = std::max<int64_t>(1, n * (most + n) * (D + Dv));
  dispatch(q.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const auto view = [](const at::Tensor& t) { return View<T>{t.data_ptr<T>(), t.stride(0), t.stride(1), t.stride(2)}; };
    const Attention<T> task{view(q_c), view(k_c), view(v_c), view(k_cache), view(v_cache), view(out),
                            mask ? mask->const_data_ptr<bool>() : nullptr,
                            mask && mask->size(0) > 1 ? mask->stride(0) : 0,
                            mask ? mask->stride(2) : 0,
                            mask ? mask->stride(3) : 0,
                            starts ? starts_c.const_data_ptr<int64_t>() : nullptr,
                            n, start, D, Dv,
                            static_cast<float>(scale.value_or(1 / std::sqrt(static_cast<double>(std::max<int64_t>(1, D)))))};
    const auto version = ARSP_VERSION(attend_head<T>);
    at::parallel_for(0, B * H, std::max<int64_t>(1, worth_a_thread(kThreadProducts) / products), [&](int64_t begin, int64_t end) {
      thread_local std::vector<float> scratch;
      scratch.resize(std::max<size_t>(scratch.size(), kQueries * (D + most + n + 2 * kMostLanes)));
      for (int64_t i = begin; i < end; ++i) version(task, i / H, i % H, scratch.data());
    });
  });
  return out;
}

}  // namespace

TORCH_LIBRARY_IMPL(arsp, CPU, m) {
  m.impl("rms_norm", rms_norm);
  m.impl("apply_rope", apply_rope);
  m.impl("cached_attention", cached_attention);
}
