// The tasks of causal attention on the CPU, each about one head of one row of the batch; the s x s matrix never exists.
// Formulas: solar_mega/ops/causal_attention.py. Who runs them: causal_attention.cpp.
//
// Queries come in blocks of kBlock. A block computes only the scores that causality, the window and the bounds of packed
// samples let it see, rounded to panels of keys; the forward takes them in chunks of kChunk, the backward at once.
//
//                keys ->
//     queries  block 0   [####  |
//        |     block 1   [########|             # computed; what is not to be seen of them is masked
//        v     block 2   [############|
//
// Products are those of panels.h. fp32 throughout: bf16 and fp16 are widened as they are packed, and outputs rounded once.
//
//     forward    S = Q K^T, online softmax over chunks, O += P V; kept per row: m = max S, l = sum exp(S - m)
//     backward   P = exp(S - m) / l, dP = dO V^T, dS = P (dP - rowsum(P dP));  dV += P^T dO, dK += dS^T Q, dQ = dS K
//                The row sum is taken in fp32 here, not from the rounded output; out need not be saved.
//                dK and dV of grouped heads are summed per query head and added in order: bit-equal under any threads

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <new>

#include "common/causal_attention.h"
#include "cpu/element.h"
#include "cpu/exp.h"
#include "cpu/panels.h"

namespace solar_mega {
namespace {

constexpr int64_t kBlock = 64;
constexpr int64_t kChunk = 512;
constexpr int64_t kPad = 16; // between rows of scores, or rows a power of two apart would share cache sets

// One allocation handed out piece by piece, and again from its start for the next task.
class Scratch {
 public:
  explicit Scratch(int64_t floats)
      : data_(static_cast<float*>(std::aligned_alloc(64, up(floats * 4, 64))), std::free), next_(data_.get()) {
    if (next_ == nullptr) throw std::bad_alloc();
  }
  void restart() { next_ = data_.get(); }
  float* take(int64_t floats) {
    float* at = next_;
    next_ += up(floats, 16);
    return at;
  }

