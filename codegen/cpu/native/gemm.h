// The micro-kernel of attention's two products, C[rows][columns] += A[rows][K] * B[K][columns].
//
// Each element of C gets one chain of fused multiply-adds over k = 0..K-1, added once: results do not
// depend on how many rows are computed together. Callers that split K sum short chains, which
// keeps the rounding error small.
#pragma once
#include "vec.h"

namespace go {

constexpr int PANEL = 16;  // columns of B that are stored and computed together

// B as panels of storage type `Type`: panel p holds [K][PANEL] contiguously.
template <class Type>
struct Panels {
  const typename Type::Storage* data;
  int64_t panel_stride;
  GO_INLINE F8 get(int64_t k, int64_t panel, int half) const {
    return Type::load(data + panel * panel_stride + k * PANEL + half * LANES);
  }
};

// B as K separate rows in their storage dtype, converted on the fly.
template <class Type>
struct StoredRows {
  const typename Type::Storage* const* rows;
  GO_INLINE F8 get(int64_t k, int64_t panel, int half) const {
    return Type::load(rows[k] + panel * PANEL + half * LANES);
  }
};

// R rows by P panels in registers: R * P <= 6.
template <int R, int P, class B>
GO_INLINE void gemm_block(const float* a, int64_t a_stride, const B& b, int64_t depth,
                          int64_t panel, float* c, int64_t c_stride) {
  F8 acc[R][2 * P];
  for (int r = 0; r < R; ++r) {
    for (int j = 0; j < 2 * P; ++j) acc[r][j] = F8{};
  }
  // The smaller side is kept in registers: with the accumulators it must fit in 16.
  for (int64_t k = 0; k < depth; ++k) {
    if (R <= 2 * P) {
      F8 left[R];
      for (int r = 0; r < R; ++r) left[r] = splat(a[r * a_stride + k]);
      for (int j = 0; j < 2 * P; ++j) {
        const F8 right = b.get(k, panel + j / 2, j % 2);
        for (int r = 0; r < R; ++r) acc[r][j] = fma(left[r], right, acc[r][j]);
      }
    } else {
      F8 right[2 * P];
      for (int j = 0; j < 2 * P; ++j) right[j] = b.get(k, panel + j / 2, j % 2);
      for (int r = 0; r < R; ++r) {
        const F8 left = splat(a[r * a_stride + k]);
        for (int j = 0; j < 2 * P; ++j) acc[r][j] = fma(left, right[j], acc[r][j]);
      }
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int j = 0; j < 2 * P; ++j) {
      float* to = c + r * c_stride + j * LANES;
      store(to, load(to) + acc[r][j]);
    }
  }
}

template <int R, int P, class B>
void gemm_columns(const float* a, int64_t a_stride, const B& b, int64_t depth, int64_t panels,
                  float* c, int64_t c_stride) {
  int64_t p = 0;
  for (; p + P <= panels; p += P) {
    gemm_block<R, P>(a, a_stride, b, depth, p, c + p * PANEL, c_stride);
  }
  for (; p < panels; ++p) gemm_block<R, 1>(a, a_stride, b, depth, p, c + p * PANEL, c_stride);
}

// All rows (any number) by all panels.
template <class B>
void gemm(const float* a, int64_t a_stride, const B& b, int64_t depth, int64_t panels, float* c,
          int64_t c_stride, int64_t rows) {
  constexpr int BLOCK = 6;
  const int64_t whole = rows / BLOCK * BLOCK;
  if (whole > 0) {
    // One panel of B stays in the first-level cache while all rows pass over it.
    for (int64_t p = 0; p < panels; ++p) {
      for (int64_t r = 0; r < whole; r += BLOCK) {
        gemm_block<BLOCK, 1>(a + r * a_stride, a_stride, b, depth, p,
                             c + r * c_stride + p * PANEL, c_stride);
      }
    }
  }
  a += whole * a_stride;
  c += whole * c_stride;
  switch (rows - whole) {
    case 1: return gemm_columns<1, 4>(a, a_stride, b, depth, panels, c, c_stride);
    case 2: return gemm_columns<2, 2>(a, a_stride, b, depth, panels, c, c_stride);
    case 3: return gemm_columns<3, 2>(a, a_stride, b, depth, panels, c, c_stride);
    case 4: return gemm_columns<4, 1>(a, a_stride, b, depth, panels, c, c_stride);
    case 5: return gemm_columns<5, 1>(a, a_stride, b, depth, panels, c, c_stride);
  }
}

}  // namespace go
