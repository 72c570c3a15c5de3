// Launchers of the token log-prob kernels (token_logprob.cuh has layout, launch shapes and floor bytes). Everything
// runs on torch's current stream; nothing waits for the device.

#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>

#include <tuple>

#include "common/token_logprob.h"
#include "cuda/dtypes.cuh"
#include "cuda/token_logprob.cuh"

namespace solar_mega {
namespace {

cudaStream_t current_stream(const Tensor& t) {
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

void check_width(const char* op, int64_t width) {
  SOLAR_MEGA_CHECK(width < (int64_t{1} << 30), op, ": logits has ", width, " columns; allowed: below 2^30");
}

LogprobResults pointers(const LogprobOutputs& out) {
  return {
      static_cast<float*>(out.logps.data_ptr()), static_cast<float*>(out.saved.data_ptr()),
      out.metrics ? static_cast<float*>(out.entropy.data_ptr()) : nullptr,
      out.metrics ? static_cast<bool*>(out.hit.data_ptr()) : nullptr};
}

// One of `stats` and `out` is given.
void launch_forward(
    const LogprobShape& shape, const Tensor& logits, const Tensor& targets, const std::optional<Tensor>& mask,
    const LossTerms& terms, bool smooth, bool spread, const Tensor* stats, const LogprobOutputs* out) {
  const torch::stable::accelerator::DeviceGuard guard(logits.get_device_index());
  for_each_dtype(logits.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    LogprobForward<T> args{};
    args.logits = static_cast<const T*>(logits.data_ptr());
    args.targets = static_cast<const int64_t*>(targets.data_ptr());
    args.mask = mask ? static_cast<const bool*>(mask->data_ptr()) : nullptr;
    args.stats = stats ? static_cast<float*>(stats->data_ptr()) : nullptr;
    if (out != nullptr) args.results = pointers(*out);
    args.layout = shape.logits;
    args.vocabulary = shape.vocabulary;
    args.terms = terms;
    args.smooth = smooth, args.spread = spread;
    const unsigned grid = logprob_grid(shape.logits.count), block = logprob_threads(shape.width / kLanes<T>);
    const cudaStream_t stream = current_stream(logits);
    if (smooth || spread)
      token_logprob_forward_kernel<T, true><<<grid, block, 0, stream>>>(args);
    else
      token_logprob_forward_kernel<T, false><<<grid, block, 0, stream>>>(args);
  });
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

LogprobTuple token_logprob(
    const Tensor& logits, const Tensor& targets, std::optional<Tensor> mask, int64_t vocab_size, double label_smoothing,
    double z_loss, bool metrics) {
  const char* op = "token_logprob";
  const LogprobShape shape = check_logprob(op, logits, targets, mask, 0, vocab_size);
  check_width(op, shape.width);
  const LossTerms terms = check_terms(op, label_smoothing, z_loss);
  const LogprobOutputs out = empty_outputs(row_sizes(logits), metrics, logits);
  if (targets.numel() > 0)
    launch_forward(shape, logits, targets, mask, terms, terms.smoothing != 0, metrics, nullptr, &out);
  return out.tuple();
}

Tensor token_logprob_partial(
    const Tensor& logits, const Tensor& targets, std::optional<Tensor> mask, int64_t first_column, int64_t vocab_size,
    bool smooth, bool entropy) {
  const char* op = "token_logprob_partial";
  const LogprobShape shape = check_logprob(op, logits, targets, mask, first_column, vocab_size);
  check_width(op, shape.width);
  const auto sizes = stacked_sizes(stat_count(smooth, entropy), logits);
  Tensor stats = empty({sizes.data(), sizes.size()}, ScalarType::Float, logits);
  if (targets.numel() > 0)
    launch_forward(shape, logits, targets, mask, LossTerms{}, smooth, entropy, &stats, nullptr);
  return stats;
}

LogprobTuple token_logprob_combine(
    const Tensor& stats, int64_t vocab_size, double label_smoothing, double z_loss, bool metrics) {
  const char* op = "token_logprob_combine";
  const LossTerms terms = check_terms(op, label_smoothing, z_loss);
  const CombineShape shape = check_combine(op, stats, terms.smoothing != 0, metrics, vocab_size);
  const auto sizes = stats.sizes();
  const LogprobOutputs out = empty_outputs({sizes.begin() + 2, sizes.end()}, metrics, stats);
  if (shape.rows > 0) {
    const torch::stable::accelerator::DeviceGuard guard(stats.get_device_index());
    const unsigned grid = static_cast<unsigned>((shape.rows + kCombineThreads - 1) / kCombineThreads);
    token_logprob_combine_kernel<<<grid, kCombineThreads, 0, current_stream(stats)>>>(
        static_cast<const float*>(stats.data_ptr()), shape.shards, shape.rows, terms.smoothing != 0, metrics, terms,
        vocab_size, pointers(out));
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }
  return out.tuple();
}

void launch_backward(
    const LogprobShape& shape, const Tensor& dlogps, const Tensor& logits, const Tensor& targets, const Tensor& saved,
    const LossTerms& terms, const Tensor& dlogits, const Rows& out) {
  if (shape.logits.count == 0) return;
  const torch::stable::accelerator::DeviceGuard guard(logits.get_device_index());
  for_each_dtype(logits.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    LogprobBackward<T> args{};
    args.dlogps = static_cast<const float*>(dlogps.data_ptr());
    args.logits = static_cast<const T*>(logits.data_ptr());
    args.targets = static_cast<const int64_t*>(targets.data_ptr());
    args.saved = static_cast<const float*>(saved.data_ptr());
    args.dlogits = static_cast<T*>(dlogits.data_ptr());
    args.layout = shape.logits, args.out_layout = out;
    args.width = static_cast<int>(shape.width);
    args.vocabulary = shape.vocabulary;
    args.terms = terms;
    const unsigned grid = logprob_grid(shape.logits.count), block = logprob_threads(shape.width / kLanes<T>);
    token_logprob_backward_kernel<T><<<grid, block, 0, current_stream(logits)>>>(args);
  });
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

Tensor token_logprob_backward(
    const Tensor& dlogps, const Tensor& logits, const Tensor& targets, const Tensor& saved, int64_t first_column,
    int64_t vocab_size, double label_smoothing, double z_loss) {
  const char* op = "token_logprob_backward";
  const LogprobShape shape = check_logprob_backward(op, dlogps, logits, targets, saved, first_column, vocab_size);
  check_width(op, shape.width);
  Tensor dlogits = empty(logits.sizes(), logits.scalar_type(), logits);
  launch_backward(
      shape, dlogps, logits, targets, saved, check_terms(op, label_smoothing, z_loss), dlogits, contiguous_rows(shape));
  return dlogits;
}

void token_logprob_backward_(
    const Tensor& dlogps, Tensor logits, const Tensor& targets, const Tensor& saved, int64_t first_column,
    int64_t vocab_size, double label_smoothing, double z_loss) {
  const char* op = "token_logprob_backward_";
  const LogprobShape shape = check_logprob_backward(op, dlogps, logits, targets, saved, first_column, vocab_size);
  check_width(op, shape.width);
  check_writable_rows(op, shape);
  launch_backward(
      shape, dlogps, logits, targets, saved, check_terms(op, label_smoothing, z_loss), logits, shape.logits);
}

} // namespace

STABLE_TORCH_LIBRARY_IMPL(solar_mega, CUDA, m) {
  m.impl("token_logprob", TORCH_BOX(&token_logprob));
  m.impl("token_logprob_partial", TORCH_BOX(&token_logprob_partial));
  m.impl("token_logprob_combine", TORCH_BOX(&token_logprob_combine));
  m.impl("token_logprob_backward", TORCH_BOX(&token_logprob_backward));
  m.impl("token_logprob_backward_", TORCH_BOX(&token_logprob_backward_));
}

} // namespace solar_mega
