// What every kernel sees: `Context` resolves operands and dims of an `Instr` and offers scratch
// memory, dynamic work distribution and a barrier; `Kernel` is the one signature of them all.
//
// A kernel is called by all `threads` threads of a run with the same instruction and divides the
// work itself. It may rely on all its inputs being written (the plan sets Instr::barrier where an
// earlier instruction feeds it) and need not end with a barrier.
#pragma once
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <vector>

#include "abi.h"

namespace go {

constexpr size_t CACHE_LINE = 64;
// What go_run returns beside the number of an instruction.
constexpr int64_t BAD_THREADS = -1, NO_MEMORY = -2, NO_THREAD = -3;

// A grow-only aligned block of memory. Contents are lost when it grows.
class Scratch {
 public:
  char* at_least(size_t bytes);
  size_t capacity() const { return capacity_; }

 private:
  struct Free {
    void operator()(char* p) const { std::free(p); }
  };
  std::unique_ptr<char, Free> data_;
  size_t capacity_ = 0;
};

// Thrown in the threads of a run that wait for one which has given up.
struct Abandoned {};

// Centralised generation barrier: spins with pause, then yields so that an oversubscribed machine
// still makes progress.
class Barrier {
 public:
  void reset(int threads) {
    threads_ = threads;
    arrived_.store(0, std::memory_order_relaxed);
    abandoned_.store(false, std::memory_order_relaxed);
  }
  // Throws Abandoned when a thread of the run will not arrive.
  void wait();
  void abandon() { abandoned_.store(true, std::memory_order_relaxed); }

 private:
  int threads_ = 1;
  alignas(CACHE_LINE) std::atomic<int> arrived_{0};
  alignas(CACHE_LINE) std::atomic<uint32_t> generation_{0};
  std::atomic<bool> abandoned_{false};
};

// Work counters of one instruction, for kernels that take work items dynamically.
struct alignas(CACHE_LINE) Counters {
  std::atomic<int64_t> slot[2];
};

class Context {
 public:
  // Called by the owner of the run, before any worker starts.
  void begin(const Instr* instrs, int64_t n, void* const* bases, const int64_t* syms, int threads);

  bool has(const Instr& instr, int operand) const { return instr.operands[operand].base >= 0; }
  int dtype(const Instr& instr, int operand) const { return instr.operands[operand].dtype; }
  template <class T = char>
  T* ptr(const Instr& instr, int operand) const {
    const Operand& o = instr.operands[operand];
    return reinterpret_cast<T*>(static_cast<char*>(bases_[o.base]) + o.offset +
                                o.offset_per_token * syms_[SYM_TOKENS]);
  }
  int64_t dim(const Instr& instr, int i) const {
    return instr.dims[i].mult * syms_[instr.dims[i].sym];
  }
  int64_t sym(Sym s) const { return syms_[s]; }

  // Private memory of one thread, 64-byte aligned; valid until its next call of scratch().
  char* scratch(int thread, size_t bytes) { return private_[thread].memory.at_least(bytes); }
  // Memory all threads of the run share. Collective: every thread calls it with the same size,
  // once, before it touches the memory. It waits until nobody uses the memory any more.
  char* shared(const Instr& instr, int thread, size_t bytes);

  // Collective: returns when all threads of the run have arrived; earlier writes are visible.
  void barrier() {
    if (threads_ > 1) barrier_.wait();
  }
  // The next work item(s) of this instruction: returns the first of `count`. Starts at 0 in each
  // run; two independent counters (slot 0 and 1) an instruction.
  int64_t take(const Instr& instr, int slot, int64_t count = 1) {
    return counters_[&instr - instrs_].slot[slot].fetch_add(count, std::memory_order_relaxed);
  }
  // Reports an instruction this kernel cannot execute (dtype, attribute); go_run returns its
  // number + 1. The kernel must still take part in its barriers.
  void fail(const Instr& instr) { error_.store(&instr - instrs_ + 1, std::memory_order_relaxed); }
  // Ends the run of a thread that has no memory; the others end at their next barrier.
  void abandon() {
    error_.store(NO_MEMORY, std::memory_order_relaxed);
    barrier_.abandon();
  }
  int64_t error() const { return error_.load(std::memory_order_relaxed); }

 private:
  struct alignas(CACHE_LINE) Private {
    Scratch memory;
  };
  const Instr* instrs_ = nullptr;
  void* const* bases_ = nullptr;
  const int64_t* syms_ = nullptr;
  int threads_ = 1;
  std::atomic<int64_t> error_{0};
  Barrier barrier_;
  Scratch shared_;
  std::vector<Private> private_;
  std::unique_ptr<Counters[]> counters_;
  int64_t counters_size_ = 0;
};

using Kernel = void (*)(const Instr&, Context&, int thread, int threads);

// The half-open part [begin, end) of n items that belongs to `thread`.
struct Range {
  int64_t begin, end;
};
inline Range share(int64_t n, int thread, int threads) {
  return {n * thread / threads, n * (thread + 1) / threads};
}

void rms_norm(const Instr&, Context&, int thread, int threads);
void layer_norm(const Instr&, Context&, int thread, int threads);
void rope(const Instr&, Context&, int thread, int threads);
void kv_write(const Instr&, Context&, int thread, int threads);
void paged_attention(const Instr&, Context&, int thread, int threads);
void glu(const Instr&, Context&, int thread, int threads);
void binary(const Instr&, Context&, int thread, int threads);
void unary(const Instr&, Context&, int thread, int threads);
void gather_rows(const Instr&, Context&, int thread, int threads);
void embed(const Instr&, Context&, int thread, int threads);   // linear*.cpp
void linear(const Instr&, Context&, int thread, int threads);  // linear*.cpp

}  // namespace go
