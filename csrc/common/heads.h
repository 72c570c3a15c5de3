// Attention's tensors as strides, in elements. Free of torch headers: kernels take them by value.
//
//     packed  [s, b, groups, (per_group + 2) * head_dim]      q .. q k v | q .. q k v | ...      one | per group
//     q       [s, b, groups * per_group, head_dim]
//     k, v    [s, b, groups, head_dim]

#pragma once

#include <cstdint>

namespace solar_mega {

struct HeadStrides {
  int64_t s = 0;
  int64_t b = 0;
  int64_t head = 0; // of `packed`: a group
};

struct QkvShape {
  int64_t s, b, groups, per_group, head_dim;
  int64_t half;       // pairs rotated per head: rotary_dim / 2
  int64_t table_rows; // positions that cos and sin, [table_rows, half], know
  HeadStrides packed, q, k, v;
  int64_t position_s, position_b; // strides of the positions, where given
};

} // namespace solar_mega
