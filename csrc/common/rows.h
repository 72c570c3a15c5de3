// A tensor [..., width] seen as rows. Free of torch headers: kernels take it by value.
//
//     [s, b, h] contiguous            one run of rows, `inner_stride` = h apart           (no division per row)
//     [b, s, h].transpose(0, 1)       runs of `inner` = b rows; rows `inner_stride` = s*h apart,
//                                     runs `outer_stride` = h apart
//
// Offsets are in elements and 64-bit: T * h passes 2^31 on real training shapes.

#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define SOLAR_MEGA_HOST_DEVICE __host__ __device__
#else
#define SOLAR_MEGA_HOST_DEVICE
#endif

namespace solar_mega {

struct Rows {
  int64_t count = 0;
  int64_t inner = 1;
  int64_t inner_stride = 0;
  int64_t outer_stride = 0;

  SOLAR_MEGA_HOST_DEVICE int64_t offset(int64_t row) const {
    if (row < inner) return row * inner_stride;
    return (row / inner) * outer_stride + (row % inner) * inner_stride;
  }
};

} // namespace solar_mega
