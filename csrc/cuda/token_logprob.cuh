// Token log-prob kernels: a row's statistics (and result, where the row is whole), the joining of shards, the gradient.
// Formulas: solar_mega/ops/token_logprob.py; what a row is reduced to: common/token_stats.h. T is float, __nv_bfloat16
// or __half; all arithmetic is fp32.
//
// A block takes one row, of any width and alignment, and reads it once:
//
//     row of n tokens     | head |      vectors of 16 bytes, each of kLanes<T> elements         | tail |
//                          < 16 B  [0][1][2] ... [blockDim-1][blockDim] ...                       < 16 B
//                                   '---- j = 0 ------------' '-- j = 1, ..., kUnroll-1 --' then the next kUnroll
//
//     Each thread has kUnroll vectors in flight, one head and one tail element at most. It keeps its own running
//     maximum m and sum s = Σ exp(x - m), rescaled when the maximum grows (rare after the first vectors), and all are
//     brought to one maximum at the end: a shuffle tree and one barrier each for maximum and sum.
//
// Launch: grid min(rows, 2^31 - 1), block logprob_threads(vectors); 4 blocks of 256 threads stay resident per SM.
//
// Floor bytes, R rows of V/tp columns and element size e (8192 x 32000 bf16 in brackets, MB):
//     forward  R V e        (524.4 with targets and results)
//     backward 2 R V e      (1048.6), in place or not

#pragma once

#include "common/token_stats.h"
#include "cuda/device.cuh"

namespace solar_mega {

constexpr int kLogprobThreads = 256;
constexpr int kUnroll = 4;
constexpr int kCombineThreads = 128;
constexpr float kLog2e = 1.44269504f;

inline unsigned logprob_threads(int64_t vectors) { return vectors <= 512 ? 128 : kLogprobThreads; }

inline unsigned logprob_grid(int64_t rows) {
  constexpr int64_t most = 0x7fffffff;
  return static_cast<unsigned>(rows < most ? rows : most);
}

// Where results go; all [rows]. saved is max [rows], then sum [rows].
struct LogprobResults {
  float *logps, *saved, *entropy; // entropy and hit are null when not wanted
  bool* hit;
};

template <typename T>
struct LogprobForward {
  const T* logits;
  const int64_t* targets;
  const bool* mask; // null: all count
  float* stats;     // [K, rows] for the joining of shards; null: the row is whole, finish it
  LogprobResults results;
  Rows layout;
  Vocabulary vocabulary;
  LossTerms terms;
  bool smooth, spread; // which extra statistics go to `stats`
};

template <typename T>
struct LogprobBackward {
  const float* dlogps; // [rows]
  const T* logits;
  const int64_t* targets;
  const float* saved;
  T* dlogits; // may be logits
  Rows layout, out_layout;
  int width; // columns, of which vocabulary.valid are tokens
  Vocabulary vocabulary;
  LossTerms terms;
};

// Elements of a row before its first 16-byte boundary, and whole vectors from there.
struct Cut {
  int head, vectors;
};

template <typename T>
__device__ inline Cut cut_row(const T* row, int n) {
  const int past = static_cast<int>(reinterpret_cast<uintptr_t>(row) % 16);
  int head = past == 0 ? 0 : (16 - past) / static_cast<int>(sizeof(T));
  if (head > n) head = n;
  return {head, (n - head) / kLanes<T>};
}

// What a thread, then a row, has summed about its own maximum.
struct Running {
  float max = -INFINITY, sum = 0, total = 0, spread = 0;

  // exp(x - max) with the maximum of nothing but -inf taken as 0: the sum then stays 0, or becomes NaN.
  __device__ float shift() const { return max == -INFINITY ? 0.0f : max; }

  // kExtra: also Σ x and Σ exp(x - max)(x - max).
  template <bool kExtra>
  __device__ void raise(float to) {
    if (!(to > max)) return;
    const float step = max - to, factor = exp2_approx(step * kLog2e);
    if (kExtra && sum != 0) spread = factor * (spread + step * sum);
    sum *= factor;
    max = to;
  }

