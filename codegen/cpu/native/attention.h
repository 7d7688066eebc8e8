// Attention of one unit of query rows over one split of the context: the arithmetic shared by all
// of PAGED_ATTENTION's schedules.
//
// The context is cut into splits of SPLIT keys at absolute positions. A split's softmax gives, per
// row, a partial result (maximum, sum, weighted values); partials are merged in the order of the
// splits. A row's result is therefore the same bits whichever rows are computed with it, in one go
// or in parallel: keys it does not see contribute exact zeros.
#pragma once
#include <limits>

#include "pack.h"
#include "vmath.h"

namespace go {

constexpr int64_t SPLIT = 256;
constexpr float MINUS_INF = -std::numeric_limits<float>::infinity();

inline int64_t round_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

// Query rows computed together: `tokens` consecutive tokens of one request x the query heads of
// `heads` kv heads (row = (head * tokens + token) * group + query head).
struct Unit {
  int64_t request;
  int64_t kv_head, heads;  // the first kv head and their number
  int64_t token, tokens;   // the first token's row in the activations and their number
  int64_t position;        // of the first token
  int64_t low, high;       // key positions any of its rows sees: [low, high)
  int64_t first_item;      // number of its first split among the splits of all units
  int64_t first_split() const { return low / SPLIT; }
  int64_t splits() const { return (high - 1) / SPLIT + 1 - first_split(); }
};

// Per row: maximum, sum, and `width` weighted values (rounded up to whole panels).
struct Partial {
  float* maximum;
  float* total;
  float* values;
  int64_t stride;  // floats between the values of two rows
};

struct AttentionShape {
  int64_t kv_heads, group, key_width, value_width, block_size, window;
  float scale, softcap;
  int64_t padded_values() const { return round_up(value_width, PANEL); }
};

// What a thread needs to compute a split; pointers into its scratch.
struct Workspace {
  float* queries;  // [rows][key_width], scaled
  float* weights;  // [rows][SPLIT]: scores, then probabilities
  void* stored_keys;  // KEY_PANELS panels [key_width][PANEL] in the cache's storage type
  float* keys;        // the same, widened
  float* values;   // [padded / PANEL][SPLIT][PANEL]
  void* key_rows;     // [SPLIT] addresses of rows of the caches
  void* value_rows;   // [SPLIT]
  const void* zeros;  // a row of zeros, for keys nobody sees
};

// The panels of a K tile that are packed before their scores are computed.
constexpr int64_t KEY_PANELS = 4;
// So few rows of a head are bound by reading the cache: widening it ahead would not pay.
constexpr int64_t FEW_ROWS = 6;

// Reads `bytes` of each row once, in memory order. Hardware prefetchers do not follow the rows of
// one head, which lie far apart; reading all heads' rows through is a stream they do follow.
// (Prefetch instructions in place of the reads were measured to gain nothing.)
template <class T>
inline void fetch_rows(const T* const* rows, int64_t begin, int64_t end, int64_t bytes) {
  int sum = 0;
  for (int64_t j = begin; j < end; ++j) {
    const char* row = reinterpret_cast<const char*>(rows[j]);
    for (int64_t i = 0; i < bytes; i += 64) sum += row[i];
  }
  asm volatile("" ::"r"(sum));
}

// Turns a row's scores on columns [begin, end) of the split (whole panels) into exp(score - max),
// where only [first, last) is visible.
inline void softmax_row(float* row, int64_t begin, int64_t end, int64_t first, int64_t last,
                        float softcap, float* maximum, float* total) {
  if (first >= last) {
    for (int64_t j = begin; j < end; j += LANES) store(row + j, splat(0.0f));
    *maximum = MINUS_INF;
    *total = 0.0f;
    return;
  }
  if (softcap > 0.0f) {
    const F8 cap = splat(softcap);
    for (int64_t j = begin; j < end; j += LANES) store(row + j, cap * tanh(load(row + j) / cap));
  }
  for (int64_t j = begin; j < first; ++j) row[j] = MINUS_INF;
  for (int64_t j = last; j < end; ++j) row[j] = MINUS_INF;
  F8 top[2] = {splat(MINUS_INF), splat(MINUS_INF)};
  for (int64_t j = begin; j < end; j += PANEL) {
    top[0] = max(load(row + j), top[0]);
    top[1] = max(load(row + j + LANES), top[1]);
  }
  const float highest = max(max(top[0], top[1]));
  const F8 shift = splat(highest);
  F8 sums[2] = {splat(0.0f), splat(0.0f)};
  for (int64_t j = begin; j < end; j += PANEL) {
    const F8 low = exp_nonpositive(load(row + j) - shift);
    const F8 high = exp_nonpositive(load(row + j + LANES) - shift);
    store(row + j, low);
    store(row + j + LANES, high);
    sums[0] += low;
    sums[1] += high;
  }
  *maximum = highest;
  *total = sum(sums[0] + sums[1]);
}

// Writes the partial result of kv head number `head` of `unit` over split number `split` (of the
// context). `Type`: Float<dtype> of both caches; `table` is the request's row of the block table.
template <class Type>
void attend_split(const AttentionShape& shape, const Unit& unit, int64_t head, int64_t split,
                  const typename Type::Storage* k_cache, const typename Type::Storage* v_cache,
                  const int64_t* table, const Workspace& work, const Partial& out) {
  using Stored = typename Type::Storage;
  const int64_t origin = split * SPLIT;
  const int64_t first = (unit.low > origin ? unit.low : origin) - origin;
  const int64_t last = (unit.high < origin + SPLIT ? unit.high : origin + SPLIT) - origin;
  const int64_t begin = first / PANEL * PANEL, end = round_up(last, PANEL);
  const int64_t rows = unit.tokens * shape.group, first_row = head * rows;
  const int64_t padded = shape.padded_values();

  const Stored** key_rows = reinterpret_cast<const Stored**>(work.key_rows);
  const Stored** value_rows = reinterpret_cast<const Stored**>(work.value_rows);
  for (int64_t j = begin; j < end; ++j) {
    key_rows[j] = value_rows[j] = static_cast<const Stored*>(work.zeros);
  }
  for (int64_t j = first; j < last;) {
    const int64_t block = (origin + j) / shape.block_size, offset = (origin + j) % shape.block_size;
    int64_t slot = table[block] * shape.block_size + offset;
    slot = slot * shape.kv_heads + unit.kv_head + head;
    for (int64_t i = offset; i < shape.block_size && j < last; ++i, ++j, slot += shape.kv_heads) {
      key_rows[j] = k_cache + slot * shape.key_width;
      value_rows[j] = v_cache + slot * shape.value_width;
    }
  }

  const bool few = rows <= FEW_ROWS;
  if (few && head == 0) {
    const int64_t bytes = unit.heads * static_cast<int64_t>(sizeof(Stored));
    fetch_rows(key_rows, first, last, bytes * shape.key_width);
    fetch_rows(value_rows, first, last, bytes * shape.value_width);
  }
  const float* queries = work.queries + first_row * shape.key_width;
  const int64_t key_panel = shape.key_width * PANEL;
  Stored* stored_keys = static_cast<Stored*>(work.stored_keys);
  for (int64_t j = begin; j < end; j += KEY_PANELS * PANEL) {
    const int64_t left = (end - j) / PANEL;
    const int64_t panels = left < KEY_PANELS ? left : KEY_PANELS;
    for (int64_t p = 0; p < panels; ++p) {
      pack_keys(key_rows + j + p * PANEL, shape.key_width, stored_keys + p * key_panel);
    }
    for (int64_t r = 0; r < rows; ++r) {
      std::memset(work.weights + r * SPLIT + j, 0, panels * PANEL * sizeof(float));
    }
    const auto score = [&](const auto& keys) {
      gemm(queries, shape.key_width, keys, shape.key_width, panels, work.weights + j, SPLIT, rows);
    };
    if (few) {
      score(Panels<Type>{stored_keys, key_panel});
    } else {
      widen<Type>(stored_keys, panels * key_panel, work.keys);
      score(Panels<Float<F32>>{work.keys, key_panel});
    }
  }

  float* values = out.values + first_row * out.stride;
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t own = unit.position + r / shape.group - origin;  // its place in this split
    const int64_t sees_to = own + 1 < last ? own + 1 : last;
    const int64_t sees_from = shape.window > 0 ? own + 1 - shape.window : first;
    softmax_row(work.weights + r * SPLIT, begin, end, sees_from > first ? sees_from : first,
                sees_to, shape.softcap, out.maximum + first_row + r, out.total + first_row + r);
    std::memset(values + r * out.stride, 0, padded * sizeof(float));
  }

