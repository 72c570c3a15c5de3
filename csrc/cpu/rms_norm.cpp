// RMSNorm on the CPU: forward, residual add + forward, backward. Formulas: solar_mega/ops/rms_norm.py.
//
//     forward    one row at a time, twice over it while it sits in L1: sum of squares, then the scaled row.
//                Rows are shared out over torch's threads.
//     backward   rows are cut into at most 64 chunks, a function of the shape alone:
//
//                  rows  ┌ chunk 0 ┐ -> dx rows, partial[0, :] ┐
//                        ├ chunk 1 ┤ -> dx rows, partial[1, :] ├ column sums in chunk order -> dweight
//                        └ ...     ┘                           ┘
//
//                so that dweight does not depend, to the bit, on how many threads there are.
//
// Statistics and sums are fp32 for every dtype; outputs are rounded once. The sum x + residual is rounded to the
// dtype before it is normalised: it is what the next layer sees and what the backward reads.

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <tuple>

#include "common/rms_norm.h"
#include "cpu/element.h"

namespace solar_mega {
namespace {

constexpr int64_t kGrain = 32768; // elements below which a thread is not worth waking
constexpr int64_t kMaxChunks = 64;

template <typename T>
SOLAR_MEGA_INLINE void add_rows_body(const T* a, const T* b, T* sum, int64_t width) {
#pragma omp simd
  for (int64_t i = 0; i < width; ++i) sum[i] = from_float<T>(to_float(a[i]) + to_float(b[i]));
}

template <typename T>
SOLAR_MEGA_INLINE void forward_row_body(
    const T* x, const T* weight, T* y, float* rstd, int64_t width, float eps, float offset) {
  float sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < width; ++i) sum += to_float(x[i]) * to_float(x[i]);
  const float r = 1.0f / std::sqrt(sum / static_cast<float>(width) + eps);
  *rstd = r;
#pragma omp simd
  for (int64_t i = 0; i < width; ++i) y[i] = from_float<T>(to_float(x[i]) * r * (to_float(weight[i]) + offset));
}

template <typename T>
SOLAR_MEGA_INLINE void backward_row_body(
    const T* dy, const T* x, const T* weight, const T* dresidual, float r, T* dx, float* dweight, int64_t width,
    float offset) {
  float sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < width; ++i) sum += to_float(dy[i]) * (to_float(weight[i]) + offset) * to_float(x[i]);
  const float pull = r * r * r * (sum / static_cast<float>(width));
  if (dresidual == nullptr) {
#pragma omp simd
    for (int64_t i = 0; i < width; ++i) {
      const float g = to_float(dy[i]) * r, v = to_float(x[i]);
      dx[i] = from_float<T>(g * (to_float(weight[i]) + offset) - pull * v);
      dweight[i] += g * v;
    }
  } else {
#pragma omp simd
    for (int64_t i = 0; i < width; ++i) {
      const float g = to_float(dy[i]) * r, v = to_float(x[i]);
      dx[i] = from_float<T>(g * (to_float(weight[i]) + offset) - pull * v + to_float(dresidual[i]));
      dweight[i] += g * v;
    }
  }
}

template <typename T>
SOLAR_MEGA_INLINE void sum_chunks_body(
    float* partial, int64_t chunks, int64_t width, int64_t from, int64_t to, T* out) {
  for (int64_t c = 1; c < chunks; ++c) {
    const float* row = partial + c * width;
#pragma omp simd
    for (int64_t i = from; i < to; ++i) partial[i] += row[i];
  }
#pragma omp simd
  for (int64_t i = from; i < to; ++i) out[i] = from_float<T>(partial[i]);
}

SOLAR_MEGA_ISA_VARIANTS(add_rows)
SOLAR_MEGA_ISA_VARIANTS(forward_row)
SOLAR_MEGA_ISA_VARIANTS(backward_row)
SOLAR_MEGA_ISA_VARIANTS(sum_chunks)

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// `residual` and `sum` are both given or both null.
template <typename T>
void forward(
    const NormShape& shape, const Tensor& x, const Tensor* residual, const Tensor& weight, float eps, float offset,
    Tensor& y, Tensor* sum, Tensor& rstd) {
  const T* xp = static_cast<const T*>(x.data_ptr());
  const T* wp = static_cast<const T*>(weight.data_ptr());
  const T* rp = residual ? static_cast<const T*>(residual->data_ptr()) : nullptr;
  T* sp = sum ? static_cast<T*>(sum->data_ptr()) : nullptr;
  T* yp = static_cast<T*>(y.data_ptr());
  float* rstd_p = static_cast<float*>(rstd.data_ptr());
  const int64_t width = shape.width;
  torch::stable::parallel_for(0, shape.x.count, ceil_div(kGrain, width), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const T* source = xp + shape.x.offset(row);
      if (rp != nullptr) {
        add_rows(source, rp + shape.other.offset(row), sp + row * width, width);
        source = sp + row * width;
      }
      forward_row(source, wp, yp + row * width, rstd_p + row, width, eps, offset);
    }
  });
}

