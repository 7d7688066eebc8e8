// The check of a step's inputs, once before its plan runs: kernels follow them without looking.
#include "abi.h"

namespace {

enum Input { SLOTS, QUERY_START, KV_LENS, BLOCK_TABLES, LOGIT_ROWS };

// Failing is answered with the number of the input + 1.
constexpr int64_t bad(Input input) { return input + 1; }

}  // namespace

extern "C" {

// inputs: addresses in the order of Input. Returns 0 when every slot is one of the cache's (or
// negative), the queries of the requests follow each other and end with the last row, each request's
// context holds its rows and is covered by blocks of the cache, and every logit row is a row, with
// at least one of them and no more than there are rows: the arena has room for so many.
int64_t go_check_step(void* const* inputs, const int64_t* syms, int64_t block_size,
                      int64_t blocks) {
  const auto* slots = static_cast<const int64_t*>(inputs[SLOTS]);
  const auto* starts = static_cast<const int64_t*>(inputs[QUERY_START]);
  const auto* lengths = static_cast<const int64_t*>(inputs[KV_LENS]);
  const auto* tables = static_cast<const int64_t*>(inputs[BLOCK_TABLES]);
  const auto* logit_rows = static_cast<const int64_t*>(inputs[LOGIT_ROWS]);
  const int64_t rows = syms[SYM_TOKENS], requests = syms[SYM_REQUESTS];
  const int64_t columns = syms[SYM_BLOCK_COLUMNS];
  const int64_t wanted = syms[SYM_LOGIT_ROWS];
  if (wanted < 1 || wanted > rows) return bad(LOGIT_ROWS);
  for (int64_t i = 0; i < wanted; ++i) {
    if (logit_rows[i] < 0 || logit_rows[i] >= rows) return bad(LOGIT_ROWS);
  }
  if (blocks == 0) return 0;
  for (int64_t i = 0; i < rows; ++i) {
    if (slots[i] >= block_size * blocks) return bad(SLOTS);
  }
  if (starts[0] != 0 || starts[requests] != rows) return bad(QUERY_START);
  for (int64_t r = 0; r < requests; ++r) {
    const int64_t own = starts[r + 1] - starts[r];
    if (own < 0 || starts[r + 1] > rows) return bad(QUERY_START);
    if (lengths[r] < own || lengths[r] > columns * block_size) return bad(KV_LENS);
    const int64_t used = (lengths[r] + block_size - 1) / block_size;
    for (int64_t column = 0; column < used; ++column) {
      const int64_t block = tables[r * columns + column];
      if (block < 0 || block >= blocks) return bad(BLOCK_TABLES);
    }
  }
  return 0;
}
}
