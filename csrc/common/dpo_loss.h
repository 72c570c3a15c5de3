// The contract of dpo_loss's arguments, the same on every device (csrc/cpu/dpo_loss.cpp, csrc/cuda/dpo_loss.cu).

#pragma once

#include <array>
#include <limits>
#include <optional>
#include <string>

#include "common/dpo_formula.h"
#include "common/tensor.h"

namespace solar_mega {

struct DpoShape {
  int64_t tokens, pairs;
  DpoOptions options;
};

// loss, nll, per_pair, sums, counts, coefficients
using DpoOutputs = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

inline DpoVariant dpo_variant(const std::string& name) {
  constexpr std::array<const char*, 8> names = {
      "sigmoid", "robust", "hinge", "ipo", "apo_zero", "apo_down", "sppo_hard", "nca_pair"};
  static_assert(names.size() == static_cast<size_t>(DpoVariant::count));
  std::string allowed;
  for (size_t i = 0; i < names.size(); ++i) {
    if (name == names[i]) return static_cast<DpoVariant>(i);
    allowed += (i ? ", " : "") + std::string(names[i]);
  }
  refuse("dpo_loss: variant is '", name, "'; allowed: ", allowed);
}

inline DpoOptions dpo_options(
    const std::string& variant, double beta, double label_smoothing, double rpo_alpha, bool rpo_per_sequence) {
  const DpoOptions options{dpo_variant(variant), beta, label_smoothing, rpo_alpha, rpo_per_sequence};
  SOLAR_MEGA_CHECK(beta > 0 && beta < 1e30, "dpo_loss: beta is ", beta, "; allowed: a finite number > 0");
  SOLAR_MEGA_CHECK(
      label_smoothing >= 0 && label_smoothing < 0.5, "dpo_loss: label_smoothing is ", label_smoothing,
      "; allowed: 0 <= label_smoothing < 0.5");
  SOLAR_MEGA_CHECK(
      label_smoothing == 0 || options.variant == DpoVariant::sigmoid || options.variant == DpoVariant::robust,
      "dpo_loss: label_smoothing is ", label_smoothing, " but variant '", variant,
      "' has none; allowed: 0, or variant sigmoid or robust");
  SOLAR_MEGA_CHECK(
      rpo_alpha >= 0 && rpo_alpha < 1e30, "dpo_loss: rpo_alpha is ", rpo_alpha, "; allowed: a finite number >= 0");
  return options;
}

inline void check_dpo_vector(
    const char* name, const Tensor& t, const Tensor& logps, int64_t wanted, const char* per_what) {
  SOLAR_MEGA_CHECK(
      t.is_cpu() == logps.is_cpu() && t.get_device_index() == logps.get_device_index(), "dpo_loss: ", name, " is on ",
      device_text(t), "; it must be on ", device_text(logps), ", where logps is");
  SOLAR_MEGA_CHECK(
      t.dim() == 1 && t.size(0) == wanted, "dpo_loss: ", name, " has shape ", to_text(t.sizes()), "; it must be [",
      wanted, "], one per ", per_what);
  SOLAR_MEGA_CHECK(
      wanted <= 1 || t.stride(0) == 1, "dpo_loss: ", name, " has stride ", t.stride(0),
      "; it must be contiguous. Call .contiguous() on it");
}

// Where the offsets can be read without waiting for a device.
inline void check_dpo_offsets(const Tensor& cu_seqlens, int64_t tokens) {
  const int32_t* at = static_cast<const int32_t*>(cu_seqlens.data_ptr());
  const int64_t count = cu_seqlens.size(0);
  SOLAR_MEGA_CHECK(at[0] == 0, "dpo_loss: cu_seqlens starts at ", at[0], "; it must start at 0");
  for (int64_t i = 1; i < count; ++i)
    SOLAR_MEGA_CHECK(
        at[i] >= at[i - 1], "dpo_loss: cu_seqlens falls from ", at[i - 1], " to ", at[i], " at index ", i,
        "; it must not decrease");
  SOLAR_MEGA_CHECK(
      at[count - 1] <= tokens, "dpo_loss: cu_seqlens ends at ", at[count - 1], "; logps has ", tokens, " tokens");
}

inline DpoShape check_dpo_loss(
    const Tensor& logps, const Tensor& cu_seqlens, const std::optional<Tensor>& mask,
    const std::optional<Tensor>& reference_logps, const std::optional<Tensor>& reference_token_logps,
    const DpoOptions& options) {
  const char* op = "dpo_loss";
  check_dtype(op, "logps", logps, ScalarType::Float, ": sums over a sequence lose too much in less");
  SOLAR_MEGA_CHECK(logps.dim() == 1, op, ": logps has shape ", to_text(logps.sizes()), "; allowed: [tokens]");
  const int64_t tokens = logps.size(0);
  check_dpo_vector("logps", logps, logps, tokens, "token");
  SOLAR_MEGA_CHECK(
      tokens <= std::numeric_limits<int32_t>::max(), op, ": logps has ", tokens, " tokens; allowed: below 2^31");
  check_dtype(op, "cu_seqlens", cu_seqlens, ScalarType::Int, ", as attention kernels take it");
  SOLAR_MEGA_CHECK(
      cu_seqlens.dim() == 1 && cu_seqlens.size(0) >= 3 && cu_seqlens.size(0) % 2 == 1, op, ": cu_seqlens has shape ",
      to_text(cu_seqlens.sizes()), "; allowed: [2 * pairs + 1] with at least one pair, as sequence 2i is the chosen and",
      " 2i + 1 the rejected response of pair i");
  const int64_t pairs = cu_seqlens.size(0) / 2;
  check_dpo_vector("cu_seqlens", cu_seqlens, logps, 2 * pairs + 1, "sequence, and the end");
  if (mask) {
    const auto dtype = mask->scalar_type();
    SOLAR_MEGA_CHECK(
        dtype == ScalarType::Bool || dtype == ScalarType::Float, op, ": mask has dtype ",
        torch::headeronly::toString(dtype), "; allowed: Bool, Float");
    check_dpo_vector("mask", *mask, logps, tokens, "token");
  }
  SOLAR_MEGA_CHECK(
      !reference_logps || !reference_token_logps, op,
      ": reference_logps and reference_token_logps are both given; allowed: one of them, or none to go without a "
      "reference");
  if (reference_logps) {
    const auto dtype = reference_logps->scalar_type();
    SOLAR_MEGA_CHECK(
        dtype == ScalarType::Float || dtype == ScalarType::Double, op, ": reference_logps has dtype ",
        torch::headeronly::toString(dtype), "; allowed: Float, Double");
    check_dpo_vector("reference_logps", *reference_logps, logps, 2 * pairs, "sequence");
  }
  if (reference_token_logps) {
    check_dtype(op, "reference_token_logps", *reference_token_logps, ScalarType::Float, ", as logps");
    check_dpo_vector("reference_token_logps", *reference_token_logps, logps, tokens, "token");
  }
  if (cu_seqlens.is_cpu()) check_dpo_offsets(cu_seqlens, tokens);
  return {tokens, pairs, options};
}

inline DpoOutputs empty_dpo_outputs(const DpoShape& shape, const Tensor& logps) {
  const int64_t per_pair[2] = {kDpoRows, shape.pairs}, sequences[1] = {2 * shape.pairs}, tokens[1] = {shape.tokens};
  return {
      empty({per_pair, size_t{0}}, ScalarType::Float, logps), empty({per_pair, size_t{0}}, ScalarType::Float, logps),
      empty({per_pair, 2}, ScalarType::Float, logps),         empty({sequences, 1}, ScalarType::Double, logps),
      empty({sequences, 1}, ScalarType::Float, logps),        empty({tokens, 1}, ScalarType::Float, logps)};
}

} // namespace solar_mega
