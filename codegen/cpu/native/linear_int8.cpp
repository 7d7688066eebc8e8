// The integer path of OP_LINEAR: x rounded to int8 in groups of 32, exact integer inner products.
//
// x is quantized by absmax: scale = absmax / 127, code = round to even of x * (1 / scale). Then, over
// the groups in order, acc += dot * (scale_w * scale_x), acc += zero * (scale_x * sum of codes): each
// output is one fixed chain, whatever the number of rows.
#include <algorithm>
#include <cmath>

#include "linear.h"

namespace go {
namespace {

constexpr int64_t SMALL = 4;       // rows that every thread quantizes for itself
constexpr int64_t ROW_TILE = 256;  // rows of a work item
constexpr int64_t PANEL_TILE = 8;  // panels of a work item

// Quantized rows: codes [rows][K], then per row and group its scale and the sum of its codes.
struct Quantized {
  int8_t* codes;
  float* scale;
  int32_t* sum;
};

int64_t quantized_bytes(int64_t rows, int64_t depth) {
  return rows * (depth + depth / GROUP * 8) + 192;
}

Quantized place(char* memory, int64_t rows, int64_t depth) {
  const int64_t groups = rows * (depth / GROUP);
  char* scales = memory + (rows * depth + 63) / 64 * 64;
  char* sums = scales + (groups * 4 + 63) / 64 * 64;
  return {reinterpret_cast<int8_t*>(memory), reinterpret_cast<float*>(scales),
          reinterpret_cast<int32_t*>(sums)};
}

template <class Type>
void quantize_row(const typename Type::Storage* x, int64_t depth, int8_t* codes, float* scales,
                  int32_t* sums) {
  for (int64_t g = 0; g < depth / GROUP; ++g) {
    F8 v[GROUP / LANES];
    F8 peak{};
    for (int i = 0; i < GROUP / LANES; ++i) {
      v[i] = Type::load(x + g * GROUP + i * LANES);
      peak = max(peak, abs(v[i]));
    }
    float scale = max(peak) / 127.0f;
    // Below this the reciprocal would overflow; such a group is zero for all purposes.
    if (!(scale > 1e-30f)) scale = 0.0f;
    const F8 inverse = splat(scale > 0.0f ? 1.0f / scale : 0.0f);
    I8v total{};
    for (int i = 0; i < GROUP / LANES; ++i) {
      const F8 scaled = v[i] * inverse;
      I8v q;
#if defined(__AVX2__)
      q = bits<I8v>(_mm256_cvtps_epi32(scaled));
#else
      for (int j = 0; j < LANES; ++j) q[j] = static_cast<int32_t>(std::nearbyintf(scaled[j]));
#endif
      total += q;
      for (int j = 0; j < LANES; ++j) {
        codes[g * GROUP + i * LANES + j] = static_cast<int8_t>(q[j]);
      }
    }
    scales[g] = scale;
    sums[g] = ((total[0] + total[1]) + (total[2] + total[3])) +
              ((total[4] + total[5]) + (total[6] + total[7]));
  }
}

void quantize_rows(const Linear& op, Range rows, const Quantized& to) {
  const int64_t groups = op.depth / GROUP;
  for (int64_t r = rows.begin; r < rows.end; ++r) {
    int8_t* codes = to.codes + r * op.depth;
    float* scales = to.scale + r * groups;
    int32_t* sums = to.sum + r * groups;
    if (op.x_dtype == F32) {
      const float* x = reinterpret_cast<const float*>(op.x) + r * op.x_stride;
      quantize_row<Float<F32>>(x, op.depth, codes, scales, sums);
    } else {
      const uint16_t* x = reinterpret_cast<const uint16_t*>(op.x) + r * op.x_stride;
      if (op.x_dtype == BF16) {
        quantize_row<Float<BF16>>(x, op.depth, codes, scales, sums);
      } else {
        quantize_row<Float<F16>>(x, op.depth, codes, scales, sums);
      }
    }
  }
}

// Integer inner products of 8 outputs with R rows over one group.
template <int BITS, int R>
struct GroupDot;

#if defined(__AVX2__)
GO_INLINE __m256i four_codes(const int8_t* x) {
  int32_t word;
  std::memcpy(&word, x, sizeof word);
  return _mm256_set1_epi32(word);
}

template <int R>
struct GroupDot<4, R> {
  // Eight sums of two products of at most 15 * 127 stay below 2^15.
  static GO_INLINE void run(const uint8_t* codes, const int8_t* const* x, I8v* dot) {
    const __m256i mask = _mm256_set1_epi8(15);
    __m256i sums[R];
    for (int r = 0; r < R; ++r) sums[r] = _mm256_setzero_si256();
#pragma GCC unroll 4
    for (int j = 0; j < QUADS / 2; ++j) {
      const __m256i both = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes + j * 32));
      const __m256i low = _mm256_and_si256(both, mask);
      const __m256i high = _mm256_and_si256(_mm256_srli_epi16(both, 4), mask);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        sums[r] = _mm256_add_epi16(sums[r], _mm256_maddubs_epi16(low, four_codes(x[r] + j * 8)));
        sums[r] =
            _mm256_add_epi16(sums[r], _mm256_maddubs_epi16(high, four_codes(x[r] + j * 8 + 4)));
      }
    }
    for (int r = 0; r < R; ++r) {
      dot[r] = bits<I8v>(_mm256_madd_epi16(sums[r], _mm256_set1_epi16(1)));
    }
  }
};

