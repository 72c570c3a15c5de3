// Rotary kernels: packed QKV -> q, k, v (forward) and dq, dk, dv -> packed dQKV (backward, the opposite angle).
// Formulas: solar_mega/ops/qkv_rotary.py. T is float, __nv_bfloat16 or __half; all arithmetic is fp32.
//
// Vector kernel. A head of d elements is d / N vectors of 16 bytes (N = kLanes<T>), `half` pairs are half / N:
//
//     head        [ 0 | 1 | .. | hv-1 ][ hv | hv+1 | .. | 2hv-1 ][ rest: copied ]          hv = half / N
//     lane (threadIdx.x)  0   1  .. hv-1    0     1  ..    hv-1     0  1 ..
//
//     Lane l owns vectors l and hv + l: in the half style they are each other's partners, in the interleaved style
//     each holds its own pairs; either way the lane's N cosines and N sines are the same for all heads of the token,
//     so they are loaded once and stay in registers. threadIdx.y walks the token's heads, groups * (per_group + 2),
//     two at a time so that four 16-byte loads are in flight; threadIdx.z is the token.
//
// Launch: block (hv, slots, tokens) of at most kRotaryThreads, grid = min(ceil(s b / tokens), SMs * kRotaryBlocksPerSm)
// and blocks step over tokens.
//
//     d 128, all rotated, 16-bit     hv 8    block (8, 16, 1)    e.g. 48 heads of a 7B model: 3 per thread
//     d 64                           hv 4    block (4, 32, 1)    32-byte stretches at least, whole sectors
//     d, half or strides that are no multiples of 16 bytes: the elements kernel, one pair at a time
//
// Floor bytes, T = s b tokens, H = groups (per_group + 2) d elements each of size e: forward and backward 2 T H e, and
// the tables once per distinct position, 4 * 2 * half each (8192 tokens, 32 query and 8 key/value heads of 128, bf16:
// 201.3 MB, + 2.1 for 4096 positions).
//
// A position outside the tables cannot be refused without waiting for the device: that token's rotated elements are
// written as NaN, and no memory outside the tables is read.

#pragma once

#include "common/heads.h"
#include "cuda/device.cuh"

namespace solar_mega {

constexpr int kRotaryThreads = 128;
constexpr int kRotaryBlocksPerSm = 8;

template <typename T>
struct QkvRotary {
  T* packed; // read by the forward, written by the backward
  T* q;      // the other way round
  T* k;
  T* v;
  const float* cos; // [table_rows, half]
  const float* sin;
  const int64_t* positions; // null: the place in the sequence
  QkvShape shape;
};

struct RotaryPlan {
  bool vectors;
  dim3 block;

