// Launchers of the rotary kernels (qkv_rotary.cuh has layout, launch shapes and floor bytes). Everything runs on
// torch's current stream; nothing waits for the device.

#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>

#include <tuple>

#include "common/qkv_rotary.h"
#include "cuda/dtypes.cuh"
#include "cuda/qkv_rotary.cuh"

namespace solar_mega {
namespace {

bool aligned(const Tensor& t) { return reinterpret_cast<uintptr_t>(t.data_ptr()) % 16 == 0; }

bool heads_aligned(const Tensor& t, const HeadStrides& strides) {
  const int64_t lanes = 16 / static_cast<int64_t>(t.element_size());
  return aligned(t) && strides.s % lanes == 0 && strides.b % lanes == 0 && strides.head % lanes == 0;
}

void check_sizes(const char* op, const QkvShape& shape) {
  constexpr int64_t kMost = int64_t{1} << 30;
  SOLAR_MEGA_CHECK(
      shape.s < kMost && shape.b < kMost && shape.groups * (shape.per_group + 2) * shape.head_dim < kMost,
      op, ": s is ", shape.s, ", b ", shape.b, " and a token has ", shape.groups * (shape.per_group + 2), " heads of ",
      shape.head_dim, "; allowed: each of s, b and heads * head_dim below 2^30");
}

template <bool kBackward>
void launch(
    const QkvShape& shape, const Tensor& packed, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& cos,
    const Tensor& sin, const std::optional<Tensor>& positions, bool interleaved) {
  const int device = packed.get_device_index();
  void* current = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &current));
  const cudaStream_t stream = static_cast<cudaStream_t>(current);
  int processors = 0;
  STD_CUDA_CHECK(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device));
  const bool wide = heads_aligned(packed, shape.packed) && heads_aligned(q, shape.q) && heads_aligned(k, shape.k) &&
      heads_aligned(v, shape.v) && aligned(cos) && aligned(sin) && shape.half % 4 == 0;
  const RotaryPlan plan = plan_rotary(shape, 16 / static_cast<int64_t>(packed.element_size()), wide);
  const unsigned grid = plan.grid(shape.s * shape.b, processors);
  for_each_dtype(packed.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    QkvRotary<T> args{};
    args.packed = static_cast<T*>(packed.data_ptr());
    args.q = static_cast<T*>(q.data_ptr());
    args.k = static_cast<T*>(k.data_ptr());
    args.v = static_cast<T*>(v.data_ptr());
    args.cos = static_cast<const float*>(cos.data_ptr());
    args.sin = static_cast<const float*>(sin.data_ptr());
    args.positions = positions ? static_cast<const int64_t*>(positions->data_ptr()) : nullptr;
    args.shape = shape;
    if (!plan.vectors)
      qkv_rotary_elements_kernel<T, kBackward><<<grid, plan.block, 0, stream>>>(args, interleaved);
    else if (interleaved)
      qkv_rotary_kernel<T, kBackward, true><<<grid, plan.block, 0, stream>>>(args);
    else
      qkv_rotary_kernel<T, kBackward, false><<<grid, plan.block, 0, stream>>>(args);
  });
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

std::tuple<Tensor, Tensor, Tensor> qkv_rotary(
    const Tensor& qkv, const Tensor& cos, const Tensor& sin, std::optional<Tensor> positions, int64_t queries_per_group,
    bool interleaved) {
  QkvShape shape = check_qkv_rotary(qkv, cos, sin, positions, queries_per_group);
  check_sizes("qkv_rotary", shape);
  const torch::stable::accelerator::DeviceGuard guard(qkv.get_device_index());
  const int64_t heads = shape.groups * shape.per_group, d = shape.head_dim;
  const ScalarType dtype = qkv.scalar_type();
  Tensor q = empty({shape.s, shape.b, heads, d}, dtype, qkv);
  Tensor k = empty({shape.s, shape.b, shape.groups, d}, dtype, qkv);
  Tensor v = empty({shape.s, shape.b, shape.groups, d}, dtype, qkv);
  shape.q = contiguous_heads(shape, heads, d), shape.k = shape.v = contiguous_heads(shape, shape.groups, d);
  if (qkv.numel() > 0) launch<false>(shape, qkv, q, k, v, cos, sin, positions, interleaved);
  return {q, k, v};
}

Tensor qkv_rotary_backward(
    const Tensor& dq, const Tensor& dk, const Tensor& dv, const Tensor& cos, const Tensor& sin,
    std::optional<Tensor> positions, bool interleaved) {
  QkvShape shape = check_qkv_rotary_backward(dq, dk, dv, cos, sin, positions);
  check_sizes("qkv_rotary_backward", shape);
  const torch::stable::accelerator::DeviceGuard guard(dq.get_device_index());
  const int64_t width = (shape.per_group + 2) * shape.head_dim;
  Tensor dqkv = empty({shape.s, shape.b, shape.groups, width}, dq.scalar_type(), dq);
  shape.packed = contiguous_heads(shape, shape.groups, width);
  if (dqkv.numel() > 0) launch<true>(shape, dqkv, dq, dk, dv, cos, sin, positions, interleaved);
  return dqkv;
}

} // namespace

STABLE_TORCH_LIBRARY_IMPL(solar_mega, CUDA, m) {
  m.impl("qkv_rotary", TORCH_BOX(&qkv_rotary));
  m.impl("qkv_rotary_backward", TORCH_BOX(&qkv_rotary_backward));
}

} // namespace solar_mega
