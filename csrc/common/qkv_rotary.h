// The contract of the rotary ops' arguments, the same on every device (csrc/cpu/qkv_rotary.cpp, csrc/cuda/qkv_rotary.cu).

#pragma once

#include <optional>

#include "common/heads.h"
#include "common/tensor.h"

namespace solar_mega {

inline void check_beside(const char* op, const char* name, const Tensor& t, const char* first, const Tensor& reference) {
  SOLAR_MEGA_CHECK(
      t.is_cpu() == reference.is_cpu() && t.get_device_index() == reference.get_device_index(),
      op, ": ", name, " is on ", device_text(t), "; it must be on ", device_text(reference), ", where ", first, " is");
}

// [s, b, heads, d] with a dense last dimension, as strides.
inline HeadStrides head_strides(const char* op, const char* name, const Tensor& t) {
  SOLAR_MEGA_CHECK(
      t.size(3) == 1 || t.stride(3) == 1 || t.numel() == 0,
      op, ": ", name, " of shape ", to_text(t.sizes()), " has strides ", to_text(t.strides()),
      "; allowed: last stride 1. Call .contiguous() on it");
  return {t.stride(0), t.stride(1), t.stride(2)};
}

inline void check_tables(
    const char* op, const Tensor& cos, const Tensor& sin, const std::optional<Tensor>& positions, const char* first,
    const Tensor& reference, QkvShape& shape) {
  const Tensor* tables[2] = {&cos, &sin};
  const char* names[2] = {"cos", "sin"};
  for (int i = 0; i < 2; ++i) {
    const Tensor& t = *tables[i];
    check_beside(op, names[i], t, first, reference);
    check_dtype(op, names[i], t, ScalarType::Float, "");
    SOLAR_MEGA_CHECK(
        t.dim() == 2 && t.is_contiguous() && t.size(1) >= 1 && 2 * t.size(1) <= shape.head_dim,
        op, ": ", names[i], " has shape ", to_text(t.sizes()), " and strides ", to_text(t.strides()),
        "; allowed: contiguous [positions, rotary_dim / 2] with rotary_dim from 2 to the head_dim, ", shape.head_dim);
  }
  SOLAR_MEGA_CHECK(
      same_sizes(cos, sin), op, ": sin has shape ", to_text(sin.sizes()), "; it must be ", to_text(cos.sizes()),
      ", the shape of cos");
  shape.half = cos.size(1);
  shape.table_rows = cos.size(0);
  if (!positions.has_value()) {
    SOLAR_MEGA_CHECK(
        shape.s <= shape.table_rows, op, ": ", first, " has ", shape.s, " positions but cos and sin only ",
        shape.table_rows, " rows; give larger tables, or positions");
    return;
  }
  const Tensor& p = *positions;
  check_beside(op, "positions", p, first, reference);
  check_dtype(op, "positions", p, ScalarType::Long, "");
  const bool per_step = p.dim() == 1 && p.size(0) == shape.s;
  SOLAR_MEGA_CHECK(
      per_step || (p.dim() == 2 && p.size(0) == shape.s && p.size(1) == shape.b),
      op, ": positions has shape ", to_text(p.sizes()), "; allowed: [", shape.s, "] or [", shape.s, ", ", shape.b, "]");
  shape.position_s = p.stride(0);
  shape.position_b = per_step ? 0 : p.stride(1);
}

inline QkvShape check_qkv_rotary(
    const Tensor& qkv, const Tensor& cos, const Tensor& sin, const std::optional<Tensor>& positions, int64_t per_group) {
  const char* op = "qkv_rotary";
  check_float_dtype(op, "qkv", qkv);
  SOLAR_MEGA_CHECK(per_group >= 1, op, ": queries_per_group is ", per_group, "; allowed: 1 or more");
  SOLAR_MEGA_CHECK(
      qkv.dim() == 4 && qkv.size(2) >= 1 && qkv.size(3) >= per_group + 2 && qkv.size(3) % (per_group + 2) == 0,
      op, ": qkv has shape ", to_text(qkv.sizes()), "; allowed: [s, b, groups, (queries_per_group + 2) * head_dim] with "
      "queries_per_group = ", per_group);
  QkvShape shape{};
  shape.s = qkv.size(0), shape.b = qkv.size(1), shape.groups = qkv.size(2), shape.per_group = per_group;
  shape.head_dim = qkv.size(3) / (per_group + 2);
  shape.packed = head_strides(op, "qkv", qkv);
  check_tables(op, cos, sin, positions, "qkv", qkv, shape);
  return shape;
}

inline QkvShape check_qkv_rotary_backward(
    const Tensor& dq, const Tensor& dk, const Tensor& dv, const Tensor& cos, const Tensor& sin,
    const std::optional<Tensor>& positions) {
  const char* op = "qkv_rotary_backward";
  check_float_dtype(op, "dq", dq);
  const bool grouped = dq.dim() == 4 && dk.dim() == 4 && dk.size(2) >= 1 && dk.size(3) >= 1 &&
      dq.size(2) >= dk.size(2) && dq.size(2) % dk.size(2) == 0;
  SOLAR_MEGA_CHECK(
      grouped && dq.size(0) == dk.size(0) && dq.size(1) == dk.size(1) && dq.size(3) == dk.size(3),
      op, ": dq has shape ", to_text(dq.sizes()), " and dk ", to_text(dk.sizes()),
      "; allowed: [s, b, groups * queries_per_group, head_dim] and [s, b, groups, head_dim]");
  SOLAR_MEGA_CHECK(
      same_sizes(dv, dk), op, ": dv has shape ", to_text(dv.sizes()), "; it must be ", to_text(dk.sizes()),
      ", the shape of dk");
  check_beside(op, "dk", dk, "dq", dq), check_beside(op, "dv", dv, "dq", dq);
  check_dtype(op, "dk", dk, dq.scalar_type(), ", as dq"), check_dtype(op, "dv", dv, dq.scalar_type(), ", as dq");
  QkvShape shape{};
  shape.s = dq.size(0), shape.b = dq.size(1), shape.groups = dk.size(2), shape.per_group = dq.size(2) / dk.size(2);
  shape.head_dim = dq.size(3);
  shape.q = head_strides(op, "dq", dq), shape.k = head_strides(op, "dk", dk), shape.v = head_strides(op, "dv", dv);
  check_tables(op, cos, sin, positions, "dq", dq, shape);
  return shape;
}

inline HeadStrides contiguous_heads(const QkvShape& shape, int64_t heads, int64_t width) {
  return {shape.b * heads * width, heads * width, width};
}

} // namespace solar_mega
