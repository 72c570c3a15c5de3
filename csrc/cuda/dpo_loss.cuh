// The preference loss in one launch: per-sequence sums, loss per pair, per-token coefficients, means over the pairs.
// Formulas: common/dpo_formula.h. M is the mask's type: std::nullptr_t (none), uint8_t or float.
//
//     logps   [ chosen 0 | rejected 0 | chosen 1 | rejected 1 | ... | padding ]        offsets: int32 [2 pairs + 1]
//                 |            |
//     block    threadIdx.y 0   1       a block takes pairs blockIdx.x, blockIdx.x + gridDim.x, ...; its two halves
//              threadIdx.x strides     sum a sequence each, in fp64; one thread evaluates the formula; then the
//              over the tokens         halves write their tokens' coefficients (tokens still in L1 or L2)
//
// Launch: block (kDpoThreads, 2), grid min(pairs, 2 * SMs). Means: every pair leaves its terms in `partial`; the block
// that draws the last ticket adds them up, thread-strided and then by a fixed tree. Ticket numbers are the only
// atomics, and no value depends on who draws which: the result is the same to the bit in every run, on every grid.
// With the SFT term over tokens, every block first counts all chosen tokens for itself (mask bytes from L2).
//
// Floor bytes for T tokens: read 4 T (+ 4 T token reference, + T or 4 T mask), write 4 T. At 16384 tokens that is
// 0.15 MB: the launch is the cost, and what fusing saves is launches.
//
// Offsets are data on the device. A pair whose offsets decrease or leave [0, tokens] is not touched: its loss is NaN,
// and so is the mean.

#pragma once

#include <cstddef>

#include "common/dpo_formula.h"
#include "cuda/device.cuh"

namespace solar_mega {

constexpr int kDpoThreads = 128;
constexpr int kDpoWarps = kDpoThreads / kWarp; // of one half
constexpr int kDpoBlocksPerSm = 2;
constexpr int kDpoPartials = 3; // loss, chosen log-probs, chosen tokens

template <typename M>
struct DpoLoss {
  const float* logps;            // [tokens]
  const float* reference_tokens; // [tokens] or null
  const double* reference_f64;   // [2 * pairs]; it, the next, or both null
  const float* reference_f32;
  const M* mask;          // [tokens], null for nullptr_t
  const int32_t* offsets; // [2 * pairs + 1]
  float *loss, *nll;      // []
  float* per_pair;        // [kDpoRows, pairs]
  double* sums;           // [2 * pairs]
  float* counts;          // [2 * pairs]
  float* coefficients;    // [tokens]
  double* partial;        // [kDpoPartials, pairs]
  unsigned* ticket;       // 0 at the start
  int64_t tokens, pairs;
  DpoOptions options;
};

__device__ inline float dpo_weight(const std::nullptr_t*, int64_t) { return 1.0f; }
__device__ inline float dpo_weight(const uint8_t* mask, int64_t i) { return mask[i] ? 1.0f : 0.0f; }
__device__ inline float dpo_weight(const float* mask, int64_t i) { return mask[i]; }

__device__ inline double warp_sum(double v) {
#pragma unroll
  for (int mask = kWarp / 2; mask > 0; mask /= 2) v += __shfl_xor_sync(0xffffffffu, v, mask);
  return v;
}

// Adds `values` over the threads of each half; slots[half][i] then holds sums per warp, to be added by dpo_total after
// a barrier. Callers keep a barrier between the last reading of slots and the next call.
using DpoSlots = double[2][kDpoPartials][kDpoWarps];

__device__ inline void dpo_gather(double a, double b, double c, DpoSlots& slots) {
  a = warp_sum(a), b = warp_sum(b), c = warp_sum(c);
  if (threadIdx.x % kWarp != 0) return;
  double(*mine)[kDpoWarps] = slots[threadIdx.y];
  const int warp = threadIdx.x / kWarp;
  mine[0][warp] = a, mine[1][warp] = b, mine[2][warp] = c;
}

__device__ inline double dpo_total(const double (&warps)[kDpoWarps]) {
  double sum = 0;
#pragma unroll
  for (int w = 0; w < kDpoWarps; ++w) sum += warps[w];
  return sum;
}

// Whether a pair's two sequences lie in order within [0, tokens]. The first must begin at 0: no token without a home.
template <typename M>
__device__ inline bool dpo_in_order(const DpoLoss<M>& a, int64_t pair) {
  const int32_t* at = a.offsets + 2 * pair;
  return at[0] <= at[1] && at[1] <= at[2] && at[2] <= a.tokens && (pair == 0 ? at[0] == 0 : at[0] >= 0);
}

// All chosen tokens of the call, the same number in every block. Warps take pairs, lanes tokens.
template <typename M>
__device__ inline double dpo_count_chosen(const DpoLoss<M>& a, DpoSlots& slots) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.y * kDpoWarps + threadIdx.x / kWarp;
  double count = 0;
  for (int64_t pair = warp; pair < a.pairs; pair += 2 * kDpoWarps) {
    if (!dpo_in_order(a, pair)) continue;
    for (int64_t i = a.offsets[2 * pair] + lane; i < a.offsets[2 * pair + 1]; i += kWarp)
      count += static_cast<double>(dpo_weight(a.mask, i));
  }
  dpo_gather(count, 0, 0, slots);
  __syncthreads();
  count = dpo_total(slots[0][0]) + dpo_total(slots[1][0]);
  __syncthreads();
  return count;
}