  unsigned grid(int64_t tokens, int processors) const {
    const int64_t needed = (tokens + block.z - 1) / block.z, resident = int64_t{kRotaryBlocksPerSm} * processors;
    return static_cast<unsigned>(needed < resident ? needed : resident);
  }
};

// `aligned`: every head of every tensor starts on 16 bytes, and so do the rows of the tables.
inline RotaryPlan plan_rotary(const QkvShape& shape, int64_t lanes, bool aligned) {
  const int64_t hv = shape.half / lanes, heads = shape.groups * (shape.per_group + 2);
  if (!aligned || shape.half % lanes != 0 || shape.head_dim % lanes != 0 || hv > kRotaryThreads)
    return {false, dim3(kRotaryThreads, 1, 1)};
  int64_t slots = kRotaryThreads / hv, tokens = 1;
  if (slots > heads) { // few heads: several tokens to a block
    tokens = slots / heads;
    slots = heads;
  }
  return {true, dim3(static_cast<unsigned>(hv), static_cast<unsigned>(slots), static_cast<unsigned>(tokens))};
}

// 16 bytes from and to global memory. A pointer chosen among several loses its address space, and a plain access
// through it would be a generic one.
template <typename T>
__device__ inline uint4 load_global16(const T* p) {
#ifdef __CUDA_ARCH__
  return __ldg(reinterpret_cast<const uint4*>(p));
#else
  return load16(p);
#endif
}
template <typename T>
__device__ inline void store_global16(T* p, uint4 v) {
#ifdef __CUDA_ARCH__
  __stwb(reinterpret_cast<uint4*>(p), v);
#else
  store16(p, v);
#endif
}

// Where head h of a token starts in q, k or v; whether it turns.
template <typename T>
struct HeadPlace {
  T* packed;
  T* apart;
  bool turns;
};

template <typename T>
__device__ inline HeadPlace<T> head_place(const QkvRotary<T>& a, int s, int b, int h) {
  const int per = static_cast<int>(a.shape.per_group) + 2;
  const int group = h / per, slot = h - group * per;
  const HeadStrides& row = a.shape.packed;
  T* packed = a.packed + s * row.s + b * row.b + group * row.head + slot * a.shape.head_dim;
  if (slot < per - 2) {
    const HeadStrides& q = a.shape.q;
    return {packed, a.q + s * q.s + b * q.b + (group * (per - 2) + slot) * q.head, true};
  }
  const bool key = slot == per - 2;
  const HeadStrides& kv = key ? a.shape.k : a.shape.v;
  return {packed, (key ? a.k : a.v) + s * kv.s + b * kv.b + group * kv.head, key};
}

template <typename T>
__device__ inline int64_t position_of(const QkvRotary<T>& a, int s, int b) {
  return a.positions == nullptr ? s : a.positions[s * a.shape.position_s + b * a.shape.position_b];
}

// The lane's cosines and (signed) sines. Half style: pairs l N ... of the two partner vectors. Interleaved: the N/2
// pairs of vector l, then the N/2 of vector hv + l.
template <int N, bool kInterleaved>
__device__ inline void load_angles(const float* row, int lane, int hv, float sign, float (&out)[N]) {
#pragma unroll
  for (int i = 0; i < N; i += 4) {
    float4 four;
    if (!kInterleaved) {
      four = *reinterpret_cast<const float4*>(row + lane * N + i);
    } else if (N == 8) {
      four = *reinterpret_cast<const float4*>(row + (i == 0 ? lane : hv + lane) * 4);
    } else {
      const float2 low = *reinterpret_cast<const float2*>(row + lane * 2);
      const float2 high = *reinterpret_cast<const float2*>(row + (hv + lane) * 2);
      four = float4{low.x, low.y, high.x, high.y};
    }
    out[i] = sign * four.x, out[i + 1] = sign * four.y, out[i + 2] = sign * four.z, out[i + 3] = sign * four.w;
  }
}

template <typename T, bool kInterleaved>
__device__ inline void turn(uint4& first, uint4& second, const float (&c)[kLanes<T>], const float (&n)[kLanes<T>]) {
  constexpr int N = kLanes<T>;
  float x[N], y[N], u[N], w[N];
  unpack<T>(first, x);
  unpack<T>(second, y);
  if (!kInterleaved) {
#pragma unroll
    for (int i = 0; i < N; ++i) u[i] = x[i] * c[i] - y[i] * n[i], w[i] = y[i] * c[i] + x[i] * n[i];
  } else {
#pragma unroll
    for (int i = 0; i < N / 2; ++i) {
      const int j = N / 2 + i;
      u[2 * i] = x[2 * i] * c[i] - x[2 * i + 1] * n[i];
      u[2 * i + 1] = x[2 * i + 1] * c[i] + x[2 * i] * n[i];
      w[2 * i] = y[2 * i] * c[j] - y[2 * i + 1] * n[j];
      w[2 * i + 1] = y[2 * i + 1] * c[j] + y[2 * i] * n[j];
    }
  }
  first = pack<T>(u);
  second = pack<T>(w);
}

template <typename T, bool kBackward, bool kInterleaved>
__global__ void __launch_bounds__(kRotaryThreads, kRotaryBlocksPerSm) qkv_rotary_kernel(const QkvRotary<T> a) {
  constexpr int N = kLanes<T>;
  constexpr int kAtOnce = 2;
  const int lane = threadIdx.x, hv = blockDim.x;
  const int heads = static_cast<int>(a.shape.groups * (a.shape.per_group + 2));
  const int vectors = static_cast<int>(a.shape.head_dim) / N;
  const int batch = static_cast<int>(a.shape.b);
  const int64_t tokens = a.shape.s * a.shape.b, step = static_cast<int64_t>(gridDim.x) * blockDim.z;
  for (int64_t token = static_cast<int64_t>(blockIdx.x) * blockDim.z + threadIdx.z; token < tokens; token += step) {
    const int s = static_cast<int>(token / batch), b = static_cast<int>(token - static_cast<int64_t>(s) * batch);
    const int64_t at = position_of(a, s, b);
    float c[N], n[N];
    if (at >= 0 && at < a.shape.table_rows) {
      load_angles<N, kInterleaved>(a.cos + at * a.shape.half, lane, hv, 1.0f, c);
      load_angles<N, kInterleaved>(a.sin + at * a.shape.half, lane, hv, kBackward ? -1.0f : 1.0f, n);
    } else {
#pragma unroll
      for (int i = 0; i < N; ++i) c[i] = n[i] = bits_as<float>(0x7fc00000u);
    }
    for (int h = threadIdx.y; h < heads; h += kAtOnce * blockDim.y) {
      uint4 first[kAtOnce], second[kAtOnce];
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j) {
        const int head = h + j * blockDim.y;
        if (head >= heads) continue;
        const HeadPlace<T> place = head_place(a, s, b, head);
        const T* source = kBackward ? place.apart : place.packed;
        first[j] = load_global16(source + lane * N);
        second[j] = load_global16(source + (hv + lane) * N);
      }
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j) {
        const int head = h + j * blockDim.y;
        if (head >= heads) continue;
        const HeadPlace<T> place = head_place(a, s, b, head);
        const T* source = kBackward ? place.apart : place.packed;
        T* target = kBackward ? place.packed : place.apart;
        if (place.turns) turn<T, kInterleaved>(first[j], second[j], c, n);
        store_global16(target + lane * N, first[j]);
        store_global16(target + (hv + lane) * N, second[j]);
        for (int i = 2 * hv + lane; i < vectors; i += hv) store_global16(target + i * N, load_global16(source + i * N));
      }
    }
  }
}

