// Launchers of the SwiGLU kernels (swiglu.cuh has layout, launch shape and floor bytes). Everything runs on torch's
// current stream; nothing waits for the device.

#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>

#include "common/swiglu.h"
#include "cuda/dtypes.cuh"
#include "cuda/swiglu.cuh"

namespace solar_mega {
namespace {

bool aligned(const Tensor& t, const Rows& rows) {
  const int64_t lanes = 16 / static_cast<int64_t>(t.element_size());
  return reinterpret_cast<uintptr_t>(t.data_ptr()) % 16 == 0 && rows.inner_stride % lanes == 0 &&
      rows.outer_stride % lanes == 0;
}

template <bool kBackward>
void launch(const SwigluShape& shape, const Tensor* dy, const Tensor& x, Tensor& out) {
  SOLAR_MEGA_CHECK(
      shape.width < (int64_t{1} << 29), "swiglu: x has ", 2 * shape.width, " columns; allowed: below 2^30");
  void* current = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &current));
  const cudaStream_t stream = static_cast<cudaStream_t>(current);
  const int64_t lanes = 16 / static_cast<int64_t>(x.element_size());
  const bool wide = shape.width % lanes == 0 && aligned(x, shape.x) && (dy == nullptr || aligned(*dy, shape.dy));
  const int64_t items = wide ? shape.width / lanes : shape.width;
  const dim3 grid(
      static_cast<unsigned>((items + kSwigluThreads - 1) / kSwigluThreads),
      static_cast<unsigned>(shape.x.count < 65535 ? shape.x.count : 65535));
  for_each_dtype(x.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    Swiglu<T> args{};
    args.x = static_cast<const T*>(x.data_ptr());
    args.dy = dy ? static_cast<const T*>(dy->data_ptr()) : nullptr;
    args.out = static_cast<T*>(out.data_ptr());
    args.x_rows = shape.x;
    args.dy_rows = shape.dy;
    args.rows = shape.x.count;
    args.width = static_cast<int>(shape.width);
    if (wide)
      swiglu_kernel<T, kBackward><<<grid, kSwigluThreads, 0, stream>>>(args);
    else
      swiglu_elements_kernel<T, kBackward><<<grid, kSwigluThreads, 0, stream>>>(args);
  });
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

Tensor swiglu(const Tensor& x) {
  const SwigluShape shape = check_swiglu("swiglu", x);
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const std::vector<int64_t> sizes = swiglu_output_sizes(x);
  Tensor y = empty({sizes.data(), sizes.size()}, x.scalar_type(), x);
  if (x.numel() > 0) launch<false>(shape, nullptr, x, y);
  return y;
}

Tensor swiglu_backward(const Tensor& dy, const Tensor& x) {
  const SwigluShape shape = check_swiglu_backward(dy, x);
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  Tensor dx = empty(x.sizes(), x.scalar_type(), x);
  if (x.numel() > 0) launch<true>(shape, &dy, x, dx);
  return dx;
}

} // namespace

STABLE_TORCH_LIBRARY_IMPL(solar_mega, CUDA, m) {
  m.impl("swiglu", TORCH_BOX(&swiglu));
  m.impl("swiglu_backward", TORCH_BOX(&swiglu_backward));
}

} // namespace solar_mega
