// Runs CUDA kernel bodies (csrc/cuda/*.cuh) on the CPU, faithfully enough to catch mistakes of index, mask, barrier
// and reduction: every CUDA thread is a fiber; warps run in shuffled order, each as far as the next barrier, their lanes
// in shuffled order from one warp shuffle to the next. Blocks run one after the other, shuffled too, each with shared
// memory full of NaN.
//
// Include this first, then the kernels' header, and call run_grid(grid, block, seed, [&] { kernel<...>(args); }).

#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <link.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <random>
#include <vector>

#undef __device__
#undef __host__
#undef __global__
#undef __shared__
#undef __launch_bounds__
#define __device__
#define __host__
#define __global__
#define __launch_bounds__(...)
// One block at a time, so shared memory can be static. Thread-local storage gathers it in one segment of this
// library that holds nothing else, which run_block finds and poisons.
#define __shared__ static thread_local

namespace cuda_on_host {

struct Fiber {
  ucontext_t context;
  std::vector<char> stack;
  uint3 index;
  int linear;
  enum { ready, at_barrier, at_shuffle, done } state = ready;
  double value = 0; // offered to the warp's shuffle; holds a float exactly
};

struct Machine {
  ucontext_t scheduler;
  std::vector<Fiber> fibers;
  Fiber* running = nullptr;
  const std::function<void()>* kernel = nullptr;
  dim3 block_dim, grid_dim;
  uint3 block_index;

  void wait(decltype(Fiber::ready) state) {
    Fiber* self = running;
    self->state = state;
    swapcontext(&self->context, &scheduler);
  }
};

inline Machine machine;

inline thread_local char anchor;

inline void poison_shared_memory() {
  anchor = 1; // the segment exists once something in it has been touched
  const auto visit = [](dl_phdr_info* info, size_t, void*) {
    const char* tls = static_cast<char*>(info->dlpi_tls_data);
    for (int i = 0; i < info->dlpi_phnum; ++i) {
      const auto& header = info->dlpi_phdr[i];
      if (header.p_type != PT_TLS || tls == nullptr || &anchor < tls || &anchor >= tls + header.p_memsz) continue;
      std::memset(info->dlpi_tls_data, 0xff, header.p_memsz); // every float a NaN
      return 1;
    }
    return 0;
  };
  if (dl_iterate_phdr(visit, nullptr) != 1) std::abort();
}

inline void fiber_main() {
  (*machine.kernel)();
  machine.running->state = Fiber::done;
  swapcontext(&machine.running->context, &machine.scheduler);
}

// Runs one warp, lanes in shuffled order, until it waits at a barrier or is done. A shuffle completes when all 32
// lanes are at it.
inline void run_warp(int warp, std::mt19937& random) {
  const auto begin = machine.fibers.begin() + 32 * warp;
  const auto end = machine.fibers.end() - begin < 32 ? machine.fibers.end() : begin + 32;
  const auto all = [&](auto state) { return std::all_of(begin, end, [&](const Fiber& f) { return f.state == state; }); };
  std::vector<Fiber*> lanes;
  for (auto f = begin; f != end; ++f) lanes.push_back(&*f);
  do {
    for (Fiber* f : lanes)
      if (f->state == Fiber::at_shuffle) f->state = Fiber::ready;
    std::shuffle(lanes.begin(), lanes.end(), random);
    for (Fiber* f : lanes) {
      if (f->state != Fiber::ready) continue;
      machine.running = f;
      swapcontext(&machine.scheduler, &f->context);
    }
  } while (all(Fiber::at_shuffle));
  if (all(Fiber::at_barrier) || all(Fiber::done)) return;
  std::fprintf(stderr, "cuda_on_host: the lanes of a warp diverged at a barrier or shuffle\n");
  std::abort();
}

inline void run_block(std::mt19937& random) {
  auto& fibers = machine.fibers;
  poison_shared_memory();
  for (Fiber& f : fibers) {
    getcontext(&f.context);
    f.context.uc_stack.ss_sp = f.stack.data();
    f.context.uc_stack.ss_size = f.stack.size();
    f.context.uc_link = nullptr;
    f.state = Fiber::ready;
    makecontext(&f.context, fiber_main, 0);
  }
  std::vector<int> warps((fibers.size() + 31) / 32);
  for (size_t w = 0; w < warps.size(); ++w) warps[w] = static_cast<int>(w);
  const auto all = [&](auto state) {
    return std::all_of(fibers.begin(), fibers.end(), [&](const Fiber& f) { return f.state == state; });
  };
  // Each warp runs as far ahead of the others as barriers let it, which is what brings races to light.
  while (!all(Fiber::done)) {
    std::shuffle(warps.begin(), warps.end(), random);
    for (int warp : warps) run_warp(warp, random);
    if (all(Fiber::done)) return;
    if (!all(Fiber::at_barrier)) {
      std::fprintf(stderr, "cuda_on_host: the warps of a block diverged at a barrier\n");
      std::abort();
    }
    for (Fiber& f : fibers) f.state = Fiber::ready;
  }
}

inline void run_grid(dim3 grid, dim3 block, unsigned seed, const std::function<void()>& kernel) {
  std::mt19937 random(seed);
  machine.kernel = &kernel;
  machine.grid_dim = grid;
  machine.block_dim = block;
  machine.fibers.resize(block.x * block.y * block.z);
  for (size_t i = 0; i < machine.fibers.size(); ++i) {
    const unsigned n = static_cast<unsigned>(i);
    machine.fibers[i].index = {n % block.x, n / block.x % block.y, n / block.x / block.y};
    machine.fibers[i].linear = static_cast<int>(i);
    machine.fibers[i].stack.resize(64 * 1024);
  }
  std::vector<unsigned> order(grid.x * grid.y);
  for (unsigned b = 0; b < order.size(); ++b) order[b] = b;
  std::shuffle(order.begin(), order.end(), random);
  for (unsigned b : order) {
    machine.block_index = {b % grid.x, b / grid.x, 0};
    run_block(random);
  }
}

inline double shuffle_xor(double value, int mask) {
  Fiber* self = machine.running;
  self->value = value;
  machine.wait(Fiber::at_shuffle);
  const double got = machine.fibers[self->linear ^ mask].value;
  machine.wait(Fiber::at_shuffle); // nobody offers the next value before all have read this one
  return got;
}

} // namespace cuda_on_host

#define threadIdx (::cuda_on_host::machine.running->index)
#define blockIdx (::cuda_on_host::machine.block_index)
#define blockDim (::cuda_on_host::machine.block_dim)
#define gridDim (::cuda_on_host::machine.grid_dim)

inline void __syncthreads() { cuda_on_host::machine.wait(cuda_on_host::Fiber::at_barrier); }
inline float __shfl_xor_sync(unsigned, float value, int mask) {
  return static_cast<float>(cuda_on_host::shuffle_xor(value, mask));
}
inline double __shfl_xor_sync(unsigned, double value, int mask) { return cuda_on_host::shuffle_xor(value, mask); }
// One thread runs at a time, and blocks one after the other.
inline unsigned atomicAdd(unsigned* at, unsigned value) {
  const unsigned before = *at;
  *at += value;
  return before;
}
inline void __threadfence() {}
inline float rsqrtf(float v) { return 1.0f / std::sqrt(v); }
