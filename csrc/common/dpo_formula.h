// What one pair of a preference loss is: the value and its two derivatives, in fp64. Free of torch headers; every
// device compiles this one text. Formulas with their papers: VARIANTS of solar_mega/ops/dpo_loss.py, in this order.

#pragma once

#include <cmath>
#include <cstdint>

#include "common/rows.h"

namespace solar_mega {

enum class DpoVariant : int64_t { sigmoid, robust, hinge, ipo, apo_zero, apo_down, sppo_hard, nca_pair, count };

struct DpoOptions {
  DpoVariant variant;
  double beta;
  double label_smoothing; // sigmoid and robust only
  double rpo_alpha;       // weight of the chosen responses' negative log-likelihood
  bool rpo_per_sequence;  // that likelihood as a mean over sequences of their means, else over all chosen tokens
};

// Sums over the counted tokens of one sequence.
struct DpoSequence {
  double logps = 0, reference = 0, weight = 0;
};

struct DpoPair {
  double loss;
  double chosen, rejected; // d loss / d (log-ratio), the log-ratio being logps - reference
};

// log(1 + exp(x)) without overflow, and with its digits where it is small.
SOLAR_MEGA_HOST_DEVICE inline double softplus(double x) { return (x > 0 ? x : 0) + log1p(exp(-fabs(x))); }
SOLAR_MEGA_HOST_DEVICE inline double logistic(double x) {
  const double e = exp(-fabs(x));
  return (x > 0 ? 1 : e) / (1 + e);
}
SOLAR_MEGA_HOST_DEVICE inline double logistic_slope(double x) { return logistic(x) * logistic(-x); }

// a and b: the chosen and the rejected response's log-ratio.
SOLAR_MEGA_HOST_DEVICE inline DpoPair dpo_pair(
    const DpoOptions& o, double a, double b, double chosen_tokens, double rejected_tokens) {
  const double beta = o.beta, eps = o.label_smoothing, h = beta * (a - b);
  switch (o.variant) {
    case DpoVariant::sigmoid: {
      const double slope = beta * (eps * logistic(h) - (1 - eps) * logistic(-h));
      return {(1 - eps) * softplus(-h) + eps * softplus(h), slope, -slope};
    }
    case DpoVariant::robust: {
      const double scale = 1 / (1 - 2 * eps);
      const double slope = -scale * beta * ((1 - eps) * logistic(-h) + eps * logistic(h));
      return {scale * ((1 - eps) * softplus(-h) - eps * softplus(h)), slope, -slope};
    }
    case DpoVariant::hinge:
      // Written so that a NaN stays one.
      return h >= 1 ? DpoPair{0, 0, 0} : DpoPair{1 - h, -beta, beta};
    case DpoVariant::ipo: {
      const double chosen = chosen_tokens > 1 ? chosen_tokens : 1, rejected = rejected_tokens > 1 ? rejected_tokens : 1;
      const double off = a / chosen - b / rejected - 1 / (2 * beta);
      return {off * off, 2 * off / chosen, -2 * off / rejected};
    }
    case DpoVariant::apo_zero:
      return {
          logistic(-beta * a) + logistic(beta * b), -beta * logistic_slope(beta * a), beta * logistic_slope(beta * b)};
    case DpoVariant::apo_down:
      return {
          logistic(beta * a) + logistic(-h), beta * (logistic_slope(beta * a) - logistic_slope(h)),
          beta * logistic_slope(h)};
    case DpoVariant::sppo_hard: {
      const double up = a - 1 / (2 * beta), down = b + 1 / (2 * beta);
      return {up * up + down * down, 2 * up, 2 * down};
    }
    default: // nca_pair
      return {
          softplus(-beta * a) + 0.5 * softplus(beta * a) + 0.5 * softplus(beta * b),
          beta * (0.5 * logistic(beta * a) - logistic(-beta * a)), 0.5 * beta * logistic(beta * b)};
  }
}

// Rows of the op's [5, pairs] output.
enum DpoRow { kDpoLoss, kDpoChosenReward, kDpoRejectedReward, kDpoMargin, kDpoAccuracy, kDpoRows };

// Writes a pair's column of that output and returns what its tokens' weights are multiplied with: the gradient of the
// mean over `pairs` pairs. `chosen_tokens`: all chosen tokens of the call, for the likelihood over all of them.
SOLAR_MEGA_HOST_DEVICE inline DpoPair dpo_finish_pair(
    const DpoOptions& o, const DpoSequence& chosen, const DpoSequence& rejected, double chosen_tokens, int64_t pair,
    int64_t pairs, float* out) {
  const double a = chosen.logps - chosen.reference, b = rejected.logps - rejected.reference;
  DpoPair result = dpo_pair(o, a, b, chosen.weight, rejected.weight);
  out[kDpoLoss * pairs + pair] = static_cast<float>(result.loss);
  out[kDpoChosenReward * pairs + pair] = static_cast<float>(o.beta * a);
  out[kDpoRejectedReward * pairs + pair] = static_cast<float>(o.beta * b);
  out[kDpoMargin * pairs + pair] = static_cast<float>(o.beta * (a - b));
  out[kDpoAccuracy * pairs + pair] = a > b ? 1.0f : 0.0f;
  result.chosen /= static_cast<double>(pairs);
  result.rejected /= static_cast<double>(pairs);
  const double spread = o.rpo_per_sequence ? chosen.weight * static_cast<double>(pairs) : chosen_tokens;
  if (o.rpo_alpha != 0 && spread > 0) result.chosen -= o.rpo_alpha / spread;
  return result;
}

} // namespace solar_mega
