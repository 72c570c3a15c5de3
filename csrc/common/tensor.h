// What ops ask of their arguments, in one vocabulary: every refusal names the op, the argument, what was given and
// what is allowed. Also allocation without a trip through the dispatcher.

#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "common/rows.h"

namespace solar_mega {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Like STD_TORCH_CHECK without the source position in front: these messages are for the caller. A macro, so that
// texts are only made when they are needed.
#define SOLAR_MEGA_CHECK(ok, ...)                      \
  do {                                                 \
    if (!(ok)) ::solar_mega::refuse(__VA_ARGS__);      \
  } while (0)

template <typename... Parts>
[[noreturn]] void refuse(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  throw std::runtime_error(text.str());
}

inline std::string to_text(torch::headeronly::IntHeaderOnlyArrayRef values) {
  std::ostringstream out;
  out << '[';
  for (size_t i = 0; i < values.size(); ++i) out << (i ? ", " : "") << values[i];
  out << ']';
  return out.str();
}

inline std::string device_text(const Tensor& t) {
  if (t.is_cpu()) return "cpu";
  if (t.is_cuda()) return "cuda:" + std::to_string(t.get_device_index());
  return "another kind of device";
}

inline bool same_sizes(const Tensor& a, const Tensor& b) {
  const auto left = a.sizes(), right = b.sizes();
  if (left.size() != right.size()) return false;
  for (size_t i = 0; i < left.size(); ++i)
    if (left[i] != right[i]) return false;
  return true;
}

inline void check_float_dtype(const char* op, const char* name, const Tensor& t) {
  const auto dtype = t.scalar_type();
  SOLAR_MEGA_CHECK(
      dtype == ScalarType::Float || dtype == ScalarType::BFloat16 || dtype == ScalarType::Half,
      op, ": ", name, " has dtype ", torch::headeronly::toString(dtype), "; allowed: Float, BFloat16, Half");
}

inline void check_dtype(const char* op, const char* name, const Tensor& t, ScalarType wanted, const char* because) {
  SOLAR_MEGA_CHECK(
      t.scalar_type() == wanted,
      op, ": ", name, " has dtype ", torch::headeronly::toString(t.scalar_type()), "; it must be ",
      torch::headeronly::toString(wanted), because);
}

// `where` names the argument that `reference` is.
inline void check_device(
    const char* op, const char* name, const Tensor& t, const Tensor& reference, const char* where = "x") {
  SOLAR_MEGA_CHECK(
      t.is_cpu() == reference.is_cpu() && t.get_device_index() == reference.get_device_index(),
      op, ": ", name, " is on ", device_text(t), "; it must be on ", device_text(reference), ", where ", where, " is");
}

inline void check_like(const char* op, const char* name, const Tensor& t, const Tensor& x) {
  check_device(op, name, t, x);
  check_dtype(op, name, t, x.scalar_type(), ", as x");
  SOLAR_MEGA_CHECK(
      same_sizes(t, x), op, ": ", name, " has shape ", to_text(t.sizes()), "; it must be ", to_text(x.sizes()),
      ", the shape of x");
}

// `t` as rows, or a refusal: the last dimension must be dense, and the leading ones must fold into at most two strides.
inline Rows rows_of(const char* op, const char* name, const Tensor& t) {
  const auto sizes = t.sizes(), strides = t.strides();
  const int64_t last = t.dim() - 1;
  int64_t counts[2] = {1, 1}, steps[2] = {0, 0};
  int groups = 0;
  bool foldable = sizes[last] == 1 || strides[last] == 1;
  for (int64_t d = last - 1; d >= 0 && foldable; --d) {
    if (sizes[d] == 1) continue;
    if (groups > 0 && strides[d] == steps[groups - 1] * counts[groups - 1]) {
      counts[groups - 1] *= sizes[d];
    } else if (groups < 2) {
      counts[groups] = sizes[d];
      steps[groups++] = strides[d];
    } else {
      foldable = false;
    }
  }
  SOLAR_MEGA_CHECK(
      foldable || t.numel() == 0, op, ": ", name, " of shape ", to_text(sizes), " has strides ", to_text(strides),
      "; allowed: last stride 1 and leading dimensions that fold into at most two strides. Call .contiguous() on it");
  return {counts[0] * counts[1], counts[0], steps[0], steps[1]};
}

// Uninitialised, contiguous, on the device of `like`.
inline Tensor empty(torch::headeronly::IntHeaderOnlyArrayRef sizes, ScalarType dtype, const Tensor& like) {
  std::vector<int64_t> strides(sizes.size());
  int64_t step = 1;
  for (size_t d = sizes.size(); d-- > 0;) {
    strides[d] = step;
    step *= sizes[d] > 0 ? sizes[d] : 1;
  }
  int32_t device_type = 0;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  const int32_t dtype_code = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
  AtenTensorHandle handle = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(), dtype_code, device_type,
      like.get_device_index(), &handle));
  return Tensor(handle);
}

} // namespace solar_mega
