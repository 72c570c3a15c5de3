// Token log-probs on the CPU: a shard's statistics, their joining over shards, the gradient. Formulas:
// solar_mega/ops/token_logprob.py; what a row is reduced to: common/token_stats.h.
//
//     forward    a row goes by in blocks of kBlock columns, each read from memory once and used twice from L1:
//
//                   x  [ block 0 ][ block 1 ] ...      max of the block -> rescale what was summed so far
//                                                      Σ exp(x - max)   -> add
//
//     backward   one pass, in place or into a new tensor: dlogits = at_target + everywhere - scale exp(x - max)
//
// Rows are shared out over torch's threads; each is computed by one thread in one order, so the number of threads does
// not change a bit. Elements are fp32 in registers; sums over blocks are fp64.

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <tuple>

#include "common/token_logprob.h"
#include "cpu/element.h"
#include "cpu/exp.h"

namespace solar_mega {
namespace {

constexpr int64_t kBlock = 512; // summed in fp32, blocks in fp64: short enough to round well with four lanes
constexpr int64_t kGrain = 16384; // elements below which a thread is not worth waking
constexpr float kNoMax = -std::numeric_limits<float>::infinity();

template <typename T>
SOLAR_MEGA_INLINE void block_max_body(const T* x, int64_t n, float* max) {
  float m = *max;
#pragma omp simd reduction(max : m)
  for (int64_t i = 0; i < n; ++i) {
    const float v = to_float(x[i]);
    m = v > m ? v : m;
  }
  *max = m;
}

template <typename T>
SOLAR_MEGA_INLINE void block_sum_body(const T* x, int64_t n, float max, float* sum) {
  float s = 0;
#pragma omp simd reduction(+ : s)
  for (int64_t i = 0; i < n; ++i) s += fast_exp(to_float(x[i]) - max);
  *sum = s;
}

// With Σ x and Σ exp(x - max) (x - max); a probability of 0 adds nothing to the latter, whatever its logit.
template <typename T>
SOLAR_MEGA_INLINE void block_sums_body(const T* x, int64_t n, float max, float* sums) {
  float s = 0, total = 0, spread = 0;
#pragma omp simd reduction(+ : s, total, spread)
  for (int64_t i = 0; i < n; ++i) {
    const float v = to_float(x[i]), d = v - max, e = fast_exp(d), term = e * d;
    s += e;
    total += v;
    spread += e == 0.0f ? 0.0f : term;
  }
  sums[0] = s, sums[1] = total, sums[2] = spread;
}

template <typename T>
SOLAR_MEGA_INLINE void gradient_row_body(const T* x, T* dx, int64_t n, float max, float scale, float everywhere) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) dx[i] = from_float<T>(everywhere - scale * fast_exp(to_float(x[i]) - max));
}

SOLAR_MEGA_ISA_VARIANTS(block_max)
SOLAR_MEGA_ISA_VARIANTS(block_sum)
SOLAR_MEGA_ISA_VARIANTS(block_sums)
SOLAR_MEGA_ISA_VARIANTS(gradient_row)

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

struct Targets {
  const int64_t* targets;
  const bool* mask; // null: all count

  bool counts(int64_t row) const { return targets[row] != kIgnore && (mask == nullptr || mask[row]); }
};

Targets targets_of(const char* op, const Tensor& targets, const std::optional<Tensor>& mask, int64_t vocab_size) {
  const Targets out{
      static_cast<const int64_t*>(targets.data_ptr()),
      mask.has_value() ? static_cast<const bool*>(mask->data_ptr()) : nullptr};
  const int64_t rows = targets.numel();
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t target = out.targets[row];
    SOLAR_MEGA_CHECK(
        (target >= 0 && target < vocab_size) || !out.counts(row), op, ": targets has ", target, " at position ", row,
        "; allowed: 0 to ", vocab_size - 1, ", or ", kIgnore, " for a token that does not count");
  }
  return out;
}

