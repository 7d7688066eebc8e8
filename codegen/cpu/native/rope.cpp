// ROPE: rotary position embedding of the first `rotary` dims of each head.
#include "kernel.h"
#include "rows.h"

namespace go {
namespace {

// An angle a pair -> an angle a column, in place. Backwards, so that nothing is read after it was
// written over.
void widen(float* table, int64_t half, int64_t style) {
  if (style == ROTATE_HALF) {
    for (int64_t i = 0; i < half; ++i) table[i + half] = table[i];
  } else {
    for (int64_t i = half - 1; i >= 0; --i) table[2 * i] = table[2 * i + 1] = table[i];
  }
}

}  // namespace

void rope(const Instr& instr, Context& ctx, int thread, int threads) {
  const int64_t style = instr.attrs_i[0], halved = instr.attrs_i[1];
  bool ok = (style == ROTATE_HALF || style == INTERLEAVED) && (halved == 0 || halved == 1);
  for (int i = 0; i < 4; ++i) ok = ok && is_float(ctx.dtype(instr, i));
  if (!ok) return ctx.fail(instr);
  const int64_t heads = ctx.dim(instr, 1), width = ctx.dim(instr, 2), rotary = ctx.dim(instr, 3);
  const int64_t half = rotary / 2, angles = halved ? half : rotary;
  float* x = reinterpret_cast<float*>(ctx.scratch(thread, (width + 3 * rotary) * sizeof(float)));
  float *turned = x + width, *cos = turned + rotary, *sin = cos + rotary;

  const Range part = share(ctx.dim(instr, 0) * heads, thread, threads);
  int64_t angles_row = -1;
  const auto address = [&](int operand, int64_t row, int64_t head) {
    const int64_t* s = instr.strides[operand];
    return at(ctx.ptr(instr, operand), ctx.dtype(instr, operand), row * s[0] + head * s[1]);
  };
  for (int64_t item = part.begin; item < part.end; ++item) {
    const int64_t row = item / heads, head = item % heads;
    if (row != angles_row) {
      load_row(address(2, row, 0), ctx.dtype(instr, 2), angles, cos);
      load_row(address(3, row, 0), ctx.dtype(instr, 3), angles, sin);
      if (halved) {
        widen(cos, half, style);
        widen(sin, half, style);
      }
      angles_row = row;
    }
    load_row(address(1, row, head), ctx.dtype(instr, 1), width, x);
    if (style == ROTATE_HALF) {
      for (int64_t i = 0; i < half; ++i) turned[i] = -x[i + half];
      for (int64_t i = 0; i < half; ++i) turned[i + half] = x[i];
    } else {
      for (int64_t i = 0; i < half; ++i) {
        turned[2 * i] = -x[2 * i + 1];
        turned[2 * i + 1] = x[2 * i];
      }
    }
    for (int64_t i = 0; i < rotary; ++i) x[i] = x[i] * cos[i] + turned[i] * sin[i];
    store_row(x, address(0, row, head), ctx.dtype(instr, 0), width);
  }
}

}  // namespace go
