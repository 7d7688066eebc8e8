// The library's entry points: the dispatch table and the loop over a plan.
#include <mutex>
#include <new>
#include <system_error>

#include "kernel.h"
#include "pool.h"

namespace go {
namespace {

constexpr Kernel KERNELS[OP_COUNT] = {
    embed, linear, rms_norm, layer_norm, rope, kv_write, paged_attention,
    glu,   binary, unary,    gather_rows,
};

struct Plan {
  const Instr* instrs;
  int64_t n;
  Context* context;
};

void execute(void* argument, int thread, int threads) {
  const Plan& plan = *static_cast<const Plan*>(argument);
  try {
    for (int64_t i = 0; i < plan.n; ++i) {
      const Instr& instr = plan.instrs[i];
      if (instr.barrier) plan.context->barrier();
      KERNELS[instr.op](instr, *plan.context, thread, threads);
    }
  } catch (const std::bad_alloc&) {
    plan.context->abandon();
  } catch (const Abandoned&) {
  }
}

}  // namespace
}  // namespace go

extern "C" {

int64_t go_abi_version() { return ABI_VERSION; }
int64_t go_sizeof_instr() { return sizeof(Instr); }

// Executes n instructions on `threads` threads (the caller is one of them). Returns 0, or the
// number + 1 of an instruction that could not be executed, or BAD_THREADS, or NO_MEMORY (for the
// scratch of a kernel) or NO_THREAD (the system starts no more). Safe to call from several threads
// (runs queue up) and after fork().
int64_t go_run(const Instr* instrs, int64_t n, void* const* bases, const int64_t* syms,
               int64_t threads) {
  if (threads < 1 || threads > go::Pool::MAX_THREADS) return go::BAD_THREADS;
  for (int64_t i = 0; i < n; ++i) {
    if (instrs[i].op < 0 || instrs[i].op >= OP_COUNT) return i + 1;
  }
  go::Pool& pool = go::Pool::instance();
  std::lock_guard<std::mutex> lock(pool.run_mutex());
  go::Plan plan{instrs, n, &pool.context()};
  try {
    pool.context().begin(instrs, n, bases, syms, static_cast<int>(threads));
    pool.run(go::execute, &plan, static_cast<int>(threads));
  } catch (const std::bad_alloc&) {
    return go::NO_MEMORY;
  } catch (const std::system_error&) {
    return go::NO_THREAD;
  }
  return pool.context().error();
}
}
