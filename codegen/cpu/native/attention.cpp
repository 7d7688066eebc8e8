// PAGED_ATTENTION: cuts a step's rows into units and decides who computes what.
//
// With many units each is one work item, which folds its splits into one running result. With few
// (decoding at small batch) every (unit, split) is an item; partial results lie in shared memory
// and are folded after a barrier, in the same order: both ways give the same bits.
#include "attention.h"

#include "kernel.h"
#include "rows.h"

namespace go {
namespace {

constexpr int64_t UNIT_ROWS = 48;               // query rows that amortise packing a K/V tile
constexpr int64_t UNITS_PER_THREAD = 8;         // enough to balance the threads without splits
constexpr int64_t ITEMS_PER_THREAD = 2;         // below it, units get fewer kv heads
constexpr int64_t SPLIT_BYTES = 192 << 10;      // of K and V that may wait in the L2 cache
constexpr int64_t MAX_SHARED_BYTES = 64 << 20;  // of partial results

// Hands out pieces of a block of memory; with no block it only counts the bytes.
class Pieces {
 public:
  explicit Pieces(char* base) : base_(base) {}
  template <class T>
  T* take(int64_t count) {
    T* piece = base_ == nullptr ? nullptr : reinterpret_cast<T*>(base_ + used_);
    used_ += round_up(count * static_cast<int64_t>(sizeof(T)), CACHE_LINE);
    return piece;
  }
  int64_t used() const { return used_; }

 private:
  char* base_;
  int64_t used_ = 0;
};

Partial take_partial(Pieces& pieces, int64_t rows, int64_t padded) {
  Partial p;
  p.maximum = pieces.take<float>(rows);
  p.total = pieces.take<float>(rows);
  p.values = pieces.take<float>(rows * padded);
  p.stride = padded;
  return p;
}

class PagedAttention {
 public:
  PagedAttention(const Instr& instr, Context& ctx, int thread, int threads)
      : instr_(instr), ctx_(ctx), thread_(thread), threads_(threads) {
    shape_.kv_heads = ctx.dim(instr, 1);
    shape_.key_width = ctx.dim(instr, 2);
    shape_.value_width = ctx.dim(instr, 3);
    shape_.block_size = instr.attrs_i[0];
    shape_.group = instr.attrs_i[1];
    shape_.window = instr.attrs_i[2];
    shape_.scale = static_cast<float>(instr.attrs_f[0]);
    shape_.softcap = static_cast<float>(instr.attrs_f[1]);
    least_peak_ = static_cast<float>(instr.attrs_f[2]);
    most_peak_ = static_cast<float>(instr.attrs_f[3]);
    requests_ = ctx.sym(SYM_REQUESTS);
    columns_ = ctx.sym(SYM_BLOCK_COLUMNS);
    tables_ = ctx.ptr<int64_t>(instr, 4);
    starts_ = ctx.ptr<int64_t>(instr, 5);
    lengths_ = ctx.ptr<int64_t>(instr, 6);
    unit_tokens_ = UNIT_ROWS > shape_.group ? UNIT_ROWS / shape_.group : 1;
    max_rows_ = unit_tokens_ * shape_.group;
    Pieces counted(nullptr);
    lay_out(counted);
    Pieces pieces(ctx.scratch(thread, counted.used()));
    lay_out(pieces);
    std::memset(const_cast<void*>(work_.zeros), 0, zero_bytes());
    // Kv heads of a unit share the reading of neighbouring rows of the cache.
    const int64_t head_bytes =
        SPLIT * (shape_.key_width + shape_.value_width) * item_size(ctx.dtype(instr, 2));
    int64_t heads = SPLIT_BYTES > head_bytes ? SPLIT_BYTES / head_bytes : 1;
    if (heads > shape_.kv_heads) heads = shape_.kv_heads;
    fill_units(heads);
    while (heads > 1 && items_ < ITEMS_PER_THREAD * threads_) fill_units(heads = (heads + 1) / 2);
  }

  void run() {
    Pieces partial(nullptr);
    take_partial(partial, max_rows_, shape_.padded_values());
    item_bytes_ = partial.used();
    const bool split = threads_ > 1 && units_count_ < UNITS_PER_THREAD * threads_ &&
                       items_ > units_count_ && items_ * item_bytes_ <= MAX_SHARED_BYTES;
    const int dtype = ctx_.dtype(instr_, 2);
    with_float(dtype, [&](auto type) {
      using Type = decltype(type);
      if (split) {
        run_splits<Type>();
      } else {
        run_units<Type>();
      }
    });
  }

