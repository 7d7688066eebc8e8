// GLU, BINARY and UNARY: elements in chunks that fit the first-level cache, computed in fp32.
#include <cstring>

#include "kernel.h"
#include "rows.h"
#include "vmath.h"

namespace go {
namespace {

constexpr int64_t CHUNK = 256;

// Dims that are contiguous with their inner neighbour in every operand are merged, which leaves
// long innermost runs.
struct Loop {
  int operands;
  int64_t extent[MAX_DIMS];
  int64_t stride[3][MAX_DIMS];
  int64_t outer;   // product of all extents but the innermost
  int64_t chunks;  // chunks of the innermost one

  Loop(const Instr& instr, const Context& ctx, int count) : operands(count) {
    int64_t e[MAX_DIMS];
    int64_t s[3][MAX_DIMS];
    int last = MAX_DIMS - 1;
    for (int k = 0; k < MAX_DIMS; ++k) {
      e[k] = 1;
      for (int o = 0; o < operands; ++o) s[o][k] = 0;
    }
    e[last] = ctx.dim(instr, MAX_DIMS - 1);
    for (int o = 0; o < operands; ++o) s[o][last] = instr.strides[o][MAX_DIMS - 1];
    for (int d = MAX_DIMS - 2; d >= 0; --d) {
      const int64_t size = ctx.dim(instr, d);
      if (size == 1) continue;
      bool merge = true;
      for (int o = 0; o < operands; ++o) {
        merge = merge && (e[last] == 1 || instr.strides[o][d] == s[o][last] * e[last]);
      }
      if (merge && e[last] == 1) {
        for (int o = 0; o < operands; ++o) s[o][last] = instr.strides[o][d];
      }
      if (!merge) {
        --last;
        for (int o = 0; o < operands; ++o) s[o][last] = instr.strides[o][d];
      }
      e[last] *= size;
    }
    outer = 1;
    for (int k = 0; k < MAX_DIMS; ++k) {
      extent[k] = e[k];
      for (int o = 0; o < operands; ++o) stride[o][k] = s[o][k];
      if (k < MAX_DIMS - 1) outer *= e[k];
    }
    chunks = (extent[MAX_DIMS - 1] + CHUNK - 1) / CHUNK;
  }

