// Causal attention on the CPU, forward and backward: its ops, and how their tasks (causal_attention.h) are shared out.
// Formulas: solar_mega/ops/causal_attention.py.
//
// Heads (forward: blocks of queries too) are shared out over torch's threads.

#include <torch/csrc/stable/library.h>

#include <optional>
#include <tuple>
#include <vector>

#include "common/causal_attention.h"
#include "cpu/causal_attention.h"

namespace solar_mega {
namespace {

// ---- one variant per instruction set: unlike elsewhere the vector's width is part of the code

enum class Stage { pack, pack_backward, forward, backward, gather };

// Stages run over (b, group), (b, head, block) or (b, head).
template <int W, typename T>
SOLAR_MEGA_INLINE void run_body(Stage stage, const Attention<T>& a, int64_t begin, int64_t end, T* dk, T* dv) {
  const AttentionShape& shape = a.shape;
  const int64_t scores = stage == Stage::forward ? kChunk + kPad : stage == Stage::backward ? 2 * (a.keys + kPad) : 0;
  Scratch memory(kBlock * (scores + 2 * shape.dim + 3 * a.width) + 7 * 16);
  const int64_t blocks = (shape.s + kBlock - 1) / kBlock;
  for (int64_t i = begin; i < end; ++i) {
    switch (stage) {
      case Stage::pack: pack_head<W>(a, i / shape.groups, i % shape.groups, false); break;
      case Stage::pack_backward: pack_head<W>(a, i / shape.groups, i % shape.groups, true); break;
      case Stage::forward:
        forward_block<W>(a, i / blocks / shape.heads, i / blocks % shape.heads, i % blocks * kBlock, memory);
        break;
      case Stage::backward: backward_head<W>(a, i / shape.heads, i % shape.heads, memory); break;
      case Stage::gather:
        gather_group(a, a.dk, i / shape.groups, i % shape.groups, dk);
        gather_group(a, a.dv, i / shape.groups, i % shape.groups, dv);
    }
  }
}

#ifdef __x86_64__
template <typename T>
SOLAR_MEGA_TARGET_AVX512 void run_avx512(Stage stage, const Attention<T>& a, int64_t begin, int64_t end, T* dk, T* dv) {
  run_body<16>(stage, a, begin, end, dk, dv);
}
template <typename T>
SOLAR_MEGA_TARGET_AVX2 void run_avx2(Stage stage, const Attention<T>& a, int64_t begin, int64_t end, T* dk, T* dv) {
  run_body<8>(stage, a, begin, end, dk, dv);
}
#endif
template <typename T>
void run_base(Stage stage, const Attention<T>& a, int64_t begin, int64_t end, T* dk, T* dv) {
  run_body<4>(stage, a, begin, end, dk, dv);
}

int64_t panel_columns() { return isa() == Isa::avx512 ? 32 : isa() == Isa::avx2 ? 16 : 8; }

template <typename T>
void run(Stage stage, const Attention<T>& a, int64_t count, T* dk = nullptr, T* dv = nullptr) {
  torch::stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
#ifdef __x86_64__
    if (isa() == Isa::avx512) return run_avx512(stage, a, begin, end, dk, dv);
    if (isa() == Isa::avx2) return run_avx2(stage, a, begin, end, dk, dv);
#endif
    run_base(stage, a, begin, end, dk, dv);
  });
}

template <typename T>
Attention<T> arguments(const AttentionShape& shape, const Tensor& q, const Tensor& k, const Tensor& v, double scale) {
  Attention<T> a{};
  a.shape = shape;
  a.q = static_cast<const T*>(q.data_ptr());
  a.k = static_cast<const T*>(k.data_ptr());
  a.v = static_cast<const T*>(v.data_ptr());
  a.scale = static_cast<float>(scale);
  a.keys = up(shape.s, panel_columns());
  a.width = up(shape.dim, panel_columns());
  return a;
}

float* floats(Tensor& t) { return static_cast<float*>(t.data_ptr()); }

