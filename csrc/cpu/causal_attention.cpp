// Causal attention on the CPU, forward and backward, without the s x s matrix. Formulas: solar_mega/ops/causal_attention.py.
//
// One head of one row of the batch at a time, queries in blocks of kBlock. A block computes only the scores that
// causality, the window and the bounds of packed samples let it see, rounded to panels of keys; the forward takes them in
// chunks of kChunk, the backward at once.
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
//
// Heads (forward: blocks of queries too) are shared out over torch's threads.

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <new>
#include <optional>
#include <tuple>
#include <vector>

#include "common/causal_attention.h"
#include "cpu/element.h"
#include "cpu/exp.h"
#include "cpu/panels.h"

namespace solar_mega {
namespace {

constexpr int64_t kBlock = 64;
constexpr int64_t kChunk = 512;
constexpr int64_t kPad = 16; // between rows of scores, or rows a power of two apart would share cache sets

int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// One allocation handed out piece by piece, and again from its start for the next task.
class Scratch {
 public:
  explicit Scratch(int64_t floats)
      : data_(static_cast<float*>(std::aligned_alloc(64, round_up(floats * 4, 64))), std::free), next_(data_.get()) {
    if (next_ == nullptr) throw std::bad_alloc();
  }
  void restart() { next_ = data_.get(); }
  float* take(int64_t floats) {
    float* at = next_;
    next_ += round_up(floats, 16);
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

// ---- one variant per instruction set: unlike elsewhere the vector's width is part of the code

enum class Stage { pack, pack_backward, forward, backward, gather };

// Stages run over (b, group), (b, head, block) or (b, head).
template <int W, typename T>
SOLAR_MEGA_INLINE void run_body(Stage stage, const Attention<T>& a, int64_t begin, int64_t end, T* dk, T* dv) {
  const AttentionShape& shape = a.shape;
  const int64_t scores = stage == Stage::forward ? kChunk + kPad : stage == Stage::backward ? 2 * (a.keys + kPad) : 0;
  Scratch memory(kBlock * (scores + 2 * shape.dim + 3 * a.width) + 7 * 16);
  const int64_t blocks = (shape.s + kBlock - 1) / kBlock;
  for (int64_t i = begin; i < end; ++i) {
    switch (stage) {
      case Stage::pack: pack_head<W>(a, i / shape.groups, i % shape.groups, false); break;
      case Stage::pack_backward: pack_head<W>(a, i / shape.groups, i % shape.groups, true); break;
      case Stage::forward:
        forward_block<W>(a, i / blocks / shape.heads, i / blocks % shape.heads, i % blocks * kBlock, memory);
        break;
      case Stage::backward: backward_head<W>(a, i / shape.heads, i % shape.heads, memory); break;
      case Stage::gather:
        gather_group(a, a.dk, i / shape.groups, i % shape.groups, dk);
        gather_group(a, a.dv, i / shape.groups, i % shape.groups, dv);
    }
  }
}

#ifdef __x86_64__
template <typename T>
SOLAR_MEGA_TARGET_AVX512 void run_avx512(Stage stage, const Attention<T>& a, int64_t begin, int64_t end, T* dk, T* dv) {
  run_body<16>(stage, a, begin, end, dk, dv);
}
template <typename T>
SOLAR_MEGA_TARGET_AVX2 void run_avx2(Stage stage, const Attention<T>& a, int64_t begin, int64_t end, T* dk, T* dv) {
  run_body<8>(stage, a, begin, end, dk, dv);
}
#endif
template <typename T>
void run_base(Stage stage, const Attention<T>& a, int64_t begin, int64_t end, T* dk, T* dv) {
  run_body<4>(stage, a, begin, end, dk, dv);
}

int64_t panel_columns() { return isa() == Isa::avx512 ? 32 : isa() == Isa::avx2 ? 16 : 8; }

template <typename T>
void run(Stage stage, const Attention<T>& a, int64_t count, T* dk = nullptr, T* dv = nullptr) {
  torch::stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
#ifdef __x86_64__
    if (isa() == Isa::avx512) return run_avx512(stage, a, begin, end, dk, dv);
    if (isa() == Isa::avx2) return run_avx2(stage, a, begin, end, dk, dv);
#endif
    run_base(stage, a, begin, end, dk, dv);
  });
}

template <typename F>
void for_each_dtype(ScalarType dtype, const F& f) {
  if (dtype == ScalarType::Float) return f(float{});
  if (dtype == ScalarType::BFloat16) return f(BFloat16{});
  f(Float16{});
}

template <typename T>
Attention<T> arguments(const AttentionShape& shape, const Tensor& q, const Tensor& k, const Tensor& v, double scale) {
  Attention<T> a{};
  a.shape = shape;
  a.q = static_cast<const T*>(q.data_ptr());
  a.k = static_cast<const T*>(k.data_ptr());
  a.v = static_cast<const T*>(v.data_ptr());
  a.scale = static_cast<float>(scale);
  a.keys = round_up(shape.s, panel_columns());
  a.width = round_up(shape.dim, panel_columns());
  return a;
}

float* floats(Tensor& t) { return static_cast<float*>(t.data_ptr()); }

std::tuple<Tensor, Tensor> causal_attention(
    const Tensor& q, const Tensor& k, const Tensor& v, double scale, int64_t window, std::optional<Tensor> cu_seqlens) {
  AttentionShape shape = check_causal_attention("causal_attention", q, k, v, scale, window);
  const std::vector<int32_t> starts = sample_starts("causal_attention", cu_seqlens, shape.s);
  shape.starts = starts.empty() ? nullptr : starts.data();
  Tensor y = empty({shape.s, shape.b, shape.heads, shape.dim}, q.scalar_type(), q);
  Tensor stats = empty({shape.b, shape.heads, shape.s, 2}, ScalarType::Float, q);
  if (q.numel() == 0) return {y, stats};
  for_each_dtype(q.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    Attention<T> a = arguments<T>(shape, q, k, v, scale);
    const int64_t pairs = shape.b * shape.groups;
    Tensor k_columns = empty({pairs, a.keys, shape.dim}, ScalarType::Float, q);
    Tensor v_rows = empty({pairs, a.keys, a.width}, ScalarType::Float, q);
    a.k_columns = floats(k_columns), a.v_rows = floats(v_rows);
    a.y = static_cast<T*>(y.data_ptr()), a.stats_out = floats(stats);
    run(Stage::pack, a, pairs);
    run(Stage::forward, a, shape.b * shape.heads * ((shape.s + kBlock - 1) / kBlock));
  });
  return {y, stats};
}

std::tuple<Tensor, Tensor, Tensor> causal_attention_backward(
    const Tensor& dout, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& stats, double scale,
    int64_t window, std::optional<Tensor> cu_seqlens) {
  const char* op = "causal_attention_backward";
  AttentionShape shape = check_causal_attention(op, q, k, v, scale, window);
  const std::vector<int32_t> starts = sample_starts(op, cu_seqlens, shape.s);
  shape.starts = starts.empty() ? nullptr : starts.data();
  check_beside(op, "dout", dout, "q", q);
  check_dtype(op, "dout", dout, q.scalar_type(), ", as q");
  SOLAR_MEGA_CHECK(
      same_sizes(dout, q), op, ": dout has shape ", to_text(dout.sizes()), "; it must be ", to_text(q.sizes()),
      ", the shape of q");
  check_beside(op, "stats", stats, "q", q);
  check_dtype(op, "stats", stats, ScalarType::Float, ", as the forward returned it");
  SOLAR_MEGA_CHECK(
      stats.is_contiguous() && stats.dim() == 4 && stats.size(0) == shape.b && stats.size(1) == shape.heads &&
          stats.size(2) == shape.s && stats.size(3) == 2,
      op, ": stats has shape ", to_text(stats.sizes()),
      "; it must be contiguous [b, heads, s, 2], as the forward returned it");
  Tensor dq = empty(q.sizes(), q.scalar_type(), q), dk = empty(k.sizes(), q.scalar_type(), q);
  Tensor dv = empty(k.sizes(), q.scalar_type(), q);
  if (q.numel() == 0) return {dq, dk, dv};
  for_each_dtype(q.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    Attention<T> a = arguments<T>(shape, q, k, v, scale);
    const int64_t pairs = shape.b * shape.groups, heads = shape.b * shape.heads;
    Tensor k_columns = empty({pairs, a.keys, shape.dim}, ScalarType::Float, q);
    Tensor v_columns = empty({pairs, a.keys, shape.dim}, ScalarType::Float, q);
    Tensor k_rows = empty({pairs, a.keys, a.width}, ScalarType::Float, q);
    Tensor dk_sums = empty({heads, a.keys, a.width}, ScalarType::Float, q);
    Tensor dv_sums = empty({heads, a.keys, a.width}, ScalarType::Float, q);
    a.k_columns = floats(k_columns), a.v_columns = floats(v_columns), a.k_rows = floats(k_rows);
    a.dk = floats(dk_sums), a.dv = floats(dv_sums);
    a.dout = static_cast<const T*>(dout.data_ptr()), a.dout_strides = head_strides(op, "dout", dout);
    a.stats = static_cast<const float*>(stats.data_ptr());
    a.dq = static_cast<T*>(dq.data_ptr());
    run(Stage::pack_backward, a, pairs);
    run(Stage::backward, a, heads);
    run(Stage::gather, a, pairs, static_cast<T*>(dk.data_ptr()), static_cast<T*>(dv.data_ptr()));
  });
  return {dq, dk, dv};
}

} // namespace

STABLE_TORCH_LIBRARY_IMPL(solar_mega, CPU, m) {
  m.impl("causal_attention", TORCH_BOX(&causal_attention));
  m.impl("causal_attention_backward", TORCH_BOX(&causal_attention_backward));
}

} // namespace solar_mega
