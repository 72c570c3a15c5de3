// The token log-prob kernels' bodies as a plain shared library, called by test_token_logprob_on_host.py through ctypes.

#include "cuda_on_host.h"

#include "cuda/token_logprob.cuh"

using namespace solar_mega;
using cuda_on_host::run_grid;

namespace {

Rows rows(const int64_t* v) { return {v[0], v[1], v[2], v[3]}; }

// pointers: logits, targets, mask, stats, logps, saved, entropy, hit
template <typename T>
void forward(void** p, const int64_t* layout, Vocabulary vocabulary, LossTerms terms, bool smooth, bool spread,
             unsigned grid, unsigned block, unsigned seed) {
  LogprobForward<T> a{};
  a.logits = static_cast<T*>(p[0]), a.targets = static_cast<int64_t*>(p[1]), a.mask = static_cast<bool*>(p[2]);
  a.stats = static_cast<float*>(p[3]);
  a.results = {static_cast<float*>(p[4]), static_cast<float*>(p[5]), static_cast<float*>(p[6]), static_cast<bool*>(p[7])};
  a.layout = rows(layout), a.vocabulary = vocabulary, a.terms = terms, a.smooth = smooth, a.spread = spread;
  if (smooth || spread)
    run_grid(grid, block, seed, [&] { token_logprob_forward_kernel<T, true>(a); });
  else
    run_grid(grid, block, seed, [&] { token_logprob_forward_kernel<T, false>(a); });
}

// pointers: dlogps, logits, targets, saved, dlogits
template <typename T>
void backward(void** p, const int64_t* layout, const int64_t* out, int width, Vocabulary vocabulary, LossTerms terms,
              unsigned grid, unsigned block, unsigned seed) {
  LogprobBackward<T> a{};
  a.dlogps = static_cast<float*>(p[0]), a.logits = static_cast<T*>(p[1]), a.targets = static_cast<int64_t*>(p[2]);
  a.saved = static_cast<float*>(p[3]), a.dlogits = static_cast<T*>(p[4]);
  a.layout = rows(layout), a.out_layout = rows(out), a.width = width, a.vocabulary = vocabulary, a.terms = terms;
  run_grid(grid, block, seed, [&] { token_logprob_backward_kernel<T>(a); });
}

Vocabulary vocabulary(const int64_t* v) { return {v[0], v[1], v[2]}; }

} // namespace

// dtype: 0 float, 1 bfloat16, 2 half. vocab: first, valid, size.
extern "C" void host_forward(int dtype, void** p, const int64_t* layout, const int64_t* vocab, float smoothing, float z,
                             int smooth, int spread, unsigned grid, unsigned block, unsigned seed) {
  const auto run = dtype == 0 ? forward<float> : dtype == 1 ? forward<__nv_bfloat16> : forward<__half>;
  run(p, layout, vocabulary(vocab), {smoothing, z}, smooth != 0, spread != 0, grid, block, seed);
}

extern "C" void host_backward(int dtype, void** p, const int64_t* layout, const int64_t* out, int width,
                              const int64_t* vocab, float smoothing, float z, unsigned grid, unsigned block,
                              unsigned seed) {
  const auto run = dtype == 0 ? backward<float> : dtype == 1 ? backward<__nv_bfloat16> : backward<__half>;
  run(p, layout, out, width, vocabulary(vocab), {smoothing, z}, grid, block, seed);
}

// pointers: stats, logps, saved, entropy, hit
extern "C" void host_combine(void** p, int64_t shards, int64_t rows, int smooth, int entropy, float smoothing, float z,
                             int64_t vocab_size, unsigned seed) {
  const LogprobResults out{
      static_cast<float*>(p[1]), static_cast<float*>(p[2]), static_cast<float*>(p[3]), static_cast<bool*>(p[4])};
  run_grid((rows + kCombineThreads - 1) / kCombineThreads, kCombineThreads, seed, [&] {
    token_logprob_combine_kernel(static_cast<float*>(p[0]), shards, rows, smooth != 0, entropy != 0, {smoothing, z},
                                 vocab_size, out);
  });
}

extern "C" unsigned host_block(int64_t width, int lanes) { return logprob_threads(width / lanes); }