template <int R>
struct GroupDot<8, R> {
  // |w| * (x with w's sign): a sum of two products stays below 2^15 because no code is -128.
  static GO_INLINE void run(const uint8_t* codes, const int8_t* const* x, I8v* dot) {
    const __m256i ones = _mm256_set1_epi16(1);
    __m256i sums[R];
    for (int r = 0; r < R; ++r) sums[r] = _mm256_setzero_si256();
#pragma GCC unroll 8
    for (int j = 0; j < QUADS; ++j) {
      const __m256i w = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes + j * 32));
      const __m256i size = _mm256_abs_epi8(w);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        const __m256i pairs =
            _mm256_maddubs_epi16(size, _mm256_sign_epi8(four_codes(x[r] + j * 4), w));
        sums[r] = _mm256_add_epi32(sums[r], _mm256_madd_epi16(pairs, ones));
      }
    }
    for (int r = 0; r < R; ++r) dot[r] = bits<I8v>(sums[r]);
  }
};
#else
template <int BITS, int R>
struct GroupDot {
  static GO_INLINE void run(const uint8_t* codes, const int8_t* const* x, I8v* dot) {
    for (int r = 0; r < R; ++r) {
      I8v sum{};
      for (int k = 0; k < GROUP; ++k) sum += codes_at<BITS>(codes, k) * x[r][k];
      dot[r] = sum;
    }
  }
};
#endif

// One panel of 8 outputs for R rows.
template <int BITS, bool ZERO, int R>
GO_INLINE void panel_rows(const Linear& op, const uint8_t* panel, const Quantized& x,
                          int64_t x_row, int64_t row, int64_t first) {
  const int64_t groups = op.depth / GROUP;
  F8 acc[R];
  const int8_t* codes[R];
  const float* scales[R];
  const int32_t* sums[R];
  for (int r = 0; r < R; ++r) {
    acc[r] = F8{};
    codes[r] = x.codes + (x_row + r) * op.depth;
    scales[r] = x.scale + (x_row + r) * groups;
    sums[r] = x.sum + (x_row + r) * groups;
  }
  for (int64_t g = 0; g < groups; ++g, panel += block_bytes(BITS, ZERO)) {
    const F8 scale = Float<F16>::load(reinterpret_cast<const uint16_t*>(panel));
    I8v dot[R];
    GroupDot<BITS, R>::run(panel + COLUMNS * 2 * (ZERO ? 2 : 1), codes, dot);
    F8 zero{};
    if (ZERO) zero = Float<F16>::load(reinterpret_cast<const uint16_t*>(panel) + COLUMNS);
    for (int r = 0; r < R; ++r) {
      const int32_t sum = sums[r][g];
      const F8 exact = to_float(dot[r] - op.offset * sum);
      acc[r] = fma(exact, scale * splat(scales[r][g]), acc[r]);
      if (ZERO) acc[r] = fma(zero, splat(scales[r][g] * static_cast<float>(sum)), acc[r]);
      codes[r] += GROUP;
    }
  }
  for (int r = 0; r < R; ++r) store_outputs(op, row + r, first, acc[r]);
}

template <int BITS, bool ZERO>
void tile(const Linear& op, const Quantized& x, Range panels, Range rows) {
  const int64_t panel_bytes = op.depth / GROUP * block_bytes(BITS, ZERO);
  for (int64_t p = panels.begin; p < panels.end; ++p) {
    const uint8_t* panel = op.weight + p * panel_bytes;
    int64_t r = rows.begin;
    for (; r + 4 <= rows.end; r += 4) {
      panel_rows<BITS, ZERO, 4>(op, panel, x, r, r, p * COLUMNS);
    }
    switch (rows.end - r) {
      case 1: panel_rows<BITS, ZERO, 1>(op, panel, x, r, r, p * COLUMNS); break;
      case 2: panel_rows<BITS, ZERO, 2>(op, panel, x, r, r, p * COLUMNS); break;
      case 3: panel_rows<BITS, ZERO, 3>(op, panel, x, r, r, p * COLUMNS); break;
    }
  }
}

template <int BITS, bool ZERO>
void run(const Instr& instr, Context& ctx, const Linear& op, int thread, int threads) {
  const int64_t panels = (op.outputs + COLUMNS - 1) / COLUMNS;
  const int64_t bytes = quantized_bytes(op.rows, op.depth);
  if (op.rows <= SMALL) {
    const Quantized x = place(ctx.scratch(thread, bytes), op.rows, op.depth);
    quantize_rows(op, {0, op.rows}, x);
    return tile<BITS, ZERO>(op, x, share(panels, thread, threads), {0, op.rows});
  }
  const Quantized x = place(ctx.shared(instr, thread, bytes), op.rows, op.depth);
  quantize_rows(op, share(op.rows, thread, threads), x);
  ctx.barrier();
  const int64_t across = (panels + PANEL_TILE - 1) / PANEL_TILE;
  const int64_t tiles = across * ((op.rows + ROW_TILE - 1) / ROW_TILE);
  for (int64_t t; (t = ctx.take(instr, 0)) < tiles;) {
    const int64_t p = t % across * PANEL_TILE, r = t / across * ROW_TILE;
    tile<BITS, ZERO>(op, x, {p, std::min(panels, p + PANEL_TILE)},
                     {r, std::min(op.rows, r + ROW_TILE)});
  }
}

}  // namespace

void linear_int8(const Instr& instr, Context& ctx, const Linear& op, int kind, int thread,
                 int threads) {
  switch (kind) {
    case WEIGHT_4BIT: return run<4, false>(instr, ctx, op, thread, threads);
    case WEIGHT_4BIT_ZERO: return run<4, true>(instr, ctx, op, thread, threads);
    case WEIGHT_8BIT: return run<8, false>(instr, ctx, op, thread, threads);
    case WEIGHT_8BIT_ZERO: return run<8, true>(instr, ctx, op, thread, threads);
  }
  ctx.fail(instr);
}

}  // namespace go