  const auto weigh = [&](const auto& columns) {
    gemm(work.weights + begin, SPLIT, columns, end - begin, padded / PANEL, values, out.stride,
         rows);
  };
  if (few && shape.value_width == padded) {
    weigh(StoredRows<Type>{value_rows + begin});
  } else {
    pack_values<Type>(value_rows + begin, end - begin, shape.value_width, SPLIT * PANEL,
                      work.values);
    weigh(Panels<Float<F32>>{work.values, SPLIT * PANEL});
  }
}

// Folds row `r` of `part` into row `r` of `into`. Exactly nothing happens where the row saw no key.
inline void merge_row(const Partial& part, const Partial& into, int64_t r, int64_t padded) {
  const float theirs = part.maximum[r], ours = into.maximum[r];
  if (theirs == MINUS_INF) return;
  const float top = theirs > ours ? theirs : ours;
  const F8 scales = exp_nonpositive(F8{ours - top, theirs - top});
  const F8 a = splat(scales[0]), b = splat(scales[1]);
  into.maximum[r] = top;
  into.total[r] = into.total[r] * scales[0] + part.total[r] * scales[1];
  const float* from = part.values + r * part.stride;
  float* to = into.values + r * into.stride;
  for (int64_t j = 0; j < padded; j += LANES) {
    store(to + j, fma(load(to + j), a, load(from + j) * b));
  }
}

// Divides row `r` by its sum, to which `sink` adds a logit without a value (-inf: none).
inline void finish_row(const Partial& result, int64_t r, int64_t padded, float sink) {
  float factor = 1.0f;
  float total = result.total[r];
  if (sink != MINUS_INF) {
    const float own = result.maximum[r], top = sink > own ? sink : own;
    const F8 scales = exp_nonpositive(F8{own - top, sink - top});
    factor = scales[0];
    total = total * scales[0] + scales[1];
  }
  float* row = result.values + r * result.stride;
  const F8 inverse = splat(factor / total);
  for (int64_t j = 0; j < padded; j += LANES) store(row + j, load(row + j) * inverse);
}

}  // namespace go
