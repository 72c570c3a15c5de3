// The SwiGLU kernels' bodies as a plain shared library, called by test_swiglu_on_host.py through ctypes.

#include "cuda_on_host.h"

#include "cuda/swiglu.cuh"

using namespace solar_mega;
using cuda_on_host::run_grid;

namespace {

Rows rows(const int64_t* v) { return {v[0], v[1], v[2], v[3]}; }

template <typename T, bool kBackward>
void run(const Swiglu<T>& a, bool wide, unsigned seed) {
  const int items = wide ? a.width / kLanes<T> : a.width;
  const dim3 grid((items + kSwigluThreads - 1) / kSwigluThreads, 3); // fewer than rows, so that blocks step over them
  run_grid(grid, kSwigluThreads, seed, [&] {
    if (wide)
      swiglu_kernel<T, kBackward>(a);
    else
      swiglu_elements_kernel<T, kBackward>(a);
  });
}

template <typename T>
void run_any(void** p, const int64_t* x_rows, const int64_t* dy_rows, int width, bool wide, unsigned seed) {
  Swiglu<T> a{};
  a.x = static_cast<T*>(p[0]), a.dy = static_cast<T*>(p[1]), a.out = static_cast<T*>(p[2]);
  a.x_rows = rows(x_rows), a.rows = x_rows[0], a.width = width;
  if (a.dy == nullptr) return run<T, false>(a, wide, seed);
  a.dy_rows = rows(dy_rows);
  run<T, true>(a, wide, seed);
}

} // namespace

// dtype: 0 float, 1 bfloat16, 2 half.
extern "C" void host_swiglu(int dtype, void** p, const int64_t* x_rows, const int64_t* dy_rows, int width, int wide,
                            unsigned seed) {
  const auto run = dtype == 0 ? run_any<float> : dtype == 1 ? run_any<__nv_bfloat16> : run_any<__half>;
  run(p, x_rows, dy_rows, width, wide != 0, seed);
}
