// The float path of OP_LINEAR: fp32 activations and arithmetic, weights converted to fp32.
//
// An output is the sum, in order, of one chain of fused multiply-adds for each CHAIN columns k
// (short chains round less), whatever the blocking below: a row's result does not depend on how
// many rows are computed together. Few rows read each weight once and convert it in registers. For
// more rows, tiles of rows by outputs convert a part of a panel at a time into the first-level
// cache.
#include "gemm.h"
#include "linear.h"

namespace go {
namespace {

constexpr int64_t CHAIN = 64;
constexpr int64_t FEW = 4;            // rows for which weights are converted in registers
constexpr int64_t DEPTH_BLOCK = 256;  // columns k of a panel kept in the first-level cache
constexpr int64_t ROW_BLOCK = 6;      // rows of the micro-kernel
constexpr int64_t ROW_TILE = 192;     // rows of x (by DEPTH_BLOCK) kept in the second-level cache
constexpr int64_t STREAMING = 24;     // rows up to which panels are computed one after the other
constexpr int64_t STRIP = 4;          // panels of a tile at most
static_assert(CHAIN % GROUP == 0 && DEPTH_BLOCK % CHAIN == 0, "blocks nest");

// Panels of 16 whose vectors are converted once for all rows of a block.
template <class Type>
struct Pinned {
  const typename Type::Storage* data;
  int64_t panel_stride;
  GO_INLINE F8 get(int64_t k, int64_t panel, int half) const {
    F8 v = Type::load(data + panel * panel_stride + k * PANEL + half * LANES);
    pin(v);
    return v;
  }
};

struct Rows {
  const float* data;
  int64_t stride;
  Rows from(int64_t row, int64_t k) const { return {data + row * stride + k, stride}; }
};

int64_t converted_size(const Linear& op) {
  return op.x_dtype == F32 ? 0 : op.rows * op.depth * static_cast<int64_t>(sizeof(float));
}

// The rows of x as fp32: themselves, or `rows` of them converted into `memory`.
Rows float_rows(const Linear& op, Range rows, char* memory) {
  if (op.x_dtype == F32) return {reinterpret_cast<const float*>(op.x), op.x_stride};
  float* to = reinterpret_cast<float*>(memory);
  with_float(op.x_dtype, [&](auto type) {
    using Type = decltype(type);
    for (int64_t r = rows.begin; r < rows.end; ++r) {
      const auto* x = reinterpret_cast<const typename Type::Storage*>(op.x) + r * op.x_stride;
      int64_t k = 0;
      for (; k + LANES <= op.depth; k += LANES) store(to + r * op.depth + k, Type::load(x + k));
      for (; k < op.depth; ++k) to[r * op.depth + k] = Type::get(x[k]);
    }
  });
  return {to, op.depth};
}

void store_panels(const Linear& op, int64_t row, int64_t rows, int64_t panel, int64_t panels,
                  const float* c, int64_t c_stride) {
  const int64_t first = panel * PANEL, end = std::min(first + panels * PANEL, op.outputs);
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t n = first; n < end; n += LANES) {
      store_outputs(op, row + r, n, load(c + r * c_stride + n - first));
    }
  }
}

// Dense weights. `rows_by_panels` computes R rows by P of its panels in registers; `part` gives
// `depth` columns of a panel of 16 as fp32, maybe in `scratch`.
template <class Type>
struct Dense {
  static constexpr int64_t WIDTH = PANEL;
  // Panels computed together for 1 to FEW rows: what fits in 16 registers.
  static constexpr int TOGETHER[FEW] = {4, 2, 2, 1};
  using Storage = typename Type::Storage;

  static const Storage* at(const Linear& op, int64_t panel, int64_t k) {
    return reinterpret_cast<const Storage*>(op.weight) + (panel * op.depth + k) * PANEL;
  }

  template <int R, int P>
  static void rows_by_panels(const Linear& op, Rows x, int64_t panel) {
    float c[R * P * PANEL] = {};
    for (int64_t k = 0; k < op.depth; k += CHAIN) {
      const Pinned<Type> weights = {at(op, panel, k), op.depth * PANEL};
      gemm_block<R, P>(x.data + k, x.stride, weights, std::min(CHAIN, op.depth - k), 0, c,
                       P * PANEL);
    }
    store_panels(op, 0, R, panel, P, c, P * PANEL);
  }