// This thread's share of a sequence's sums.
template <typename M>
__device__ inline DpoSequence dpo_sum_tokens(const DpoLoss<M>& a, int64_t begin, int64_t end) {
  DpoSequence sums;
  for (int64_t i = begin + threadIdx.x; i < end; i += kDpoThreads) {
    const float w = dpo_weight(a.mask, i);
    if (w == 0) continue; // a token that does not count may hold anything, NaN included
    const double wide = static_cast<double>(w);
    sums.weight += wide;
    sums.logps += wide * static_cast<double>(a.logps[i]);
    if (a.reference_tokens != nullptr) sums.reference += wide * static_cast<double>(a.reference_tokens[i]);
  }
  return sums;
}

template <typename M>
__device__ inline DpoSequence dpo_sequence(const DpoLoss<M>& a, int64_t sequence, const DpoSlots& slots) {
  const auto& mine = slots[sequence % 2];
  DpoSequence out{dpo_total(mine[0]), dpo_total(mine[1]), dpo_total(mine[2])};
  if (a.reference_f64 != nullptr) out.reference = a.reference_f64[sequence];
  if (a.reference_f32 != nullptr) out.reference = static_cast<double>(a.reference_f32[sequence]);
  a.sums[sequence] = out.logps;
  a.counts[sequence] = static_cast<float>(out.weight);
  return out;
}

// By the block that came last: the means over all pairs.
template <typename M>
__device__ inline void dpo_means(const DpoLoss<M>& a, DpoSlots& slots) {
  const volatile double* partial = a.partial; // other blocks wrote it: not from a stale L1 line
  double loss = 0, logps = 0, tokens = 0;
  for (int64_t pair = threadIdx.y * kDpoThreads + threadIdx.x; pair < a.pairs; pair += 2 * kDpoThreads) {
    const double chosen = partial[a.pairs + pair], weight = partial[2 * a.pairs + pair];
    loss += partial[pair];
    tokens += weight;
    logps += !a.options.rpo_per_sequence ? chosen : weight > 0 ? chosen / weight : 0;
  }
  dpo_gather(loss, logps, tokens, slots);
  __syncthreads();
  if (threadIdx.x != 0 || threadIdx.y != 0) return;
  const double pairs = static_cast<double>(a.pairs);
  loss = (dpo_total(slots[0][0]) + dpo_total(slots[1][0])) / pairs;
  logps = dpo_total(slots[0][1]) + dpo_total(slots[1][1]);
  tokens = a.options.rpo_per_sequence ? pairs : dpo_total(slots[0][2]) + dpo_total(slots[1][2]);
  const double nll = tokens > 0 ? -logps / tokens : 0;
  *a.nll = static_cast<float>(nll);
  // An infinite nll times 0 is not 0.
  *a.loss = static_cast<float>(a.options.rpo_alpha != 0 ? loss + a.options.rpo_alpha * nll : loss);
}

template <typename M>
__global__ void __launch_bounds__(2 * kDpoThreads, kDpoBlocksPerSm) dpo_loss_kernel(const DpoLoss<M> a) {
  __shared__ DpoSlots slots;
  __shared__ float coefficient[2];
  __shared__ bool last;
  const bool first_thread = threadIdx.x == 0 && threadIdx.y == 0;
  const bool count_chosen = a.options.rpo_alpha != 0 && !a.options.rpo_per_sequence;
  const double chosen_tokens = count_chosen ? dpo_count_chosen(a, slots) : 0;

  for (int64_t pair = blockIdx.x; pair < a.pairs; pair += gridDim.x) {
    const bool ok = dpo_in_order(a, pair);
    const int64_t begin = ok ? a.offsets[2 * pair + threadIdx.y] : 0;
    const int64_t end = ok ? a.offsets[2 * pair + threadIdx.y + 1] : 0;
    const DpoSequence mine = dpo_sum_tokens(a, begin, end);
    dpo_gather(mine.logps, mine.reference, mine.weight, slots);
    __syncthreads();
    if (first_thread) {
      DpoSequence chosen = dpo_sequence(a, 2 * pair, slots);
      const DpoSequence rejected = dpo_sequence(a, 2 * pair + 1, slots);
      if (!ok) chosen.logps = bits_as<double>(uint64_t{0x7ff8000000000000}); // NaN
      const DpoPair result = dpo_finish_pair(a.options, chosen, rejected, chosen_tokens, pair, a.pairs, a.per_pair);
      coefficient[0] = static_cast<float>(result.chosen);
      coefficient[1] = static_cast<float>(result.rejected);
      a.partial[pair] = result.loss;
      a.partial[a.pairs + pair] = chosen.logps;
      a.partial[2 * a.pairs + pair] = chosen.weight;
    }
    __syncthreads();
    const float value = coefficient[threadIdx.y];
    for (int64_t i = begin + threadIdx.x; i < end; i += kDpoThreads) {
      const float w = dpo_weight(a.mask, i);
      a.coefficients[i] = w != 0 ? w * value : 0.0f;
    }
  }

  // Padding after the last sequence.
  const int64_t stop = a.offsets[2 * a.pairs], thread = threadIdx.y * kDpoThreads + threadIdx.x;
  for (int64_t i = (stop > 0 ? stop : 0) + int64_t{blockIdx.x} * 2 * kDpoThreads + thread; i < a.tokens;
       i += int64_t{gridDim.x} * 2 * kDpoThreads)
    a.coefficients[i] = 0.0f;

  if (first_thread) {
    __threadfence(); // partial before the ticket
    last = atomicAdd(a.ticket, 1u) == gridDim.x - 1;
    __threadfence();
  }
  __syncthreads();
  if (last) dpo_means(a, slots);
}

} // namespace solar_mega
