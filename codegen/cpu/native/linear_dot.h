// Integer inner products of blocks of low-bit weights with rows of int8.
//
//   GroupDot<BITS>::start(even, odd, offset): the word a row's sums begin with in a group; it takes
//       the offset of the weights off. even, odd: sums of the row's codes at k % 4 < 2 and >= 2.
//   group_dots<BITS, R, P>: dot[r][p] = sum of (code - offset) * x over 32 columns for R rows by P
//       panels of 8 outputs, exact. x is -127..127; 4-bit offsets are 0 to 16.
#pragma once
#include "linear.h"

namespace go {

template <int BITS>
struct GroupDot;

#if defined(__AVX2__)

GO_INLINE __m256i splat_word(const void* p) {
  int32_t word;
  std::memcpy(&word, p, sizeof word);
  return _mm256_set1_epi32(word);
}
GO_INLINE __m256i load_codes(const uint8_t* p) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
}

#if defined(__AVX512VNNI__) && defined(__AVX512VL__)
#define GO_DOT _mm256_dpbusd_epi32
#elif defined(__AVXVNNI__)
#define GO_DOT _mm256_dpbusd_avx_epi32
#endif

#if defined(GO_DOT)

template <>
struct GroupDot<4> {
  static GO_INLINE int32_t start(int even, int odd, int offset) { return -offset * (even + odd); }
  static GO_INLINE __m256i add(__m256i sum, __m256i codes, __m256i x) {
    return GO_DOT(sum, codes, x);
  }
  static GO_INLINE __m256i finish(__m256i sum) { return sum; }
};

// Unsigned codes are what the instruction takes: 128 more than the stored ones.
template <>
struct GroupDot<8> {
  static GO_INLINE int32_t start(int even, int odd, int offset) {
    return -(offset + 128) * (even + odd);
  }
  static GO_INLINE __m256i add(__m256i sum, __m256i codes, __m256i x) {
    return GO_DOT(sum, _mm256_xor_si256(codes, _mm256_set1_epi8(-128)), x);
  }
  static GO_INLINE __m256i finish(__m256i sum) { return sum; }
};

#else

// Sums of 16 bits: each takes 16 products, at most 16 * 16 * 127 in the end with the offset off
// (before the end it may wrap, which does no harm).
template <>
struct GroupDot<4> {
  static GO_INLINE int32_t start(int even, int odd, int offset) {
    const uint32_t low = static_cast<uint16_t>(-offset * even);
    return static_cast<int32_t>(low | static_cast<uint32_t>(-offset * odd) << 16);
  }
  static GO_INLINE __m256i add(__m256i sum, __m256i codes, __m256i x) {
    return _mm256_add_epi16(sum, _mm256_maddubs_epi16(codes, x));
  }
  static GO_INLINE __m256i finish(__m256i sum) {
    return _mm256_madd_epi16(sum, _mm256_set1_epi16(1));
  }
};

// |code| as an unsigned byte times x with the code's sign: two products are at most 2 * 128 * 127,
// which does not saturate 16 bits.
template <>
struct GroupDot<8> {
  static GO_INLINE int32_t start(int even, int odd, int offset) { return -offset * (even + odd); }
  static GO_INLINE __m256i add(__m256i sum, __m256i codes, __m256i x) {
    const __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(codes), _mm256_sign_epi8(x, codes));
    return _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
  }
  static GO_INLINE __m256i finish(__m256i sum) { return sum; }
};

#endif

template <int BITS, int R, int P>
GO_INLINE void group_dots(const uint8_t* const* codes, const int8_t* const* x,
                          const int32_t* const* start, I8v (*dot)[P]) {
  using Dot = GroupDot<BITS>;
  __m256i sums[R][P];
  for (int r = 0; r < R; ++r) {
    for (int p = 0; p < P; ++p) sums[r][p] = splat_word(start[r]);
  }
  constexpr int LOADS = QUADS * BITS / 8;  // a load of 4-bit codes holds two quads
#pragma GCC unroll 8
  for (int j = 0; j < LOADS; ++j) {
    __m256i low[P], high[P];
    for (int p = 0; p < P; ++p) {
      low[p] = load_codes(codes[p] + j * 32);
      if (BITS == 4) {
        const __m256i mask = _mm256_set1_epi8(15);
        high[p] = _mm256_and_si256(_mm256_srli_epi16(low[p], 4), mask);
        low[p] = _mm256_and_si256(low[p], mask);
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const int8_t* quads = x[r] + j * 32 / BITS;
      const __m256i first = splat_word(quads);
      for (int p = 0; p < P; ++p) pin(sums[r][p] = Dot::add(sums[r][p], low[p], first));
      if (BITS == 4) {
        const __m256i second = splat_word(quads + 4);
        for (int p = 0; p < P; ++p) pin(sums[r][p] = Dot::add(sums[r][p], high[p], second));
      }
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int p = 0; p < P; ++p) dot[r][p] = bits<I8v>(Dot::finish(sums[r][p]));
  }
}

#else

template <int BITS>
struct GroupDot {
  static int32_t start(int even, int odd, int offset) { return -offset * (even + odd); }
};

template <int BITS, int R, int P>
GO_INLINE void group_dots(const uint8_t* const* codes, const int8_t* const* x,
                          const int32_t* const* start, I8v (*dot)[P]) {
  for (int r = 0; r < R; ++r) {
    for (int p = 0; p < P; ++p) dot[r][p] = I8v{} + *start[r];
  }
  for (int p = 0; p < P; ++p) {
    for (int k = 0; k < GROUP; ++k) {
      const I8v column = codes_at<BITS>(codes[p], k);
      for (int r = 0; r < R; ++r) dot[r][p] += column * x[r][k];
    }
  }
}

#endif

}  // namespace go
