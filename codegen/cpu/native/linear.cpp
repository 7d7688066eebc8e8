// OP_LINEAR and OP_EMBED: operands resolved, the path chosen.
#include "linear.h"

namespace go {
namespace {

// Row `id` of a dense table.
template <class Type>
void embed_dense(const uint8_t* weight, int64_t depth, int64_t id, float* to) {
  constexpr int64_t PANEL = 16;
  const auto* from =
      reinterpret_cast<const typename Type::Storage*>(weight) + id / PANEL * PANEL * depth;
  for (int64_t k = 0; k < depth; ++k) to[k] = Type::get(from[k * PANEL + id % PANEL]);
}

template <class Kind>
void embed_codes(const uint8_t* weight, int64_t depth, int64_t id, int offset, float* to) {
  const uint8_t* block = weight + id / COLUMNS * (depth / GROUP) * Kind::BLOCK;
  alignas(32) float values[GROUP * COLUMNS];
  for (int64_t k = 0; k < depth; k += GROUP, block += Kind::BLOCK) {
    dequantize<Kind>(block, offset, GROUP, values, COLUMNS);
    for (int64_t i = 0; i < GROUP; ++i) to[k + i] = values[i * COLUMNS + id % COLUMNS];
  }
}

bool embed_row(int kind, const uint8_t* weight, int64_t depth, int64_t id, int offset, float* to) {
  switch (kind) {
    case WEIGHT_F32: embed_dense<Float<F32>>(weight, depth, id, to); return true;
    case WEIGHT_BF16: embed_dense<Float<BF16>>(weight, depth, id, to); return true;
    case WEIGHT_F16: embed_dense<Float<F16>>(weight, depth, id, to); return true;
    case WEIGHT_4BIT: embed_codes<Codes<4, false>>(weight, depth, id, offset, to); return true;
    case WEIGHT_4BIT_ZERO: embed_codes<Codes<4, true>>(weight, depth, id, offset, to); return true;
    case WEIGHT_8BIT: embed_codes<Codes<8, false>>(weight, depth, id, offset, to); return true;
    case WEIGHT_8BIT_ZERO: embed_codes<Codes<8, true>>(weight, depth, id, offset, to); return true;
  }
  return false;
}

bool is_float(int dtype) { return dtype == F32 || dtype == BF16 || dtype == F16; }

}  // namespace

void linear(const Instr& instr, Context& ctx, int thread, int threads) {
  const int kind = static_cast<int>(instr.attrs_i[0]);
  const bool has_bias = instr.attrs_i[2] != 0;
  const Linear op = {
      ctx.dim(instr, 0),
      ctx.dim(instr, 1),
      ctx.dim(instr, 2),
      ctx.ptr(instr, 0),
      ctx.dtype(instr, 0),
      instr.strides[0][0],
      ctx.ptr(instr, 1),
      ctx.dtype(instr, 1),
      instr.strides[1][0],
      ctx.ptr<uint8_t>(instr, 2),
      has_bias ? ctx.ptr(instr, 3) : nullptr,
      has_bias ? ctx.dtype(instr, 3) : static_cast<int>(F32),
      static_cast<int>(instr.attrs_i[4]),
  };
  if (!is_float(op.out_dtype) || !is_float(op.x_dtype) || !is_float(op.bias_dtype)) {
    return ctx.fail(instr);
  }
  if (kind >= WEIGHT_4BIT && op.depth % GROUP != 0) return ctx.fail(instr);
  if (instr.attrs_i[1] == 0) return linear_float(instr, ctx, op, kind, thread, threads);
  linear_int8(instr, ctx, op, kind, thread, threads);
}

void embed(const Instr& instr, Context& ctx, int thread, int threads) {
  const int64_t rows = ctx.dim(instr, 0), depth = ctx.dim(instr, 1);
  const int64_t* ids = ctx.ptr<int64_t>(instr, 1);
  const int kind = static_cast<int>(instr.attrs_i[0]);
  const float factor = static_cast<float>(instr.attrs_f[0]);
  Linear out{};
  out.out = ctx.ptr(instr, 0);
  out.out_dtype = ctx.dtype(instr, 0);
  out.out_stride = instr.strides[0][0];
  out.outputs = depth;
  if (!is_float(out.out_dtype) || ctx.dtype(instr, 1) != I64) return ctx.fail(instr);
  float* values = reinterpret_cast<float*>(ctx.scratch(thread, (depth + LANES) * sizeof(float)));
  const Range mine = share(rows, thread, threads);
  for (int64_t row = mine.begin; row < mine.end; ++row) {
    const int64_t id = ids[row];
    const bool known = id >= 0 && id < instr.attrs_i[1] &&
                       embed_row(kind, ctx.ptr<uint8_t>(instr, 2), depth, id,
                                 static_cast<int>(instr.attrs_i[4]), values);
    if (!known) return ctx.fail(instr);
    for (int64_t k = 0; k < depth; k += LANES) {
      store_outputs(out, row, k, load(values + k) * splat(factor));
    }
  }
}

}  // namespace go
