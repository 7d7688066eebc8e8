// The integer path of OP_LINEAR: x rounded to int8 in groups of 32, exact integer inner products.
//
// Over the groups in order, acc += dot * (scale_w * scale_x), acc += zero * (scale_x * sum of
// codes): each output is one fixed chain, whatever the number of rows.
#include "linear_dot.h"
#include "linear_quantize.h"

namespace go {
namespace {

constexpr int64_t SMALL = 4;       // rows that every thread quantizes for itself
constexpr int64_t ROW_TILE = 128;  // rows of a work item
constexpr int64_t PANEL_TILE = 8;  // panels of a work item at most

// R rows by P panels of 8 outputs.
template <class Kind, int R, int P>
void block(const Linear& op, const QuantizedRows& x, int64_t row, int64_t panel) {
  const int64_t groups = op.depth / GROUP;
  F8 acc[R][P];
  for (int r = 0; r < R; ++r) {
    for (int p = 0; p < P; ++p) acc[r][p] = F8{};
  }
  const uint8_t* weights = op.weight + panel * groups * Kind::BLOCK;
  for (int64_t g = 0; g < groups; ++g, weights += Kind::BLOCK) {
    const uint8_t* codes[P];
    const int8_t* x_codes[R];
    const int32_t* start[R];
    for (int p = 0; p < P; ++p) codes[p] = weights + p * groups * Kind::BLOCK + Kind::HEADER;
    for (int r = 0; r < R; ++r) {
      x_codes[r] = x.codes + ((row + r) * groups + g) * GROUP;
      start[r] = x.start + (row + r) * groups + g;
    }
    I8v dot[R][P];
    group_dots<Kind::BITS, R, P>(codes, x_codes, start, dot);
    for (int p = 0; p < P; ++p) {
      const auto* halves = reinterpret_cast<const uint16_t*>(codes[p] - Kind::HEADER);
      const F8 scale = Float<F16>::load(halves);
      F8 zero{};
      if (Kind::ZERO) zero = Float<F16>::load(halves + COLUMNS);
      for (int r = 0; r < R; ++r) {
        const int64_t at = (row + r) * groups + g;
        acc[r][p] = fma(to_float(dot[r][p]), scale * splat(x.scale[at]), acc[r][p]);
        if (Kind::ZERO) acc[r][p] = fma(zero, splat(x.scaled_sum[at]), acc[r][p]);
      }
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int p = 0; p < P; ++p) store_outputs(op, row + r, (panel + p) * COLUMNS, acc[r][p]);
  }
}

template <class Kind, int P>
void rows_by_panels(const Linear& op, const QuantizedRows& x, Range rows, int64_t panel) {
  int64_t r = rows.begin;
  for (; r + 4 <= rows.end; r += 4) block<Kind, 4, P>(op, x, r, panel);
  switch (rows.end - r) {
    case 1: return block<Kind, 1, P>(op, x, r, panel);
    case 2: return block<Kind, 2, P>(op, x, r, panel);
    case 3: return block<Kind, 3, P>(op, x, r, panel);
  }
}

template <class Kind>
void tile(const Linear& op, const QuantizedRows& x, Range panels, Range rows) {
  int64_t p = panels.begin;
  for (; p + 2 <= panels.end; p += 2) rows_by_panels<Kind, 2>(op, x, rows, p);
  if (p < panels.end) rows_by_panels<Kind, 1>(op, x, rows, p);
}

template <class Kind>
void run(const Instr& instr, Context& ctx, const Linear& op, int thread, int threads) {
  const int64_t panels = (op.outputs + COLUMNS - 1) / COLUMNS;
  const int64_t bytes = QuantizedRows::bytes(op.rows, op.depth);
  if (op.rows <= SMALL) {
    const auto x = QuantizedRows::in(ctx.scratch(thread, bytes), op.rows, op.depth);
    quantize_rows<Kind::BITS>(op, {0, op.rows}, x);
    return tile<Kind>(op, x, share(panels, thread, threads), {0, op.rows});
  }
  const auto x = QuantizedRows::in(ctx.shared(instr, thread, bytes), op.rows, op.depth);
  quantize_rows<Kind::BITS>(op, share(op.rows, thread, threads), x);
  ctx.barrier();
  const int64_t down = (op.rows + ROW_TILE - 1) / ROW_TILE;
  // Enough tiles to keep all threads busy to the end, of whole pairs of panels.
  const int64_t width = std::max<int64_t>(
      2, std::min(PANEL_TILE, panels * down / (4 * std::max(1, threads)) / 2 * 2));
  const int64_t across = (panels + width - 1) / width;
  for (int64_t t; (t = ctx.take(instr, 0)) < across * down;) {
    const int64_t p = t % across * width, r = t / across * ROW_TILE;
    tile<Kind>(op, x, {p, std::min(panels, p + width)}, {r, std::min(op.rows, r + ROW_TILE)});
  }
}

}  // namespace

void linear_int8(const Instr& instr, Context& ctx, const Linear& op, int kind, int thread,
                 int threads) {
  switch (kind) {
    case WEIGHT_4BIT: return run<Codes<4, false>>(instr, ctx, op, thread, threads);
    case WEIGHT_4BIT_ZERO: return run<Codes<4, true>>(instr, ctx, op, thread, threads);
    case WEIGHT_8BIT: return run<Codes<8, false>>(instr, ctx, op, thread, threads);
    case WEIGHT_8BIT_ZERO: return run<Codes<8, true>>(instr, ctx, op, thread, threads);
  }
  ctx.fail(instr);
}

}  // namespace go
