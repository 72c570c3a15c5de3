// The contract of the ops that mix models' weights (csrc/cpu/weighted_sum.cpp, csrc/cpu/dot_products.cpp).

#pragma once

#include "common/tensor.h"

namespace solar_mega {

// The first tensor, which the others have to match: a contiguous vector.
inline void check_first(const char* op, const char* name, const Tensor& t) {
  check_float_dtype(op, name, t);
  SOLAR_MEGA_CHECK(
      t.dim() == 1 && (t.size(0) <= 1 || t.stride(0) == 1), op, ": ", name, " has shape ", to_text(t.sizes()),
      " and strides ", to_text(t.strides()), "; allowed: [elements], contiguous");
}

// Another model's tensor: device, dtype and size of the first.
inline void check_vector(const char* op, const char* name, const Tensor& t, const Tensor& first) {
  check_device(op, name, t, first, "the first input");
  check_dtype(op, name, t, first.scalar_type(), ", as the first input");
  SOLAR_MEGA_CHECK(
      t.dim() == 1 && t.size(0) == first.size(0) && (t.size(0) <= 1 || t.stride(0) == 1), op, ": ", name, " has shape ",
      to_text(t.sizes()), " and strides ", to_text(t.strides()), "; it must be [", first.size(0),
      "] and contiguous, as the first input");
}

} // namespace solar_mega
