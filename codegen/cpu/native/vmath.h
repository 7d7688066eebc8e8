// Elementary functions on eight fp32 lanes. Polynomials are minimax fits (Remez/Lawson) made for
// this file; the quoted errors are relative and were measured against float64.
#pragma once
#include <limits>

#include "vec.h"

namespace go {

// e^r - 1 - r on |r| <= ln(2)/2, then scaled by 2^n: error 1e-7 (2 ulp).
// `n` is returned as the integer in the low bits of `shifted`.
GO_INLINE F8 exp_reduced(F8 x, I8v& n) {
  const F8 magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  const F8 shifted = fma(x, splat(1.44269504f), magic);
  n = bits<I8v>(shifted) - bits<int32_t>(12582912.0f);
  const F8 whole = shifted - magic;
  F8 r = fma(whole, splat(-0.693359375f), x);  // ln 2 in two parts; the first product is exact
  r = fma(whole, splat(2.12194440e-4f), r);
  F8 q = splat(0.00138145965f);
  q = fma(q, r, splat(0.00836871751f));
  q = fma(q, r, splat(0.0416683890f));
  q = fma(q, r, splat(0.166665211f));
  q = fma(q, r, splat(0.49999994f));
  return fma(q * r, r, r) + splat(1.0f);
}
GO_INLINE F8 pow2(I8v n) { return bits<F8>((n + 127) << 23); }

// For x <= 0 (or -inf, NaN): results below 2^-126 are flushed to zero; exp(0) == 1 exactly.
GO_INLINE F8 exp_nonpositive(F8 x) {
  const F8 low = splat(-87.3365f);
  I8v n;
  const F8 y = exp_reduced(x < low ? low : x, n) * pow2(n);
  return x < low ? splat(0.0f) : y;
}
// Any x: overflows to inf, NaN stays NaN, tiny results are denormal.
GO_INLINE F8 exp(F8 x) {
  const F8 low = splat(-104.0f), high = splat(89.0f);
  I8v n;
  const F8 clamped = x < low ? low : x > high ? high : x;
  const F8 y = exp_reduced(clamped, n);
  const I8v half = n >> 1;
  return y * pow2(half) * pow2(n - half);
}

GO_INLINE F8 sigmoid(F8 x) { return splat(1.0f) / (splat(1.0f) + exp(-x)); }
GO_INLINE F8 silu(F8 x) { return x / (splat(1.0f) + exp(-x)); }

GO_INLINE F8 tanh(F8 x) {
  const F8 a = abs(x);
  const F8 z = x * x;
  F8 p = splat(-0.00571703704f);
  p = fma(p, z, splat(0.0206505787f));
  p = fma(p, z, splat(-0.0537434965f));
  p = fma(p, z, splat(0.133314908f));
  p = fma(p, z, splat(-0.333332837f));
  const F8 small = fma(p * z, x, x);
  const F8 large = splat(1.0f) - splat(2.0f) / (exp(a + a) + splat(1.0f));
  const F8 signed_large = bits<F8>(bits<I8v>(large) | (bits<I8v>(x) & int32_t(0x80000000)));
  return a > splat(0.625f) ? signed_large : small;
}

// 0.5 x (1 + tanh(u)) = x * sigmoid(2u), which does not cancel for negative x.
GO_INLINE F8 gelu_tanh(F8 x) {
  const F8 u = splat(0.7978845608f) * fma(splat(0.044715f) * x * x, x, x);
  return x / (splat(1.0f) + exp(-(u + u)));
}

// x * Phi(x), Phi the normal distribution. Phi(-y) = exp(-y^2/2) * h(y), with h fitted in
// t = 1 / (1 + 0.33 y) on y in [0, 14].
GO_INLINE F8 gelu(F8 x) {
  const F8 y = min(abs(x), splat(14.0f));
  const F8 t = splat(1.0f) / fma(splat(0.33f), y, splat(1.0f));
  F8 h = splat(-0.0261074975f);
  h = fma(h, t, splat(0.149804756f));
  h = fma(h, t, splat(-0.32507363f));
  h = fma(h, t, splat(0.295120865f));
  h = fma(h, t, splat(-0.109552883f));
  h = fma(h, t, splat(0.147302836f));
  h = fma(h, t, splat(0.103260554f));
  h = fma(h, t, splat(0.13376930f));
  h = fma(h, t, splat(0.131468937f));
  h = fma(h, t, splat(6.78337665e-6f));
  const F8 tail = exp_nonpositive(splat(-0.5f) * y * y) * h;
  return x * (x > splat(0.0f) ? splat(1.0f) - tail : tail);
}

}  // namespace go