template <typename T>
void backward(
    const NormShape& shape, const Tensor& dy, const Tensor& x, const Tensor& weight, const Tensor& rstd,
    const Tensor* dresidual, float offset, Tensor& dx, Tensor& dweight) {
  const T* dyp = static_cast<const T*>(dy.data_ptr());
  const T* xp = static_cast<const T*>(x.data_ptr());
  const T* wp = static_cast<const T*>(weight.data_ptr());
  const T* drp = dresidual ? static_cast<const T*>(dresidual->data_ptr()) : nullptr;
  const float* rstd_p = static_cast<const float*>(rstd.data_ptr());
  T* dxp = static_cast<T*>(dx.data_ptr());
  T* dwp = static_cast<T*>(dweight.data_ptr());
  const int64_t width = shape.width, rows = shape.x.count;
  const int64_t chunks = std::clamp<int64_t>(rows * width / kGrain, 1, kMaxChunks);
  const int64_t chunk_rows = ceil_div(rows, chunks);

  Tensor partial_tensor = empty({chunks, width}, ScalarType::Float, x);
  float* partial = static_cast<float*>(partial_tensor.data_ptr());
  torch::stable::parallel_for(0, chunks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c) {
      float* sums = partial + c * width;
      std::memset(sums, 0, width * sizeof(float));
      for (int64_t row = c * chunk_rows; row < std::min(rows, (c + 1) * chunk_rows); ++row)
        backward_row(
            dyp + shape.other.offset(row), xp + shape.x.offset(row), wp,
            drp ? drp + shape.dresidual.offset(row) : nullptr, rstd_p[row], dxp + row * width, sums, width, offset);
    }
  });
  torch::stable::parallel_for(0, width, std::max<int64_t>(64, ceil_div(kGrain, chunks)), [&](int64_t from, int64_t to) {
    sum_chunks(partial, chunks, width, from, to, dwp);
  });
}

std::tuple<Tensor, Tensor> rms_norm(const Tensor& x, const Tensor& weight, double eps, bool zero_centered) {
  const NormShape shape = check_norm_forward("rms_norm", x, nullptr, weight, eps);
  Tensor y = empty(x.sizes(), x.scalar_type(), x), rstd = empty_rstd(x);
  if (x.numel() > 0)
    for_each_dtype(x.scalar_type(), [&](auto t) {
      forward<decltype(t)>(
          shape, x, nullptr, weight, static_cast<float>(eps), zero_centered ? 1.0f : 0.0f, y, nullptr, rstd);
    });
  return {y, rstd};
}

std::tuple<Tensor, Tensor, Tensor> add_rms_norm(
    const Tensor& x, const Tensor& residual, const Tensor& weight, double eps, bool zero_centered) {
  const NormShape shape = check_norm_forward("add_rms_norm", x, &residual, weight, eps);
  Tensor y = empty(x.sizes(), x.scalar_type(), x), sum = empty(x.sizes(), x.scalar_type(), x), rstd = empty_rstd(x);
  if (x.numel() > 0)
    for_each_dtype(x.scalar_type(), [&](auto t) {
      forward<decltype(t)>(
          shape, x, &residual, weight, static_cast<float>(eps), zero_centered ? 1.0f : 0.0f, y, &sum, rstd);
    });
  return {y, sum, rstd};
}

std::tuple<Tensor, Tensor> rms_norm_backward(
    const Tensor& dy, const Tensor& x, const Tensor& weight, const Tensor& rstd, std::optional<Tensor> dresidual,
    bool zero_centered) {
  const NormShape shape = check_norm_backward(dy, x, weight, rstd, dresidual);
  Tensor dx = empty(x.sizes(), x.scalar_type(), x), dweight = empty(weight.sizes(), x.scalar_type(), x);
  if (x.numel() == 0)
    std::memset(dweight.data_ptr(), 0, shape.width * dweight.element_size());
  else
    for_each_dtype(x.scalar_type(), [&](auto t) {
      backward<decltype(t)>(
          shape, dy, x, weight, rstd, dresidual ? &*dresidual : nullptr, zero_centered ? 1.0f : 0.0f, dx, dweight);
    });
  return {dx, dweight};
}

} // namespace

STABLE_TORCH_LIBRARY_IMPL(solar_mega, CPU, m) {
  m.impl("rms_norm", TORCH_BOX(&rms_norm));
  m.impl("add_rms_norm", TORCH_BOX(&add_rms_norm));
  m.impl("rms_norm_backward", TORCH_BOX(&rms_norm_backward));
}

} // namespace solar_mega
