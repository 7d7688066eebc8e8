// The contract between the Python lowering (codegen/cpu/abi.py mirrors this file field by field)
// and the native kernels: a plan is an array of `Instr`, executed by `go_run` in one call.
//
// Rows are tokens. Every activation is a strided view into one arena; a view's address is
//     bases[base] + offset + offset_per_token * syms[SYM_TOKENS]
// and a dimension's extent is mult * syms[sym], so one plan serves every batch.
#pragma once
#include <cstdint>

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

enum Op : int32_t {
  OP_EMBED = 0,            // out, ids, weight
  OP_LINEAR = 1,           // out, x, weight, bias?
  OP_RMS_NORM = 2,         // out, x, weight?
  OP_LAYER_NORM = 3,       // out, x, weight?, bias?
  OP_ROPE = 4,             // out, x, cos, sin
  OP_KV_WRITE = 5,         // k_cache, v_cache, k, v, slots
  OP_PAGED_ATTENTION = 6,  // out, q, k_cache, v_cache, block_tables, query_start, kv_lens, sinks?
  OP_GLU = 7,              // out, gate, up
  OP_BINARY = 8,           // out, a, b        (b may be absent: scalar in attrs_f[0])
  OP_UNARY = 9,            // out, a           (copy and cast included)
  OP_GATHER_ROWS = 10,     // out, x, row indices
  OP_COUNT = 11,
};

struct Operand {
  int32_t base;              // index into bases; -1: operand absent
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
