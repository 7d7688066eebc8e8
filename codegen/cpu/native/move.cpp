// KV_WRITE and GATHER_ROWS: rows copied to where an index says.
#include <cstring>

#include "kernel.h"
#include "rows.h"

namespace go {
namespace {

void convert(const char* from, int from_dtype, char* to, int to_dtype, int64_t n, float* buffer) {
  if (from_dtype == to_dtype) {
    std::memcpy(to, from, n * item_size(to_dtype));
    return;
  }
  load_row(from, from_dtype, n, buffer);
  store_row(buffer, to, to_dtype, n);
}

}  // namespace

void kv_write(const Instr& instr, Context& ctx, int thread, int threads) {
  bool ok = ctx.dtype(instr, 4) == I64;
  for (int i = 0; i < 4; ++i) ok = ok && is_float(ctx.dtype(instr, i));
  if (!ok) return ctx.fail(instr);
  const int64_t heads = ctx.dim(instr, 1);
  const int64_t widths[2] = {ctx.dim(instr, 2), ctx.dim(instr, 3)};
  const int64_t* slots = ctx.ptr<int64_t>(instr, 4);
  const int64_t slots_of_cache = instr.attrs_i[0] * instr.attrs_i[1];
  const int64_t widest = widths[0] > widths[1] ? widths[0] : widths[1];
  float* buffer = reinterpret_cast<float*>(ctx.scratch(thread, widest * sizeof(float)));
  const Range part = share(ctx.dim(instr, 0), thread, threads);
  for (int64_t row = part.begin; row < part.end; ++row) {
    if (slots[row] < 0) continue;
    if (slots[row] >= slots_of_cache) return ctx.fail(instr);
    for (int which = 0; which < 2; ++which) {
      const int cache = ctx.dtype(instr, which), fresh = ctx.dtype(instr, 2 + which);
      const int64_t* s = instr.strides[2 + which];
      char* to = at(ctx.ptr(instr, which), cache, slots[row] * heads * widths[which]);
      char* from = at(ctx.ptr(instr, 2 + which), fresh, row * s[0]);
      for (int64_t head = 0; head < heads; ++head) {
        convert(at(from, fresh, head * s[1]), fresh, at(to, cache, head * widths[which]), cache,
                widths[which], buffer);
      }
    }
  }
}

void gather_rows(const Instr& instr, Context& ctx, int thread, int threads) {
  const int to = ctx.dtype(instr, 0), from = ctx.dtype(instr, 1);
  bool ok = is_dtype(to) && (to == from || (is_float(to) && is_float(from)));
  ok = ok && ctx.dtype(instr, 2) == I64;
  if (!ok) return ctx.fail(instr);
  const int64_t width = ctx.dim(instr, 1);
  const int64_t* indices = ctx.ptr<int64_t>(instr, 2);
  float* buffer = reinterpret_cast<float*>(ctx.scratch(thread, width * sizeof(float)));
  const int64_t table_rows = ctx.dim(instr, 2);
  const Range part = share(ctx.dim(instr, 0), thread, threads);
  for (int64_t row = part.begin; row < part.end; ++row) {
    if (indices[row] < 0 || indices[row] >= table_rows) return ctx.fail(instr);
    convert(at(ctx.ptr(instr, 1), from, indices[row] * instr.strides[1][0]), from,
            at(ctx.ptr(instr, 0), to, row * instr.strides[0][0]), to, width, buffer);
  }
}

}  // namespace go
