// Weight layouts of OP_LINEAR and OP_EMBED, written by codegen/cpu/packing.py.
//
// Dense: panels of 16 output columns, [ceil(N / 16)][K][16], zero padded.
// Low-bit: panels of 8 output columns, [ceil(N / 8)][K / 32] blocks of
//     f16 scale[8]; f16 zero[8] (only with zeros); codes
// where codes hold 32 columns k of 8 outputs as quads of 4 consecutive k, one output a 4-byte lane.
// 8 bits: 8 quads of 32 bytes. 4 bits: 4 times 32 bytes, the low nibbles are quad 2j, the high
// nibbles quad 2j + 1. W = scale * (code - offset) + zero. 4-bit offsets are 0 to 16.
#pragma once
#include <algorithm>

#include "kernel.h"
#include "vec.h"

namespace go {

enum WeightKind : int32_t {
  WEIGHT_F32 = 0,
  WEIGHT_BF16 = 1,
  WEIGHT_F16 = 2,
  WEIGHT_4BIT = 3,
  WEIGHT_4BIT_ZERO = 4,
  WEIGHT_8BIT = 5,
  WEIGHT_8BIT_ZERO = 6,
};

constexpr int COLUMNS = 8;  // outputs of a low-bit panel
constexpr int GROUP = 32;   // columns k of a block
constexpr int QUADS = GROUP / 4;

// One kind of low-bit weight at compile time.
template <int BITS_, bool ZERO_>
struct Codes {
  static constexpr int BITS = BITS_;
  static constexpr bool ZERO = ZERO_;
  static constexpr int64_t HEADER = COLUMNS * 2 * (ZERO ? 2 : 1);
  static constexpr int64_t BLOCK = HEADER + COLUMNS * GROUP * BITS / 8;
};

// Holds a vector in its register. Compilers otherwise read an operand of several multiplications
// from memory for each of them, or reassociate integer sums into trees that need more registers
// than there are: both halve the speed of the loops below.
template <class Vector>
GO_INLINE void pin([[maybe_unused]] Vector& v) {
#if defined(__AVX2__)
  __asm__("" : "+x"(v));
#endif
}

// Codes of 8 outputs at column k of a block, as integers.
template <int BITS>
GO_INLINE I8v codes_at(const uint8_t* codes, int k) {
  const int quad = k / 4;
  I8v lanes;
  if (BITS == 4) {
    std::memcpy(&lanes, codes + quad / 2 * 32, sizeof lanes);
    const int shift = quad % 2 * 4 + k % 4 * 8;
    return bits<I8v>(bits<U8v>(lanes) >> shift) & 15;
  }
  std::memcpy(&lanes, codes + quad * 32, sizeof lanes);
  return (lanes << (24 - k % 4 * 8)) >> 24;
}

GO_INLINE F8 to_float(I8v v) { return __builtin_convertvector(v, F8); }

// Weights of one block as floats. Without a zero, or without an offset, `weight` is the rounded
// exact value: products of a code and an fp16 scale fit in fp32.
template <class Kind>
struct Block {
  GO_INLINE Block(const uint8_t* block, int offset) : codes(block + Kind::HEADER) {
    const auto* halves = reinterpret_cast<const uint16_t*>(block);
    scale = Float<F16>::load(halves);
    shift = scale * splat(static_cast<float>(-offset));
    if (Kind::ZERO) shift += Float<F16>::load(halves + COLUMNS);
  }
  Block() = default;
  GO_INLINE F8 weight(int k) const {
    return fma(to_float(codes_at<Kind::BITS>(codes, k)), scale, shift);
  }
  const uint8_t* codes;
  F8 scale, shift;
};

// `depth` columns k (whole blocks) of 8 outputs as floats, [depth][stride].
template <class Kind>
GO_INLINE void dequantize(const uint8_t* block, int offset, int64_t depth, float* to,
                          int64_t stride) {
  for (int64_t g = 0; g < depth; g += GROUP, block += Kind::BLOCK) {
    const Block<Kind> weights(block, offset);
#pragma GCC unroll 32
    for (int k = 0; k < GROUP; ++k) store(to + (g + k) * stride, weights.weight(k));
  }
}

// Operands of one OP_LINEAR with the pointers resolved.
struct Linear {
  int64_t rows, outputs, depth;
  char* out;
  int out_dtype;
  int64_t out_stride;
  const char* x;
  int x_dtype;
  int64_t x_stride;
  const uint8_t* weight;
  const char* bias;  // null: none
  int bias_dtype;
  int offset;
};

// Calls `body` with the Float type of a dtype that is F32, BF16 or F16.
template <class Body>
GO_INLINE void with_float(int dtype, const Body& body) {
  if (dtype == F32) return body(Float<F32>{});
  if (dtype == BF16) return body(Float<BF16>{});
  body(Float<F16>{});
}

// Finishes up to 8 outputs of one row from column `first` on: adds the bias, rounds, stores.
inline void store_outputs(const Linear& op, int64_t row, int64_t first, F8 value) {
  const int64_t count = std::min<int64_t>(LANES, op.outputs - first);
  if (op.bias != nullptr) {
    with_float(op.bias_dtype, [&](auto type) {
      using Type = decltype(type);
      const auto* bias = reinterpret_cast<const typename Type::Storage*>(op.bias) + first;
      if (count == LANES) {
        value += Type::load(bias);
      } else {
        for (int64_t i = 0; i < count; ++i) value[i] += Type::get(bias[i]);
      }
    });
  }
  with_float(op.out_dtype, [&](auto type) {
    using Type = decltype(type);
    auto* to = reinterpret_cast<typename Type::Storage*>(op.out) + row * op.out_stride + first;
    if (count == LANES) {
      Type::store(to, value);
    } else {
      for (int64_t i = 0; i < count; ++i) to[i] = Type::put(value[i]);
    }
  });
}

// The float path: linear_float.cpp. The integer path: linear_int8.cpp.
void linear_float(const Instr&, Context&, const Linear&, int kind, int thread, int threads);
void linear_int8(const Instr&, Context&, const Linear&, int kind, int thread, int threads);

}  // namespace go
