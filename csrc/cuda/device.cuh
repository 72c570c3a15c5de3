// What the kernels share on the device: 16-byte vectors of any dtype, and sums over a row's threads.
//
// Kernel bodies (*.cuh) know nothing of torch; the launchers (*.cu) do. The bodies therefore compile with any host
// compiler that is given the CUDA headers and definitions of threadIdx, __syncthreads and __shfl_xor_sync.

#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <cstring>

#include "common/rows.h"

namespace solar_mega {

constexpr int kWarp = 32;

// ---- single elements

__device__ inline float to_float(float v) { return v; }
__device__ inline float to_float(__nv_bfloat16 v) { return __bfloat162float(v); }
__device__ inline float to_float(__half v) { return __half2float(v); }

__device__ inline void from_float(float v, float& out) { out = v; }
__device__ inline void from_float(float v, __nv_bfloat16& out) { out = __float2bfloat16_rn(v); }
__device__ inline void from_float(float v, __half& out) { out = __float2half_rn(v); }

// ---- 16 bytes at a time: kept packed in registers (4 of them), unpacked to fp32 where they are used

template <typename T>
constexpr int kLanes = 16 / static_cast<int>(sizeof(T));

template <typename T>
__device__ inline uint4 load16(const T* p) {
  return *reinterpret_cast<const uint4*>(p);
}
template <typename T>
__device__ inline void store16(T* p, uint4 v) {
  *reinterpret_cast<uint4*>(p) = v;
}

template <typename To, typename From>
__device__ inline To bits_as(From v) {
  static_assert(sizeof(To) == sizeof(From), "a change of type, not of value");
  To out;
  memcpy(&out, &v, sizeof(out));
  return out;
}

__device__ inline void unpack_word(uint32_t word, float* out, const float*) { out[0] = bits_as<float>(word); }
__device__ inline void unpack_word(uint32_t word, float* out, const __nv_bfloat16*) {
  out[0] = bits_as<float>(word << 16);
  out[1] = bits_as<float>(word & 0xffff0000u);
}
__device__ inline void unpack_word(uint32_t word, float* out, const __half*) {
  const float2 pair = __half22float2(bits_as<__half2>(word));
  out[0] = pair.x;
  out[1] = pair.y;
}

__device__ inline uint32_t pack_word(const float* v, const float*) { return bits_as<uint32_t>(v[0]); }
__device__ inline uint32_t pack_word(const float* v, const __nv_bfloat16*) {
  return bits_as<uint32_t>(__floats2bfloat162_rn(v[0], v[1]));
}
__device__ inline uint32_t pack_word(const float* v, const __half*) {
  return bits_as<uint32_t>(__floats2half2_rn(v[0], v[1]));
}

template <typename T>
__device__ inline void unpack(uint4 bits, float (&out)[kLanes<T>]) {
  constexpr int step = 4 / static_cast<int>(sizeof(T));
  const T* dtype = nullptr;
  unpack_word(bits.x, out, dtype);
  unpack_word(bits.y, out + step, dtype);
  unpack_word(bits.z, out + 2 * step, dtype);
  unpack_word(bits.w, out + 3 * step, dtype);
}

template <typename T>
__device__ inline uint4 pack(const float (&v)[kLanes<T>]) {
  constexpr int step = 4 / static_cast<int>(sizeof(T));
  const T* dtype = nullptr;
  uint4 bits;
  bits.x = pack_word(v, dtype);
  bits.y = pack_word(v + step, dtype);
  bits.z = pack_word(v + 2 * step, dtype);
  bits.w = pack_word(v + 3 * step, dtype);
  return bits;
}

// ---- 2^v in one instruction: relative error 2^-22, results below 2^-126 are 0

__device__ inline float exp2_approx(float v) {
#ifdef __CUDA_ARCH__
  float out;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(out) : "f"(v));
  return out;
#else
  return exp2f(v);
#endif
}

// ---- sums and maxima: a fixed tree, so two runs agree to the bit, and every thread gets the same value

__device__ inline float warp_sum(float v) {
#pragma unroll
  for (int mask = kWarp / 2; mask > 0; mask /= 2) v += __shfl_xor_sync(0xffffffffu, v, mask);
  return v;
}

// Sum over the blockDim.x threads of this row; blockDim.y rows share the block. blockDim.x is a multiple of 32.
// `slots` holds a float per warp of the block. Calls must alternate between two sets of slots: one barrier per
// call then suffices, since whoever writes a set again has passed the barrier that followed all reads of it.
__device__ inline float row_sum(float v, float* slots) {
  v = warp_sum(v);
  const int warps = static_cast<int>(blockDim.x) / kWarp;
  if (warps == 1) return v;
  slots += threadIdx.y * warps;
  if (threadIdx.x % kWarp == 0) slots[threadIdx.x / kWarp] = v;
  __syncthreads();
  v = 0;
  for (int w = 0; w < warps; ++w) v += slots[w];
  return v;
}

// As row_sum, for the maximum (of numbers: NaNs are passed over).
__device__ inline float row_max(float v, float* slots) {
#pragma unroll
  for (int mask = kWarp / 2; mask > 0; mask /= 2) v = fmaxf(v, __shfl_xor_sync(0xffffffffu, v, mask));
  const int warps = static_cast<int>(blockDim.x) / kWarp;
  if (warps == 1) return v;
  slots += threadIdx.y * warps;
  if (threadIdx.x % kWarp == 0) slots[threadIdx.x / kWarp] = v;
  __syncthreads();
  v = slots[0];
  for (int w = 1; w < warps; ++w) v = fmaxf(v, slots[w]);
  return v;
}

} // namespace solar_mega
