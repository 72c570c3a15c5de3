// What one row of logits is reduced to, and how shards' reductions are joined. Free of torch headers: kernels and
// host code share it.
//
//     stats [K, rows] of a shard, K = 3 + smooth + entropy, fp32:
//
//        0  max     m = max over the shard's tokens of x          -inf when it has none
//        1  sum     s = Σ exp(x - m)                                  0 when it has none
//        2  target  x[target], 0 when another shard has it
//        3  total   Σ x                                           only with label smoothing
//        3|4 spread u = Σ exp(x - m) (x - m)                      only for the entropy
//
//     A row that does not count (masked, or target == kIgnore) is all zeros, max included: a row that counts has a
//     joined sum of at least 1, or NaN, so sum == 0 says "skip me" without another array.

#pragma once

#include <cmath>
#include <cstdint>

#include "common/rows.h"

namespace solar_mega {

constexpr int64_t kIgnore = -100; // PyTorch's ignore_index
constexpr int kMaxStats = 5;

struct Vocabulary {
  int64_t first;  // global token of column 0
  int64_t valid;  // columns [0, valid) are tokens, the rest padding
  int64_t size;   // tokens over all shards
};

struct LossTerms {
  float smoothing, z;
};

SOLAR_MEGA_HOST_DEVICE inline int stat_count(bool smooth, bool entropy) { return 3 + smooth + entropy; }

// Of the whole row: over all shards once they are joined.
struct RowStats {
  float max, sum, target, total, spread;
};

// exp(from - to) for maxima; 0 for a shard without tokens. Both -inf gives NaN: a row of nothing but -inf has no
// softmax.
SOLAR_MEGA_HOST_DEVICE inline float shift_factor(float from, float to) { return std::exp(from - to); }

// sum, spread <- those about another maximum.
SOLAR_MEGA_HOST_DEVICE inline void add_shifted(
    RowStats& row, float max, float sum, float spread) {
  const float factor = shift_factor(max, row.max);
  row.sum += factor * sum;
  // 0 * inf where the shard has no tokens
  if (sum != 0) row.spread += factor * (spread + (max - row.max) * sum);
}

// Values of token `row` from stats [shards][K][rows].
SOLAR_MEGA_HOST_DEVICE inline RowStats join_shards(
    const float* stats, int64_t shards, int64_t rows, int64_t row, bool smooth, bool entropy) {
  const int64_t step = stat_count(smooth, entropy) * rows;
  const float* at = stats + row;
  RowStats out{at[0], 0, 0, 0, 0};
  for (int64_t s = 1; s < shards; ++s) out.max = at[s * step] > out.max ? at[s * step] : out.max;
  for (int64_t s = 0; s < shards; ++s, at += step) {
    add_shifted(out, at[0], at[rows], entropy ? at[(3 + smooth) * rows] : 0.0f);
    out.target += at[2 * rows];
    if (smooth) out.total += at[3 * rows];
  }
  return out;
}

// A row that counts and has a single shard.
SOLAR_MEGA_HOST_DEVICE inline RowStats join_single(RowStats row) {
  if (row.max == -INFINITY) row.sum = NAN;
  return row;
}

struct RowResult {
  float logp, entropy;
  bool hit;
};

// logp = (1 - ε) x_t + ε/V Σ x - lse - z lse², lse = max + ln(sum). Differences to the maximum are taken first: they
// are small where lse is large. `Real` is double on the CPU, float on the GPU.
template <typename Real>
SOLAR_MEGA_HOST_DEVICE inline RowResult finish_row(const RowStats& row, const LossTerms& terms, int64_t vocab_size) {
  if (row.sum == 0) return {0, 0, false};
  const Real log_sum = std::log(static_cast<Real>(row.sum)), max = row.max;
  Real logp = (static_cast<Real>(row.target) - max) - log_sum;
  if (terms.smoothing != 0) {
    const Real mean = (static_cast<Real>(row.total) / static_cast<Real>(vocab_size) - max) - log_sum;
    logp += static_cast<Real>(terms.smoothing) * (mean - logp);
  }
  if (terms.z != 0) logp -= static_cast<Real>(terms.z) * (max + log_sum) * (max + log_sum);
  const Real entropy = log_sum - static_cast<Real>(row.spread) / static_cast<Real>(row.sum);
  return {static_cast<float>(logp), static_cast<float>(entropy), row.target >= row.max};
}

// dlogits[v] = at_target [v == target] + everywhere - scale exp(x[v] - max)
struct RowGradient {
  float at_target, everywhere, scale;
};

SOLAR_MEGA_HOST_DEVICE inline RowGradient gradient_of(
    float dlogp, float max, float sum, const LossTerms& terms, int64_t vocab_size) {
  const float d_lse = terms.z == 0 ? dlogp : dlogp * (1 + 2 * terms.z * (max + std::log(sum)));
  return {
      dlogp * (1 - terms.smoothing), dlogp * terms.smoothing / static_cast<float>(vocab_size), d_lse / sum};
}

} // namespace solar_mega
