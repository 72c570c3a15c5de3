// RMSNorm kernels: forward, residual add + forward, backward, and the sum of the weight gradient's partials.
// Formulas: solar_mega/ops/rms_norm.py. T is float, __nv_bfloat16 or __half; all arithmetic is fp32.
//
// Layout of the vector kernels, a row of `width` elements being nv = width / kLanes<T> vectors of 16 bytes:
//
//                    threadIdx.x ->  0     1     2   ...  tpr-1 |  0     1   ...   (tpr = blockDim.x)
//     row (threadIdx.y)   vectors  [ 0 ] [ 1 ] [ 2 ] ... [tpr-1] [tpr] [tpr+1] ...
//                                   '------- j = 0 ------------' '---- j = 1, ..., K-1
//
//     Each thread holds K vectors of its row in registers: a row is read once. The grid is persistent, blocks step
//     over rows by gridDim.x * blockDim.y. For K <= 2 the weight's K vectors stay in registers for all of them, and
//     the next row's vectors are on their way while this row's sum is being reduced. K = 4 has no registers left
//     for either: it reads the weight from L1 and leans on its twice as many loads in flight.
//
// Launch: block (tpr, rows per block), at most block_threads(K) threads; grid = SMs * resident blocks, or fewer
// when rows run out. __launch_bounds__ caps registers so that those blocks are resident together.
//
//     width / lanes      K   tpr           e.g. bf16 width
//     1 .. 128           1   32 .. 128     <= 1024
//     129 .. 512         2   96 .. 256     <= 4096
//     513 .. 2048        4   160 .. 512    <= 16384      (fp32: <= 8192)
//     other widths, or rows that are not 16-byte aligned: the *_any_width kernels, one element at a time
//
// Floor bytes, R rows of width H and element size e (8192 x 4096 bf16 in brackets, MB):
//     forward           2 R H e + 4 R      (134.3)      add + forward         4 R H e + 4 R   (268.5)
//     backward          3 R H e + 4 R      (201.4)      + residual gradient   4 R H e + 4 R   (268.5)
//     The backward's partials add 4 H * 2 * (grid * rows per block), written and read through L2 (8.7 on 132 SMs).
//
// dweight takes two stages and no atomics, so it is the same to the bit in every run:
//     block b, row slot s  ->  partial[b * blockDim.y + s, :] fp32      rms_norm_backward_kernel
//     partial [P, width]   ->  dweight [width]                          rms_norm_sum_partials_kernel

#pragma once

#include "cuda/device.cuh"

namespace solar_mega {

constexpr int block_threads(int k) { return k <= 2 ? 256 : 512; }
constexpr int forward_blocks_per_sm(int k) { return 1024 / block_threads(k); }
constexpr int backward_blocks_per_sm(int k) { return 512 / block_threads(k); }
constexpr int kAnyWidthThreads = 256;
constexpr int kAnyWidthBlocksPerSm = 4;
constexpr int kMaxVectorsPerRow = 4 * 512;
constexpr int kSumTile = 32; // columns, and row groups, of a block of rms_norm_sum_partials_kernel

// How rows are laid over threads; k = 0 stands for the any-width kernels.
struct NormPlan {
  int k;
  dim3 block;

