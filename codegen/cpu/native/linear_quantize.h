// Rows rounded to int8 in groups of 32 columns, by absmax: scale = absmax / 127, code =
// x * (1 / scale) rounded to even. A group with a scale below 1e-30, whose reciprocal would
// overflow, counts as zero. One that is not finite has the scale NaN, which reaches every output of
// its row.
#pragma once
#include <cmath>
#include <limits>

#include "linear_dot.h"

namespace go {

// codes [rows][K], then for each row and group its scale, the word its integer sums start with
// (linear_dot.h), and scale * sum of codes.
struct QuantizedRows {
  int8_t* codes;
  float* scale;
  int32_t* start;
  float* scaled_sum;

  static int64_t bytes(int64_t rows, int64_t depth) { return rows * (depth + depth / GROUP * 12); }
  static QuantizedRows in(char* memory, int64_t rows, int64_t depth) {
    const int64_t groups = rows * (depth / GROUP);
    float* scale = reinterpret_cast<float*>(memory);
    int32_t* start = reinterpret_cast<int32_t*>(scale + groups);
    float* scaled_sum = reinterpret_cast<float*>(start + groups);
    return {reinterpret_cast<int8_t*>(scaled_sum + groups), scale, start, scaled_sum};
  }
};

constexpr int GROUP_VECTORS = GROUP / LANES;

// Sums of a group's codes at columns k % 4 < 2 (even) and k % 4 >= 2 (odd).
struct PairSums {
  int even, odd;
};

#if defined(__AVX2__)

GO_INLINE int32_t max_lane(I8v v) {
  __m128i m = _mm_max_epi32(_mm256_castsi256_si128(bits<__m256i>(v)),
                            _mm256_extracti128_si256(bits<__m256i>(v), 1));
  m = _mm_max_epi32(m, _mm_shuffle_epi32(m, 0x4E));
  return _mm_cvtsi128_si32(_mm_max_epi32(m, _mm_shuffle_epi32(m, 0xB1)));
}

// Rounds 32 values to even, stores them as bytes.
GO_INLINE PairSums store_codes(const F8* v, int8_t* to) {
  __m256i q[GROUP_VECTORS];
  for (int i = 0; i < GROUP_VECTORS; ++i) q[i] = _mm256_cvtps_epi32(v[i]);
  const __m256i halves = _mm256_packs_epi16(_mm256_packs_epi32(q[0], q[1]),
                                            _mm256_packs_epi32(q[2], q[3]));
  const __m256i codes =
      _mm256_permutevar8x32_epi32(halves, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), codes);
  const __m256i pairs = _mm256_maddubs_epi16(_mm256_set1_epi8(1), codes);
  __m128i sums = _mm_add_epi16(_mm256_castsi256_si128(pairs), _mm256_extracti128_si256(pairs, 1));
  sums = _mm_add_epi16(sums, _mm_shuffle_epi32(sums, 0x4E));
  const int32_t both = _mm_cvtsi128_si32(_mm_add_epi16(sums, _mm_shuffle_epi32(sums, 0xB1)));
  return {static_cast<int16_t>(both), both >> 16};
}

#else

GO_INLINE int32_t max_lane(I8v v) {
  int32_t m = v[0];
  for (int j = 1; j < LANES; ++j) m = std::max(m, v[j]);
  return m;
}

GO_INLINE PairSums store_codes(const F8* v, int8_t* to) {
  int sums[2] = {0, 0};
  for (int k = 0; k < GROUP; ++k) {
    to[k] = static_cast<int8_t>(std::nearbyintf(v[k / LANES][k % LANES]));
    sums[k / 2 % 2] += to[k];
  }
  return {sums[0], sums[1]};
}

#endif

template <int BITS, class Type>
void quantize_row(const typename Type::Storage* x, int64_t row, int64_t groups, int offset,
                  const QuantizedRows& to) {
  constexpr int32_t INFINITE = 0x7F800000;
  for (int64_t g = row * groups; g < (row + 1) * groups; ++g, x += GROUP) {
    F8 v[GROUP_VECTORS];
    I8v peaks{};  // magnitudes compare as integers, with NaN the largest
    for (int i = 0; i < GROUP_VECTORS; ++i) {
      v[i] = Type::load(x + i * LANES);
      const I8v magnitude = bits<I8v>(v[i]) & 0x7FFFFFFF;
      peaks = magnitude > peaks ? magnitude : peaks;
    }
    const int32_t peak = max_lane(peaks);
    const bool finite = peak < INFINITE;
    float scale = bits<float>(peak) / 127.0f;
    if (!finite || !(scale > 1e-30f)) scale = 0.0f;
    const F8 inverse = splat(scale > 0.0f ? 1.0f / scale : 0.0f);
    for (int i = 0; i < GROUP_VECTORS; ++i) v[i] = finite ? v[i] * inverse : F8{};
    const PairSums sums = store_codes(v, to.codes + g * GROUP);
    to.scale[g] = finite ? scale : std::numeric_limits<float>::quiet_NaN();
    to.start[g] = GroupDot<BITS>::start(sums.even, sums.odd, offset);
    to.scaled_sum[g] = to.scale[g] * static_cast<float>(sums.even + sums.odd);
  }
}

// `rows` of x, for weights of BITS bits with op.offset.
template <int BITS>
void quantize_rows(const Linear& op, Range rows, const QuantizedRows& to) {
  with_float(op.x_dtype, [&](auto type) {
    using Type = decltype(type);
    const auto* x = reinterpret_cast<const typename Type::Storage*>(op.x);
    for (int64_t r = rows.begin; r < rows.end; ++r) {
      quantize_row<BITS, Type>(x + r * op.x_stride, r, op.depth / GROUP, op.offset, to);
    }
  });
}

}  // namespace go
