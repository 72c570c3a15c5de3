// The rotary kernels' bodies as a plain shared library, called by test_qkv_rotary_on_host.py through ctypes.

#include "cuda_on_host.h"

#include "cuda/qkv_rotary.cuh"

using namespace solar_mega;
using cuda_on_host::run_grid;

namespace {

template <typename T, bool kBackward>
int run(const QkvRotary<T>& a, bool interleaved, bool aligned, int processors, unsigned seed) {
  const RotaryPlan plan = plan_rotary(a.shape, kLanes<T>, aligned);
  // One block per processor, so that blocks have several tokens to step over.
  const unsigned grid = std::min<unsigned>(plan.grid(a.shape.s * a.shape.b, processors), processors);
  run_grid(grid, plan.block, seed, [&] {
    if (!plan.vectors)
      qkv_rotary_elements_kernel<T, kBackward>(a, interleaved);
    else if (interleaved)
      qkv_rotary_kernel<T, kBackward, true>(a);
    else
      qkv_rotary_kernel<T, kBackward, false>(a);
  });
  return plan.vectors ? static_cast<int>(plan.block.z) : 0;
}

HeadStrides strides(const int64_t* v) { return {v[0], v[1], v[2]}; }

template <typename T>
int run_any(void** p, const int64_t* sizes, const int64_t* steps, bool backward, bool interleaved, bool aligned,
            int processors, unsigned seed) {
  QkvRotary<T> a{};
  a.packed = static_cast<T*>(p[0]), a.q = static_cast<T*>(p[1]), a.k = static_cast<T*>(p[2]), a.v = static_cast<T*>(p[3]);
  a.cos = static_cast<float*>(p[4]), a.sin = static_cast<float*>(p[5]), a.positions = static_cast<int64_t*>(p[6]);
  QkvShape& shape = a.shape;
  shape.s = sizes[0], shape.b = sizes[1], shape.groups = sizes[2], shape.per_group = sizes[3];
  shape.head_dim = sizes[4], shape.half = sizes[5], shape.table_rows = sizes[6];
  shape.packed = strides(steps), shape.q = strides(steps + 3), shape.k = strides(steps + 6), shape.v = strides(steps + 9);
  shape.position_s = steps[12], shape.position_b = steps[13];
  return backward ? run<T, true>(a, interleaved, aligned, processors, seed)
                  : run<T, false>(a, interleaved, aligned, processors, seed);
}

} // namespace

// dtype: 0 float, 1 bfloat16, 2 half. Returns the tokens per block of the vector kernel, 0 for the elements kernel.
extern "C" int host_rotary(int dtype, void** p, const int64_t* sizes, const int64_t* steps, int backward,
                           int interleaved, int aligned, int processors, unsigned seed) {
  const auto run = dtype == 0 ? run_any<float> : dtype == 1 ? run_any<__nv_bfloat16> : run_any<__half>;
  return run(p, sizes, steps, backward != 0, interleaved != 0, aligned != 0, processors, seed);
}
