// The three dot products of two models' weights on the CPU, in one pass: fp32 products, summed up in fp32 over short
// blocks and in fp64 over the blocks. Formula: solar_mega/ops/dot_products.py.
//
// One thread: who merges a model has a tensor per thread.

#include <torch/csrc/stable/library.h>

#include <algorithm>

#include "common/mix.h"
#include "cpu/element.h"

namespace solar_mega {
namespace {

// Elements summed up in fp32. With vectors of 16 a lane adds 64 products, so a block errs by 64 roundings at most.
constexpr int64_t kBlock = 1024;

template <typename T>
SOLAR_MEGA_INLINE void block_body(const T* a, const T* b, const T* base, double* sums, int64_t n) {
  float aa = 0, bb = 0, ab = 0;
  if (base == nullptr) {
#pragma omp simd reduction(+ : aa, bb, ab)
    for (int64_t i = 0; i < n; ++i) {
      const float x = to_float(a[i]), y = to_float(b[i]);
      aa += x * x;
      bb += y * y;
      ab += x * y;
    }
  } else {
#pragma omp simd reduction(+ : aa, bb, ab)
    for (int64_t i = 0; i < n; ++i) {
      const float origin = to_float(base[i]), x = to_float(a[i]) - origin, y = to_float(b[i]) - origin;
      aa += x * x;
      bb += y * y;
      ab += x * y;
    }
  }
  sums[0] += aa;
  sums[1] += bb;
  sums[2] += ab;
}

SOLAR_MEGA_ISA_VARIANTS(block)

Tensor dot_products(const Tensor& a, const Tensor& b, const std::optional<Tensor>& base) {
  const char* op = "dot_products";
  check_first(op, "a", a);
  check_vector(op, "b", b, a);
  if (base) check_vector(op, "base", *base, a);
  Tensor sums = empty({3}, ScalarType::Double, a);
  double* out = static_cast<double*>(sums.data_ptr());
  out[0] = out[1] = out[2] = 0;
  for_each_dtype(a.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const T *x = static_cast<const T*>(a.data_ptr()), *y = static_cast<const T*>(b.data_ptr());
    const T* origin = base ? static_cast<const T*>(base->data_ptr()) : nullptr;
    for (int64_t at = 0; at < a.size(0); at += kBlock)
      block(x + at, y + at, origin == nullptr ? nullptr : origin + at, out, std::min(kBlock, a.size(0) - at));
  });
  return sums;
}

} // namespace

STABLE_TORCH_LIBRARY_IMPL(solar_mega, CPU, m) { m.impl("dot_products", TORCH_BOX(&dot_products)); }

} // namespace solar_mega