  static const float* part(const Linear& op, int64_t panel, int64_t k, int64_t depth,
                           float* scratch) {
    const Storage* from = at(op, panel, k);
    if constexpr (std::is_same<Storage, float>::value) return from;
    for (int64_t i = 0; i < depth * PANEL; i += LANES) store(scratch + i, Type::load(from + i));
    return scratch;
  }
};

template <class Kind>
struct LowBit {
  static constexpr int64_t WIDTH = COLUMNS;
  static constexpr int TOGETHER[FEW] = {3, 2, 2, 1};

  static const uint8_t* at(const Linear& op, int64_t panel, int64_t k) {
    return op.weight + (panel * op.depth + k) / GROUP * Kind::BLOCK;
  }

  template <int R, int P>
  static void rows_by_panels(const Linear& op, Rows x, int64_t panel) {
    const int64_t panel_bytes = op.depth / GROUP * Kind::BLOCK;
    const uint8_t* at_k = at(op, panel, 0);
    F8 total[R][P] = {};
    for (int64_t chain = 0; chain < op.depth; chain += CHAIN) {
      F8 acc[R][P] = {};
      const int64_t end = std::min(chain + CHAIN, op.depth);
      for (int64_t k = chain; k < end; k += GROUP, at_k += Kind::BLOCK) {
        Block<Kind> block[P];
        for (int p = 0; p < P; ++p) block[p] = Block<Kind>(at_k + p * panel_bytes, op.offset);
#pragma GCC unroll 32
        for (int i = 0; i < GROUP; ++i) {
          for (int p = 0; p < P; ++p) {
            const F8 weight = block[p].weight(i);
            for (int r = 0; r < R; ++r) {
              acc[r][p] = fma(splat(x.data[r * x.stride + k + i]), weight, acc[r][p]);
            }
          }
        }
      }
      for (int r = 0; r < R; ++r) {
        for (int p = 0; p < P; ++p) total[r][p] += acc[r][p];
      }
    }
    for (int r = 0; r < R; ++r) {
      for (int p = 0; p < P; ++p) store_outputs(op, r, (panel + p) * COLUMNS, total[r][p]);
    }
  }

  static const float* part(const Linear& op, int64_t panel, int64_t k, int64_t depth,
                           float* scratch) {
    for (int half = 0; half < 2; ++half) {
      const int64_t low = 2 * panel + half;
      float* to = scratch + half * COLUMNS;
      if (low * COLUMNS < op.outputs) {
        dequantize<Kind>(at(op, low, k), op.offset, depth, to, PANEL);
      } else {
        for (int64_t i = 0; i < depth; ++i) store(to + i * PANEL, F8{});
      }
    }
    return scratch;
  }
};

template <class Weight, int R>
void few_rows(const Linear& op, Rows x, int thread, int threads) {
  constexpr int P = Weight::TOGETHER[R - 1];
  const int64_t panels = (op.outputs + Weight::WIDTH - 1) / Weight::WIDTH;
  const Range mine = share(panels, thread, threads);
  int64_t p = mine.begin;
  for (; p + P <= mine.end; p += P) Weight::template rows_by_panels<R, P>(op, x, p);
  for (; p < mine.end; ++p) Weight::template rows_by_panels<R, 1>(op, x, p);
}

// c[rows][16] += `depth` columns of x times those of one panel.
void panel_product(Rows x, int64_t rows, const float* panel, int64_t depth, float* c,
                   int64_t c_stride) {
  const auto block = [&](auto count, int64_t row) {
    constexpr int R = decltype(count)::value;
    for (int64_t k = 0; k < depth; k += CHAIN) {
      const Pinned<Float<F32>> part = {panel + k * PANEL, 0};
      gemm_block<R, 1>(x.data + row * x.stride + k, x.stride, part, std::min(CHAIN, depth - k), 0,
                       c + row * c_stride, c_stride);
    }
  };
  // Blocks of nearly equal size: a last one of one row would take as long as four.
  const int64_t blocks = (rows + ROW_BLOCK - 1) / ROW_BLOCK;
  for (int64_t b = 0; b < blocks; ++b) {
    const int64_t row = rows * b / blocks;
    switch (rows * (b + 1) / blocks - row) {
      case 1: block(std::integral_constant<int, 1>{}, row); break;
      case 2: block(std::integral_constant<int, 2>{}, row); break;
      case 3: block(std::integral_constant<int, 3>{}, row); break;
      case 4: block(std::integral_constant<int, 4>{}, row); break;
      case 5: block(std::integral_constant<int, 5>{}, row); break;
      case 6: block(std::integral_constant<int, 6>{}, row); break;
    }
  }
}

