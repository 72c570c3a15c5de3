// Storage types of the CPU kernels. Conversions are plain arithmetic, so that loops over them vectorise.

#pragma once

#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Half.h>

#include <cstdint>

#include "cpu/dispatch.h"

namespace solar_mega {

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

SOLAR_MEGA_INLINE float to_float(float v) { return v; }
SOLAR_MEGA_INLINE float to_float(BFloat16 v) { return __builtin_bit_cast(float, static_cast<uint32_t>(v.bits) << 16); }
SOLAR_MEGA_INLINE float to_float(Float16 v) { return c10::detail::fp16_ieee_to_fp32_value(v.bits); }

template <typename T>
SOLAR_MEGA_INLINE T from_float(float v);

template <>
SOLAR_MEGA_INLINE float from_float<float>(float v) {
  return v;
}
// Round to nearest, ties to even; a NaN stays one (rounding could carry its payload into infinity).
template <>
SOLAR_MEGA_INLINE BFloat16 from_float<BFloat16>(float v) {
  const uint32_t bits = __builtin_bit_cast(uint32_t, v);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return {static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded)};
}
template <>
SOLAR_MEGA_INLINE Float16 from_float<Float16>(float v) {
  return {c10::detail::fp16_ieee_from_fp32_value(v)};
}

// Calls f with a zero of the storage type; `check_float_dtype` has been there.
template <typename F>
void for_each_dtype(torch::headeronly::ScalarType dtype, const F& f) {
  if (dtype == torch::headeronly::ScalarType::Float) return f(float{});
  if (dtype == torch::headeronly::ScalarType::BFloat16) return f(BFloat16{});
  f(Float16{});
}

} // namespace solar_mega
