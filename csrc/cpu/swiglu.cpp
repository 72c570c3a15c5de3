// SwiGLU on the CPU: forward and backward, one pass each. Formulas: solar_mega/ops/swiglu.py.

#include <torch/csrc/stable/library.h>

#include "common/swiglu.h"
#include "cpu/element.h"
#include "cpu/exp.h"

namespace solar_mega {
namespace {

constexpr int64_t kGrain = 32768; // elements below which a thread is not worth waking

SOLAR_MEGA_INLINE float sigmoid(float v) {
  const float e = -v < 88.0f ? -v : 88.0f; // fast_exp's limit; sigmoid is 6e-39 there
  return 1.0f / (1.0f + fast_exp(e));
}

template <typename T>
SOLAR_MEGA_INLINE void forward_row_body(const T* x, T* y, int64_t width) {
#pragma omp simd
  for (int64_t i = 0; i < width; ++i) {
    const float gate = to_float(x[i]);
    y[i] = from_float<T>(gate * sigmoid(gate) * to_float(x[width + i]));
  }
}

template <typename T>
SOLAR_MEGA_INLINE void backward_row_body(const T* dy, const T* x, T* dx, int64_t width) {
#pragma omp simd
  for (int64_t i = 0; i < width; ++i) {
    const float gate = to_float(x[i]), d = to_float(dy[i]), s = sigmoid(gate);
    dx[i] = from_float<T>(d * to_float(x[width + i]) * s * (1.0f + gate * (1.0f - s)));
    dx[width + i] = from_float<T>(d * gate * s);
  }
}

SOLAR_MEGA_ISA_VARIANTS(forward_row)
SOLAR_MEGA_ISA_VARIANTS(backward_row)

int64_t grain(int64_t width) { return (kGrain + width - 1) / width; }

Tensor swiglu(const Tensor& x) {
  const SwigluShape shape = check_swiglu("swiglu", x);
  const std::vector<int64_t> sizes = swiglu_output_sizes(x);
  Tensor y = empty({sizes.data(), sizes.size()}, x.scalar_type(), x);
  if (x.numel() == 0) return y;
  for_each_dtype(x.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const T* xp = static_cast<const T*>(x.data_ptr());
    T* yp = static_cast<T*>(y.data_ptr());
    const int64_t width = shape.width;
    torch::stable::parallel_for(0, shape.x.count, grain(width), [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) forward_row(xp + shape.x.offset(row), yp + row * width, width);
    });
  });
  return y;
}

Tensor swiglu_backward(const Tensor& dy, const Tensor& x) {
  const SwigluShape shape = check_swiglu_backward(dy, x);
  Tensor dx = empty(x.sizes(), x.scalar_type(), x);
  if (x.numel() == 0) return dx;
  for_each_dtype(x.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const T *dyp = static_cast<const T*>(dy.data_ptr()), *xp = static_cast<const T*>(x.data_ptr());
    T* dxp = static_cast<T*>(dx.data_ptr());
    const int64_t width = shape.width;
    torch::stable::parallel_for(0, shape.x.count, grain(width), [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row)
        backward_row(dyp + shape.dy.offset(row), xp + shape.x.offset(row), dxp + row * 2 * width, width);
    });
  });
  return dx;
}

} // namespace

STABLE_TORCH_LIBRARY_IMPL(solar_mega, CPU, m) {
  m.impl("swiglu", TORCH_BOX(&swiglu));
  m.impl("swiglu_backward", TORCH_BOX(&swiglu_backward));
}

} // namespace solar_mega
