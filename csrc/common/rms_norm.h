// The contract of the RMSNorm ops' arguments, the same on every device (csrc/cpu/rms_norm.cpp, csrc/cuda/rms_norm.cu).

#pragma once

#include <optional>

#include "common/tensor.h"

namespace solar_mega {

struct NormShape {
  int64_t width; // hidden size
  Rows x;
  Rows other; // the residual of a forward, the output gradient of a backward
  Rows dresidual;
};

inline void check_norm_weight(const char* op, const Tensor& x, const Tensor& weight) {
  check_device(op, "weight", weight, x);
  check_dtype(op, "weight", weight, x.scalar_type(), ", as x");
  SOLAR_MEGA_CHECK(
      weight.dim() == 1 && weight.size(0) == x.size(-1) && weight.is_contiguous(), op, ": weight has shape ",
      to_text(weight.sizes()), " and strides ", to_text(weight.strides()), "; it must be contiguous of shape [",
      x.size(-1), "], the last dimension of x");
}

inline void check_norm_input(const char* op, const Tensor& x) {
  check_float_dtype(op, "x", x);
  SOLAR_MEGA_CHECK(
      x.dim() >= 1 && x.size(-1) >= 1, op, ": x has shape ", to_text(x.sizes()),
      "; allowed: [..., hidden] with hidden >= 1");
}

inline NormShape check_norm_forward(
    const char* op, const Tensor& x, const Tensor* residual, const Tensor& weight, double eps) {
  check_norm_input(op, x);
  check_norm_weight(op, x, weight);
  SOLAR_MEGA_CHECK(eps >= 0 && eps < 1e30, op, ": eps is ", eps, "; allowed: a finite number >= 0");
  NormShape shape{x.size(-1), rows_of(op, "x", x), {}, {}};
  if (residual != nullptr) {
    check_like(op, "residual", *residual, x);
    shape.other = rows_of(op, "residual", *residual);
  }
  return shape;
}

inline NormShape check_norm_backward(
    const Tensor& dy, const Tensor& x, const Tensor& weight, const Tensor& rstd,
    const std::optional<Tensor>& dresidual) {
  const char* op = "rms_norm_backward";
  check_norm_input(op, x);
  check_norm_weight(op, x, weight);
  check_like(op, "dy", dy, x);
  check_device(op, "rstd", rstd, x);
  check_dtype(op, "rstd", rstd, ScalarType::Float, ", as the forward returned it");
  NormShape shape{x.size(-1), rows_of(op, "x", x), rows_of(op, "dy", dy), {}};
  SOLAR_MEGA_CHECK(
      rstd.numel() * shape.width == x.numel() && rstd.is_contiguous(), op, ": rstd has shape ", to_text(rstd.sizes()),
      " and strides ", to_text(rstd.strides()), "; it must be contiguous with one value per row of x, which is ",
      to_text(x.sizes()));
  if (dresidual.has_value()) {
    check_like(op, "dresidual", *dresidual, x);
    shape.dresidual = rows_of(op, "dresidual", *dresidual);
  }
  return shape;
}

inline Tensor empty_rstd(const Tensor& x) {
  const auto sizes = x.sizes();
  return empty({sizes.data(), sizes.size() - 1}, ScalarType::Float, x);
}

} // namespace solar_mega
