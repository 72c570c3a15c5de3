// The ops' schemas, and the Python module `solar_mega._C` whose import registers them.
//
// Kernels register themselves: csrc/cpu/<op>.cpp for CPU, csrc/cuda/<op>.cu for CUDA, under the stem that
// solar_mega/ops/<op>.py and tests/ops/test_<op>.py have too. Everything goes through LibTorch's stable ABI and
// Python's limited API, so that one binary serves torch 2.10 and newer and Python 3.10 and newer.

#include <Python.h>

#include <torch/csrc/stable/library.h>

#include "cpu/dispatch.h"

STABLE_TORCH_LIBRARY(solar_mega, m) {
  m.def("rms_norm(Tensor x, Tensor weight, float eps, bool zero_centered=False) -> (Tensor y, Tensor rstd)");
  m.def(
      "add_rms_norm(Tensor x, Tensor residual, Tensor weight, float eps, bool zero_centered=False) -> "
      "(Tensor y, Tensor new_residual, Tensor rstd)");
  m.def(
      "rms_norm_backward(Tensor dy, Tensor x, Tensor weight, Tensor rstd, Tensor? dresidual=None, "
      "bool zero_centered=False) -> (Tensor dx, Tensor dweight)");
  m.def(
      "qkv_rotary(Tensor qkv, Tensor cos, Tensor sin, Tensor? positions, int queries_per_group, "
      "bool interleaved=False) -> (Tensor q, Tensor k, Tensor v)");
  m.def(
      "qkv_rotary_backward(Tensor dq, Tensor dk, Tensor dv, Tensor cos, Tensor sin, Tensor? positions, "
      "bool interleaved=False) -> Tensor dqkv");
  m.def(
      "causal_attention(Tensor q, Tensor k, Tensor v, float scale, int window=0, Tensor? cu_seqlens=None) -> "
      "(Tensor out, Tensor stats)");
  m.def(
      "causal_attention_backward(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor stats, float scale, "
      "int window=0, Tensor? cu_seqlens=None) -> (Tensor dq, Tensor dk, Tensor dv)");
  m.def("swiglu(Tensor x) -> Tensor");
  m.def("swiglu_backward(Tensor dy, Tensor x) -> Tensor dx");
  m.def(
      "token_logprob(Tensor logits, Tensor targets, Tensor? mask, int vocab_size, float label_smoothing=0., "
      "float z_loss=0., bool metrics=False) -> (Tensor logps, Tensor saved, Tensor entropy, Tensor hit)");
  m.def(
      "token_logprob_partial(Tensor logits, Tensor targets, Tensor? mask, int first_column, int vocab_size, "
      "bool smooth=False, bool entropy=False) -> Tensor stats");
  m.def(
      "token_logprob_combine(Tensor stats, int vocab_size, float label_smoothing=0., float z_loss=0., "
      "bool metrics=False) -> (Tensor logps, Tensor saved, Tensor entropy, Tensor hit)");
  m.def(
      "token_logprob_backward(Tensor dlogps, Tensor logits, Tensor targets, Tensor saved, int first_column, "
      "int vocab_size, float label_smoothing=0., float z_loss=0.) -> Tensor dlogits");
  m.def(
      "token_logprob_backward_(Tensor dlogps, Tensor(a!) logits, Tensor targets, Tensor saved, int first_column, "
      "int vocab_size, float label_smoothing=0., float z_loss=0.) -> ()");
  m.def(
      "dpo_loss(Tensor logps, Tensor cu_seqlens, Tensor? mask=None, Tensor? reference_logps=None, "
      "Tensor? reference_token_logps=None, str variant=\"sigmoid\", float beta=0.1, float label_smoothing=0.0, "
      "float rpo_alpha=0.0, bool rpo_per_sequence=False) -> (Tensor loss, Tensor nll, Tensor per_pair, Tensor sums, "
      "Tensor counts, Tensor coefficients)");
  m.def("weighted_sum_out(Tensor[] inputs, float[] weights, Tensor? base, Tensor(a!) out) -> bool");
  m.def("dot_products(Tensor a, Tensor b, Tensor? base=None) -> Tensor");
}

namespace {

#ifdef SOLAR_MEGA_WITH_CUDA
constexpr const char* kWithCuda = "1";
#else
constexpr const char* kWithCuda = "";
#endif

int add_build_facts(PyObject* module) {
  const char* isa = nullptr;
  try {
    isa = solar_mega::isa_name(solar_mega::isa());
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_ImportError, error.what());
    return -1;
  }
  const bool failed = PyModule_AddStringConstant(module, "cpu_isa", isa) ||
      PyModule_AddStringConstant(module, "cuda", kWithCuda) ||
      PyModule_AddStringConstant(module, "cuda_reason", SOLAR_MEGA_BUILD_CUDA_REASON) ||
      PyModule_AddStringConstant(module, "torch", SOLAR_MEGA_BUILD_TORCH) ||
      PyModule_AddStringConstant(module, "compiler", __VERSION__);
  return failed ? -1 : 0;
}

PyModuleDef_Slot slots[] = {{Py_mod_exec, reinterpret_cast<void*>(add_build_facts)}, {0, nullptr}};

PyModuleDef module_def = {
    PyModuleDef_HEAD_INIT, "_C", "Compiled ops of solar_mega.", 0, nullptr, slots, nullptr, nullptr, nullptr};

} // namespace

PyMODINIT_FUNC PyInit__C(void) { return PyModuleDef_Init(&module_def); }