 private:
  int64_t rows_of(int64_t request) const { return starts_[request + 1] - starts_[request]; }
  int64_t tiles_of(int64_t request) const {
    return (rows_of(request) + unit_tokens_ - 1) / unit_tokens_;
  }
  int64_t zero_bytes() const {
    const int64_t width = shape_.key_width > shape_.value_width ? shape_.key_width
                                                                : shape_.value_width;
    return round_up(width, PANEL) * static_cast<int64_t>(sizeof(float));
  }

  int64_t most_units() const {
    int64_t units = 0;
    for (int64_t r = 0; r < requests_; ++r) units += tiles_of(r) * shape_.kv_heads;
    return units;
  }

  void lay_out(Pieces& pieces) {
    units_ = pieces.take<Unit>(most_units());
    work_.queries = pieces.take<float>(max_rows_ * shape_.key_width);
    work_.weights = pieces.take<float>(max_rows_ * SPLIT);
    work_.stored_keys = pieces.take<float>(KEY_PANELS * PANEL * shape_.key_width);
    work_.keys = pieces.take<float>(KEY_PANELS * PANEL * shape_.key_width);
    work_.values = pieces.take<float>(SPLIT * shape_.padded_values());
    work_.key_rows = pieces.take<void*>(SPLIT);
    work_.value_rows = pieces.take<void*>(SPLIT);
    work_.zeros = pieces.take<char>(zero_bytes());
    partial_ = take_partial(pieces, max_rows_, shape_.padded_values());
    running_ = take_partial(pieces, max_rows_, shape_.padded_values());
  }

  void fill_units(int64_t most_heads) {
    units_count_ = items_ = 0;
    for (int64_t r = 0; r < requests_; ++r) {
      for (int64_t tile = 0; tile < tiles_of(r); ++tile) {
        const int64_t done = tile * unit_tokens_, left = rows_of(r) - done;
        Unit unit;
        unit.request = r;
        unit.token = starts_[r] + done;
        unit.tokens = left < unit_tokens_ ? left : unit_tokens_;
        unit.position = lengths_[r] - left;
        unit.high = unit.position + unit.tokens;
        unit.low = shape_.window > 0 && unit.position + 1 > shape_.window
                       ? unit.position + 1 - shape_.window
                       : 0;
        const int64_t fitting = max_rows_ / (unit.tokens * shape_.group);
        const int64_t heads = fitting < most_heads ? fitting : most_heads;
        for (unit.kv_head = 0; unit.kv_head < shape_.kv_heads; unit.kv_head += heads) {
          const int64_t others = shape_.kv_heads - unit.kv_head;
          unit.heads = heads < others ? heads : others;
          unit.first_item = items_;
          items_ += unit.splits();
          units_[units_count_++] = unit;
        }
      }
    }
  }

  int64_t rows_of(const Unit& unit) const { return unit.heads * unit.tokens * shape_.group; }
  int64_t query_head(const Unit& unit, int64_t row) const {
    const int64_t kv_head = unit.kv_head + row / (unit.tokens * shape_.group);
    return kv_head * shape_.group + row % shape_.group;
  }
  char* row_address(int operand, const Unit& unit, int64_t row) const {
    const int64_t token = unit.token + row / shape_.group % unit.tokens;
    const int64_t* s = instr_.strides[operand];
    return at(ctx_.ptr(instr_, operand), ctx_.dtype(instr_, operand),
              token * s[0] + query_head(unit, row) * s[1]);
  }

  void load_queries(const Unit& unit) {
    const int64_t width = shape_.key_width;
    for (int64_t r = 0; r < rows_of(unit); ++r) {
      float* row = work_.queries + r * width;
      load_row(row_address(1, unit, r), ctx_.dtype(instr_, 1), width, row);
      for (int64_t d = 0; d < width; ++d) row[d] *= shape_.scale;
    }
  }