  template <bool kExtra>
  __device__ void add(float x, float about) {
    const float d = x - about, e = exp2_approx(d * kLog2e);
    sum += e;
    if (kExtra) {
      total += x;
      if (e != 0) spread += e * d;
    }
  }
};

template <typename T, bool kExtra>
__device__ inline Running scan_row(const T* row, int n) {
  constexpr int N = kLanes<T>;
  const Cut cut = cut_row(row, n);
  Running r;
  const T* body = row + cut.head;
  for (int first = threadIdx.x; first < cut.vectors; first += kUnroll * blockDim.x) {
    uint4 bits[kUnroll];
#pragma unroll
    for (int j = 0; j < kUnroll; ++j) {
      const int at = first + j * static_cast<int>(blockDim.x);
      bits[j] = at < cut.vectors ? load16(body + at * N) : uint4{0, 0, 0, 0};
    }
#pragma unroll
    for (int j = 0; j < kUnroll; ++j) {
      if (first + j * static_cast<int>(blockDim.x) >= cut.vectors) break;
      float v[N];
      unpack<T>(bits[j], v);
      float peak = v[0];
#pragma unroll
      for (int i = 1; i < N; ++i) peak = fmaxf(peak, v[i]);
      r.raise<kExtra>(peak);
      const float about = r.shift();
#pragma unroll
      for (int i = 0; i < N; ++i) r.add<kExtra>(v[i], about);
    }
  }
  const int tail = cut.head + cut.vectors * N, ends = cut.head + (n - tail); // fewer than 2 N elements
  for (int i = threadIdx.x; i < ends; i += blockDim.x) {
    const float v = to_float(row[i < cut.head ? i : i - cut.head + tail]);
    r.raise<kExtra>(v);
    r.add<kExtra>(v, r.shift());
  }
  return r;
}

__device__ inline void store_result(const LogprobResults& to, int64_t rows, int64_t row, const RowStats& s,
                                    const LossTerms& terms, int64_t vocab_size) {
  const RowResult result = finish_row<float>(s, terms, vocab_size);
  to.logps[row] = result.logp;
  to.saved[row] = s.max;
  to.saved[rows + row] = s.sum;
  if (to.entropy != nullptr) to.entropy[row] = result.entropy;
  if (to.hit != nullptr) to.hit[row] = result.hit;
}

template <typename T>
__device__ inline void store_row(const LogprobForward<T>& a, int64_t row, const RowStats& s) {
  const int64_t rows = a.layout.count;
  if (a.stats == nullptr) return store_result(a.results, rows, row, s, a.terms, a.vocabulary.size);
  a.stats[row] = s.max;
  a.stats[rows + row] = s.sum;
  a.stats[2 * rows + row] = s.target;
  if (a.smooth) a.stats[3 * rows + row] = s.total;
  if (a.spread) a.stats[(3 + a.smooth) * rows + row] = s.spread;
}

template <typename T, bool kExtra>
__global__ void __launch_bounds__(kLogprobThreads, 4) token_logprob_forward_kernel(const LogprobForward<T> a) {
  __shared__ float slots[2][kLogprobThreads / kWarp];
  const int n = static_cast<int>(a.vocabulary.valid);
  for (int64_t row = blockIdx.x; row < a.layout.count; row += gridDim.x) {
    const int64_t target = a.targets[row], column = target - a.vocabulary.first;
    RowStats s{0, 0, 0, 0, 0};
    if (target != kIgnore && (a.mask == nullptr || a.mask[row])) { // the whole block alike
      const T* x = a.logits + a.layout.offset(row);
      if (threadIdx.x == 0 && column >= 0 && column < n) s.target = to_float(x[column]);
      Running r = scan_row<T, kExtra>(x, n);
      s.max = row_max(r.max, slots[0]);
      r.raise<kExtra>(s.max);
      s.sum = row_sum(r.sum, slots[1]);
      if (kExtra) {
        s.total = row_sum(r.total, slots[0]);
        s.spread = row_sum(r.spread, slots[1]);
      }
      if (a.stats == nullptr) s = join_single(s);
      if (target < 0 || target >= a.vocabulary.size) s.target = s.sum = NAN; // no such token: shows in loss and gradient
    }
    if (threadIdx.x == 0) store_row(a, row, s);
  }
}

// stats [shards, K, rows] -> results. One thread per token; grid ceil(rows / kCombineThreads).
__global__ void __launch_bounds__(kCombineThreads) token_logprob_combine_kernel(
    const float* stats, int64_t shards, int64_t rows, bool smooth, bool entropy, LossTerms terms, int64_t vocab_size,
    LogprobResults results) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kCombineThreads + threadIdx.x;
  if (row >= rows) return;
  store_result(results, rows, row, join_shards(stats, shards, rows, row, smooth, entropy), terms, vocab_size);
}

