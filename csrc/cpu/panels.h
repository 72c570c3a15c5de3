// Products of small matrices in fp32, C[M, N] (+)= A[M, K] B[K, N], by one register-tiled kernel.
//
// B is packed in panels of N = 2 W columns, W floats being the widest vector of the machine, [panel][K][2 W]; A is read
// element by element, so a transposed A costs nothing; C is row-major.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "cpu/element.h"

namespace solar_mega {
namespace {

constexpr int kRows = 8; // of C in registers

SOLAR_MEGA_INLINE int64_t up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// ---- the product. Rows of A are `row` apart and columns `column`; B is one panel [K][2 W].

template <int W, int R>
SOLAR_MEGA_INLINE void tile(
    const float* a, int64_t row, int64_t column, const float* b, float* c, int64_t c_row, int64_t depth, bool add) {
  typedef float vec __attribute__((vector_size(W * 4)));
  typedef float vec_anywhere __attribute__((vector_size(W * 4), aligned(4)));
  vec sum[R][2];
#pragma GCC unroll 8
  for (int i = 0; i < R; ++i) sum[i][0] = sum[i][1] = vec{};
  for (int64_t k = 0; k < depth; ++k) {
    const vec low = *reinterpret_cast<const vec_anywhere*>(b + k * 2 * W);
    const vec high = *reinterpret_cast<const vec_anywhere*>(b + k * 2 * W + W);
#pragma GCC unroll 8
    for (int i = 0; i < R; ++i) {
      const float v = a[i * row + k * column];
      sum[i][0] += low * v;
      sum[i][1] += high * v;
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < R; ++i) {
    vec_anywhere* out = reinterpret_cast<vec_anywhere*>(c + i * c_row);
    vec_anywhere* out_high = reinterpret_cast<vec_anywhere*>(c + i * c_row + W);
    *out = add ? *out + sum[i][0] : sum[i][0];
    *out_high = add ? *out_high + sum[i][1] : sum[i][1];
  }
}

// C[rows, panels * 2 W] (+)= A[rows, depth] B; rows is a multiple of kRows, panels of B are `panel` floats apart.
template <int W>
SOLAR_MEGA_INLINE void multiply(
    const float* a, int64_t row, int64_t column, const float* b, int64_t panel, float* c, int64_t c_row, int64_t rows,
    int64_t panels, int64_t depth, bool add) {
  constexpr int R = W == 16 ? kRows : kRows / 2; // 16 vector registers hold no more
  for (int64_t p = 0; p < panels; ++p)
    for (int64_t i = 0; i < rows; i += R)
      tile<W, R>(a + i * row, row, column, b + p * panel, c + i * c_row + p * 2 * W, c_row, depth, add);
}

// ---- packing. x: `rows` rows of `dim`, `step` apart.

template <typename T>
SOLAR_MEGA_INLINE void pack_rows(
    const T* x, int64_t step, int64_t rows, int64_t dim, int64_t padded_rows, float factor, float* out) {
  for (int64_t i = 0; i < rows; ++i) {
#pragma omp simd
    for (int64_t j = 0; j < dim; ++j) out[i * dim + j] = factor * to_float(x[i * step + j]);
  }
  std::memset(out + rows * dim, 0, (padded_rows - rows) * dim * sizeof(float));
}

// [panel][padded_rows][2 W]: B for products over the rows.
template <int W, typename T>
SOLAR_MEGA_INLINE void pack_panels(
    const T* x, int64_t step, int64_t rows, int64_t dim, int64_t padded_rows, float factor, float* out) {
  for (int64_t from = 0; from < dim; from += 2 * W, out += padded_rows * 2 * W) {
    const int64_t width = std::min<int64_t>(2 * W, dim - from);
    if (width < 2 * W || rows < padded_rows) std::memset(out, 0, padded_rows * 2 * W * sizeof(float));
    for (int64_t i = 0; i < rows; ++i) {
#pragma omp simd
      for (int64_t j = 0; j < width; ++j) out[i * 2 * W + j] = factor * to_float(x[i * step + from + j]);
    }
  }
}

// [panel of rows][dim][2 W]: B for products over the columns of x.
template <int W, typename T>
SOLAR_MEGA_INLINE void pack_transposed(const T* x, int64_t step, int64_t rows, int64_t dim, float* out) {
  for (int64_t from = 0; from < rows; from += 2 * W, out += dim * 2 * W) {
    const int64_t count = std::min<int64_t>(2 * W, rows - from);
    if (count < 2 * W) std::memset(out, 0, dim * 2 * W * sizeof(float));
    for (int64_t i = 0; i < count; ++i)
      for (int64_t j = 0; j < dim; ++j) out[j * 2 * W + i] = to_float(x[(from + i) * step + j]);
  }
}

} // namespace
} // namespace solar_mega
