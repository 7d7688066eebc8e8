// Context: scratch growth, the spin barrier, and what begins a run.
#include <new>
#include <sched.h>

#include "kernel.h"
#include "spin.h"

namespace go {

char* Scratch::at_least(size_t bytes) {
  if (bytes > capacity_) {
    const size_t rounded = (bytes + bytes / 4 + 4095) / 4096 * 4096;
    data_.reset();
    capacity_ = 0;
    char* fresh = static_cast<char*>(std::aligned_alloc(4096, rounded));
    if (fresh == nullptr) throw std::bad_alloc();
    data_.reset(fresh);
    capacity_ = rounded;
  }
  return data_.get();
}

void Barrier::wait() {
  const uint32_t generation = generation_.load(std::memory_order_relaxed);
  if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == threads_) {
    arrived_.store(0, std::memory_order_relaxed);
    generation_.store(generation + 1, std::memory_order_release);
    return;
  }
  for (int spins = 0; generation_.load(std::memory_order_acquire) == generation; ++spins) {
    if (spins < SPINS_BEFORE_YIELD) {
      pause();
    } else {
      if (abandoned_.load(std::memory_order_relaxed)) throw Abandoned{};
      sched_yield();
    }
  }
}

void Context::begin(const Instr* instrs, int64_t n, void* const* bases, const int64_t* syms,
                    int threads) {
  instrs_ = instrs;
  bases_ = bases;
  syms_ = syms;
  threads_ = threads;
  error_.store(0, std::memory_order_relaxed);
  barrier_.reset(threads);
  if (private_.size() < static_cast<size_t>(threads)) private_.resize(threads);
  if (counters_size_ < n) {
    counters_.reset(new Counters[n]);
    counters_size_ = n;
  }
  for (int64_t i = 0; i < n; ++i) {
    for (auto& slot : counters_[i].slot) slot.store(0, std::memory_order_relaxed);
  }
}

char* Context::shared(const Instr& instr, int thread, size_t bytes) {
  // The capacity changes only between the two barriers below, so all threads agree on `grow`.
  const bool grow = bytes > shared_.capacity();
  if (grow) {
    barrier();
    if (thread == 0) shared_.at_least(bytes);
    barrier();
  } else if (!instr.barrier) {
    barrier();
  }
  return shared_.at_least(bytes);
}

}  // namespace go
