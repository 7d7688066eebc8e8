// Weight layouts of OP_LINEAR and OP_EMBED, written by codegen/cpu/packing.py.
//
// Dense: panels of 16 output columns, [ceil(N / 16)][K][16], zero padded.
// Low-bit: panels of 8 output columns, [ceil(N / 8)][K / 32] blocks of
//     f16 scale[8]; f16 zero[8] (only with zeros); codes
// where codes hold 32 columns k of 8 outputs as quads of 4 consecutive k, one output a 4-byte lane.
// 8 bits: 8 quads of 32 bytes. 4 bits: 4 times 32 bytes, the low nibbles are quad 2j, the high
// nibbles quad 2j + 1. W = scale * (code - offset) + zero.
#pragma once
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

constexpr int COLUMNS = 8;       // outputs of a low-bit panel
constexpr int GROUP = 32;        // columns k of a block
constexpr int QUADS = GROUP / 4;

constexpr int64_t block_bytes(int bits, bool zero) {
  return COLUMNS * 2 * (zero ? 2 : 1) + COLUMNS * GROUP * bits / 8;
}

// Codes of 8 outputs at column k of a block, as integers.
template <int BITS>
GO_INLINE I8v codes_at(const uint8_t* codes, int k) {
  const int quad = k / 4;
  I8v lanes;
  if (BITS == 4) {
    std::memcpy(&lanes, codes + quad / 2 * 32, sizeof lanes);
    return lanes >> (quad % 2 * 4 + k % 4 * 8) & 15;
  }
  std::memcpy(&lanes, codes + quad * 32, sizeof lanes);
  return (lanes << (24 - k % 4 * 8)) >> 24;
}

GO_INLINE F8 to_float(I8v v) { return __builtin_convertvector(v, F8); }

// One block as floats, [32][stride] with 8 outputs a row.
template <int BITS, bool ZERO>
GO_INLINE void dequantize_block(const uint8_t* block, int offset, float* to, int64_t stride) {
  const F8 scale = Float<F16>::load(reinterpret_cast<const uint16_t*>(block));
  F8 zero{};
  if (ZERO) zero = Float<F16>::load(reinterpret_cast<const uint16_t*>(block) + COLUMNS);
  const uint8_t* codes = block + COLUMNS * 2 * (ZERO ? 2 : 1);
#pragma GCC unroll 32
  for (int k = 0; k < GROUP; ++k) {
    const F8 code = to_float(codes_at<BITS>(codes, k) - offset);
    store(to + k * stride, ZERO ? fma(code, scale, zero) : code * scale);
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
  const char* bias;
  int bias_dtype;
  int offset;
};

// Finishes `count` (<= 8) outputs of one row: adds the bias, rounds, stores.
void store_outputs(const Linear& op, int64_t row, int64_t first, F8 value);

// The float path: linear_dense.cpp. The integer path: linear_int8.cpp.
void linear_float(const Instr&, Context&, const Linear&, int kind, int thread, int threads);
void linear_int8(const Instr&, Context&, const Linear&, int kind, int thread, int threads);

}  // namespace go
