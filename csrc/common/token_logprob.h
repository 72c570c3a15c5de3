// The contract of the token log-prob ops' arguments, the same on every device (csrc/cpu/token_logprob.cpp,
// csrc/cuda/token_logprob.cu). Formulas: solar_mega/ops/token_logprob.py.

#pragma once

#include <algorithm>
#include <optional>
#include <tuple>
#include <vector>

#include "common/tensor.h"
#include "common/token_stats.h"

namespace solar_mega {

constexpr double kLargestCoefficient = 1e30;

struct LogprobShape {
  Rows logits;
  int64_t width; // columns of this shard
  Vocabulary vocabulary;
};

inline void check_per_token(
    const char* op, const char* name, const Tensor& t, const Tensor& logits, ScalarType dtype) {
  check_device(op, name, t, logits, "logits");
  check_dtype(op, name, t, dtype, "");
  const auto got = t.sizes(), whole = logits.sizes();
  bool same = got.size() + 1 == whole.size();
  for (size_t i = 0; same && i < got.size(); ++i) same = got[i] == whole[i];
  SOLAR_MEGA_CHECK(
      same && t.is_contiguous(), op, ": ", name, " has shape ", to_text(got), " and strides ", to_text(t.strides()),
      "; it must be contiguous with one value per row of logits, which is ", to_text(whole));
}

// The columns of this shard that are tokens are [0, valid): global tokens [first_column, first_column + valid).
inline LogprobShape check_logprob(
    const char* op, const Tensor& logits, const Tensor& targets, const std::optional<Tensor>& mask,
    int64_t first_column, int64_t vocab_size) {
  check_float_dtype(op, "logits", logits);
  SOLAR_MEGA_CHECK(
      logits.dim() >= 1 && logits.size(-1) >= 1, op, ": logits has shape ", to_text(logits.sizes()),
      "; allowed: [..., columns] with columns >= 1");
  check_per_token(op, "targets", targets, logits, ScalarType::Long);
  if (mask.has_value()) check_per_token(op, "mask", *mask, logits, ScalarType::Bool);
  SOLAR_MEGA_CHECK(first_column >= 0, op, ": first_column is ", first_column, "; allowed: >= 0");
  SOLAR_MEGA_CHECK(vocab_size >= 1, op, ": vocab_size is ", vocab_size, "; allowed: >= 1");
  const int64_t width = logits.size(-1);
  const int64_t valid = std::clamp<int64_t>(vocab_size - first_column, 0, width);
  return {rows_of(op, "logits", logits), width, {first_column, valid, vocab_size}};
}

inline LossTerms check_terms(const char* op, double label_smoothing, double z_loss) {
  SOLAR_MEGA_CHECK(
      label_smoothing >= 0 && label_smoothing < 1, op, ": label_smoothing is ", label_smoothing, "; allowed: 0 <= it < 1");
  SOLAR_MEGA_CHECK(
      z_loss >= 0 && z_loss < kLargestCoefficient, op, ": z_loss is ", z_loss, "; allowed: a finite number >= 0");
  return {static_cast<float>(label_smoothing), static_cast<float>(z_loss)};
}

// [rows] sizes behind a leading dimension, as statistics and saved pairs have.
inline std::vector<int64_t> stacked_sizes(int64_t count, const Tensor& logits) {
  const auto sizes = logits.sizes();
  std::vector<int64_t> out{count};
  out.insert(out.end(), sizes.begin(), sizes.end() - 1);
  return out;
}

inline std::vector<int64_t> row_sizes(const Tensor& logits) {
  const auto sizes = logits.sizes();
  return {sizes.begin(), sizes.end() - 1};
}

inline LogprobShape check_logprob_backward(
    const char* op, const Tensor& dlogps, const Tensor& logits, const Tensor& targets, const Tensor& saved,
    int64_t first_column, int64_t vocab_size) {
  const LogprobShape shape = check_logprob(op, logits, targets, std::nullopt, first_column, vocab_size);
  check_per_token(op, "dlogps", dlogps, logits, ScalarType::Float);
  check_device(op, "saved", saved, logits, "logits");
  check_dtype(op, "saved", saved, ScalarType::Float, ", as the forward returned it");
  SOLAR_MEGA_CHECK(
      saved.numel() == 2 * targets.numel() && saved.is_contiguous(), op, ": saved has shape ", to_text(saved.sizes()),
      "; it must be contiguous of shape ", to_text({stacked_sizes(2, logits).data(), logits.sizes().size()}));
  return shape;
}

// Two rows that share memory cannot both be overwritten.
inline void check_writable_rows(const char* op, const LogprobShape& shape) {
  const Rows& r = shape.logits;
  const int64_t outer = r.inner > 0 ? r.count / r.inner : 0;
  const int64_t a = r.inner > 1 ? r.inner_stride : 0, b = outer > 1 ? r.outer_stride : 0;
  const int64_t inner_span = (r.inner > 1 ? (r.inner - 1) * a : 0) + shape.width;
  const int64_t outer_span = (outer > 1 ? (outer - 1) * b : 0) + shape.width;
  const bool apart = (r.inner <= 1 || a >= shape.width) && (outer <= 1 || b >= shape.width) &&
      (r.inner <= 1 || outer <= 1 || b >= inner_span || a >= outer_span);
  SOLAR_MEGA_CHECK(
      apart || r.count == 0, op, ": rows of logits share memory (row strides ", r.inner_stride, " and ", r.outer_stride,
      ", ", shape.width, " columns); they cannot be overwritten. Call .contiguous() on logits");
}

inline Rows contiguous_rows(const LogprobShape& shape) {
  return {shape.logits.count, shape.logits.count, shape.width, 0};
}

using LogprobTuple = std::tuple<Tensor, Tensor, Tensor, Tensor>;

// logps [...], saved [2, ...]: max and sum. entropy and hit [...], or empty when no metrics are wanted.
struct LogprobOutputs {
  Tensor logps, saved, entropy, hit;
  bool metrics;

