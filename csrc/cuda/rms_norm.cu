// Launchers of the RMSNorm kernels (rms_norm.cuh has layouts, launch shapes and floor bytes). Everything runs on
// torch's current stream; nothing waits for the device.

#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>

#include <tuple>
#include <type_traits>

#include "common/rms_norm.h"
#include "cuda/dtypes.cuh"
#include "cuda/rms_norm.cuh"

namespace solar_mega {
namespace {

struct Device {
  cudaStream_t stream;
  int processors;
};

Device current(const Tensor& t) {
  const int index = t.get_device_index();
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(index, &stream));
  int processors = 0;
  STD_CUDA_CHECK(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, index));
  return {static_cast<cudaStream_t>(stream), processors};
}

bool rows_aligned(const Tensor& t, const Rows& rows) {
  const int64_t e = static_cast<int64_t>(t.element_size());
  return reinterpret_cast<uintptr_t>(t.data_ptr()) % 16 == 0 && rows.inner_stride * e % 16 == 0 &&
      rows.outer_stride * e % 16 == 0;
}

template <int K>
using Constant = std::integral_constant<int, K>;

template <typename F>
void with_vectors(int k, const F& f) {
  if (k == 1) return f(Constant<1>{});
  if (k == 2) return f(Constant<2>{});
  f(Constant<4>{});
}

void check_width(const char* op, int64_t width) {
  SOLAR_MEGA_CHECK(width < (int64_t{1} << 30), op, ": x has hidden size ", width, "; allowed: below 2^30");
}

