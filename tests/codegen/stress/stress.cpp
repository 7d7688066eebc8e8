// Runs recorded plans (record_plans.py) from several threads at once and compares every result with
// that of one thread. Meant to be built with -fsanitize=thread, like the library it is linked to.
//
//   stress PLANS CALLERS ROUNDS [drop-barriers]
//
// drop-barriers leaves out what orders dependent instructions: the sanitizer must find the races.
#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "abi.h"

extern "C" {
int64_t go_sizeof_instr();
int64_t go_run(const Instr*, int64_t, void* const*, const int64_t*, int64_t);
}

namespace {

constexpr size_t ALIGNMENT = 64;

struct Free {
  void operator()(char* p) const { std::free(p); }
};
using Block = std::unique_ptr<char, Free>;

Block aligned(size_t bytes) {
  return Block(static_cast<char*>(std::aligned_alloc(ALIGNMENT, (bytes / ALIGNMENT + 1) * ALIGNMENT)));
}

struct Base {
  int64_t bytes;
  bool is_private;
  Block data;
};

struct Recorded {
  std::vector<Instr> instrs;
  std::vector<int64_t> syms;
  std::vector<Base> bases;
};

// What one caller runs a plan on: its own copy of what the plan writes.
class Memory {
 public:
  explicit Memory(const Recorded& plan) : plan_(plan) {
    for (const Base& base : plan.bases) {
      own_.push_back(base.is_private ? aligned(base.bytes) : nullptr);
      addresses_.push_back(base.is_private ? own_.back().get() : base.data.get());
    }
  }
  // Returns go_run's status.
  int64_t run(int64_t threads) {
    for (size_t i = 0; i < own_.size(); ++i) {
      if (own_[i]) std::memcpy(own_[i].get(), plan_.bases[i].data.get(), plan_.bases[i].bytes);
    }
    return go_run(plan_.instrs.data(), static_cast<int64_t>(plan_.instrs.size()),
                  addresses_.data(), plan_.syms.data(), threads);
  }
  // All but the arena, whose dead values depend on nothing but are nobody's business.
  bool equals(const Memory& other) const {
    for (size_t i = 1; i < own_.size(); ++i) {
      if (own_[i] && std::memcmp(own_[i].get(), other.own_[i].get(), plan_.bases[i].bytes) != 0) {
        return false;
      }
    }
    return true;
  }

 private:
  const Recorded& plan_;
  std::vector<Block> own_;
  std::vector<void*> addresses_;
};

void must(bool is_true, const char* what) {
  if (is_true) return;
  std::fprintf(stderr, "stress: %s\n", what);
  std::exit(2);
}

template <class T>
void read(std::FILE* file, T* to, size_t count) {
  must(count == 0 || std::fread(to, sizeof(T), count, file) == count, "the file of plans is short");
}

std::vector<Recorded> load(const char* path) {
  std::FILE* file = std::fopen(path, "rb");
  must(file != nullptr, "the file of plans cannot be read");
  int64_t count;
  read(file, &count, 1);
  std::vector<Recorded> plans(count);
  for (Recorded& plan : plans) {
    int64_t sizes[3];
    read(file, sizes, 3);
    plan.instrs.resize(sizes[0]);
    plan.bases.resize(sizes[1]);
    plan.syms.resize(sizes[2]);
    read(file, plan.syms.data(), plan.syms.size());
    for (Base& base : plan.bases) {
      int64_t header[2];
      read(file, header, 2);
      base.bytes = header[0];
      base.is_private = header[1] != 0;
      base.data = aligned(base.bytes);
      read(file, base.data.get(), base.bytes);
    }
    read(file, plan.instrs.data(), plan.instrs.size());
  }
  std::fclose(file);
  return plans;
}

}  // namespace

int main(int argc, char** argv) {
  must(argc >= 4, "usage: stress PLANS CALLERS ROUNDS [drop-barriers]");
  must(go_sizeof_instr() == static_cast<int64_t>(sizeof(Instr)), "the library has another ABI");
  std::vector<Recorded> plans = load(argv[1]);
  const int callers = std::atoi(argv[2]), rounds = std::atoi(argv[3]);
  std::vector<Memory> expected;
  for (const Recorded& plan : plans) {
    expected.emplace_back(plan);
    must(expected.back().run(1) == 0, "a plan does not run");
  }
  if (argc > 4 && std::string(argv[4]) == "drop-barriers") {
    for (Recorded& plan : plans) {
      for (Instr& instr : plan.instrs) instr.barrier = 0;
    }
  }
  std::atomic<int> wrong{0};
  std::vector<std::thread> threads;
  for (int caller = 0; caller < callers; ++caller) {
    threads.emplace_back([&, caller] {
      const int64_t sizes[] = {2, 3, 1, 5, 2, 4};
      for (int round = 0; round < rounds; ++round) {
        const size_t number = (caller * 7 + round) % plans.size();
        Memory memory(plans[number]);
        if (memory.run(sizes[(caller + round) % 6]) != 0) ++wrong;
        if (!memory.equals(expected[number])) ++wrong;
        // Long enough for the workers to fall asleep, now and then.
        if (round % 16 == 15) std::this_thread::sleep_for(std::chrono::milliseconds(2));
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  std::printf("%zu plans, %d callers x %d rounds: %d wrong\n", plans.size(), callers, rounds,
              wrong.load());
  return wrong.load() == 0 ? 0 : 1;
}