template <class Weight>
void many_rows(const Instr& instr, Context& ctx, const Linear& op, Rows x, int thread,
               int threads) {
  const int64_t panels = (op.outputs + PANEL - 1) / PANEL;
  const int64_t down = (op.rows + ROW_TILE - 1) / ROW_TILE;
  // Enough tiles to keep all threads busy to the end.
  const int64_t strip =
      std::max<int64_t>(1, std::min(STRIP, panels * down / (4 * std::max(1, threads))));
  const int64_t across = (panels + strip - 1) / strip;
  const int64_t c_stride = strip * PANEL;
  float* c = reinterpret_cast<float*>(
      ctx.scratch(thread, (ROW_TILE * c_stride + DEPTH_BLOCK * PANEL) * sizeof(float)));
  float* expanded = c + ROW_TILE * c_stride;
  for (int64_t tile; (tile = ctx.take(instr, 0)) < across * down;) {
    const int64_t panel = tile % across * strip, count = std::min(strip, panels - panel);
    const Range mine = share(op.rows, static_cast<int>(tile / across), static_cast<int>(down));
    const int64_t rows = mine.end - mine.begin;
    std::fill(c, c + rows * c_stride, 0.0f);
    // Few rows are in the caches as a whole; then the weights are read in the order of memory.
    const int64_t together = rows <= STREAMING ? 1 : count;
    for (int64_t first = 0; first < count; first += together) {
      for (int64_t k = 0; k < op.depth; k += DEPTH_BLOCK) {
        const int64_t depth = std::min(DEPTH_BLOCK, op.depth - k);
        for (int64_t p = first; p < first + together; ++p) {
          const float* part = Weight::part(op, panel + p, k, depth, expanded);
          panel_product(x.from(mine.begin, k), rows, part, depth, c + p * PANEL, c_stride);
        }
      }
    }
    store_panels(op, mine.begin, rows, panel, count, c, c_stride);
  }
}

template <class Weight>
void run(const Instr& instr, Context& ctx, const Linear& op, int thread, int threads) {
  const int64_t bytes = converted_size(op);
  if (op.rows <= FEW) {
    const Rows x = float_rows(op, {0, op.rows}, bytes > 0 ? ctx.scratch(thread, bytes) : nullptr);
    switch (op.rows) {
      case 1: return few_rows<Weight, 1>(op, x, thread, threads);
      case 2: return few_rows<Weight, 2>(op, x, thread, threads);
      case 3: return few_rows<Weight, 3>(op, x, thread, threads);
      case 4: return few_rows<Weight, 4>(op, x, thread, threads);
    }
    return;
  }
  char* memory = bytes > 0 ? ctx.shared(instr, thread, bytes) : nullptr;
  const Rows x = float_rows(op, share(op.rows, thread, threads), memory);
  if (bytes > 0) ctx.barrier();
  many_rows<Weight>(instr, ctx, op, x, thread, threads);
}

}  // namespace

void linear_float(const Instr& instr, Context& ctx, const Linear& op, int kind, int thread,
                  int threads) {
  switch (kind) {
    case WEIGHT_F32: return run<Dense<Float<F32>>>(instr, ctx, op, thread, threads);
    case WEIGHT_BF16: return run<Dense<Float<BF16>>>(instr, ctx, op, thread, threads);
    case WEIGHT_F16: return run<Dense<Float<F16>>>(instr, ctx, op, thread, threads);
    case WEIGHT_4BIT: return run<LowBit<Codes<4, false>>>(instr, ctx, op, thread, threads);
    case WEIGHT_4BIT_ZERO: return run<LowBit<Codes<4, true>>>(instr, ctx, op, thread, threads);
    case WEIGHT_8BIT: return run<LowBit<Codes<8, false>>>(instr, ctx, op, thread, threads);
    case WEIGHT_8BIT_ZERO: return run<LowBit<Codes<8, true>>>(instr, ctx, op, thread, threads);
  }
  ctx.fail(instr);
}

}  // namespace go
