// The contract of the causal attention ops' arguments (csrc/cpu/causal_attention.cpp).

#pragma once

#include <algorithm>
#include <optional>
#include <vector>

#include "common/heads.h"
#include "common/qkv_rotary.h"
#include "common/tensor.h"

namespace solar_mega {

struct AttentionShape {
  int64_t s, b, heads, groups, dim;
  int64_t window; // keys that a query sees, itself included; at least s where there is no window
  HeadStrides q, k, v;
  const int32_t* starts; // per row, the first of its packed sample; null where a row of the batch is one sample

  int64_t first_key(int64_t row) const {
    const int64_t start = starts == nullptr ? 0 : starts[row];
    return std::max(start, row + 1 - window);
  }
};

// cu_seqlens [samples + 1] -> the first row of each row's sample, [s]; empty without cu_seqlens.
inline std::vector<int32_t> sample_starts(const char* op, const std::optional<Tensor>& cu_seqlens, int64_t s) {
  if (!cu_seqlens) return {};
  const Tensor& cu = *cu_seqlens;
  check_dtype(op, "cu_seqlens", cu, ScalarType::Int, ", as attention kernels take it");
  SOLAR_MEGA_CHECK(cu.is_cpu(), op, ": cu_seqlens is on ", device_text(cu), "; it must be on cpu, where q is");
  SOLAR_MEGA_CHECK(
      cu.dim() == 1 && cu.is_contiguous() && cu.size(0) >= 1, op, ": cu_seqlens has shape ", to_text(cu.sizes()),
      "; allowed: contiguous [samples + 1]");
  const int32_t* at = static_cast<const int32_t*>(cu.data_ptr());
  const int64_t samples = cu.size(0) - 1;
  SOLAR_MEGA_CHECK(
      at[0] == 0 && at[samples] == s, op, ": cu_seqlens runs from ", at[0], " to ", at[samples],
      "; it must cover all positions, 0 to ", s);
  std::vector<int32_t> starts(s);
  for (int64_t i = 0; i < samples; ++i) {
    SOLAR_MEGA_CHECK(
        at[i + 1] >= at[i] && at[i + 1] <= s, op, ": cu_seqlens goes from ", at[i], " to ", at[i + 1], " at index ", i + 1,
        "; it must not decrease, nor exceed ", s);
    std::fill(starts.begin() + at[i], starts.begin() + at[i + 1], at[i]);
  }
  return starts;
}

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
  AttentionShape shape{q.size(0), q.size(1), q.size(2), k.size(2), q.size(3), window > 0 ? window : q.size(0), {}, {}, {}, nullptr};
  shape.q = head_strides(op, "q", q), shape.k = head_strides(op, "k", k), shape.v = head_strides(op, "v", v);
  return shape;
}

} // namespace solar_mega
