// The contract of the SwiGLU ops' arguments, the same on every device (csrc/cpu/swiglu.cpp, csrc/cuda/swiglu.cu).

#pragma once

#include "common/tensor.h"

namespace solar_mega {

struct SwigluShape {
  int64_t width; // columns of the output: half of x's
  Rows x;
  Rows dy;
};

inline SwigluShape check_swiglu(const char* op, const Tensor& x) {
  check_float_dtype(op, "x", x);
  SOLAR_MEGA_CHECK(
      x.dim() >= 1 && x.size(-1) >= 2 && x.size(-1) % 2 == 0, op, ": x has shape ", to_text(x.sizes()),
      "; allowed: [..., 2 * width] with width >= 1");
  return {x.size(-1) / 2, rows_of(op, "x", x), {}};
}

inline std::vector<int64_t> swiglu_output_sizes(const Tensor& x) {
  std::vector<int64_t> sizes(x.sizes().begin(), x.sizes().end());
  sizes.back() /= 2;
  return sizes;
}

inline SwigluShape check_swiglu_backward(const Tensor& dy, const Tensor& x) {
  const char* op = "swiglu_backward";
  SwigluShape shape = check_swiglu(op, x);
  check_device(op, "dy", dy, x);
  check_dtype(op, "dy", dy, x.scalar_type(), ", as x");
  const std::vector<int64_t> wanted = swiglu_output_sizes(x);
  const auto sizes = dy.sizes();
  bool same = sizes.size() == wanted.size();
  for (size_t i = 0; same && i < wanted.size(); ++i) same = sizes[i] == wanted[i];
  SOLAR_MEGA_CHECK(
      same, op, ": dy has shape ", to_text(sizes), "; it must be ", to_text({wanted.data(), wanted.size()}),
      ", half of each row of x");
  shape.dy = rows_of(op, "dy", dy);
  return shape;
}

} // namespace solar_mega
