// The preference loss's kernel body as a plain shared library, called by test_dpo_loss_on_host.py through ctypes.

#include "cuda_on_host.h"

#include "cuda/dpo_loss.cuh"

using namespace solar_mega;

namespace {

struct Inputs {
  const float *logps, *reference_tokens;
  const double* reference_f64;
  const float* reference_f32;
  const void* mask;
  const int32_t* offsets;
  float *loss, *nll, *per_pair;
  double* sums;
  float *counts, *coefficients;
};

template <typename M>
void run(const Inputs& in, int64_t tokens, int64_t pairs, const DpoOptions& options, int blocks, unsigned seed) {
  DpoLoss<M> a{};
  a.logps = in.logps, a.reference_tokens = in.reference_tokens;
  a.reference_f64 = in.reference_f64, a.reference_f32 = in.reference_f32;
  a.mask = static_cast<const M*>(in.mask), a.offsets = in.offsets;
  a.loss = in.loss, a.nll = in.nll, a.per_pair = in.per_pair;
  a.sums = in.sums, a.counts = in.counts, a.coefficients = in.coefficients;
  std::vector<double> partial(kDpoPartials * pairs, NAN);
  unsigned ticket = 0;
  a.partial = partial.data(), a.ticket = &ticket;
  a.tokens = tokens, a.pairs = pairs, a.options = options;
  cuda_on_host::run_grid(blocks, dim3(kDpoThreads, 2), seed, [&] { dpo_loss_kernel<M>(a); });
}

} // namespace

// mask_kind: 0 none, 1 bool, 2 float. p: the pointers of Inputs in order.
extern "C" void host_dpo_loss(void** p, int mask_kind, int64_t tokens, int64_t pairs, int64_t variant, double beta,
                              double label_smoothing, double rpo_alpha, int rpo_per_sequence, int blocks,
                              unsigned seed) {
  Inputs in;
  static_assert(sizeof(in) == 12 * sizeof(void*));
  std::memcpy(&in, p, sizeof(in));
  const DpoOptions options{static_cast<DpoVariant>(variant), beta, label_smoothing, rpo_alpha, rpo_per_sequence != 0};
  const auto call = mask_kind == 0 ? run<std::nullptr_t> : mask_kind == 1 ? run<uint8_t> : run<float>;
  call(in, tokens, pairs, options, blocks, seed);
}