template <typename T>
RowStats row_stats(const T* x, const Vocabulary& vocabulary, int64_t target, bool extra) {
  double sum = 0, total = 0, spread = 0;
  float max = kNoMax;
  for (int64_t start = 0; start < vocabulary.valid; start += kBlock) {
    const int64_t n = std::min(kBlock, vocabulary.valid - start);
    const float before = max;
    block_max(x + start, n, &max);
    if (max > before && sum != 0) {
      const double step = static_cast<double>(before) - max, factor = std::exp(step);
      spread = factor * (spread + step * sum);
      sum *= factor;
    }
    const float shift = max == kNoMax ? 0 : max; // nothing but -inf so far: adds zeros, or NaN
    float sums[3] = {0, 0, 0};
    if (extra)
      block_sums(x + start, n, shift, sums);
    else
      block_sum(x + start, n, shift, sums);
    sum += sums[0], total += sums[1], spread += sums[2];
  }
  const int64_t column = target - vocabulary.first;
  const bool here = column >= 0 && column < vocabulary.valid;
  return {
      max, static_cast<float>(sum), here ? to_float(x[column]) : 0, static_cast<float>(total),
      static_cast<float>(spread)};
}

// f(row, its statistics) for every row; those that do not count are not read.
template <typename F>
void for_each_row(
    const LogprobShape& shape, const Tensor& logits, const Targets& targets, bool extra, const F& f) {
  for_each_dtype(logits.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const T* x = static_cast<const T*>(logits.data_ptr());
    const int64_t grain = ceil_div(kGrain, shape.width);
    torch::stable::parallel_for(0, shape.logits.count, grain, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        const bool counts = targets.counts(row);
        f(row, counts,
          counts ? row_stats(x + shape.logits.offset(row), shape.vocabulary, targets.targets[row], extra) : RowStats{});
      }
    });
  });
}

Tensor token_logprob_partial(
    const Tensor& logits, const Tensor& targets, std::optional<Tensor> mask, int64_t first_column, int64_t vocab_size,
    bool smooth, bool entropy) {
  const char* op = "token_logprob_partial";
  const LogprobShape shape = check_logprob(op, logits, targets, mask, first_column, vocab_size);
  const auto sizes = stacked_sizes(stat_count(smooth, entropy), logits);
  Tensor stats = empty({sizes.data(), sizes.size()}, ScalarType::Float, logits);
  if (targets.numel() == 0) return stats;
  const Targets wanted = targets_of(op, targets, mask, vocab_size);
  float* out = static_cast<float*>(stats.data_ptr());
  const int64_t rows = shape.logits.count;
  for_each_row(shape, logits, wanted, smooth || entropy, [&](int64_t row, bool, const RowStats& s) {
    out[row] = s.max, out[rows + row] = s.sum, out[2 * rows + row] = s.target;
    if (smooth) out[3 * rows + row] = s.total;
    if (entropy) out[(3 + smooth) * rows + row] = s.spread;
  });
  return stats;
}

// The results of all rows, one row at a time.
struct Results {
  float *logps, *max, *sum, *entropy;
  bool* hit;

  Results(const LogprobOutputs& out, int64_t rows)
      : logps(static_cast<float*>(out.logps.data_ptr())),
        max(static_cast<float*>(out.saved.data_ptr())),
        sum(max + rows),
        entropy(out.metrics ? static_cast<float*>(out.entropy.data_ptr()) : nullptr),
        hit(out.metrics ? static_cast<bool*>(out.hit.data_ptr()) : nullptr) {}

  void set(int64_t row, const RowStats& s, const LossTerms& terms, int64_t vocab_size) const {
    const RowResult r = finish_row<double>(s, terms, vocab_size);
    logps[row] = r.logp, max[row] = s.max, sum[row] = s.sum;
    if (entropy != nullptr) entropy[row] = r.entropy, hit[row] = r.hit;
  }
};

LogprobTuple token_logprob(
    const Tensor& logits, const Tensor& targets, std::optional<Tensor> mask, int64_t vocab_size, double label_smoothing,
    double z_loss, bool metrics) {
  const char* op = "token_logprob";
  const LogprobShape shape = check_logprob(op, logits, targets, mask, 0, vocab_size);
  const LossTerms terms = check_terms(op, label_smoothing, z_loss);
  const LogprobOutputs out = empty_outputs(row_sizes(logits), metrics, logits);
  if (targets.numel() > 0) {
    const Results results(out, shape.logits.count);
    const Targets wanted = targets_of(op, targets, mask, vocab_size);
    for_each_row(
        shape, logits, wanted, metrics || terms.smoothing != 0, [&](int64_t row, bool counts, const RowStats& s) {
          results.set(row, counts ? join_single(s) : s, terms, vocab_size);
        });
  }
  return out.tuple();
}