// dlogits of one element that is not the target.
__device__ inline float gradient_at(float x, float max, const RowGradient& g) {
  return g.everywhere - g.scale * exp2_approx((x - max) * kLog2e);
}

// Each thread reads what it then overwrites, so dlogits may be logits; row i of both must start at the same distance
// from a 16-byte boundary, or the row is done element by element.
template <typename T>
__global__ void __launch_bounds__(kLogprobThreads, 4) token_logprob_backward_kernel(const LogprobBackward<T> a) {
  constexpr int N = kLanes<T>;
  const int n = static_cast<int>(a.vocabulary.valid);
  const int64_t rows = a.layout.count;
  for (int64_t row = blockIdx.x; row < rows; row += gridDim.x) {
    const T* x = a.logits + a.layout.offset(row);
    T* dx = a.dlogits + a.out_layout.offset(row);
    const float d = a.dlogps[row], max = a.saved[row], sum = a.saved[rows + row];
    const bool counts = sum != 0 && d != 0;
    const RowGradient g = gradient_of(d, max, sum, a.terms, a.vocabulary.size);
    const int64_t at = a.targets[row] - a.vocabulary.first;
    const int target = at >= 0 && at < n ? static_cast<int>(at) : -1;

    Cut cut = cut_row(x, n);
    if ((reinterpret_cast<uintptr_t>(x) - reinterpret_cast<uintptr_t>(dx)) % 16 != 0) cut = {n, 0};
    const T* body = x + cut.head;
    for (int first = threadIdx.x; first < cut.vectors; first += kUnroll * blockDim.x) {
      uint4 bits[kUnroll];
#pragma unroll
      for (int j = 0; j < kUnroll; ++j) {
        const int v = first + j * static_cast<int>(blockDim.x);
        bits[j] = counts && v < cut.vectors ? load16(body + v * N) : uint4{0, 0, 0, 0};
      }
#pragma unroll
      for (int j = 0; j < kUnroll; ++j) {
        const int v = first + j * static_cast<int>(blockDim.x);
        if (v >= cut.vectors) break;
        if (counts) {
          float f[N];
          unpack<T>(bits[j], f);
#pragma unroll
          for (int i = 0; i < N; ++i) f[i] = gradient_at(f[i], max, g);
          const int lane = target - cut.head - v * N;
          if (lane >= 0 && lane < N) {
#pragma unroll
            for (int i = 0; i < N; ++i) f[i] += i == lane ? g.at_target : 0.0f;
          }
          bits[j] = pack<T>(f);
        }
        store16(dx + cut.head + v * N, bits[j]);
      }
    }
    const int tail = cut.head + cut.vectors * N, ends = cut.head + (a.width - tail); // the padding too
    for (int i = threadIdx.x; i < ends; i += blockDim.x) {
      const int c = i < cut.head ? i : i - cut.head + tail;
      float value = 0;
      if (counts && c < n) {
        value = gradient_at(to_float(x[c]), max, g);
        if (c == target) value += g.at_target;
      }
      from_float(value, dx[c]);
    }
  }
}

} // namespace solar_mega
