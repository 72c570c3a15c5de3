// Launcher of the preference loss (dpo_loss.cuh has layout, launch shape and floor bytes). It runs on torch's current
// stream; nothing waits for the device, and a CUDA graph may capture it.

#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>

#include <algorithm>

#include "common/dpo_loss.h"
#include "cuda/dpo_loss.cuh"

namespace solar_mega {
namespace {

template <typename M>
void launch(DpoLoss<M> args, const Tensor& logps, const Tensor* mask) {
  const int device = logps.get_device_index();
  void* handle = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &handle));
  const auto stream = static_cast<cudaStream_t>(handle);
  int processors = 0;
  STD_CUDA_CHECK(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device));

  const int64_t sizes[1] = {kDpoPartials * args.pairs + 1}; // the last one holds the ticket
  Tensor partial = empty({sizes, 1}, ScalarType::Double, logps);
  args.partial = static_cast<double*>(partial.data_ptr());
  args.ticket = reinterpret_cast<unsigned*>(args.partial + kDpoPartials * args.pairs);
  STD_CUDA_CHECK(cudaMemsetAsync(args.ticket, 0, sizeof(unsigned), stream));

  if (mask != nullptr) args.mask = static_cast<const M*>(mask->data_ptr());
  const auto grid = static_cast<unsigned>(std::min<int64_t>(args.pairs, int64_t{kDpoBlocksPerSm} * processors));
  dpo_loss_kernel<M><<<grid, dim3(kDpoThreads, 2), 0, stream>>>(args);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

template <typename M>
DpoLoss<M> arguments(
    const DpoShape& shape, const Tensor& logps, const Tensor& cu_seqlens, const std::optional<Tensor>& reference_logps,
    const std::optional<Tensor>& reference_token_logps, const DpoOutputs& outputs) {
  const auto& [loss, nll, per_pair, sums, counts, coefficients] = outputs;
  DpoLoss<M> a{};
  a.logps = static_cast<const float*>(logps.data_ptr());
  if (reference_token_logps) a.reference_tokens = static_cast<const float*>(reference_token_logps->data_ptr());
  if (reference_logps && reference_logps->scalar_type() == ScalarType::Double)
    a.reference_f64 = static_cast<const double*>(reference_logps->data_ptr());
  else if (reference_logps)
    a.reference_f32 = static_cast<const float*>(reference_logps->data_ptr());
  a.offsets = static_cast<const int32_t*>(cu_seqlens.data_ptr());
  a.loss = static_cast<float*>(loss.data_ptr());
  a.nll = static_cast<float*>(nll.data_ptr());
  a.per_pair = static_cast<float*>(per_pair.data_ptr());
  a.sums = static_cast<double*>(sums.data_ptr());
  a.counts = static_cast<float*>(counts.data_ptr());
  a.coefficients = static_cast<float*>(coefficients.data_ptr());
  a.tokens = shape.tokens;
  a.pairs = shape.pairs;
  a.options = shape.options;
  return a;
}

DpoOutputs dpo_loss(
    const Tensor& logps, const Tensor& cu_seqlens, std::optional<Tensor> mask, std::optional<Tensor> reference_logps,
    std::optional<Tensor> reference_token_logps, std::string variant, double beta, double label_smoothing,
    double rpo_alpha, bool rpo_per_sequence) {
  const DpoOptions options = dpo_options(variant, beta, label_smoothing, rpo_alpha, rpo_per_sequence);
  const DpoShape shape = check_dpo_loss(logps, cu_seqlens, mask, reference_logps, reference_token_logps, options);
  const torch::stable::accelerator::DeviceGuard guard(logps.get_device_index());
  DpoOutputs outputs = empty_dpo_outputs(shape, logps);
  const auto run = [&](auto type, const Tensor* given) {
    using M = decltype(type);
    launch(arguments<M>(shape, logps, cu_seqlens, reference_logps, reference_token_logps, outputs), logps, given);
  };
  if (!mask)
    run(nullptr, nullptr);
  else if (mask->scalar_type() == ScalarType::Bool)
    run(uint8_t{}, &*mask);
  else
    run(float{}, &*mask);
  return outputs;
}

} // namespace

STABLE_TORCH_LIBRARY_IMPL(solar_mega, CUDA, m) { m.impl("dpo_loss", TORCH_BOX(&dpo_loss)); }

} // namespace solar_mega