  unsigned grid(int64_t rows, int blocks_per_sm, int processors) const {
    const int64_t needed = (rows + block.y - 1) / block.y, resident = static_cast<int64_t>(blocks_per_sm) * processors;
    return static_cast<unsigned>(needed < resident ? needed : resident);
  }
};

// `aligned`: every row of every tensor starts on 16 bytes.
inline NormPlan plan_norm(int64_t width, int64_t lanes, bool aligned) {
  const int64_t vectors = width / lanes;
  if (!aligned || width % lanes != 0 || vectors > kMaxVectorsPerRow) return {0, dim3(kAnyWidthThreads, 1)};
  const int k = vectors <= 128 ? 1 : vectors <= 512 ? 2 : 4;
  const int64_t threads = ((vectors + k - 1) / k + kWarp - 1) / kWarp * kWarp;
  return {k, dim3(static_cast<unsigned>(threads), static_cast<unsigned>(block_threads(k) / threads))};
}

template <typename T>
struct NormForward {
  const T* x;
  const T* residual; // null without the add
  const T* weight;
  T* y;         // [rows, width] contiguous
  T* sum;       // x + residual, [rows, width] contiguous; null without the add
  float* rstd;  // [rows]
  Rows x_rows, residual_rows;
  int64_t rows;
  int width;
  float inverse_width, eps;
  float offset; // added to the weight: 1 when zero-centred, else 0
};

template <typename T>
struct NormBackward {
  const T* dy;
  const T* x;
  const T* weight;
  const T* dresidual; // null without
  const float* rstd;  // [rows]
  T* dx;              // [rows, width] contiguous
  float* partial;     // [gridDim.x * blockDim.y, width]
  Rows dy_rows, x_rows, dresidual_rows;
  int64_t rows;
  int width;
  float inverse_width, offset;
};

// The weight's vector `at`: held in registers, or read again.
template <typename T, int K>
__device__ inline uint4 weight_vector(const uint4 (&held)[K], const T* weight, int j, int at, int nv) {
  if (K <= 2) return held[j];
  return at < nv ? load16(weight + at * kLanes<T>) : uint4{0, 0, 0, 0};
}

// This thread's K vectors of one row; zeros beyond the row's end and beyond the last row.
template <typename T, int K>
__device__ inline void load_row(const T* base, const Rows& layout, int64_t row, bool live, int nv, uint4 (&out)[K]) {
  const T* p = base + (live ? layout.offset(row) : 0);
#pragma unroll
  for (int j = 0; j < K; ++j) {
    const int v = threadIdx.x + j * blockDim.x;
    out[j] = live && v < nv ? load16(p + v * kLanes<T>) : uint4{0, 0, 0, 0};
  }
}

template <typename T, int K, bool kAdd>
__global__ void __launch_bounds__(block_threads(K), forward_blocks_per_sm(K))
    rms_norm_forward_kernel(const NormForward<T> a) {
  constexpr int N = kLanes<T>;
  constexpr bool kPrefetch = K <= 2;
  __shared__ float slots[2][block_threads(K) / kWarp];
  const int nv = a.width / N;
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.y;
  int64_t first = static_cast<int64_t>(blockIdx.x) * blockDim.y; // uniform in the block, so barriers are too

  uint4 weight[K], x[K], residual[K], next_x[K], next_residual[K];
  if (K <= 2) load_row<T, K>(a.weight, Rows{}, 0, true, nv, weight);
  if (kPrefetch) {
    const int64_t row = first + threadIdx.y;
    load_row<T, K>(a.x, a.x_rows, row, row < a.rows, nv, next_x);
    if (kAdd) load_row<T, K>(a.residual, a.residual_rows, row, row < a.rows, nv, next_residual);
  }
  for (int turn = 0; first < a.rows; first += step, turn ^= 1) {
    const int64_t row = first + threadIdx.y;
    const bool live = row < a.rows;
    if (kPrefetch) {
#pragma unroll
      for (int j = 0; j < K; ++j) {
        x[j] = next_x[j];
        if (kAdd) residual[j] = next_residual[j];
      }
      const int64_t ahead = row + step;
      load_row<T, K>(a.x, a.x_rows, ahead, ahead < a.rows, nv, next_x);
      if (kAdd) load_row<T, K>(a.residual, a.residual_rows, ahead, ahead < a.rows, nv, next_residual);
    } else {
      load_row<T, K>(a.x, a.x_rows, row, live, nv, x);
      if (kAdd) load_row<T, K>(a.residual, a.residual_rows, row, live, nv, residual);
    }

    float square = 0;
#pragma unroll
    for (int j = 0; j < K; ++j) {
      float v[N];
      unpack<T>(x[j], v);
      if (kAdd) {
        // Rounded to T before it is normalised: the sum that the next layer and the backward see.
        float r[N];
        unpack<T>(residual[j], r);
#pragma unroll
        for (int i = 0; i < N; ++i) v[i] += r[i];
        x[j] = pack<T>(v);
        unpack<T>(x[j], v);
        const int at = threadIdx.x + j * blockDim.x;
        if (live && at < nv) store16(a.sum + row * a.width + at * N, x[j]);
      }
#pragma unroll
      for (int i = 0; i < N; ++i) square += v[i] * v[i];
    }
    const float rstd = rsqrtf(row_sum(square, slots[turn]) * a.inverse_width + a.eps);
    if (live && threadIdx.x == 0) a.rstd[row] = rstd;
#pragma unroll
    for (int j = 0; j < K; ++j) {
      const int at = threadIdx.x + j * blockDim.x;
      float v[N], w[N];
      unpack<T>(x[j], v);
      unpack<T>(weight_vector<T, K>(weight, a.weight, j, at, nv), w);
#pragma unroll
      for (int i = 0; i < N; ++i) v[i] = v[i] * rstd * (w[i] + a.offset);
      if (live && at < nv) store16(a.y + row * a.width + at * N, pack<T>(v));
    }
  }
}

template <typename T, int K, bool kResidual>
__global__ void __launch_bounds__(block_threads(K), backward_blocks_per_sm(K))
    rms_norm_backward_kernel(const NormBackward<T> a) {
  constexpr int N = kLanes<T>;
  constexpr bool kPrefetch = K <= 2;
  __shared__ float slots[2][block_threads(K) / kWarp];
  const int nv = a.width / N;
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.y;
  int64_t first = static_cast<int64_t>(blockIdx.x) * blockDim.y;

  uint4 weight[K], x[K], dy[K], dres[K], next_x[K], next_dy[K];
  float dweight[K][N] = {}, next_rstd = 0;
  if (K <= 2) load_row<T, K>(a.weight, Rows{}, 0, true, nv, weight);
  if (kPrefetch) {
    const int64_t row = first + threadIdx.y;
    load_row<T, K>(a.x, a.x_rows, row, row < a.rows, nv, next_x);
    load_row<T, K>(a.dy, a.dy_rows, row, row < a.rows, nv, next_dy);
    if (row < a.rows) next_rstd = a.rstd[row];
  }
  for (int turn = 0; first < a.rows; first += step, turn ^= 1) {
    const int64_t row = first + threadIdx.y;
    const bool live = row < a.rows;
    float rstd = next_rstd;
    if (kResidual) load_row<T, K>(a.dresidual, a.dresidual_rows, row, live, nv, dres);
    if (kPrefetch) {
#pragma unroll
      for (int j = 0; j < K; ++j) x[j] = next_x[j], dy[j] = next_dy[j];
      const int64_t ahead = row + step;
      load_row<T, K>(a.x, a.x_rows, ahead, ahead < a.rows, nv, next_x);
      load_row<T, K>(a.dy, a.dy_rows, ahead, ahead < a.rows, nv, next_dy);
      next_rstd = ahead < a.rows ? a.rstd[ahead] : 0.0f;
    } else {
      load_row<T, K>(a.x, a.x_rows, row, live, nv, x);
      load_row<T, K>(a.dy, a.dy_rows, row, live, nv, dy);
      rstd = live ? a.rstd[row] : 0.0f;
    }

    float dot = 0;
#pragma unroll
    for (int j = 0; j < K; ++j) {
      const int at = threadIdx.x + j * blockDim.x;
      float v[N], g[N], w[N];
      unpack<T>(x[j], v);
      unpack<T>(dy[j], g);
      unpack<T>(weight_vector<T, K>(weight, a.weight, j, at, nv), w);
#pragma unroll
      for (int i = 0; i < N; ++i) dot += g[i] * (w[i] + a.offset) * v[i];
    }
    const float pull = rstd * rstd * rstd * (row_sum(dot, slots[turn]) * a.inverse_width);
#pragma unroll
    for (int j = 0; j < K; ++j) {
      const int at = threadIdx.x + j * blockDim.x;
      float v[N], g[N], w[N], r[N] = {};
      unpack<T>(x[j], v);
      unpack<T>(dy[j], g);
      unpack<T>(weight_vector<T, K>(weight, a.weight, j, at, nv), w);
      if (kResidual) unpack<T>(dres[j], r);
#pragma unroll
      for (int i = 0; i < N; ++i) {
        const float scaled = g[i] * rstd;
        dweight[j][i] += scaled * v[i]; // rows past the end were loaded as zeros
        r[i] += scaled * (w[i] + a.offset) - pull * v[i];
      }
      if (live && at < nv) store16(a.dx + row * a.width + at * N, pack<T>(r));
    }
  }

  float* partial = a.partial + (static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y) * a.width;
#pragma unroll
  for (int j = 0; j < K; ++j) {
    const int at = threadIdx.x + j * blockDim.x;
    if (at >= nv) continue;
#pragma unroll
    for (int i = 0; i < N; i += 4) {
      const float4 four = {dweight[j][i], dweight[j][i + 1], dweight[j][i + 2], dweight[j][i + 3]};
      *reinterpret_cast<float4*>(partial + at * N + i) = four;
    }
  }
}

// Any width and alignment: block (kAnyWidthThreads, 1), one row at a time, twice over it (the second time from cache).
template <typename T, bool kAdd>
__global__ void __launch_bounds__(kAnyWidthThreads) rms_norm_forward_any_width_kernel(const NormForward<T> a) {
  __shared__ float slots[2][kAnyWidthThreads / kWarp];
  int turn = 0;
  for (int64_t row = blockIdx.x; row < a.rows; row += gridDim.x, turn ^= 1) {
    const T* x = a.x + a.x_rows.offset(row);
    float square = 0;
    for (int i = threadIdx.x; i < a.width; i += blockDim.x) {
      float v = to_float(x[i]);
      if (kAdd) {
        T rounded;
        from_float(v + to_float(a.residual[a.residual_rows.offset(row) + i]), rounded);
        a.sum[row * a.width + i] = rounded;
        v = to_float(rounded);
      }
      square += v * v;
    }
    const float rstd = rsqrtf(row_sum(square, slots[turn]) * a.inverse_width + a.eps);
    if (threadIdx.x == 0) a.rstd[row] = rstd;
    const T* source = kAdd ? a.sum + row * a.width : x; // each thread reads back what it wrote itself
    for (int i = threadIdx.x; i < a.width; i += blockDim.x)
      from_float(to_float(source[i]) * rstd * (to_float(a.weight[i]) + a.offset), a.y[row * a.width + i]);
  }
}

// Each thread owns its columns of partial[blockIdx.x, :], so the running sums need no barrier.
template <typename T, bool kResidual>
__global__ void __launch_bounds__(kAnyWidthThreads) rms_norm_backward_any_width_kernel(const NormBackward<T> a) {
  __shared__ float slots[2][kAnyWidthThreads / kWarp];
  float* partial = a.partial + static_cast<int64_t>(blockIdx.x) * a.width;
  for (int i = threadIdx.x; i < a.width; i += blockDim.x) partial[i] = 0;
  int turn = 0;
  for (int64_t row = blockIdx.x; row < a.rows; row += gridDim.x, turn ^= 1) {
    const T* x = a.x + a.x_rows.offset(row);
    const T* dy = a.dy + a.dy_rows.offset(row);
    const float rstd = a.rstd[row];
    float dot = 0;
    for (int i = threadIdx.x; i < a.width; i += blockDim.x)
      dot += to_float(dy[i]) * (to_float(a.weight[i]) + a.offset) * to_float(x[i]);
    const float pull = rstd * rstd * rstd * (row_sum(dot, slots[turn]) * a.inverse_width);
    for (int i = threadIdx.x; i < a.width; i += blockDim.x) {
      const float v = to_float(x[i]), scaled = to_float(dy[i]) * rstd;
      float dx = scaled * (to_float(a.weight[i]) + a.offset) - pull * v;
      if (kResidual) dx += to_float(a.dresidual[a.dresidual_rows.offset(row) + i]);
      from_float(dx, a.dx[row * a.width + i]);
      partial[i] += scaled * v;
    }
  }
}

// partial [count, width] -> dweight [width]. Block (kSumTile columns, kSumTile row groups), grid ceil(width / kSumTile):
// group g adds rows g, g + kSumTile, ... in order, then one thread per column adds the groups in order.
template <typename T>
__global__ void __launch_bounds__(kSumTile * kSumTile)
    rms_norm_sum_partials_kernel(const float* partial, int64_t count, int width, T* dweight) {
  __shared__ float groups[kSumTile][kSumTile];
  const int column = blockIdx.x * kSumTile + threadIdx.x;
  float sum = 0;
  if (column < width)
    for (int64_t p = threadIdx.y; p < count; p += kSumTile) sum += partial[p * width + column];
  groups[threadIdx.y][threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.y != 0 || column >= width) return;
  sum = 0;
  for (int g = 0; g < kSumTile; ++g) sum += groups[g][threadIdx.x];
  from_float(sum, dweight[column]);
}

} // namespace solar_mega
