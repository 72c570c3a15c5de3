// The RMSNorm kernels' bodies as a plain shared library, called by test_rms_norm_on_host.py through ctypes.

#include "cuda_on_host.h"

#include "cuda/rms_norm.cuh"

using namespace solar_mega;
using cuda_on_host::run_grid;

namespace {

template <int K, typename F>
void with_vectors(const F& f) { f(std::integral_constant<int, K>{}); }

template <typename F>
void for_each_k(int k, const F& f) {
  if (k == 1) return with_vectors<1>(f);
  if (k == 2) return with_vectors<2>(f);
  with_vectors<4>(f);
}

template <typename T, bool kAdd>
int forward(NormForward<T> a, bool aligned, int processors, unsigned seed) {
  const NormPlan plan = plan_norm(a.width, kLanes<T>, aligned);
  if (plan.k == 0) {
    run_grid(plan.grid(a.rows, 1, processors), plan.block, seed, [&] { rms_norm_forward_any_width_kernel<T, kAdd>(a); });
  } else {
    for_each_k(plan.k, [&](auto k) {
      run_grid(plan.grid(a.rows, 1, processors), plan.block, seed, [&] { rms_norm_forward_kernel<T, k, kAdd>(a); });
    });
  }
  return plan.k;
}

template <typename T, bool kResidual>
int backward(NormBackward<T> a, T* dweight, bool aligned, int processors, unsigned seed) {
  const NormPlan plan = plan_norm(a.width, kLanes<T>, aligned);
  const unsigned grid = plan.grid(a.rows, 1, processors);
  std::vector<float> storage(static_cast<size_t>(grid) * plan.block.y * a.width + 4, NAN);
  a.partial = storage.data() + (4 - reinterpret_cast<uintptr_t>(storage.data()) / 4 % 4) % 4;
  if (plan.k == 0) {
    run_grid(grid, plan.block, seed, [&] { rms_norm_backward_any_width_kernel<T, kResidual>(a); });
  } else {
    for_each_k(plan.k, [&](auto k) {
      run_grid(grid, plan.block, seed, [&] { rms_norm_backward_kernel<T, k, kResidual>(a); });
    });
  }
  run_grid((a.width + kSumTile - 1) / kSumTile, dim3(kSumTile, kSumTile), seed, [&] {
    rms_norm_sum_partials_kernel<T>(a.partial, static_cast<int64_t>(grid) * plan.block.y, a.width, dweight);
  });
  return plan.k;
}

Rows rows(const int64_t* v) { return {v[0], v[1], v[2], v[3]}; }

template <typename T>
int forward_any(void** p, const int64_t* x_rows, const int64_t* residual_rows, int width, float eps, float offset,
                bool aligned, int processors, unsigned seed) {
  NormForward<T> a{};
  a.x = static_cast<T*>(p[0]), a.residual = static_cast<T*>(p[1]), a.weight = static_cast<T*>(p[2]);
  a.y = static_cast<T*>(p[3]), a.sum = static_cast<T*>(p[4]), a.rstd = static_cast<float*>(p[5]);
  a.x_rows = rows(x_rows), a.residual_rows = rows(residual_rows), a.rows = x_rows[0];
  a.width = width, a.inverse_width = 1.0f / static_cast<float>(width), a.eps = eps, a.offset = offset;
  return a.residual ? forward<T, true>(a, aligned, processors, seed) : forward<T, false>(a, aligned, processors, seed);
}

template <typename T>
int backward_any(void** p, const int64_t* dy_rows, const int64_t* x_rows, const int64_t* dresidual_rows, int width,
                 float offset, bool aligned, int processors, unsigned seed) {
  NormBackward<T> a{};
  a.dy = static_cast<T*>(p[0]), a.x = static_cast<T*>(p[1]), a.weight = static_cast<T*>(p[2]);
  a.dresidual = static_cast<T*>(p[3]), a.rstd = static_cast<float*>(p[4]), a.dx = static_cast<T*>(p[5]);
  a.dy_rows = rows(dy_rows), a.x_rows = rows(x_rows), a.dresidual_rows = rows(dresidual_rows), a.rows = x_rows[0];
  a.width = width, a.inverse_width = 1.0f / static_cast<float>(width), a.offset = offset;
  T* dweight = static_cast<T*>(p[6]);
  return a.dresidual ? backward<T, true>(a, dweight, aligned, processors, seed)
                     : backward<T, false>(a, dweight, aligned, processors, seed);
}

} // namespace

// dtype: 0 float, 1 bfloat16, 2 half. Both return the K of the kernel that ran, 0 for any-width.
extern "C" int host_forward(int dtype, void** p, const int64_t* x_rows, const int64_t* residual_rows, int width,
                            float eps, float offset, int aligned, int processors, unsigned seed) {
  const auto run = dtype == 0 ? forward_any<float> : dtype == 1 ? forward_any<__nv_bfloat16> : forward_any<__half>;
  return run(p, x_rows, residual_rows, width, eps, offset, aligned != 0, processors, seed);
}

extern "C" int host_backward(int dtype, void** p, const int64_t* dy_rows, const int64_t* x_rows,
                             const int64_t* dresidual_rows, int width, float offset, int aligned, int processors,
                             unsigned seed) {
  const auto run = dtype == 0 ? backward_any<float> : dtype == 1 ? backward_any<__nv_bfloat16> : backward_any<__half>;
  return run(p, dy_rows, x_rows, dresidual_rows, width, offset, aligned != 0, processors, seed);
}