std::tuple<Tensor, Tensor> causal_attention(
    const Tensor& q, const Tensor& k, const Tensor& v, double scale, int64_t window, std::optional<Tensor> cu_seqlens) {
  AttentionShape shape = check_causal_attention("causal_attention", q, k, v, scale, window);
  const std::vector<int32_t> starts = sample_starts("causal_attention", cu_seqlens, shape.s);
  shape.starts = starts.empty() ? nullptr : starts.data();
  Tensor y = empty({shape.s, shape.b, shape.heads, shape.dim}, q.scalar_type(), q);
  Tensor stats = empty({shape.b, shape.heads, shape.s, 2}, ScalarType::Float, q);
  if (q.numel() == 0) return {y, stats};
  for_each_dtype(q.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    Attention<T> a = arguments<T>(shape, q, k, v, scale);
    const int64_t pairs = shape.b * shape.groups;
    Tensor k_columns = empty({pairs, a.keys, shape.dim}, ScalarType::Float, q);
    Tensor v_rows = empty({pairs, a.keys, a.width}, ScalarType::Float, q);
    a.k_columns = floats(k_columns), a.v_rows = floats(v_rows);
    a.y = static_cast<T*>(y.data_ptr()), a.stats_out = floats(stats);
    run(Stage::pack, a, pairs);
    run(Stage::forward, a, shape.b * shape.heads * ((shape.s + kBlock - 1) / kBlock));
  });
  return {y, stats};
}

std::tuple<Tensor, Tensor, Tensor> causal_attention_backward(
    const Tensor& dout, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& stats, double scale,
    int64_t window, std::optional<Tensor> cu_seqlens) {
  const char* op = "causal_attention_backward";
  AttentionShape shape = check_causal_attention(op, q, k, v, scale, window);
  const std::vector<int32_t> starts = sample_starts(op, cu_seqlens, shape.s);
  shape.starts = starts.empty() ? nullptr : starts.data();
  check_beside(op, "dout", dout, "q", q);
  check_dtype(op, "dout", dout, q.scalar_type(), ", as q");
  SOLAR_MEGA_CHECK(
      same_sizes(dout, q), op, ": dout has shape ", to_text(dout.sizes()), "; it must be ", to_text(q.sizes()),
      ", the shape of q");
  check_beside(op, "stats", stats, "q", q);
  check_dtype(op, "stats", stats, ScalarType::Float, ", as the forward returned it");
  SOLAR_MEGA_CHECK(
      stats.is_contiguous() && stats.dim() == 4 && stats.size(0) == shape.b && stats.size(1) == shape.heads &&
          stats.size(2) == shape.s && stats.size(3) == 2,
      op, ": stats has shape ", to_text(stats.sizes()),
      "; it must be contiguous [b, heads, s, 2], as the forward returned it");
  Tensor dq = empty(q.sizes(), q.scalar_type(), q), dk = empty(k.sizes(), q.scalar_type(), q);
  Tensor dv = empty(k.sizes(), q.scalar_type(), q);
  if (q.numel() == 0) return {dq, dk, dv};
  for_each_dtype(q.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    Attention<T> a = arguments<T>(shape, q, k, v, scale);
    const int64_t pairs = shape.b * shape.groups, heads = shape.b * shape.heads;
    Tensor k_columns = empty({pairs, a.keys, shape.dim}, ScalarType::Float, q);
    Tensor v_columns = empty({pairs, a.keys, shape.dim}, ScalarType::Float, q);
    Tensor k_rows = empty({pairs, a.keys, a.width}, ScalarType::Float, q);
    Tensor dk_sums = empty({heads, a.keys, a.width}, ScalarType::Float, q);
    Tensor dv_sums = empty({heads, a.keys, a.width}, ScalarType::Float, q);
    a.k_columns = floats(k_columns), a.v_columns = floats(v_columns), a.k_rows = floats(k_rows);
    a.dk = floats(dk_sums), a.dv = floats(dv_sums);
    a.dout = static_cast<const T*>(dout.data_ptr()), a.dout_strides = head_strides(op, "dout", dout);
    a.stats = static_cast<const float*>(stats.data_ptr());
    a.dq = static_cast<T*>(dq.data_ptr());
    run(Stage::pack_backward, a, pairs);
    run(Stage::backward, a, heads);
    run(Stage::gather, a, pairs, static_cast<T*>(dk.data_ptr()), static_cast<T*>(dv.data_ptr()));
  });
  return {dq, dk, dv};
}

} // namespace

STABLE_TORCH_LIBRARY_IMPL(solar_mega, CPU, m) {
  m.impl("causal_attention", TORCH_BOX(&causal_attention));
  m.impl("causal_attention_backward", TORCH_BOX(&causal_attention_backward));
}

} // namespace solar_mega