// Any sizes, strides and alignment. Block (kRotaryThreads), a token at a time; item i of a head is pair i, or from
// `half` on the copied element half + i.
template <typename T, bool kBackward>
__global__ void __launch_bounds__(kRotaryThreads) qkv_rotary_elements_kernel(const QkvRotary<T> a, bool interleaved) {
  const int half = static_cast<int>(a.shape.half), d = static_cast<int>(a.shape.head_dim), items = d - half;
  const int heads = static_cast<int>(a.shape.groups * (a.shape.per_group + 2));
  const int batch = static_cast<int>(a.shape.b);
  const int64_t tokens = a.shape.s * a.shape.b;
  for (int64_t token = blockIdx.x; token < tokens; token += gridDim.x) {
    const int s = static_cast<int>(token / batch), b = static_cast<int>(token - static_cast<int64_t>(s) * batch);
    const int64_t at = position_of(a, s, b);
    const bool known = at >= 0 && at < a.shape.table_rows;
    for (int item = threadIdx.x; item < heads * items; item += blockDim.x) {
      const int h = item / items, i = item - h * items;
      const HeadPlace<T> place = head_place(a, s, b, h);
      const T* source = kBackward ? place.apart : place.packed;
      T* target = kBackward ? place.packed : place.apart;
      if (i >= half) {
        target[half + i] = source[half + i];
        continue;
      }
      const int left = interleaved ? 2 * i : i, right = interleaved ? 2 * i + 1 : half + i;
      if (!place.turns) {
        target[left] = source[left], target[right] = source[right];
        continue;
      }
      const float nan = bits_as<float>(0x7fc00000u);
      const float c = known ? a.cos[at * half + i] : nan;
      const float n = known ? (kBackward ? -a.sin[at * half + i] : a.sin[at * half + i]) : nan;
      const float x = to_float(source[left]), y = to_float(source[right]);
      from_float(x * c - y * n, target[left]);
      from_float(y * c + x * n, target[right]);
    }
  }
}

} // namespace solar_mega
