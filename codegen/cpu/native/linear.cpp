// OP_LINEAR and OP_EMBED: operands resolved, the path chosen, results finished.
#include "linear.h"

#include <algorithm>

namespace go {
namespace {

float scalar_at(const char* p, int dtype, int64_t i) {
  if (dtype == F32) return reinterpret_cast<const float*>(p)[i];
  const uint16_t h = reinterpret_cast<const uint16_t*>(p)[i];
  return dtype == BF16 ? from_bf16(h) : from_f16(h);
}

template <class Type>
void store_rows(const Linear& op, int64_t row, int64_t first, int64_t count, F8 value) {
  auto* to = reinterpret_cast<typename Type::Storage*>(op.out) + row * op.out_stride + first;
  if (count == LANES) return Type::store(to, value);
  for (int64_t i = 0; i < count; ++i) to[i] = Type::put(value[i]);
}

// Row `id` of a dense table.
template <class Type>
void embed_dense(const uint8_t* weight, int64_t depth, int64_t id, float* to) {
  constexpr int64_t PANEL = 16;
  const auto* from =
      reinterpret_cast<const typename Type::Storage*>(weight) + id / PANEL * PANEL * depth;
  for (int64_t k = 0; k < depth; ++k) to[k] = Type::get(from[k * PANEL + id % PANEL]);
}

template <int BITS, bool ZERO>
void embed_blocks(const uint8_t* weight, int64_t depth, int64_t id, int offset, float* to) {
  const uint8_t* block = weight + id / COLUMNS * (depth / GROUP) * block_bytes(BITS, ZERO);
  const int64_t lane = id % COLUMNS;
  alignas(32) float values[GROUP * COLUMNS];
  for (int64_t k = 0; k < depth; k += GROUP, block += block_bytes(BITS, ZERO)) {
    dequantize_block<BITS, ZERO>(block, offset, values, COLUMNS);
    for (int64_t i = 0; i < GROUP; ++i) to[k + i] = values[i * COLUMNS + lane];
  }
}

bool embed_row(int kind, const uint8_t* weight, int64_t depth, int64_t id, int offset, float* to) {
  switch (kind) {
    case WEIGHT_F32: embed_dense<Float<F32>>(weight, depth, id, to); return true;
    case WEIGHT_BF16: embed_dense<Float<BF16>>(weight, depth, id, to); return true;
    case WEIGHT_F16: embed_dense<Float<F16>>(weight, depth, id, to); return true;
    case WEIGHT_4BIT: embed_blocks<4, false>(weight, depth, id, offset, to); return true;
    case WEIGHT_4BIT_ZERO: embed_blocks<4, true>(weight, depth, id, offset, to); return true;
    case WEIGHT_8BIT: embed_blocks<8, false>(weight, depth, id, offset, to); return true;
    case WEIGHT_8BIT_ZERO: embed_blocks<8, true>(weight, depth, id, offset, to); return true;
  }
  return false;
}

bool is_float(int dtype) { return dtype == F32 || dtype == BF16 || dtype == F16; }

}  // namespace

void store_outputs(const Linear& op, int64_t row, int64_t first, F8 value) {
  const int64_t count = std::min<int64_t>(LANES, op.outputs - first);
  if (op.bias != nullptr) {
    for (int64_t i = 0; i < count; ++i) value[i] += scalar_at(op.bias, op.bias_dtype, first + i);
  }
  if (op.out_dtype == F32) return store_rows<Float<F32>>(op, row, first, count, value);
  if (op.out_dtype == BF16) return store_rows<Float<BF16>>(op, row, first, count, value);
  store_rows<Float<F16>>(op, row, first, count, value);
}

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
  if (instr.attrs_i[1] == 0) return linear_float(instr, ctx, op, kind, thread, threads);
  if (kind < WEIGHT_4BIT || op.depth % GROUP != 0) return ctx.fail(instr);
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
  if (!is_float(out.out_dtype)) return ctx.fail(instr);
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
