// Weighted sums of models' weights on the CPU: read once, added up in fp32, rounded once, and looked at for values
// that are not finite on the way. Formula: solar_mega/ops/weighted_sum.py.
//
// One thread: who merges a model has a tensor per thread.

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <vector>

#include "common/mix.h"
#include "cpu/element.h"

namespace solar_mega {
namespace {

constexpr int64_t kBlock = 2048; // elements: their fp32 sums, 8 KB, stay in the first-level cache

// Whether the exponent is all ones: infinity or NaN.
SOLAR_MEGA_INLINE uint32_t not_finite(float v) { return (__builtin_bit_cast(uint32_t, v) & 0x7f800000u) == 0x7f800000u; }
SOLAR_MEGA_INLINE uint32_t not_finite(BFloat16 v) { return (v.bits & 0x7f80u) == 0x7f80u; }
SOLAR_MEGA_INLINE uint32_t not_finite(Float16 v) { return (v.bits & 0x7c00u) == 0x7c00u; }

// y[i] = round(wa a[i] + wb b[i]); *bad becomes 1 where any y is not finite. Averages and SLERP: no sums in memory.
template <typename T, typename Y>
SOLAR_MEGA_INLINE void pair_body(const T* a, const T* b, float wa, float wb, Y* y, uint32_t* bad, int64_t n) {
  uint32_t found = 0;
#pragma omp simd reduction(| : found)
  for (int64_t i = 0; i < n; ++i)
    found |= not_finite(y[i] = from_float<Y>(wa * to_float(a[i]) + wb * to_float(b[i])));
  *bad |= found;
}

// sum[i] (+)= w (x[i] - base[i])
template <typename T>
SOLAR_MEGA_INLINE void add_body(float* sum, const T* x, const T* base, float w, bool first, int64_t n) {
  if (first) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) sum[i] = 0.0f;
  }
  if (base == nullptr) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) sum[i] += w * to_float(x[i]);
  } else {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) sum[i] += w * (to_float(x[i]) - to_float(base[i]));
  }
}

// y[i] = round(sum[i] + base[i])
template <typename T, typename Y>
SOLAR_MEGA_INLINE void store_body(const float* sum, const T* base, Y* y, uint32_t* bad, int64_t n) {
  uint32_t found = 0;
  if (base == nullptr) {
#pragma omp simd reduction(| : found)
    for (int64_t i = 0; i < n; ++i) found |= not_finite(y[i] = from_float<Y>(sum[i]));
  } else {
#pragma omp simd reduction(| : found)
    for (int64_t i = 0; i < n; ++i) found |= not_finite(y[i] = from_float<Y>(sum[i] + to_float(base[i])));
  }
  *bad |= found;
}

SOLAR_MEGA_ISA_VARIANTS(pair)
SOLAR_MEGA_ISA_VARIANTS(add)
SOLAR_MEGA_ISA_VARIANTS(store)

template <typename T, typename Y>
bool sum_up(const std::vector<const T*>& x, const std::vector<float>& weights, const T* base, Y* y, int64_t elements) {
  alignas(64) float sum[kBlock];
  uint32_t bad = 0;
  for (int64_t at = 0; at < elements; at += kBlock) {
    const int64_t n = std::min(kBlock, elements - at);
    if (x.size() == 2 && base == nullptr) {
      pair(x[0] + at, x[1] + at, weights[0], weights[1], y + at, &bad, n);
      continue;
    }
    const T* origin = base == nullptr ? nullptr : base + at;
    for (size_t i = 0; i < x.size(); ++i) add(&sum[0], x[i] + at, origin, weights[i], i == 0, n);
    store(static_cast<const float*>(sum), origin, y + at, &bad, n);
  }
  return bad == 0;
}

void check(
    const std::vector<Tensor>& inputs, const std::vector<double>& weights, const std::optional<Tensor>& base,
    const Tensor& out) {
  const char* op = "weighted_sum_out";
  SOLAR_MEGA_CHECK(!inputs.empty(), op, ": no inputs; allowed: one or more");
  SOLAR_MEGA_CHECK(
      weights.size() == inputs.size(), op, ": ", weights.size(), " weights for ", inputs.size(), " inputs");
  check_first(op, "the first input", inputs[0]);
  for (const Tensor& x : inputs) check_vector(op, "an input", x, inputs[0]);
  if (base) check_vector(op, "base", *base, inputs[0]);
  check_device(op, "out", out, inputs[0], "the first input");
  check_first(op, "out", out);
  SOLAR_MEGA_CHECK(
      out.size(0) == inputs[0].size(0), op, ": out has ", out.size(0), " elements; it must have ", inputs[0].size(0),
      ", as the inputs");
}

bool weighted_sum_out(
    std::vector<Tensor> inputs, std::vector<double> weights, const std::optional<Tensor>& base, const Tensor& out) {
  check(inputs, weights, base, out);
  const std::vector<float> factors(weights.begin(), weights.end());
  bool finite = true;
  for_each_dtype(inputs[0].scalar_type(), [&](auto stored) {
    using T = decltype(stored);
    std::vector<const T*> x;
    for (const Tensor& input : inputs) x.push_back(static_cast<const T*>(input.data_ptr()));
    const T* origin = base ? static_cast<const T*>(base->data_ptr()) : nullptr;
    for_each_dtype(out.scalar_type(), [&](auto written) {
      using Y = decltype(written);
      finite = sum_up(x, factors, origin, static_cast<Y*>(out.data_ptr()), out.size(0));
    });
  });
  return finite;
}

} // namespace

STABLE_TORCH_LIBRARY_IMPL(solar_mega, CPU, m) { m.impl("weighted_sum_out", TORCH_BOX(&weighted_sum_out)); }

} // namespace solar_mega