 private:
  std::unique_ptr<float, void (*)(void*)> data_;
  float* next_;
};

// ---- what the tasks share

template <typename T>
struct Attention {
  AttentionShape shape;
  const T *q, *k, *v, *dout;
  HeadStrides dout_strides;
  const float* stats; // [b, heads, s, 2]: the largest score of the row, and the sum of exp(score - it)
  float scale;
  int64_t keys;   // s, rounded up to whole panels
  int64_t width;  // dim, rounded up to whole panels
  float *k_columns, *k_rows, *v_columns, *v_rows; // packed, per (b, group)
  float *dk, *dv;                                 // [b, heads, keys, width]
  T *y, *dq;
  float* stats_out;
};

// The keys that some row of a block sees, in whole panels, cut into chunks.
struct Span {
  int64_t from, to;
};

template <int W, typename T>
SOLAR_MEGA_INLINE Span keys_of(const Attention<T>& a, int64_t first_row, int64_t rows) {
  return {a.shape.first_key(first_row) / (2 * W) * (2 * W), up(first_row + rows, 2 * W)};
}

// -inf where a query does not see a key. Columns of `s` are keys from ..., rows queries from first_row.
SOLAR_MEGA_INLINE void mask(
    float* s, int64_t step, const AttentionShape& shape, int64_t first_row, int64_t rows, int64_t from,
    int64_t columns) {
  const float never = -std::numeric_limits<float>::infinity();
  for (int64_t i = 0; i < rows; ++i) {
    const int64_t row = first_row + i, begin = shape.first_key(row) - from, end = row + 1 - from;
    for (int64_t j = 0; j < std::min(begin, columns); ++j) s[i * step + j] = never;
    for (int64_t j = std::max<int64_t>(end, 0); j < columns; ++j) s[i * step + j] = never;
  }
}

template <int W, typename T>
SOLAR_MEGA_INLINE void pack_head(const Attention<T>& a, int64_t b, int64_t group, bool backward) {
  const int64_t at = b * a.shape.groups + group, s = a.shape.s, d = a.shape.dim;
  const T* k = a.k + b * a.shape.k.b + group * a.shape.k.head;
  const T* v = a.v + b * a.shape.v.b + group * a.shape.v.head;
  pack_transposed<W>(k, a.shape.k.s, s, d, a.k_columns + at * a.keys * d);
  if (backward) {
    pack_panels<W>(k, a.shape.k.s, s, d, a.keys, 1.0f, a.k_rows + at * a.keys * a.width);
    pack_transposed<W>(v, a.shape.v.s, s, d, a.v_columns + at * a.keys * d);
  } else {
    pack_panels<W>(v, a.shape.v.s, s, d, a.keys, 1.0f, a.v_rows + at * a.keys * a.width);
  }
}

// ---- forward: one block of queries of one head

struct OnlineSoftmax {
  float most[kBlock], sum[kBlock];
};

// Turns a row block of scores into exp(score - running maximum); rescales what was accumulated under an older one.
SOLAR_MEGA_INLINE void exponentiate(
    float* s, int64_t step, int64_t rows, int64_t columns, OnlineSoftmax& state, float* o, int64_t width) {
  for (int64_t i = 0; i < rows; ++i) {
    float* row = s + i * step;
    float most = state.most[i];
#pragma omp simd reduction(max : most)
    for (int64_t j = 0; j < columns; ++j) most = row[j] > most ? row[j] : most;
    // A row that has seen no key yet: exp(-inf - 0) = 0 rather than exp(-inf + inf).
    const float base = most == -std::numeric_limits<float>::infinity() ? 0.0f : most;
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t j = 0; j < columns; ++j) {
      const float e = fast_exp(row[j] - base);
      row[j] = e;
      sum += e;
    }
    const float shrink = fast_exp(state.most[i] - base);
    state.sum[i] = state.sum[i] * shrink + sum;
    state.most[i] = most;
    if (shrink != 1.0f) {
#pragma omp simd
      for (int64_t j = 0; j < width; ++j) o[i * width + j] *= shrink;
    }
  }
}

template <int W, typename T>
SOLAR_MEGA_INLINE void forward_block(const Attention<T>& a, int64_t b, int64_t head, int64_t first_row, Scratch& memory) {
  const AttentionShape& shape = a.shape;
  const int64_t d = shape.dim, rows = std::min(kBlock, shape.s - first_row), padded = up(rows, kRows);
  const int64_t at = b * shape.groups + head / (shape.heads / shape.groups);
  const float *k = a.k_columns + at * a.keys * d, *v = a.v_rows + at * a.keys * a.width;
  memory.restart();
  float *q = memory.take(kBlock * d), *s = memory.take(kBlock * (kChunk + kPad)), *o = memory.take(kBlock * a.width);
  constexpr int64_t step = kChunk + kPad;
  pack_rows(
      a.q + first_row * shape.q.s + b * shape.q.b + head * shape.q.head, shape.q.s, rows, d, padded, a.scale, q);
  std::memset(o, 0, kBlock * a.width * sizeof(float));
  OnlineSoftmax state;
  for (int64_t i = 0; i < kBlock; ++i) state.most[i] = -std::numeric_limits<float>::infinity(), state.sum[i] = 0;

  const Span span = keys_of<W>(a, first_row, rows);
  for (int64_t from = span.from; from < span.to; from += kChunk) {
    const int64_t columns = std::min(kChunk, span.to - from), panels = columns / (2 * W);
    multiply<W>(q, d, 1, k + from * d, d * 2 * W, s, step, padded, panels, d, false);
    mask(s, step, shape, first_row, rows, from, columns);
    exponentiate(s, step, rows, columns, state, o, a.width);
    multiply<W>(
        s, step, 1, v + from * 2 * W, a.keys * 2 * W, o, a.width, padded, a.width / (2 * W), columns, true);
  }
  for (int64_t i = 0; i < rows; ++i) {
    T* y = a.y + ((first_row + i) * shape.b + b) * shape.heads * d + head * d;
    const float inverse = 1.0f / state.sum[i];
#pragma omp simd
    for (int64_t j = 0; j < d; ++j) y[j] = from_float<T>(o[i * a.width + j] * inverse);
    float* stats = a.stats_out + ((b * shape.heads + head) * shape.s + first_row + i) * 2;
    stats[0] = state.most[i], stats[1] = state.sum[i];
  }
}

// ---- backward: one head

// s: scores -> probabilities P; ds: dP -> dS = P (dP - rowsum(P dP)). Padded rows become zeros.
SOLAR_MEGA_INLINE void differentiate(
    float* s, float* ds, int64_t step, int64_t rows, int64_t padded, int64_t columns, const float* stats) {
  for (int64_t i = 0; i < rows; ++i) {
    float *p = s + i * step, *g = ds + i * step;
    const float most = stats[2 * i], inverse = 1.0f / stats[2 * i + 1];
    float mean = 0;
#pragma omp simd reduction(+ : mean)
    for (int64_t j = 0; j < columns; ++j) {
      p[j] = fast_exp(p[j] - most) * inverse;
      mean += p[j] * g[j];
    }
#pragma omp simd
    for (int64_t j = 0; j < columns; ++j) g[j] = p[j] * (g[j] - mean);
  }
  for (int64_t i = rows; i < padded; ++i) {
    std::memset(s + i * step, 0, columns * sizeof(float));
    std::memset(ds + i * step, 0, columns * sizeof(float));
  }
}

template <int W, typename T>
SOLAR_MEGA_INLINE void backward_head(const Attention<T>& a, int64_t b, int64_t head, Scratch& memory) {
  const AttentionShape& shape = a.shape;
  const int64_t d = shape.dim, at = b * shape.groups + head / (shape.heads / shape.groups);
  const float *k = a.k_columns + at * a.keys * d, *v = a.v_columns + at * a.keys * d;
  const float* k_rows = a.k_rows + at * a.keys * a.width;
  float* dk = a.dk + (b * shape.heads + head) * a.keys * a.width;
  float* dv = a.dv + (b * shape.heads + head) * a.keys * a.width;
  std::memset(dk, 0, a.keys * a.width * sizeof(float));
  std::memset(dv, 0, a.keys * a.width * sizeof(float));
  memory.restart();
  const int64_t step = a.keys + kPad;
  float *q = memory.take(kBlock * d), *dy = memory.take(kBlock * d);
  float *q_panels = memory.take(kBlock * a.width), *dy_panels = memory.take(kBlock * a.width);
  float *s = memory.take(kBlock * step), *ds = memory.take(kBlock * step), *dq = memory.take(kBlock * a.width);
  const int64_t panels_d = a.width / (2 * W);
  const T* q_head = a.q + b * shape.q.b + head * shape.q.head;
  const T* dy_head = a.dout + b * a.dout_strides.b + head * a.dout_strides.head;

  for (int64_t first_row = 0; first_row < shape.s; first_row += kBlock) {
    const int64_t rows = std::min(kBlock, shape.s - first_row), padded = up(rows, kRows);
    const float* stats = a.stats + ((b * shape.heads + head) * shape.s + first_row) * 2;
    const T *q_block = q_head + first_row * shape.q.s, *dy_block = dy_head + first_row * a.dout_strides.s;
    pack_rows(q_block, shape.q.s, rows, d, padded, a.scale, q);
    pack_rows(dy_block, a.dout_strides.s, rows, d, padded, 1.0f, dy);
    pack_panels<W>(q_block, shape.q.s, rows, d, padded, a.scale, q_panels);
    pack_panels<W>(dy_block, a.dout_strides.s, rows, d, padded, 1.0f, dy_panels);

    const Span span = keys_of<W>(a, first_row, rows);
    const int64_t from = span.from, columns = span.to - from, panels = columns / (2 * W);
    multiply<W>(q, d, 1, k + from * d, d * 2 * W, s, step, padded, panels, d, false);
    mask(s, step, shape, first_row, rows, from, columns);
    multiply<W>(dy, d, 1, v + from * d, d * 2 * W, ds, step, padded, panels, d, false);
    differentiate(s, ds, step, rows, padded, columns, stats);
    multiply<W>(
        s, 1, step, dy_panels, padded * 2 * W, dv + from * a.width, a.width, columns, panels_d, padded, true);
    multiply<W>(
        ds, 1, step, q_panels, padded * 2 * W, dk + from * a.width, a.width, columns, panels_d, padded, true);
    multiply<W>(
        ds, step, 1, k_rows + from * 2 * W, a.keys * 2 * W, dq, a.width, padded, panels_d, columns, false);
    for (int64_t i = 0; i < rows; ++i) {
      T* out = a.dq + ((first_row + i) * shape.b + b) * shape.heads * d + head * d;
#pragma omp simd
      for (int64_t j = 0; j < d; ++j) out[j] = from_float<T>(a.scale * dq[i * a.width + j]);
    }
  }
}

// Sums a group's query heads in order: [b, heads, keys, width] -> [s, b, groups, dim].
template <typename T>
SOLAR_MEGA_INLINE void gather_group(const Attention<T>& a, const float* sums, int64_t b, int64_t group, T* out) {
  const AttentionShape& shape = a.shape;
  const int64_t per = shape.heads / shape.groups, head_step = a.keys * a.width;
  const float* first = sums + (b * shape.heads + group * per) * head_step;
  for (int64_t i = 0; i < shape.s; ++i) {
    T* row = out + ((i * shape.b + b) * shape.groups + group) * shape.dim;
    const float* source = first + i * a.width;
    if (per == 1) {
#pragma omp simd
      for (int64_t j = 0; j < shape.dim; ++j) row[j] = from_float<T>(source[j]);
      continue;
    }
#pragma omp simd
    for (int64_t j = 0; j < shape.dim; ++j) {
      float sum = source[j];
      for (int64_t h = 1; h < per; ++h) sum += source[h * head_step + j];
      row[j] = from_float<T>(sum);
    }
  }
}

} // namespace
} // namespace solar_mega
