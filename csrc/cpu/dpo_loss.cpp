// The preference loss on the CPU: per-sequence sums, loss and per-token coefficients, pair by pair. Formulas:
// common/dpo_formula.h. A pair belongs to one thread and sums are fp64 in token order within fixed vector lanes, so
// the result does not depend, to the bit, on how many threads there are.

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <vector>

#include "common/dpo_loss.h"
#include "cpu/dispatch.h"

namespace solar_mega {
namespace {

constexpr int64_t kGrain = 32768; // tokens below which a thread is not worth waking

// The weight of a token. The mask is absent (a null nullptr_t*: every token counts), bool or float.
SOLAR_MEGA_INLINE float weight_at(const std::nullptr_t*, int64_t) { return 1.0f; }
SOLAR_MEGA_INLINE float weight_at(const uint8_t* mask, int64_t i) { return mask[i] ? 1.0f : 0.0f; }
SOLAR_MEGA_INLINE float weight_at(const float* mask, int64_t i) { return mask[i]; }

// A token that does not count may hold anything, NaN included.
template <typename M>
SOLAR_MEGA_INLINE void sum_sequence_body(
    const float* logps, const float* reference, const M* mask, int64_t begin, int64_t end, DpoSequence* out) {
  double sum = 0, reference_sum = 0, weight = 0;
#pragma omp simd reduction(+ : sum, weight)
  for (int64_t i = begin; i < end; ++i) {
    const float w = weight_at(mask, i);
    sum += w != 0 ? static_cast<double>(w) * static_cast<double>(logps[i]) : 0.0;
    weight += static_cast<double>(w);
  }
  if (reference != nullptr) {
#pragma omp simd reduction(+ : reference_sum)
    for (int64_t i = begin; i < end; ++i) {
      const float w = weight_at(mask, i);
      reference_sum += w != 0 ? static_cast<double>(w) * static_cast<double>(reference[i]) : 0.0;
    }
  }
  *out = {sum, reference_sum, weight};
}

template <typename M>
SOLAR_MEGA_INLINE void fill_sequence_body(const M* mask, int64_t begin, int64_t end, float value, float* out) {
#pragma omp simd
  for (int64_t i = begin; i < end; ++i) {
    const float w = weight_at(mask, i);
    out[i] = w != 0 ? w * value : 0.0f;
  }
}

SOLAR_MEGA_ISA_VARIANTS(sum_sequence)
SOLAR_MEGA_ISA_VARIANTS(fill_sequence)

struct Arguments {
  const float* logps;
  const float* reference_tokens; // [tokens] or null
  const void* reference;         // [2 * pairs], fp32 or fp64, or null
  bool reference_is_double;
  const int32_t* offsets; // [2 * pairs + 1]
  float *loss, *nll, *per_pair, *counts, *coefficients;
  double* sums;
};

template <typename M>
void run(const DpoShape& shape, const Arguments& a, const M* mask) {
  const int64_t pairs = shape.pairs, grain = std::max<int64_t>(1, kGrain * pairs / std::max<int64_t>(1, shape.tokens));
  std::vector<DpoSequence> sequences(2 * pairs);
  torch::stable::parallel_for(0, 2 * pairs, 2 * grain, [&](int64_t from, int64_t to) {
    for (int64_t s = from; s < to; ++s) {
      sum_sequence(a.logps, a.reference_tokens, mask, a.offsets[s], a.offsets[s + 1], &sequences[s]);
      if (a.reference != nullptr)
        sequences[s].reference = a.reference_is_double ? static_cast<const double*>(a.reference)[s]
                                                       : static_cast<const float*>(a.reference)[s];
      a.sums[s] = sequences[s].logps;
      a.counts[s] = static_cast<float>(sequences[s].weight);
    }
  });
  double chosen_tokens = 0, chosen_logps = 0, chosen_means = 0, loss = 0;
  for (int64_t p = 0; p < pairs; ++p) {
    const DpoSequence& chosen = sequences[2 * p];
    chosen_tokens += chosen.weight;
    chosen_logps += chosen.logps;
    if (chosen.weight > 0) chosen_means += chosen.logps / chosen.weight;
  }
  std::vector<double> losses(pairs);
  torch::stable::parallel_for(0, pairs, grain, [&](int64_t from, int64_t to) {
    for (int64_t p = from; p < to; ++p) {
      const DpoPair result = dpo_finish_pair(
          shape.options, sequences[2 * p], sequences[2 * p + 1], chosen_tokens, p, pairs, a.per_pair);
      losses[p] = result.loss;
      const int32_t* at = a.offsets + 2 * p;
      fill_sequence(mask, at[0], at[1], static_cast<float>(result.chosen), a.coefficients);
      fill_sequence(mask, at[1], at[2], static_cast<float>(result.rejected), a.coefficients);
    }
  });
  std::fill(a.coefficients + a.offsets[2 * pairs], a.coefficients + shape.tokens, 0.0f);
  for (double value : losses) loss += value;
  const double count = static_cast<double>(pairs);
  const double nll = -(shape.options.rpo_per_sequence ? chosen_means / count
                                                      : chosen_tokens > 0 ? chosen_logps / chosen_tokens : 0);
  *a.nll = static_cast<float>(nll);
  const bool with_nll = shape.options.rpo_alpha != 0; // an infinite nll times 0 is not 0
  *a.loss = static_cast<float>(loss / count + (with_nll ? shape.options.rpo_alpha * nll : 0));
}

DpoOutputs dpo_loss(
    const Tensor& logps, const Tensor& cu_seqlens, std::optional<Tensor> mask, std::optional<Tensor> reference_logps,
    std::optional<Tensor> reference_token_logps, std::string variant, double beta, double label_smoothing,
    double rpo_alpha, bool rpo_per_sequence) {
  const DpoOptions options = dpo_options(variant, beta, label_smoothing, rpo_alpha, rpo_per_sequence);
  const DpoShape shape =
      check_dpo_loss(logps, cu_seqlens, mask, reference_logps, reference_token_logps, options);
  DpoOutputs outputs = empty_dpo_outputs(shape, logps);
  auto& [loss, nll, per_pair, sums, counts, coefficients] = outputs;
  Arguments a{};
  a.logps = static_cast<const float*>(logps.data_ptr());
  if (reference_token_logps) a.reference_tokens = static_cast<const float*>(reference_token_logps->data_ptr());
  if (reference_logps) {
    a.reference = reference_logps->data_ptr();
    a.reference_is_double = reference_logps->scalar_type() == ScalarType::Double;
  }
  a.offsets = static_cast<const int32_t*>(cu_seqlens.data_ptr());
  a.loss = static_cast<float*>(loss.data_ptr());
  a.nll = static_cast<float*>(nll.data_ptr());
  a.per_pair = static_cast<float*>(per_pair.data_ptr());
  a.counts = static_cast<float*>(counts.data_ptr());
  a.coefficients = static_cast<float*>(coefficients.data_ptr());
  a.sums = static_cast<double*>(sums.data_ptr());
  if (!mask)
    run(shape, a, static_cast<const std::nullptr_t*>(nullptr));
  else if (mask->scalar_type() == ScalarType::Bool)
    run(shape, a, static_cast<const uint8_t*>(mask->data_ptr()));
  else
    run(shape, a, static_cast<const float*>(mask->data_ptr()));
  return outputs;
}

} // namespace

STABLE_TORCH_LIBRARY_IMPL(solar_mega, CPU, m) { m.impl("dpo_loss", TORCH_BOX(&dpo_loss)); }

} // namespace solar_mega
