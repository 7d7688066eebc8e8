// Rows of the KV cache repacked as panels for `gemm`.
#pragma once
#include "gemm.h"

namespace go {

#if defined(__AVX2__)
// 16-bit storage: 16 keys x 8 dims transposed in eight registers, keys 0-7 in the low and 8-15 in
// the high half of each.
GO_INLINE void transpose_8_dims(const uint16_t* const* rows, int64_t d, uint16_t* to) {
  __m256i r[8];
  for (int j = 0; j < 8; ++j) {
    const __m128i low = _mm_loadu_si128(reinterpret_cast<const __m128i*>(rows[j] + d));
    r[j] = _mm256_inserti128_si256(_mm256_castsi128_si256(low),
                                   *reinterpret_cast<const __m128i_u*>(rows[j + 8] + d), 1);
  }
  __m256i pairs[8], quads[8];
  for (int j = 0; j < 4; ++j) {  // two keys of dims 0-3, of dims 4-7
    pairs[j] = _mm256_unpacklo_epi16(r[2 * j], r[2 * j + 1]);
    pairs[j + 4] = _mm256_unpackhi_epi16(r[2 * j], r[2 * j + 1]);
  }
  for (int h = 0; h < 2; ++h) {    // dims 4h..4h+3
    for (int q = 0; q < 2; ++q) {  // keys 4q..4q+3
      quads[4 * h + q] = _mm256_unpacklo_epi32(pairs[4 * h + 2 * q], pairs[4 * h + 2 * q + 1]);
      quads[4 * h + 2 + q] = _mm256_unpackhi_epi32(pairs[4 * h + 2 * q], pairs[4 * h + 2 * q + 1]);
    }
  }
  for (int i = 0; i < 4; ++i) {
    const __m256i even = _mm256_unpacklo_epi64(quads[2 * i], quads[2 * i + 1]);
    const __m256i odd = _mm256_unpackhi_epi64(quads[2 * i], quads[2 * i + 1]);
    std::memcpy(to + (d + 2 * i) * PANEL, &even, sizeof even);
    std::memcpy(to + (d + 2 * i + 1) * PANEL, &odd, sizeof odd);
  }
}

GO_INLINE void transpose_8_dims(const float* const* rows, int64_t d, float* to) {
  for (int half = 0; half < 2; ++half) {
    __m256 r[8], pairs[8], quads[8];
    for (int j = 0; j < 8; ++j) r[j] = _mm256_loadu_ps(rows[half * LANES + j] + d);
    for (int j = 0; j < 4; ++j) {
      pairs[2 * j] = _mm256_unpacklo_ps(r[2 * j], r[2 * j + 1]);
      pairs[2 * j + 1] = _mm256_unpackhi_ps(r[2 * j], r[2 * j + 1]);
    }
    for (int j = 0; j < 2; ++j) {
      const __m256* p = pairs + 4 * j;
      quads[4 * j] = _mm256_shuffle_ps(p[0], p[2], 0x44);
      quads[4 * j + 1] = _mm256_shuffle_ps(p[0], p[2], 0xEE);
      quads[4 * j + 2] = _mm256_shuffle_ps(p[1], p[3], 0x44);
      quads[4 * j + 3] = _mm256_shuffle_ps(p[1], p[3], 0xEE);
    }
    float* line = to + d * PANEL + half * LANES;
    for (int i = 0; i < 4; ++i) {
      store(line + i * PANEL, _mm256_permute2f128_ps(quads[i], quads[i + 4], 0x20));
      store(line + (i + 4) * PANEL, _mm256_permute2f128_ps(quads[i], quads[i + 4], 0x31));
    }
  }
}
#endif

// PANEL rows of `width` elements, transposed to [width][PANEL] in the same storage type.
template <class Stored>
void pack_keys(const Stored* const* rows, int64_t width, Stored* to) {
  int64_t d = 0;
#if defined(__AVX2__)
  for (; d + 8 <= width; d += 8) transpose_8_dims(rows, d, to);
#endif
  for (; d < width; ++d) {
    for (int j = 0; j < PANEL; ++j) to[d * PANEL + j] = rows[j][d];
  }
}

// n elements (whole vectors) as fp32.
template <class Type>
void widen(const typename Type::Storage* from, int64_t n, float* to) {
  for (int64_t i = 0; i < n; i += LANES) store(to + i, Type::load(from + i));
}

// `count` rows of `width` elements as panels [width / PANEL][panel_stride / PANEL][PANEL]; the
// columns behind `width` of the last panel are zero.
template <class Type>
void pack_values(const typename Type::Storage* const* rows, int64_t count, int64_t width,
                 int64_t panel_stride, float* to) {
  const int64_t whole = width / PANEL;
  for (int64_t k = 0; k < count; ++k) {
    float* line = to + k * PANEL;
    for (int64_t p = 0; p < whole; ++p) {
      store(line + p * panel_stride, Type::load(rows[k] + p * PANEL));
      store(line + p * panel_stride + LANES, Type::load(rows[k] + p * PANEL + LANES));
    }
    if (whole * PANEL < width) {
      float* last = line + whole * panel_stride;
      for (int64_t j = 0; j < PANEL; ++j) {
        const int64_t d = whole * PANEL + j;
        last[j] = d < width ? Type::get(rows[k][d]) : 0.0f;
      }
    }
  }
}

}  // namespace go