template <typename T, bool kAdd>
void launch_forward(const NormForward<T>& args, const NormPlan& plan, const Device& device) {
  if (plan.k == 0) {
    const unsigned grid = plan.grid(args.rows, kAnyWidthBlocksPerSm, device.processors);
    rms_norm_forward_any_width_kernel<T, kAdd><<<grid, plan.block, 0, device.stream>>>(args);
  } else {
    with_vectors(plan.k, [&](auto k) {
      constexpr int K = decltype(k)::value;
      const unsigned grid = plan.grid(args.rows, forward_blocks_per_sm(K), device.processors);
      rms_norm_forward_kernel<T, K, kAdd><<<grid, plan.block, 0, device.stream>>>(args);
    });
  }
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

template <typename T, bool kResidual>
void launch_backward(NormBackward<T> args, const NormPlan& plan, const Device& device, const Tensor& x, T* dweight) {
  const int per_sm = plan.k == 0 ? kAnyWidthBlocksPerSm : backward_blocks_per_sm(plan.k);
  const unsigned grid = plan.grid(args.rows, per_sm, device.processors);
  const int64_t count = static_cast<int64_t>(grid) * plan.block.y;
  const int64_t sizes[2] = {count, args.width};
  Tensor partial = empty({sizes, 2}, ScalarType::Float, x);
  args.partial = static_cast<float*>(partial.data_ptr());
  if (plan.k == 0) {
    rms_norm_backward_any_width_kernel<T, kResidual><<<grid, plan.block, 0, device.stream>>>(args);
  } else {
    with_vectors(plan.k, [&](auto k) {
      rms_norm_backward_kernel<T, decltype(k)::value, kResidual><<<grid, plan.block, 0, device.stream>>>(args);
    });
  }
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  const unsigned tiles = static_cast<unsigned>((args.width + kSumTile - 1) / kSumTile);
  rms_norm_sum_partials_kernel<T><<<tiles, dim3(kSumTile, kSumTile), 0, device.stream>>>(
      args.partial, count, args.width, dweight);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

void forward(
    const NormShape& shape, const Tensor& x, const Tensor* residual, const Tensor& weight, double eps,
    bool zero_centered, Tensor& y, Tensor* sum, Tensor& rstd) {
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const Device device = current(x);
  const bool aligned = rows_aligned(x, shape.x) && rows_aligned(weight, {}) &&
      (residual == nullptr || rows_aligned(*residual, shape.other));
  const NormPlan plan = plan_norm(shape.width, 16 / static_cast<int64_t>(x.element_size()), aligned);
  for_each_dtype(x.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    NormForward<T> args{};
    args.x = static_cast<const T*>(x.data_ptr());
    args.residual = residual ? static_cast<const T*>(residual->data_ptr()) : nullptr;
    args.weight = static_cast<const T*>(weight.data_ptr());
    args.y = static_cast<T*>(y.data_ptr());
    args.sum = sum ? static_cast<T*>(sum->data_ptr()) : nullptr;
    args.rstd = static_cast<float*>(rstd.data_ptr());
    args.x_rows = shape.x;
    args.residual_rows = shape.other;
    args.rows = shape.x.count;
    args.width = static_cast<int>(shape.width);
    args.inverse_width = 1.0f / static_cast<float>(shape.width);
    args.eps = static_cast<float>(eps);
    args.offset = zero_centered ? 1.0f : 0.0f;
    if (residual)
      launch_forward<T, true>(args, plan, device);
    else
      launch_forward<T, false>(args, plan, device);
  });
}

std::tuple<Tensor, Tensor> rms_norm(const Tensor& x, const Tensor& weight, double eps, bool zero_centered) {
  const NormShape shape = check_norm_forward("rms_norm", x, nullptr, weight, eps);
  check_width("rms_norm", shape.width);
  Tensor y = empty(x.sizes(), x.scalar_type(), x), rstd = empty_rstd(x);
  if (x.numel() > 0) forward(shape, x, nullptr, weight, eps, zero_centered, y, nullptr, rstd);
  return {y, rstd};
}

std::tuple<Tensor, Tensor, Tensor> add_rms_norm(
    const Tensor& x, const Tensor& residual, const Tensor& weight, double eps, bool zero_centered) {
  const NormShape shape = check_norm_forward("add_rms_norm", x, &residual, weight, eps);
  check_width("add_rms_norm", shape.width);
  Tensor y = empty(x.sizes(), x.scalar_type(), x), sum = empty(x.sizes(), x.scalar_type(), x), rstd = empty_rstd(x);
  if (x.numel() > 0) forward(shape, x, &residual, weight, eps, zero_centered, y, &sum, rstd);
  return {y, sum, rstd};
}

std::tuple<Tensor, Tensor> rms_norm_backward(
    const Tensor& dy, const Tensor& x, const Tensor& weight, const Tensor& rstd, std::optional<Tensor> dresidual,
    bool zero_centered) {
  const NormShape shape = check_norm_backward(dy, x, weight, rstd, dresidual);
  check_width("rms_norm_backward", shape.width);
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const Device device = current(x);
  Tensor dx = empty(x.sizes(), x.scalar_type(), x), dweight = empty(weight.sizes(), x.scalar_type(), x);
  if (x.numel() == 0) {
    STD_CUDA_CHECK(cudaMemsetAsync(dweight.data_ptr(), 0, shape.width * dweight.element_size(), device.stream));
    return {dx, dweight};
  }
  const bool aligned = rows_aligned(x, shape.x) && rows_aligned(dy, shape.other) && rows_aligned(weight, {}) &&
      (!dresidual || rows_aligned(*dresidual, shape.dresidual));
  const NormPlan plan = plan_norm(shape.width, 16 / static_cast<int64_t>(x.element_size()), aligned);
  for_each_dtype(x.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    NormBackward<T> args{};
    args.dy = static_cast<const T*>(dy.data_ptr());
    args.x = static_cast<const T*>(x.data_ptr());
    args.weight = static_cast<const T*>(weight.data_ptr());
    args.dresidual = dresidual ? static_cast<const T*>(dresidual->data_ptr()) : nullptr;
    args.rstd = static_cast<const float*>(rstd.data_ptr());
    args.dx = static_cast<T*>(dx.data_ptr());
    args.dy_rows = shape.other;
    args.x_rows = shape.x;
    args.dresidual_rows = shape.dresidual;
    args.rows = shape.x.count;
    args.width = static_cast<int>(shape.width);
    args.inverse_width = 1.0f / static_cast<float>(shape.width);
    args.offset = zero_centered ? 1.0f : 0.0f;
    T* dw = static_cast<T*>(dweight.data_ptr());
    if (dresidual)
      launch_backward<T, true>(args, plan, device, x, dw);
    else
      launch_backward<T, false>(args, plan, device, x, dw);
  });
  return {dx, dweight};
}

} // namespace

STABLE_TORCH_LIBRARY_IMPL(solar_mega, CUDA, m) {
  m.impl("rms_norm", TORCH_BOX(&rms_norm));
  m.impl("add_rms_norm", TORCH_BOX(&add_rms_norm));
  m.impl("rms_norm_backward", TORCH_BOX(&rms_norm_backward));
}

} // namespace solar_mega
