// RMS_NORM and LAYER_NORM: one row of D elements at a time, in fp32.
#include "kernel.h"
#include "rows.h"

namespace go {
namespace {

// Sum of f(x_i) in 4 x LANES partial sums: the order depends on D only.
template <class F>
float row_sum(const float* x, int64_t n, F&& f) {
  F8 acc[4] = {splat(0), splat(0), splat(0), splat(0)};
  int64_t i = 0;
  for (; i + 4 * LANES <= n; i += 4 * LANES) {
    for (int j = 0; j < 4; ++j) acc[j] += f(load(x + i + j * LANES));
  }
  for (; i + LANES <= n; i += LANES) acc[0] += f(load(x + i));
  float total = sum((acc[0] + acc[1]) + (acc[2] + acc[3]));
  for (; i < n; ++i) total += f(splat(x[i]))[0];
  return total;
}

// Runs body(x row in fp32, spare row, out address) over this thread's (row, head) pairs.
template <class Body>
void over_rows(const Instr& instr, Context& ctx, int thread, int threads, float* x, Body&& body) {
  const int64_t heads = ctx.dim(instr, 1), width = ctx.dim(instr, 2);
  const int out_dtype = ctx.dtype(instr, 0), x_dtype = ctx.dtype(instr, 1);
  char* out = ctx.ptr(instr, 0);
  char* in = ctx.ptr(instr, 1);
  const Range part = share(ctx.dim(instr, 0) * heads, thread, threads);
  for (int64_t item = part.begin; item < part.end; ++item) {
    const int64_t row = item / heads, head = item % heads;
    const int64_t* s = instr.strides[1];
    load_row(at(in, x_dtype, row * s[0] + head * s[1]), x_dtype, width, x);
    body(x);
    s = instr.strides[0];
    store_row(x, at(out, out_dtype, row * s[0] + head * s[1]), out_dtype, width);
  }
}

bool floats(const Instr& instr, const Context& ctx, int operands) {
  for (int i = 0; i < operands; ++i) {
    if (ctx.has(instr, i) && !is_float(ctx.dtype(instr, i))) return false;
  }
  return true;
}

}  // namespace

void rms_norm(const Instr& instr, Context& ctx, int thread, int threads) {
  const int64_t cast = instr.attrs_i[0];
  if (!floats(instr, ctx, 3) || (cast != ROUND_FIRST && cast != ROUND_LAST)) return ctx.fail(instr);
  const int64_t width = ctx.dim(instr, 2);
  const float eps = static_cast<float>(instr.attrs_f[0]);
  const float added = static_cast<float>(instr.attrs_f[1]);
  const int x_dtype = ctx.dtype(instr, 1);
  const bool weighted = ctx.has(instr, 2);
  float* x = reinterpret_cast<float*>(ctx.scratch(thread, 2 * width * sizeof(float)));
  float* weight = x + width;
  if (weighted) {
    load_row(ctx.ptr(instr, 2), ctx.dtype(instr, 2), width, weight);
    for (int64_t i = 0; i < width; ++i) weight[i] += added;
  }
  over_rows(instr, ctx, thread, threads, x, [&](float* row) {
    const float mean = row_sum(row, width, [](F8 v) { return v * v; }) / static_cast<float>(width);
    const float factor = 1.0f / std::sqrt(mean + eps);
    for (int64_t i = 0; i < width; ++i) row[i] *= factor;
    if (cast == ROUND_FIRST) round_row(row, x_dtype, width);
    if (weighted) {
      for (int64_t i = 0; i < width; ++i) row[i] *= weight[i];
    }
  });
}

void layer_norm(const Instr& instr, Context& ctx, int thread, int threads) {
  if (!floats(instr, ctx, 4)) return ctx.fail(instr);
  const int64_t width = ctx.dim(instr, 2);
  const float eps = static_cast<float>(instr.attrs_f[0]);
  float* x = reinterpret_cast<float*>(ctx.scratch(thread, 3 * width * sizeof(float)));
  float *weight = x + width, *bias = x + 2 * width;
  for (int64_t i = 0; i < width; ++i) weight[i] = 1.0f, bias[i] = 0.0f;
  if (ctx.has(instr, 2)) load_row(ctx.ptr(instr, 2), ctx.dtype(instr, 2), width, weight);
  if (ctx.has(instr, 3)) load_row(ctx.ptr(instr, 3), ctx.dtype(instr, 3), width, bias);
  over_rows(instr, ctx, thread, threads, x, [&](float* row) {
    const float n = static_cast<float>(width);
    const float mean = row_sum(row, width, [](F8 v) { return v; }) / n;
    for (int64_t i = 0; i < width; ++i) row[i] -= mean;
    const float variance = row_sum(row, width, [](F8 v) { return v * v; }) / n;
    const float factor = 1.0f / std::sqrt(variance + eps);
    for (int64_t i = 0; i < width; ++i) row[i] = row[i] * factor * weight[i] + bias[i];
  });
}

}  // namespace go
