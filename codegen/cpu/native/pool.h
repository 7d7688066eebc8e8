// Persistent worker threads. `Pool::run` executes a task on threads 0..threads-1, where the
// caller is thread 0; workers are created on first need, spin briefly after a run, then sleep.
#pragma once
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <mutex>

#include "kernel.h"

namespace go {

class Pool {
 public:
  using Task = void (*)(void* argument, int thread, int threads);

  // The pool of this process. After fork() the child gets a new one: threads are not inherited,
  // and the parent's locks may have been held at that moment.
  static Pool& instance();

  // One run at a time; further callers wait here.
  std::mutex& run_mutex() { return run_mutex_; }
  // The context of the current run (its scratch memory is kept between runs).
  Context& context() { return context_; }
  // Runs the task; requires run_mutex() to be held, 1 <= threads <= MAX_THREADS. Throws
  // std::system_error, before anything runs, when a thread cannot be started.
  void run(Task task, void* argument, int threads);

  static constexpr int MAX_THREADS = 1024;

 private:
  void work(int thread);

  std::mutex run_mutex_;
  Context context_;
  int workers_ = 0;
  Task task_ = nullptr;
  void* argument_ = nullptr;
  // (epoch << 16 | threads): one word, so that a late worker never mixes two runs.
  alignas(CACHE_LINE) std::atomic<uint64_t> ticket_{0};
  alignas(CACHE_LINE) std::atomic<int> finished_{0};
  std::mutex sleep_mutex_;
  std::condition_variable wake_;
  std::atomic<int> sleeping_{0};
};

}  // namespace go
