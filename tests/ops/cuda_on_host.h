// Runs CUDA kernel bodies (csrc/cuda/*.cuh) on the CPU, faithfully enough to catch mistakes of index, mask, barrier
// and reduction: every CUDA thread is a fiber, all fibers of a block run until the next barrier or warp shuffle, in an
// order shuffled anew each time. Blocks run one after the other, in shuffled order, each with shared memory full of NaN.
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
  float value = 0; // offered to the warp's shuffle
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

// A warp's shuffle completes when its 32 lanes are all there; a barrier when every thread of the block is.
inline bool release(int warps) {
  auto& fibers = machine.fibers;
  bool released = false;
  for (int w = 0; w < warps; ++w) {
    const auto begin = fibers.begin() + 32 * w, end = begin + 32;
    if (std::all_of(begin, end, [](const Fiber& f) { return f.state == Fiber::at_shuffle; })) {
      for (auto f = begin; f != end; ++f) f->state = Fiber::ready;
      released = true;
    }
  }
  if (released) return true;
  if (!std::all_of(fibers.begin(), fibers.end(), [](const Fiber& f) { return f.state == Fiber::at_barrier; })) return false;
  for (Fiber& f : fibers) f.state = Fiber::ready;
  return true;
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
  std::vector<int> order(fibers.size());
  for (size_t i = 0; i < order.size(); ++i) order[i] = static_cast<int>(i);
  while (true) {
    std::shuffle(order.begin(), order.end(), random);
    for (int i : order) {
      if (fibers[i].state != Fiber::ready) continue;
      machine.running = &fibers[i];
      swapcontext(&machine.scheduler, &fibers[i].context);
    }
    if (std::all_of(fibers.begin(), fibers.end(), [](const Fiber& f) { return f.state == Fiber::done; })) return;
    if (!release(static_cast<int>(fibers.size()) / 32)) {
      std::fprintf(stderr, "cuda_on_host: threads of a block diverged at a barrier or shuffle\n");
      std::abort();
    }
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
  std::vector<unsigned> order(grid.x);
  for (unsigned b = 0; b < grid.x; ++b) order[b] = b;
  std::shuffle(order.begin(), order.end(), random);
  for (unsigned b : order) {
    machine.block_index = {b, 0, 0};
    run_block(random);
  }
}

inline float shuffle_xor(float value, int mask) {
  Fiber* self = machine.running;
  self->value = value;
  machine.wait(Fiber::at_shuffle);
  const float got = machine.fibers[self->linear ^ mask].value;
  machine.wait(Fiber::at_shuffle); // nobody offers the next value before all have read this one
  return got;
}

} // namespace cuda_on_host

#define threadIdx (::cuda_on_host::machine.running->index)
#define blockIdx (::cuda_on_host::machine.block_index)
#define blockDim (::cuda_on_host::machine.block_dim)
#define gridDim (::cuda_on_host::machine.grid_dim)

inline void __syncthreads() { cuda_on_host::machine.wait(cuda_on_host::Fiber::at_barrier); }
inline float __shfl_xor_sync(unsigned, float value, int mask) { return cuda_on_host::shuffle_xor(value, mask); }
inline float rsqrtf(float v) { return 1.0f / std::sqrt(v); }
