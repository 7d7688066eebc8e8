// Eight fp32 lanes on compiler vector extensions, with intrinsics where the extensions have no
// word for it (FMA, F16C), and loads and stores of the float dtypes.
//
// Every function is lane-wise and compiled without contraction (-ffp-contract=off), so a value
// depends on its own lane's operands only: the batch invariance of the kernels rests on this.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#if defined(__AVX2__) || defined(__F16C__) || defined(__FMA__)
#include <immintrin.h>
#endif

#include "abi.h"

#define GO_INLINE inline __attribute__((always_inline))

namespace go {

constexpr int LANES = 8;
using F8 = float __attribute__((vector_size(32)));
using I8v = int32_t __attribute__((vector_size(32)));
using U8v = uint32_t __attribute__((vector_size(32)));
using H8 = uint16_t __attribute__((vector_size(16)));

GO_INLINE F8 splat(float x) { return F8{x, x, x, x, x, x, x, x}; }
GO_INLINE F8 load(const float* p) {
  F8 v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
GO_INLINE void store(float* p, F8 v) { std::memcpy(p, &v, sizeof v); }

template <class To, class From>
GO_INLINE To bits(From from) {
  static_assert(sizeof(To) == sizeof(From), "same size");
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

// a * b + c with one rounding where the machine has it (then everywhere, else nowhere).
GO_INLINE F8 fma(F8 a, F8 b, F8 c) {
#if defined(__FMA__)
  return _mm256_fmadd_ps(a, b, c);
#elif defined(__ARM_FEATURE_FMA)
  F8 r;
  for (int i = 0; i < LANES; ++i) r[i] = __builtin_fmaf(a[i], b[i], c[i]);
  return r;
#else
  return a * b + c;
#endif
}
GO_INLINE F8 max(F8 a, F8 b) { return a > b ? a : b; }
GO_INLINE F8 min(F8 a, F8 b) { return a < b ? a : b; }
GO_INLINE F8 abs(F8 a) { return bits<F8>(bits<I8v>(a) & 0x7FFFFFFF); }

// Horizontal results, always reduced in the same tree order.
GO_INLINE float sum(F8 v) {
  return ((v[0] + v[4]) + (v[2] + v[6])) + ((v[1] + v[5]) + (v[3] + v[7]));
}
GO_INLINE float max(F8 v) {
  const auto m = [](float a, float b) { return a > b ? a : b; };
  return m(m(m(v[0], v[4]), m(v[2], v[6])), m(m(v[1], v[5]), m(v[3], v[7])));
}

// Scalar conversions: round to nearest even, NaN stays NaN.
GO_INLINE float from_bf16(uint16_t h) { return bits<float>(static_cast<uint32_t>(h) << 16); }
GO_INLINE uint16_t to_bf16(float f) {
  const uint32_t u = bits<uint32_t>(f);
  if ((u & 0x7FFFFFFF) > 0x7F800000) return static_cast<uint16_t>(u >> 16 | 0x40);
  return static_cast<uint16_t>((u + 0x7FFF + (u >> 16 & 1)) >> 16);
}
inline float from_f16(uint16_t h) {
  const uint32_t sign = static_cast<uint32_t>(h & 0x8000) << 16;
  const uint32_t magnitude = h & 0x7FFF;
  if (magnitude >= 0x7C00) return bits<float>(sign | 0x7F800000 | (magnitude & 0x3FF) << 13);
  // Shifted into place the exponent is 112 too small; the multiplication also makes denormals.
  const float scaled = bits<float>(magnitude << 13) * 5.192296858534828e33f;  // 2^112
  return bits<float>(sign | bits<uint32_t>(scaled));
}
inline uint16_t to_f16(float f) {
  const uint32_t u = bits<uint32_t>(f);
  const uint16_t sign = static_cast<uint16_t>(u >> 16 & 0x8000);
  const uint32_t a = u & 0x7FFFFFFF;
  if (a > 0x7F800000) return static_cast<uint16_t>(sign | 0x7E00);
  if (a >= 0x477FF000) return static_cast<uint16_t>(sign | 0x7C00);  // >= 65520 rounds to inf
  if (a < 0x38800000) {                                              // below 2^-14: denormal
    // Adding 0.5 leaves multiples of 2^-24 in the mantissa, rounded by the FPU.
    return static_cast<uint16_t>(sign | (bits<uint32_t>(bits<float>(a) + 0.5f) - 0x3F000000));
  }
  return static_cast<uint16_t>(sign | ((a - 0x38000000 + 0xFFF + (a >> 13 & 1)) >> 13));
}

GO_INLINE F8 from_bf16(H8 h) { return bits<F8>(__builtin_convertvector(h, U8v) << 16); }
GO_INLINE H8 to_bf16(F8 v) {
  const U8v u = bits<U8v>(v);
  const U8v rounded = u + 0x7FFF + (u >> 16 & 1);
  const U8v nan = u | 0x400000;
  const U8v result = (u & 0x7FFFFFFF) > 0x7F800000 ? nan : rounded;
  return __builtin_convertvector(result >> 16, H8);
}
GO_INLINE F8 from_f16(H8 h) {
#if defined(__F16C__)
  return _mm256_cvtph_ps(bits<__m128i>(h));
#else
  F8 r;
  for (int i = 0; i < LANES; ++i) r[i] = from_f16(h[i]);
  return r;
#endif
}
GO_INLINE H8 to_f16(F8 v) {
#if defined(__F16C__)
  return bits<H8>(_mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#else
  H8 r;
  for (int i = 0; i < LANES; ++i) r[i] = to_f16(v[i]);
  return r;
#endif
}

// One float dtype as a compile-time type: its storage, and its conversions by scalar and vector.
template <int DT>
struct Float;
template <>
struct Float<F32> {
  using Storage = float;
  static GO_INLINE float get(float x) { return x; }
  static GO_INLINE float put(float x) { return x; }
  static GO_INLINE F8 load(const float* p) { return go::load(p); }
  static GO_INLINE void store(float* p, F8 v) { go::store(p, v); }
};
template <>
struct Float<BF16> {
  using Storage = uint16_t;
  static GO_INLINE float get(uint16_t x) { return from_bf16(x); }
  static GO_INLINE uint16_t put(float x) { return to_bf16(x); }
  static GO_INLINE F8 load(const uint16_t* p) {
    H8 h;
    std::memcpy(&h, p, sizeof h);
    return from_bf16(h);
  }
  static GO_INLINE void store(uint16_t* p, F8 v) {
    const H8 h = to_bf16(v);
    std::memcpy(p, &h, sizeof h);
  }
};
template <>
struct Float<F16> {
  using Storage = uint16_t;
  static GO_INLINE float get(uint16_t x) { return from_f16(x); }
  static GO_INLINE uint16_t put(float x) { return to_f16(x); }
  static GO_INLINE F8 load(const uint16_t* p) {
    H8 h;
    std::memcpy(&h, p, sizeof h);
    return from_f16(h);
  }
  static GO_INLINE void store(uint16_t* p, F8 v) {
    const H8 h = to_f16(v);
    std::memcpy(p, &h, sizeof h);
  }
};

// The first n (< LANES) lanes; the others are `fill` or not stored.
GO_INLINE F8 load_part(const float* p, int64_t n, float fill) {
  F8 v = splat(fill);
  std::memcpy(&v, p, n * sizeof(float));
  return v;
}

}  // namespace go