  template <class Type>
  void attend(const Unit& unit, int64_t split, const Partial& out) {
    using Stored = typename Type::Storage;
    for (int64_t head = 0; head < unit.heads; ++head) {
      attend_split<Type>(shape_, unit, head, split, ctx_.ptr<Stored>(instr_, 2),
                         ctx_.ptr<Stored>(instr_, 3), tables_ + unit.request * columns_, work_,
                         out);
    }
  }

  void start_row(int64_t r) {
    running_.maximum[r] = MINUS_INF;
    running_.total[r] = 0.0f;
    std::memset(running_.values + r * running_.stride, 0, running_.stride * sizeof(float));
  }

  void write_row(const Unit& unit, int64_t r) {
    float sink = MINUS_INF;
    if (ctx_.has(instr_, 7)) {
      const int dtype = ctx_.dtype(instr_, 7);
      load_row(at(ctx_.ptr(instr_, 7), dtype, query_head(unit, r)), dtype, 1, &sink);
    }
    const float peak = running_.maximum[r];
    if (least_peak_ < most_peak_ && (peak < least_peak_ || peak > most_peak_)) ctx_.fail(instr_);
    finish_row(running_, r, shape_.padded_values(), sink);
    store_row(running_.values + r * running_.stride, row_address(0, unit, r),
              ctx_.dtype(instr_, 0), shape_.value_width);
  }

  template <class Type>
  void run_units() {
    for (int64_t i; (i = ctx_.take(instr_, 0)) < units_count_;) {
      const Unit& unit = units_[units_count_ - 1 - i];  // the longest of a request come first
      const int64_t rows = rows_of(unit);
      load_queries(unit);
      for (int64_t r = 0; r < rows; ++r) start_row(r);
      for (int64_t s = unit.first_split(); s < unit.first_split() + unit.splits(); ++s) {
        attend<Type>(unit, s, partial_);
        for (int64_t r = 0; r < rows; ++r) merge_row(partial_, running_, r, shape_.padded_values());
      }
      for (int64_t r = 0; r < rows; ++r) write_row(unit, r);
    }
  }

  Partial shared_partial(char* base, int64_t item) const {
    Pieces pieces(base + item * item_bytes_);
    return take_partial(pieces, max_rows_, shape_.padded_values());
  }

  template <class Type>
  void run_splits() {
    char* base = ctx_.shared(instr_, thread_, items_ * item_bytes_);
    int64_t loaded = -1;
    for (int64_t item; (item = ctx_.take(instr_, 0)) < items_;) {
      int64_t u = units_count_ - 1;
      while (units_[u].first_item > item) --u;
      const Unit& unit = units_[u];
      if (u != loaded) load_queries(unit);
      loaded = u;
      attend<Type>(unit, unit.first_split() + item - unit.first_item, shared_partial(base, item));
    }
    ctx_.barrier();
    int64_t row = 0;
    for (int64_t u = 0; u < units_count_; ++u) {
      const Unit& unit = units_[u];
      for (int64_t r = 0; r < rows_of(unit); ++r, ++row) {
        if (row % threads_ != thread_) continue;
        start_row(r);
        for (int64_t s = 0; s < unit.splits(); ++s) {
          merge_row(shared_partial(base, unit.first_item + s), running_, r,
                    shape_.padded_values());
        }
        write_row(unit, r);
      }
    }
  }

  const Instr& instr_;
  Context& ctx_;
  const int thread_, threads_;
  AttentionShape shape_;
  float least_peak_, most_peak_;
  int64_t requests_, columns_, unit_tokens_, max_rows_, units_count_, items_, item_bytes_;
  const int64_t *tables_, *starts_, *lengths_;
  Unit* units_;
  Workspace work_;
  Partial partial_, running_;
};

}  // namespace

void paged_attention(const Instr& instr, Context& ctx, int thread, int threads) {
  bool ok = instr.attrs_i[0] > 0 && instr.attrs_i[1] > 0 && instr.attrs_i[2] >= 0;
  for (int i : {0, 1, 2, 3, 7}) ok = ok && (!ctx.has(instr, i) || is_float(ctx.dtype(instr, i)));
  for (int i : {4, 5, 6}) ok = ok && ctx.dtype(instr, i) == I64;
  ok = ok && ctx.dtype(instr, 2) == ctx.dtype(instr, 3);
  if (!ok) return ctx.fail(instr);
  PagedAttention(instr, ctx, thread, threads).run();
}

}  // namespace go
