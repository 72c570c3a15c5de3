// SwiGLU kernels, forward and backward. Formulas: solar_mega/ops/swiglu.py. T is float, __nv_bfloat16 or __half; all
// arithmetic is fp32.
//
//     row of x   [ g: width | u: width ]        vector i of g, vector i of u -> vector i of y (backward: of dg and du)
//
// Launch: kSwigluThreads per block; blockIdx.y steps over rows, blockIdx.x * blockDim.x + threadIdx.x is the vector (or,
// where rows are not made of 16-byte vectors, the element) in the row. Neighbours read neighbouring 16 bytes.
//
// Floor bytes, R rows of `width` outputs, element size e: forward 3 R width e, backward 5 R width e.

#pragma once

#include "cuda/device.cuh"

namespace solar_mega {

constexpr int kSwigluThreads = 256;

template <typename T>
struct Swiglu {
  const T* x;
  const T* dy; // null in the forward
  T* out;      // y [rows, width] or dx [rows, 2 width], contiguous
  Rows x_rows, dy_rows;
  int64_t rows;
  int width;
};

__device__ inline float sigmoid(float v) { return 1.0f / (1.0f + expf(-v)); }

__device__ inline void swiglu_one(float gate, float up, float& y) { y = gate * sigmoid(gate) * up; }

__device__ inline void swiglu_one_backward(float gate, float up, float dy, float& dgate, float& dup) {
  const float s = sigmoid(gate);
  dgate = dy * up * s * (1.0f + gate * (1.0f - s));
  dup = dy * gate * s;
}

template <typename T, bool kBackward>
__global__ void __launch_bounds__(kSwigluThreads) swiglu_kernel(const Swiglu<T> a) {
  constexpr int N = kLanes<T>;
  const int at = (blockIdx.x * blockDim.x + threadIdx.x) * N;
  if (at >= a.width) return;
  for (int64_t row = blockIdx.y; row < a.rows; row += gridDim.y) {
    const T* x = a.x + a.x_rows.offset(row) + at;
    float gate[N], up[N], d[N];
    const uint4 gate_bits = load16(x), up_bits = load16(x + a.width);
    if (kBackward) unpack<T>(load16(a.dy + a.dy_rows.offset(row) + at), d);
    unpack<T>(gate_bits, gate);
    unpack<T>(up_bits, up);
    if (kBackward) {
#pragma unroll
      for (int i = 0; i < N; ++i) swiglu_one_backward(gate[i], up[i], d[i], gate[i], up[i]);
      T* dx = a.out + row * 2 * a.width + at;
      store16(dx, pack<T>(gate));
      store16(dx + a.width, pack<T>(up));
    } else {
#pragma unroll
      for (int i = 0; i < N; ++i) swiglu_one(gate[i], up[i], gate[i]);
      store16(a.out + row * a.width + at, pack<T>(gate));
    }
  }
}

template <typename T, bool kBackward>
__global__ void __launch_bounds__(kSwigluThreads) swiglu_elements_kernel(const Swiglu<T> a) {
  const int at = blockIdx.x * blockDim.x + threadIdx.x;
  if (at >= a.width) return;
  for (int64_t row = blockIdx.y; row < a.rows; row += gridDim.y) {
    const T* x = a.x + a.x_rows.offset(row) + at;
    float gate = to_float(x[0]), up = to_float(x[a.width]);
    if (kBackward) {
      swiglu_one_backward(gate, up, to_float(a.dy[a.dy_rows.offset(row) + at]), gate, up);
      T* dx = a.out + row * 2 * a.width + at;
      from_float(gate, dx[0]);
      from_float(up, dx[a.width]);
    } else {
      swiglu_one(gate, up, gate);
      from_float(gate, a.out[row * a.width + at]);
    }
  }
}

} // namespace solar_mega
