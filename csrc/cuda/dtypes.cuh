// From a tensor's dtype to the storage type of the kernels.

#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <torch/headeronly/core/ScalarType.h>

namespace solar_mega {

// Calls f with a value of the storage type; `check_float_dtype` has been there.
template <typename F>
void for_each_dtype(torch::headeronly::ScalarType dtype, const F& f) {
  if (dtype == torch::headeronly::ScalarType::Float) return f(float{});
  if (dtype == torch::headeronly::ScalarType::BFloat16) return f(__nv_bfloat16{});
  f(__half{});
}

} // namespace solar_mega
