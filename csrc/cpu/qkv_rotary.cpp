// Rotary embedding of Megatron's packed QKV on the CPU, forward and backward. Formulas: solar_mega/ops/qkv_rotary.py.
//
// One token at a time: its packed row is read once and its heads are written where they belong (backward: the other way
// round). cos and sin of the token's position stay in L1 for all its heads. Tokens are shared out over torch's threads.

#include <torch/csrc/stable/library.h>

#include <cstring>
#include <tuple>

#include "common/qkv_rotary.h"
#include "cpu/element.h"

namespace solar_mega {
namespace {

constexpr int64_t kGrain = 32768; // elements below which a thread is not worth waking

// One head: `half` pairs turned by the angles whose cosines and sines are given, the rest copied.
template <typename T>
SOLAR_MEGA_INLINE void turn(
    const T* x, T* y, const float* cos, const float* sin, float sign, int64_t half, int64_t dim, bool interleaved) {
  if (interleaved) {
#pragma omp simd
    for (int64_t i = 0; i < half; ++i) {
      const float a = to_float(x[2 * i]), b = to_float(x[2 * i + 1]), c = cos[i], s = sign * sin[i];
      y[2 * i] = from_float<T>(a * c - b * s);
      y[2 * i + 1] = from_float<T>(b * c + a * s);
    }
  } else {
#pragma omp simd
    for (int64_t i = 0; i < half; ++i) {
      const float a = to_float(x[i]), b = to_float(x[half + i]), c = cos[i], s = sign * sin[i];
      y[i] = from_float<T>(a * c - b * s);
      y[half + i] = from_float<T>(b * c + a * s);
    }
  }
  for (int64_t i = 2 * half; i < dim; ++i) y[i] = x[i];
}

struct Token {
  int64_t groups, per_group, dim, half;
  int64_t packed_group, q_head, k_head, v_head; // strides
  bool interleaved;
};

template <typename T>
SOLAR_MEGA_INLINE void split_token_body(
    const T* packed, T* q, T* k, T* v, const float* cos, const float* sin, const Token& t) {
  for (int64_t g = 0; g < t.groups; ++g, packed += t.packed_group, k += t.k_head, v += t.v_head) {
    for (int64_t j = 0; j < t.per_group; ++j, q += t.q_head)
      turn(packed + j * t.dim, q, cos, sin, 1.0f, t.half, t.dim, t.interleaved);
    turn(packed + t.per_group * t.dim, k, cos, sin, 1.0f, t.half, t.dim, t.interleaved);
    const T* value = packed + (t.per_group + 1) * t.dim;
    for (int64_t i = 0; i < t.dim; ++i) v[i] = value[i];
  }
}

template <typename T>
SOLAR_MEGA_INLINE void join_token_body(
    T* packed, const T* dq, const T* dk, const T* dv, const float* cos, const float* sin, const Token& t) {
  for (int64_t g = 0; g < t.groups; ++g, packed += t.packed_group, dk += t.k_head, dv += t.v_head) {
    for (int64_t j = 0; j < t.per_group; ++j, dq += t.q_head)
      turn(dq, packed + j * t.dim, cos, sin, -1.0f, t.half, t.dim, t.interleaved);
    turn(dk, packed + t.per_group * t.dim, cos, sin, -1.0f, t.half, t.dim, t.interleaved);
    T* value = packed + (t.per_group + 1) * t.dim;
    for (int64_t i = 0; i < t.dim; ++i) value[i] = dv[i];
  }
}

SOLAR_MEGA_ISA_VARIANTS(split_token)
SOLAR_MEGA_ISA_VARIANTS(join_token)

const int64_t* checked_positions(const char* op, const QkvShape& shape, const std::optional<Tensor>& positions) {
  if (!positions.has_value()) return nullptr;
  const int64_t* p = static_cast<const int64_t*>(positions->data_ptr());
  for (int64_t s = 0; s < shape.s; ++s)
    for (int64_t b = 0; b < (shape.position_b == 0 && positions->dim() == 1 ? 1 : shape.b); ++b) {
      const int64_t at = p[s * shape.position_s + b * shape.position_b];
      SOLAR_MEGA_CHECK(
          at >= 0 && at < shape.table_rows, op, ": positions holds ", at, "; allowed: 0 to ", shape.table_rows - 1,
          ", the rows of cos and sin");
    }
  return p;
}

// Calls visit(s, b, cos row, sin row) for every token.
template <typename F>
void for_each_token(
    const QkvShape& shape, const Tensor& cos, const Tensor& sin, const int64_t* positions, const F& visit) {
  const float* c = static_cast<const float*>(cos.data_ptr());
  const float* n = static_cast<const float*>(sin.data_ptr());
  const int64_t width = shape.groups * (shape.per_group + 2) * shape.head_dim;
  torch::stable::parallel_for(0, shape.s * shape.b, (kGrain + width - 1) / width, [&](int64_t begin, int64_t end) {
    for (int64_t token = begin; token < end; ++token) {
      const int64_t s = token / shape.b, b = token % shape.b;
      const int64_t at = positions ? positions[s * shape.position_s + b * shape.position_b] : s;
      visit(s, b, c + at * shape.half, n + at * shape.half);
    }
  });
}

Token token_of(const QkvShape& shape, bool interleaved) {
  return {shape.groups, shape.per_group, shape.head_dim, shape.half, shape.packed.head,
          shape.q.head, shape.k.head,    shape.v.head,   interleaved};
}

std::tuple<Tensor, Tensor, Tensor> qkv_rotary(
    const Tensor& qkv, const Tensor& cos, const Tensor& sin, std::optional<Tensor> positions, int64_t queries_per_group,
    bool interleaved) {
  QkvShape shape = check_qkv_rotary(qkv, cos, sin, positions, queries_per_group);
  const int64_t* at = checked_positions("qkv_rotary", shape, positions);
  const int64_t heads = shape.groups * shape.per_group, d = shape.head_dim;
  const ScalarType dtype = qkv.scalar_type();
  Tensor q = empty({shape.s, shape.b, heads, d}, dtype, qkv);
  Tensor k = empty({shape.s, shape.b, shape.groups, d}, dtype, qkv);
  Tensor v = empty({shape.s, shape.b, shape.groups, d}, dtype, qkv);
  shape.q = contiguous_heads(shape, heads, d), shape.k = shape.v = contiguous_heads(shape, shape.groups, d);
  if (qkv.numel() == 0) return {q, k, v};
  const Token token = token_of(shape, interleaved);
  for_each_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    const T* in = static_cast<const T*>(qkv.data_ptr());
    T *qp = static_cast<T*>(q.data_ptr()), *kp = static_cast<T*>(k.data_ptr()), *vp = static_cast<T*>(v.data_ptr());
    for_each_token(shape, cos, sin, at, [&](int64_t s, int64_t b, const float* c, const float* n) {
      split_token(
          in + s * shape.packed.s + b * shape.packed.b, qp + s * shape.q.s + b * shape.q.b,
          kp + s * shape.k.s + b * shape.k.b, vp + s * shape.v.s + b * shape.v.b, c, n, token);
    });
  });
  return {q, k, v};
}

