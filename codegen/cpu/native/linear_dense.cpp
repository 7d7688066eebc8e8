// The float path of OP_LINEAR: fp32 activations, weights as fp32 panels.
//
// Every output is a sum of chains of fused multiply-adds over 64 k each (gemm.h), so a row's result does
// not depend on how many rows are computed together. Low-bit weights are expanded a panel at a time into
// scratch, with the same operations whatever the number of rows.
#include <algorithm>

#include "gemm.h"
#include "linear.h"

namespace go {
namespace {

constexpr int64_t STRIP = 64;          // output columns a work item computes
constexpr int64_t DEPTH_BLOCK = 64;     // columns k of one chain: short chains round less
constexpr int64_t A_BYTES = 192 << 10;  // rows of x that stay in the second-level cache

const float* rows_as_float(const Linear& op, int64_t first, int64_t count, float* scratch,
                           int64_t* stride) {
  if (op.x_dtype == F32) {
    *stride = op.x_stride;
    return reinterpret_cast<const float*>(op.x) + first * op.x_stride;
  }
  *stride = op.depth;
  const auto* from = reinterpret_cast<const uint16_t*>(op.x);
  for (int64_t r = 0; r < count; ++r) {
    const uint16_t* row = from + (first + r) * op.x_stride;
    float* to = scratch + r * op.depth;
    for (int64_t k = 0; k < op.depth; ++k) {
      to[k] = op.x_dtype == BF16 ? from_bf16(row[k]) : from_f16(row[k]);
    }
  }
  return scratch;
}

// Panels [first, first + count) of 16 outputs as fp32 panels of a low-bit weight.
template <int BITS, bool ZERO>
void expand(const Linear& op, int64_t first, int64_t count, float* to) {
  const int64_t groups = op.depth / GROUP, bytes = block_bytes(BITS, ZERO);
  const int64_t low_panels = (op.outputs + COLUMNS - 1) / COLUMNS;
  for (int64_t p = 0; p < count; ++p) {
    for (int half = 0; half < 2; ++half) {
      const int64_t low = 2 * (first + p) + half;
      float* panel = to + p * op.depth * PANEL + half * COLUMNS;
      if (low >= low_panels) {
        for (int64_t k = 0; k < op.depth; ++k) store(panel + k * PANEL, F8{});
        continue;
      }
      const uint8_t* block = op.weight + low * groups * bytes;
      for (int64_t g = 0; g < groups; ++g, block += bytes) {
        dequantize_block<BITS, ZERO>(block, op.offset, panel + g * GROUP * PANEL, PANEL);
      }
    }
  }
}

template <class Type>
struct Dense {
  static constexpr bool expands = false;
  static Panels<Type> panels(const Linear& op, int64_t first, int64_t, float*) {
    const auto* data = reinterpret_cast<const typename Type::Storage*>(op.weight);
    return {data + first * op.depth * PANEL, op.depth * PANEL};
  }
};

template <int BITS, bool ZERO>
struct LowBit {
  static constexpr bool expands = true;
  static Panels<Float<F32>> panels(const Linear& op, int64_t first, int64_t count, float* scratch) {
    expand<BITS, ZERO>(op, first, count, scratch);
    return {scratch, op.depth * PANEL};
  }
};

template <class B>
void multiply(const float* x, int64_t x_stride, const B& panels, const Linear& op, int64_t count,
              int64_t rows, float* c) {
  std::fill(c, c + rows * STRIP, 0.0f);
  for (int64_t k = 0; k < op.depth; k += DEPTH_BLOCK) {
    const int64_t depth = std::min(DEPTH_BLOCK, op.depth - k);
    const B part = {panels.data + k * PANEL, panels.panel_stride};
    gemm(x + k, x_stride, part, depth, count, c, STRIP, rows);
  }
}

template <class Weight>
void run(const Instr& instr, Context& ctx, const Linear& op, int thread, int threads) {
  const int64_t strip_panels = STRIP / PANEL;
  const int64_t panels = (op.outputs + PANEL - 1) / PANEL;
  // Fewer panels a strip when there would not be a strip for every thread.
  const int64_t per_strip =
      std::max<int64_t>(1, std::min(strip_panels, panels / std::max(1, threads)));
  const int64_t strips = (panels + per_strip - 1) / per_strip;
  const int64_t row_bytes = op.depth * static_cast<int64_t>(sizeof(float));
  const int64_t block = std::min(op.rows, std::max<int64_t>(6, A_BYTES / row_bytes / 6 * 6));
  const int64_t expanded = Weight::expands ? per_strip * PANEL * op.depth : 0;
  const int64_t converted = op.x_dtype == F32 ? 0 : block * op.depth;
  float* scratch = reinterpret_cast<float*>(
      ctx.scratch(thread, (expanded + converted + block * STRIP + LANES) * sizeof(float)));
  float* x_scratch = scratch + expanded;
  float* c = x_scratch + converted;

  const auto strip = [&](int64_t s) {
    const int64_t first = s * per_strip, count = std::min(per_strip, panels - first);
    const auto b = Weight::panels(op, first, count, scratch);
    for (int64_t row = 0; row < op.rows; row += block) {
      const int64_t rows = std::min(block, op.rows - row);
      int64_t stride;
      const float* x = rows_as_float(op, row, rows, x_scratch, &stride);
      multiply(x, stride, b, op, count, rows, c);
      for (int64_t r = 0; r < rows; ++r) {
        for (int64_t n = 0; n < count * PANEL; n += LANES) {
          if (first * PANEL + n < op.outputs) {
            store_outputs(op, row + r, first * PANEL + n, load(c + r * STRIP + n));
          }
        }
      }
    }
  };
  if (op.rows <= 8) {
    const Range mine = share(strips, thread, threads);
    for (int64_t s = mine.begin; s < mine.end; ++s) strip(s);
  } else {
    for (int64_t s; (s = ctx.take(instr, 0)) < strips;) strip(s);
  }
}

}  // namespace

void linear_float(const Instr& instr, Context& ctx, const Linear& op, int kind, int thread,
                  int threads) {
  switch (kind) {
    case WEIGHT_F32: return run<Dense<Float<F32>>>(instr, ctx, op, thread, threads);
    case WEIGHT_BF16: return run<Dense<Float<BF16>>>(instr, ctx, op, thread, threads);
    case WEIGHT_F16: return run<Dense<Float<F16>>>(instr, ctx, op, thread, threads);
    case WEIGHT_4BIT: return run<LowBit<4, false>>(instr, ctx, op, thread, threads);
    case WEIGHT_4BIT_ZERO: return run<LowBit<4, true>>(instr, ctx, op, thread, threads);
    case WEIGHT_8BIT: return run<LowBit<8, false>>(instr, ctx, op, thread, threads);
    case WEIGHT_8BIT_ZERO: return run<LowBit<8, true>>(instr, ctx, op, thread, threads);
  }
  ctx.fail(instr);
}

}  // namespace go
