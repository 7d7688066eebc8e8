// The contract between the Python lowering (codegen/cpu/abi.py mirrors this file field by field)
// and the native kernels: a plan is an array of `Instr`, executed by `go_run` in one call.
//
// Rows are tokens. Every activation is a strided view into one arena; a view's address is
//     bases[base] + offset + offset_per_token * syms[SYM_TOKENS]
// and a dimension's extent is mult * syms[sym], so one plan serves every batch.
//
// Unless an op says otherwise, activations are F32, BF16 or F16 (each operand on its own), the last
// axis is contiguous, arithmetic is fp32 and the result is rounded once to the output's dtype.
// Outputs may alias inputs exactly (same address, strides and dtype), not partly; those of
// OP_GATHER_ROWS, OP_EMBED and OP_LINEAR not at all.
#pragma once
#include <cstdint>

constexpr int64_t ABI_VERSION = 2;

enum DType : int32_t { F32 = 0, BF16 = 1, F16 = 2, I64 = 3, I32 = 4, U8 = 5, I8 = 6, BOOL = 7 };

// syms[SYM_ONE] == 1 always; then tokens T, requests R, logit rows L and the columns of the block
// table of this step (the block table is dense int64 [R, columns]).
enum Sym : int32_t {
  SYM_ONE = 0,
  SYM_TOKENS = 1,
  SYM_REQUESTS = 2,
  SYM_LOGIT_ROWS = 3,
  SYM_BLOCK_COLUMNS = 4,
  SYM_COUNT = 5,
};

// Per op: operands; then its dims, the strides it reads (elements, in the order of the dims they
// step along), attrs_i and attrs_f.
enum Op : int32_t {
  // out, ids (I64 [rows]), weight. dims: rows, D. out: row.
  // i: 0 weight kind, 1 number of table rows, 4 offset of the codes.
  // f: 0 factor multiplied into each row (1.0: none).
  OP_EMBED = 0,
  // out, x, weight, bias?. dims: rows, N, K. out: row; x: row.
  // i: 0 weight kind (linear.h), 1 activation mode (0 float, 1 int8 per group of 32), 2 has bias,
  // 4 offset of the codes.
  OP_LINEAR = 1,
  // out, x, weight? [D]. dims: rows, heads, D. out, x: row, head.
  // out = x * rsqrt(mean(x^2) + eps) * (weight + added).
  // i: 0 cast order (NormCast). f: 0 eps, 1 added to the weight (Gemma: 1.0).
  OP_RMS_NORM = 2,
  // out, x, weight? [D], bias? [D]. dims: rows, heads, D. out, x: row, head. f: 0 eps.
  OP_LAYER_NORM = 3,
  // out, x, cos, sin (an angle a rotary dim: both halves/both of a pair are stored; or half as many,
  // an angle a pair). dims: rows, heads, D, rotary dims. out, x: row, head; cos, sin: row.
  // i: 0 style (RopeStyle), 1 tables hold an angle a pair.
  // out = x * cos + rotate(x) * sin on the first rotary dims; the others are copied.
  OP_ROPE = 4,
  // k_cache, v_cache (F32, F16 or BF16 [blocks, block size, kv_heads, D]), k, v, slots (I64 [rows],
  // block * block size + place in the block; a negative slot is skipped).
  // dims: rows, kv_heads, D_k, D_v. k, v: row, head. i: 0 block size, 1 blocks of the cache.
  OP_KV_WRITE = 5,
  // out, q, k_cache, v_cache, block_tables (I64 [requests, columns]), query_start (I64 prefix sums
  // [requests + 1], last = rows), kv_lens (I64 [requests], context length with this step's rows),
  // sinks? [query heads]. dims: rows, kv_heads, D_k, D_v. out, q: row, head.
  // Row i of request r stands at position kv_lens[r] - rows_r + i and sees the keys at positions
  // <= its own and, with a window, > its own - window.
  // i: 0 block size, 1 query heads per kv head, 2 window (0: none).
  // f: 0 scale, 1 softcap (0: none; scores become cap * tanh(score / cap)), 2 and 3 the bounds of a
  // row's highest score (equal: none), outside of which the instruction fails.
  OP_PAGED_ATTENTION = 6,
  // out, gate, up. dims: rows, D. out, gate, up: row. i: 0 activation (GluKind).
  // out = act(gate) * up.
  OP_GLU = 7,
  // out, a, b (absent: the scalar f[0]). dims: any 4. out, a, b: all 4. i: 0 BinaryKind.
  OP_BINARY = 8,
  // out, a. dims: any 4. out, a: all 4. i: 0 UnaryKind. Copies also take the integer dtypes (then
  // int -> int is exact and int -> float is rounded once).
  OP_UNARY = 9,
  // out, x, row indices (I64 [rows]). dims: rows, D, rows of x. out, x: row.
  OP_GATHER_ROWS = 10,
  OP_COUNT = 11,
};

// ROUND_FIRST (Llama): the normalised x is rounded to x's dtype, then multiplied by the weight.
// ROUND_LAST (Gemma): the product is formed in fp32.
enum NormCast : int32_t { ROUND_FIRST = 0, ROUND_LAST = 1 };

// ROTATE_HALF pairs dim i with i + rotary/2; INTERLEAVED pairs 2i with 2i + 1.
enum RopeStyle : int32_t { ROTATE_HALF = 0, INTERLEAVED = 1 };

enum GluKind : int32_t { GLU_SILU = 0, GLU_GELU = 1, GLU_GELU_TANH = 2, GLU_COUNT = 3 };

enum BinaryKind : int32_t {
  BINARY_ADD = 0,
  BINARY_SUB = 1,
  BINARY_MUL = 2,
  BINARY_DIV = 3,
  BINARY_MAX = 4,
  BINARY_MIN = 5,
  BINARY_COUNT = 6,
};

enum UnaryKind : int32_t {
  UNARY_COPY = 0,
  UNARY_NEG = 1,
  UNARY_EXP = 2,
  UNARY_RSQRT = 3,
  UNARY_SQRT = 4,
  UNARY_SIGMOID = 5,
  UNARY_SILU = 6,
  UNARY_GELU = 7,
  UNARY_GELU_TANH = 8,
  UNARY_TANH = 9,
  UNARY_RELU = 10,
  UNARY_COS = 11,
  UNARY_SIN = 12,
  UNARY_RECIPROCAL = 13,
  UNARY_SQUARE = 14,
  UNARY_COUNT = 15,
};

struct Operand {
  int32_t base;  // index into bases; -1: operand absent
  int32_t dtype;
  int64_t offset;            // bytes
  int64_t offset_per_token;  // bytes, times syms[SYM_TOKENS]
};

struct Dim {
  int64_t mult;
  int64_t sym;  // extent = mult * syms[sym]
};

constexpr int MAX_OPERANDS = 8;
constexpr int MAX_DIMS = 4;

struct Instr {
  int32_t op;
  int32_t barrier;  // 1: every earlier instruction must be finished by all threads before this one
  Operand operands[MAX_OPERANDS];
  Dim dims[MAX_DIMS];
  int64_t strides[MAX_OPERANDS][MAX_DIMS];  // elements; 0 broadcasts
  int64_t attrs_i[12];
  double attrs_f[4];
};