Tensor qkv_rotary_backward(
    const Tensor& dq, const Tensor& dk, const Tensor& dv, const Tensor& cos, const Tensor& sin,
    std::optional<Tensor> positions, bool interleaved) {
  QkvShape shape = check_qkv_rotary_backward(dq, dk, dv, cos, sin, positions);
  const int64_t* at = checked_positions("qkv_rotary_backward", shape, positions);
  const int64_t width = (shape.per_group + 2) * shape.head_dim;
  Tensor dqkv = empty({shape.s, shape.b, shape.groups, width}, dq.scalar_type(), dq);
  shape.packed = contiguous_heads(shape, shape.groups, width);
  if (dqkv.numel() == 0) return dqkv;
  const Token token = token_of(shape, interleaved);
  for_each_dtype(dq.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const T *qp = static_cast<const T*>(dq.data_ptr()), *kp = static_cast<const T*>(dk.data_ptr()),
            *vp = static_cast<const T*>(dv.data_ptr());
    T* out = static_cast<T*>(dqkv.data_ptr());
    for_each_token(shape, cos, sin, at, [&](int64_t s, int64_t b, const float* c, const float* n) {
      join_token(
          out + s * shape.packed.s + b * shape.packed.b, qp + s * shape.q.s + b * shape.q.b,
          kp + s * shape.k.s + b * shape.k.b, vp + s * shape.v.s + b * shape.v.b, c, n, token);
    });
  });
  return dqkv;
}

} // namespace

STABLE_TORCH_LIBRARY_IMPL(solar_mega, CPU, m) {
  m.impl("qkv_rotary", TORCH_BOX(&qkv_rotary));
  m.impl("qkv_rotary_backward", TORCH_BOX(&qkv_rotary_backward));
}

} // namespace solar_mega