LogprobTuple token_logprob_combine(
    const Tensor& stats, int64_t vocab_size, double label_smoothing, double z_loss, bool metrics) {
  const char* op = "token_logprob_combine";
  const LossTerms terms = check_terms(op, label_smoothing, z_loss);
  const bool smooth = terms.smoothing != 0;
  const CombineShape shape = check_combine(op, stats, smooth, metrics, vocab_size);
  const auto sizes = stats.sizes();
  const LogprobOutputs out = empty_outputs({sizes.begin() + 2, sizes.end()}, metrics, stats);
  const Results results(out, shape.rows);
  const float* in = static_cast<const float*>(stats.data_ptr());
  torch::stable::parallel_for(0, shape.rows, kGrain / 8, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row)
      results.set(row, join_shards(in, shape.shards, shape.rows, row, smooth, metrics), terms, vocab_size);
  });
  return out.tuple();
}

template <typename T>
void gradient_row_of(
    const T* x, T* dx, int64_t width, const Vocabulary& vocabulary, int64_t target, float max, const RowGradient& g) {
  const int64_t column = target - vocabulary.first;
  const bool here = column >= 0 && column < vocabulary.valid;
  const float logit = here ? to_float(x[column]) : 0; // dx may be x
  gradient_row(x, dx, vocabulary.valid, max, g.scale, g.everywhere);
  if (here) dx[column] = from_float<T>((g.at_target + g.everywhere) - g.scale * fast_exp(logit - max));
  std::memset(dx + vocabulary.valid, 0, (width - vocabulary.valid) * sizeof(T));
}

void backward(
    const LogprobShape& shape, const Tensor& dlogps, const Tensor& logits, const Tensor& targets, const Tensor& saved,
    const LossTerms& terms, const Tensor& dlogits, const Rows& out) {
  const float* d = static_cast<const float*>(dlogps.data_ptr());
  const int64_t* wanted = static_cast<const int64_t*>(targets.data_ptr());
  const float* max = static_cast<const float*>(saved.data_ptr());
  const float* sum = max + shape.logits.count;
  for_each_dtype(logits.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const T* x = static_cast<const T*>(logits.data_ptr());
    T* dx = static_cast<T*>(dlogits.data_ptr());
    const int64_t grain = ceil_div(kGrain, shape.width);
    torch::stable::parallel_for(0, shape.logits.count, grain, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        T* to = dx + out.offset(row);
        if (sum[row] == 0 || d[row] == 0)
          std::memset(to, 0, shape.width * sizeof(T));
        else
          gradient_row_of(
              x + shape.logits.offset(row), to, shape.width, shape.vocabulary, wanted[row], max[row],
              gradient_of(d[row], max[row], sum[row], terms, shape.vocabulary.size));
      }
    });
  });
}

Tensor token_logprob_backward(
    const Tensor& dlogps, const Tensor& logits, const Tensor& targets, const Tensor& saved, int64_t first_column,
    int64_t vocab_size, double label_smoothing, double z_loss) {
  const char* op = "token_logprob_backward";
  const LogprobShape shape = check_logprob_backward(op, dlogps, logits, targets, saved, first_column, vocab_size);
  Tensor dlogits = empty(logits.sizes(), logits.scalar_type(), logits);
  const LossTerms terms = check_terms(op, label_smoothing, z_loss);
  backward(shape, dlogps, logits, targets, saved, terms, dlogits, contiguous_rows(shape));
  return dlogits;
}

void token_logprob_backward_(
    const Tensor& dlogps, Tensor logits, const Tensor& targets, const Tensor& saved, int64_t first_column,
    int64_t vocab_size, double label_smoothing, double z_loss) {
  const char* op = "token_logprob_backward_";
  const LogprobShape shape = check_logprob_backward(op, dlogps, logits, targets, saved, first_column, vocab_size);
  check_writable_rows(op, shape);
  backward(shape, dlogps, logits, targets, saved, check_terms(op, label_smoothing, z_loss), logits, shape.logits);
}

} // namespace

STABLE_TORCH_LIBRARY_IMPL(solar_mega, CPU, m) {
  m.impl("token_logprob", TORCH_BOX(&token_logprob));
  m.impl("token_logprob_partial", TORCH_BOX(&token_logprob_partial));
  m.impl("token_logprob_combine", TORCH_BOX(&token_logprob_combine));
  m.impl("token_logprob_backward", TORCH_BOX(&token_logprob_backward));
  m.impl("token_logprob_backward_", TORCH_BOX(&token_logprob_backward_));
}

} // namespace solar_mega
