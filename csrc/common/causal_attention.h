// The contract of the causal attention ops' arguments (csrc/cpu/causal_attention.cpp).

#pragma once

#include "common/heads.h"
#include "common/qkv_rotary.h"
#include "common/tensor.h"

namespace solar_mega {

struct AttentionShape {
  int64_t s, b, heads, groups, dim;
  int64_t window; // keys that a query sees, itself included; at least s where there is no window
  HeadStrides q, k, v;

  int64_t first_key(int64_t row) const { return row + 1 > window ? row + 1 - window : 0; }
};

inline AttentionShape check_causal_attention(
    const char* op, const Tensor& q, const Tensor& k, const Tensor& v, double scale, int64_t window) {
  check_float_dtype(op, "q", q);
  SOLAR_MEGA_CHECK(
      q.dim() == 4 && k.dim() == 4 && q.size(3) >= 1 && k.size(2) >= 1 && q.size(2) >= 1 && q.size(2) % k.size(2) == 0 &&
          k.size(0) == q.size(0) && k.size(1) == q.size(1) && k.size(3) == q.size(3),
      op, ": q has shape ", to_text(q.sizes()), " and k ", to_text(k.sizes()),
      "; allowed: [s, b, groups * queries_per_group, head_dim] and [s, b, groups, head_dim]");
  SOLAR_MEGA_CHECK(
      same_sizes(v, k), op, ": v has shape ", to_text(v.sizes()), "; it must be ", to_text(k.sizes()),
      ", the shape of k");
  check_beside(op, "k", k, "q", q), check_beside(op, "v", v, "q", q);
  check_dtype(op, "k", k, q.scalar_type(), ", as q"), check_dtype(op, "v", v, q.scalar_type(), ", as q");
  SOLAR_MEGA_CHECK(scale > -1e30 && scale < 1e30, op, ": scale is ", scale, "; allowed: a finite number");
  SOLAR_MEGA_CHECK(window >= 0, op, ": window is ", window, "; allowed: 0 (none) or the keys a query sees");
  AttentionShape shape{q.size(0), q.size(1), q.size(2), k.size(2), q.size(3), window > 0 ? window : q.size(0), {}, {}, {}};
  shape.q = head_strides(op, "q", q), shape.k = head_strides(op, "k", k), shape.v = head_strides(op, "v", v);
  return shape;
}

} // namespace solar_mega