  // body(first element of each operand, n) for each chunk of this thread's share.
  template <class Body>
  void run(int thread, int threads, Body&& body) const {
    const Range part = share(outer * chunks, thread, threads);
    for (int64_t item = part.begin; item < part.end; ++item) {
      const int64_t begin = item % chunks * CHUNK;
      const int64_t rest_of_row = extent[MAX_DIMS - 1] - begin;
      int64_t first[3] = {0, 0, 0};
      for (int o = 0; o < operands; ++o) first[o] = begin * stride[o][MAX_DIMS - 1];
      int64_t rest = item / chunks;
      for (int d = MAX_DIMS - 2; d >= 0; --d) {
        const int64_t index = rest % extent[d];
        rest /= extent[d];
        for (int o = 0; o < operands; ++o) first[o] += index * stride[o][d];
      }
      body(first, rest_of_row < CHUNK ? rest_of_row : CHUNK);
    }
  }
  int64_t step(int operand) const { return stride[operand][MAX_DIMS - 1]; }
};

void gather(const char* from, int dtype, int64_t step, int64_t n, float* to) {
  if (step == 1) return load_row(from, dtype, n, to);
  with_float(dtype, [&](auto type) {
    using T = decltype(type);
    const auto* p = reinterpret_cast<const typename T::Storage*>(from);
    if (step == 0) {
      for (int64_t i = 0; i < n; ++i) to[i] = T::get(p[0]);
    } else {
      for (int64_t i = 0; i < n; ++i) to[i] = T::get(p[i * step]);
    }
  });
}

void scatter(const float* from, char* to, int dtype, int64_t step, int64_t n) {
  if (step == 1) return store_row(from, to, dtype, n);
  with_float(dtype, [&](auto type) {
    using T = decltype(type);
    auto* p = reinterpret_cast<typename T::Storage*>(to);
    for (int64_t i = 0; i < n; ++i) p[i * step] = T::put(from[i]);
  });
}

// x[i] = f(x[i]) and x[i] = f(x[i], y[i]) on whole vectors: buffers are CHUNK long, so the lanes
// behind n are spare.
template <class F>
GO_INLINE void map(float* x, int64_t n, F&& f) {
  for (int64_t i = 0; i < n; i += LANES) store(x + i, f(load(x + i)));
}
template <class F>
GO_INLINE void map(float* x, const float* y, int64_t n, F&& f) {
  for (int64_t i = 0; i < n; i += LANES) store(x + i, f(load(x + i), load(y + i)));
}
template <class F>
GO_INLINE void map_scalar(float* x, int64_t n, F&& f) {
  for (int64_t i = 0; i < n; ++i) x[i] = f(x[i]);
}
GO_INLINE F8 square_root(F8 x) {
  for (int i = 0; i < LANES; ++i) x[i] = std::sqrt(x[i]);
  return x;
}
// NaN wins, as in torch.maximum and torch.minimum.
GO_INLINE F8 nan_or(F8 a, F8 b, F8 result) { return a != a ? a : b != b ? b : result; }

void apply_unary(int64_t kind, float* x, int64_t n) {
  const F8 one = splat(1.0f);
  switch (kind) {
    case UNARY_COPY: return;
    case UNARY_NEG: return map(x, n, [](F8 v) { return -v; });
    case UNARY_EXP: return map(x, n, [](F8 v) { return exp(v); });
    case UNARY_RSQRT: return map(x, n, [&](F8 v) { return one / square_root(v); });
    case UNARY_SQRT: return map(x, n, [](F8 v) { return square_root(v); });
    case UNARY_SIGMOID: return map(x, n, [](F8 v) { return sigmoid(v); });
    case UNARY_SILU: return map(x, n, [](F8 v) { return silu(v); });
    case UNARY_GELU: return map(x, n, [](F8 v) { return gelu(v); });
    case UNARY_GELU_TANH: return map(x, n, [](F8 v) { return gelu_tanh(v); });
    case UNARY_TANH: return map(x, n, [](F8 v) { return tanh(v); });
    case UNARY_RELU: return map(x, n, [](F8 v) { return v < splat(0.0f) ? splat(0.0f) : v; });
    case UNARY_COS: return map_scalar(x, n, [](float v) { return std::cos(v); });
    case UNARY_SIN: return map_scalar(x, n, [](float v) { return std::sin(v); });
    case UNARY_RECIPROCAL: return map(x, n, [&](F8 v) { return one / v; });
    case UNARY_SQUARE: return map(x, n, [](F8 v) { return v * v; });
  }
}

void apply_binary(int64_t kind, float* x, const float* y, int64_t n) {
  switch (kind) {
    case BINARY_ADD: return map(x, y, n, [](F8 a, F8 b) { return a + b; });
    case BINARY_SUB: return map(x, y, n, [](F8 a, F8 b) { return a - b; });
    case BINARY_MUL: return map(x, y, n, [](F8 a, F8 b) { return a * b; });
    case BINARY_DIV: return map(x, y, n, [](F8 a, F8 b) { return a / b; });
    case BINARY_MAX: return map(x, y, n, [](F8 a, F8 b) { return nan_or(a, b, max(a, b)); });
    case BINARY_MIN: return map(x, y, n, [](F8 a, F8 b) { return nan_or(a, b, min(a, b)); });
  }
}

void apply_glu(int64_t kind, float* gate, const float* up, int64_t n) {
  switch (kind) {
    case GLU_SILU: return map(gate, up, n, [](F8 g, F8 u) { return silu(g) * u; });
    case GLU_GELU: return map(gate, up, n, [](F8 g, F8 u) { return gelu(g) * u; });
    case GLU_GELU_TANH: return map(gate, up, n, [](F8 g, F8 u) { return gelu_tanh(g) * u; });
  }
}

int64_t get_integer(const char* p, int dtype) {
  switch (dtype) {
    case I64: return *reinterpret_cast<const int64_t*>(p);
    case I32: return *reinterpret_cast<const int32_t*>(p);
    case I8: return *reinterpret_cast<const int8_t*>(p);
    default: return *reinterpret_cast<const uint8_t*>(p);
  }
}
void put_integer(char* p, int dtype, int64_t value) {
  switch (dtype) {
    case I64: *reinterpret_cast<int64_t*>(p) = value; return;
    case I32: *reinterpret_cast<int32_t*>(p) = static_cast<int32_t>(value); return;
    case I8: *reinterpret_cast<int8_t*>(p) = static_cast<int8_t>(value); return;
    case BOOL: *reinterpret_cast<uint8_t*>(p) = value != 0; return;
    default: *reinterpret_cast<uint8_t*>(p) = static_cast<uint8_t>(value); return;
  }
}

// A copy that reads integers or keeps the dtype.
void copy_exactly(const Loop& loop, char* out, int to, char* a, int from, int thread, int threads) {
  loop.run(thread, threads, [&](const int64_t* first, int64_t n) {
    char* q = at(out, to, first[0]);
    const char* p = at(a, from, first[1]);
    const int64_t q_step = loop.step(0) * item_size(to), p_step = loop.step(1) * item_size(from);
    if (to == from && loop.step(0) == 1 && loop.step(1) == 1) {
      std::memmove(q, p, n * item_size(to));
      return;
    }
    for (int64_t i = 0; i < n; ++i, q += q_step, p += p_step) {
      if (to == from) {
        std::memcpy(q, p, item_size(to));
      } else if (is_float(to)) {
        const float value = static_cast<float>(get_integer(p, from));
        store_row(&value, q, to, 1);
      } else {
        put_integer(q, to, get_integer(p, from));
      }
    }
  });
}

}  // namespace

void unary(const Instr& instr, Context& ctx, int thread, int threads) {
  const int to = ctx.dtype(instr, 0), from = ctx.dtype(instr, 1);
  const int64_t kind = instr.attrs_i[0];
  if (kind < 0 || kind >= UNARY_COUNT || !is_dtype(to) || !is_dtype(from)) {
    return ctx.fail(instr);
  }
  const Loop loop(instr, ctx, 2);
  char *out = ctx.ptr(instr, 0), *a = ctx.ptr(instr, 1);
  if (kind == UNARY_COPY && (to == from || !is_float(from))) {
    return copy_exactly(loop, out, to, a, from, thread, threads);
  }
  if (!is_float(to) || !is_float(from)) return ctx.fail(instr);
  alignas(32) float x[CHUNK] = {};
  loop.run(thread, threads, [&](const int64_t* first, int64_t n) {
    gather(at(a, from, first[1]), from, loop.step(1), n, x);
    apply_unary(kind, x, n);
    scatter(x, at(out, to, first[0]), to, loop.step(0), n);
  });
}

void binary(const Instr& instr, Context& ctx, int thread, int threads) {
  const bool scalar = !ctx.has(instr, 2);
  const int to = ctx.dtype(instr, 0), left = ctx.dtype(instr, 1);
  const int right = scalar ? F32 : ctx.dtype(instr, 2);
  const int64_t kind = instr.attrs_i[0];
  if (kind < 0 || kind >= BINARY_COUNT || !is_float(to) || !is_float(left) || !is_float(right)) {
    return ctx.fail(instr);
  }
  const Loop loop(instr, ctx, scalar ? 2 : 3);
  char *out = ctx.ptr(instr, 0), *a = ctx.ptr(instr, 1);
  char* b = scalar ? nullptr : ctx.ptr(instr, 2);
  alignas(32) float x[CHUNK] = {};
  alignas(32) float y[CHUNK] = {};
  if (scalar) {
    for (float& value : y) value = static_cast<float>(instr.attrs_f[0]);
  }
  loop.run(thread, threads, [&](const int64_t* first, int64_t n) {
    gather(at(a, left, first[1]), left, loop.step(1), n, x);
    if (!scalar) gather(at(b, right, first[2]), right, loop.step(2), n, y);
    apply_binary(kind, x, y, n);
    scatter(x, at(out, to, first[0]), to, loop.step(0), n);
  });
}

void glu(const Instr& instr, Context& ctx, int thread, int threads) {
  const int64_t kind = instr.attrs_i[0];
  bool ok = kind >= 0 && kind < GLU_COUNT;
  for (int i = 0; i < 3; ++i) ok = ok && is_float(ctx.dtype(instr, i));
  if (!ok) return ctx.fail(instr);
  const int64_t width = ctx.dim(instr, 1);
  const int64_t chunks = (width + CHUNK - 1) / CHUNK;
  alignas(32) float gate[CHUNK] = {};
  alignas(32) float up[CHUNK] = {};
  const Range part = share(ctx.dim(instr, 0) * chunks, thread, threads);
  for (int64_t item = part.begin; item < part.end; ++item) {
    const int64_t row = item / chunks, begin = item % chunks * CHUNK;
    const int64_t n = width - begin < CHUNK ? width - begin : CHUNK;
    const auto address = [&](int operand) {
      return at(ctx.ptr(instr, operand), ctx.dtype(instr, operand),
                row * instr.strides[operand][0] + begin);
    };
    load_row(address(1), ctx.dtype(instr, 1), n, gate);
    load_row(address(2), ctx.dtype(instr, 2), n, up);
    apply_glu(kind, gate, up, n);
    store_row(gate, address(0), ctx.dtype(instr, 0), n);
  }
}

}  // namespace go