  LogprobTuple tuple() const { return {logps, saved, entropy, hit}; }
};

inline LogprobOutputs empty_outputs(const std::vector<int64_t>& sizes, bool metrics, const Tensor& like) {
  const std::vector<int64_t> none{0}, &wanted = metrics ? sizes : none;
  std::vector<int64_t> pair{2};
  pair.insert(pair.end(), sizes.begin(), sizes.end());
  const auto make = [&](const std::vector<int64_t>& s, ScalarType dtype) {
    return empty({s.data(), s.size()}, dtype, like);
  };
  return {
      make(sizes, ScalarType::Float), make(pair, ScalarType::Float), make(wanted, ScalarType::Float),
      make(wanted, ScalarType::Bool), metrics};
}

struct CombineShape {
  int64_t shards, stats, rows;
};

inline CombineShape check_combine(const char* op, const Tensor& stats, bool smooth, bool entropy, int64_t vocab_size) {
  check_dtype(op, "stats", stats, ScalarType::Float, ", as token_logprob_partial returned it");
  const int64_t wanted = stat_count(smooth, entropy);
  SOLAR_MEGA_CHECK(
      stats.dim() >= 2 && stats.is_contiguous() && stats.size(0) >= 1 && stats.size(1) == wanted, op,
      ": stats has shape ", to_text(stats.sizes()), " and strides ", to_text(stats.strides()),
      "; it must be contiguous of shape [shards, ", wanted, ", ...]");
  SOLAR_MEGA_CHECK(vocab_size >= 1, op, ": vocab_size is ", vocab_size, "; allowed: >= 1");
  int64_t rows = 1;
  for (int64_t d = 2; d < stats.dim(); ++d) rows *= stats.size(d);
  return {stats.size(0), wanted, rows};
}

} // namespace solar_mega
