#include "pool.h"

#include <pthread.h>
#include <sched.h>

#include <thread>

#include "spin.h"

namespace go {

namespace {
// About 100 us: a decode step follows the previous one after the sampler's Python code, and waking
// a sleeping thread costs tens of microseconds.
constexpr int SPINS_BEFORE_SLEEP = 4000;

// Never destroyed: workers may still wait in it while the process exits.
Pool* current = nullptr;
void renew_in_child() { current = new Pool; }
}  // namespace

Pool& Pool::instance() {
  static const bool created = [] {
    current = new Pool;
    pthread_atfork(nullptr, nullptr, renew_in_child);
    return true;
  }();
  (void)created;
  return *current;
}

void Pool::run(Task task, void* argument, int threads) {
  for (; workers_ < threads - 1; ++workers_) {
    std::thread([this, thread = workers_ + 1] { work(thread); }).detach();
  }
  task_ = task;
  argument_ = argument;
  finished_.store(0, std::memory_order_relaxed);
  if (threads > 1) {
    const uint64_t epoch = (ticket_.load(std::memory_order_relaxed) >> 16) + 1;
    // Sequentially consistent with `sleeping_`: either we see the sleeper or it sees the ticket.
    ticket_.store(epoch << 16 | static_cast<uint64_t>(threads));
    if (sleeping_.load() > 0) {
      std::lock_guard<std::mutex> lock(sleep_mutex_);
      wake_.notify_all();
    }
  }
  task(argument, 0, threads);
  for (int spins = 0; finished_.load(std::memory_order_acquire) != threads - 1; ++spins) {
    if (spins < SPINS_BEFORE_YIELD) {
      pause();
    } else {
      sched_yield();
    }
  }
}

void Pool::work(int thread) {
  // A worker is created before its first ticket is issued or just after an older one; it may only
  // take part in runs that count it in, which it sees from the ticket itself.
  uint64_t seen = 0;
  for (;;) {
    uint64_t ticket = ticket_.load(std::memory_order_acquire);
    for (int spins = 0; ticket == seen && spins < SPINS_BEFORE_SLEEP; ++spins) {
      pause();
      ticket = ticket_.load(std::memory_order_acquire);
    }
    if (ticket == seen) {
      std::unique_lock<std::mutex> lock(sleep_mutex_);
      sleeping_.fetch_add(1);
      wake_.wait(lock, [&] { return ticket_.load() != seen; });
      sleeping_.fetch_sub(1);
      ticket = ticket_.load(std::memory_order_acquire);
    }
    seen = ticket;
    const int threads = static_cast<int>(ticket & 0xFFFF);
    if (thread < threads) {
      task_(argument_, thread, threads);
      finished_.fetch_add(1, std::memory_order_release);
    }
  }
}

}  // namespace go
