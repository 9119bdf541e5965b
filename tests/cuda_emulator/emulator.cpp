// Runs a kernel's threads as fibers with barriers between them, and reports faults of the kernel as exceptions.
// Launches (cudaLaunchKernelEx in cuda_runtime.h) call run.
#include "cuda_runtime.h"

#include <csetjmp>
#include <csignal>
#include <stdexcept>
#include <string>
#include <vector>

#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulator {
namespace {

constexpr size_t stack_bytes = 64 << 10;

// A barrier opens when all expected threads have arrived; `generation` counts its openings.
struct Barrier {
  unsigned arrived = 0, generation = 0;
};

struct Warp {
  Barrier barrier;
  unsigned mask = 0;
  // Two sets of values, because a lane may be one exchange ahead of the others, but never two.
  uint64_t values[2][32];
};

// ucontext only starts a fiber; _setjmp and _longjmp switch, because swapcontext makes two system calls per switch.
struct Fiber {
  ucontext_t start;
  jmp_buf place;
  bool started = false, finished = false;
  const Barrier* waits_at = nullptr;
  unsigned generation = 0;
};

// Memory that ends at an inaccessible page.
class FencedMemory {
 public:
  explicit FencedMemory(size_t bytes) : bytes_((bytes + 15) / 16 * 16) {
    const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE)), usable = (bytes_ + page - 1) / page * page;
    mapped_ = usable + page;
    base_ = static_cast<char*>(mmap(nullptr, mapped_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    if (base_ == MAP_FAILED || mprotect(base_ + usable, page, PROT_NONE)) throw std::runtime_error("mmap failed");
    data = base_ + usable - bytes_;
  }
  FencedMemory(const FencedMemory&) = delete;
  FencedMemory& operator=(const FencedMemory&) = delete;
  ~FencedMemory() { munmap(base_, mapped_); }
  // Fills the memory with NaN, in every floating-point type.
  void poison() { std::memset(data, 0xff, bytes_); }

  char* data;

 private:
  char* base_;
  size_t bytes_, mapped_;
};

const std::function<void()>* body;
std::vector<Fiber> fibers;
std::vector<Warp> warps;
Barrier block_barrier;
unsigned living;
size_t current;
bool in_kernel = false;
jmp_buf scheduler;
std::string failure;
FencedMemory* shared = nullptr;

void open(Barrier& barrier) {
  barrier.arrived = 0;
  ++barrier.generation;
}

void leave() {
  if (!_setjmp(fibers[current].place)) _longjmp(scheduler, 1);
}

void wait_at(const Barrier& barrier) {
  Fiber& fiber = fibers[current];
  fiber.waits_at = &barrier;
  fiber.generation = barrier.generation;
  leave();
}

void fiber_main() {
  for (;;) {
    try {
      (*body)();
    } catch (const std::exception& error) {
      failure = error.what();
    }
    fibers[current].finished = true;
    // Barriers do not wait for threads that have returned.
    if (--living > 0 && block_barrier.arrived == living) open(block_barrier);
    leave();
  }
}

void on_signal(int number, siginfo_t* info, void*) {
  if (!in_kernel) {
    signal(number, SIG_DFL);
    return;
  }
  failure = number == SIGILL ? "a misaligned or otherwise undefined access"
                             : "an access outside all tensors, at address " +
                                   std::to_string(reinterpret_cast<uintptr_t>(info->si_addr));
  _longjmp(scheduler, 1);
}

// While an instance exists, a bad access ends the launch instead of the process.
class Signals {
 public:
  Signals() {
    struct sigaction action = {};
    action.sa_sigaction = on_signal;
    action.sa_flags = SA_SIGINFO | SA_NODEFER;
    for (int k = 0; k < count; ++k) sigaction(numbers[k], &action, &previous_[k]);
  }
  ~Signals() {
    for (int k = 0; k < count; ++k) sigaction(numbers[k], &previous_[k], nullptr);
  }

 private:
  static constexpr int count = 3, numbers[count] = {SIGSEGV, SIGBUS, SIGILL};
  struct sigaction previous_[count];
};

// Runs a fiber until it waits or ends.
void resume(size_t number) {
  current = number;
  threadIdx = dim3(static_cast<unsigned>(number), 0, 0);
  Fiber& fiber = fibers[number];
  fiber.waits_at = nullptr;
  in_kernel = true;
  if (!_setjmp(scheduler)) {
    if (fiber.started) _longjmp(fiber.place, 1);
    fiber.started = true;
    setcontext(&fiber.start);
  }
  in_kernel = false;
  if (!failure.empty())
    throw std::runtime_error("emulated block " + std::to_string(blockIdx.x) + ", thread " + std::to_string(current) +
                             ": " + failure);
}

void run_block(unsigned block) {
  blockIdx = dim3(block, 0, 0);
  living = blockDim.x;
  block_barrier = {};
  std::fill(warps.begin(), warps.end(), Warp{});
  for (Fiber& fiber : fibers) fiber.finished = false, fiber.waits_at = nullptr;
  shared->poison();
  while (living > 0) {
    bool progress = false;
    for (size_t k = 0; k < fibers.size(); ++k) {
      // Reverse the order of threads in every second block, since a kernel must not depend on it.
      const size_t number = block % 2 ? fibers.size() - 1 - k : k;
      const Fiber& fiber = fibers[number];
      if (fiber.finished || (fiber.waits_at && fiber.waits_at->generation == fiber.generation)) continue;
      resume(number);
      progress = true;
    }
    if (!progress)
      throw std::runtime_error("emulated block " + std::to_string(block) + ": threads wait for others that never come");
  }
}

}  // namespace

void fail(const char* what) { throw std::runtime_error(what); }

void* shared_memory() { return shared->data; }

void sync_threads() {
  const unsigned arrived = ++block_barrier.arrived;
  if (arrived == living)
    open(block_barrier);
  else
    wait_at(block_barrier);
}

const uint64_t* exchange(unsigned mask, uint64_t value) {
  const unsigned lane = threadIdx.x & 31;
  Warp& warp = warps[threadIdx.x / 32];
  if (!(mask >> lane & 1)) fail("a lane takes part in a collective whose mask excludes it");
  if (warp.barrier.arrived && warp.mask != mask) fail("lanes of a warp pass different masks");
  uint64_t* values = warp.values[warp.barrier.generation & 1];
  values[lane] = value;
  warp.mask = mask;
  warp.barrier.arrived |= 1u << lane;
  if (warp.barrier.arrived == mask)
    open(warp.barrier);
  else
    wait_at(warp.barrier);
  return values;
}

void run(dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& thread) {
  if (block.x == 0 || block.x > 1024 || grid.x == 0 || shared_bytes > 48 << 10)
    throw std::runtime_error(
        "no device accepts this launch: it needs a block, 1 to 1,024 threads and at most 48 KiB of shared memory");
  FencedMemory stacks(block.x * stack_bytes), shared_bytes_of_block(shared_bytes);
  body = &thread;
  shared = &shared_bytes_of_block;
  failure.clear();
  gridDim = grid;
  blockDim = block;
  fibers.assign(block.x, Fiber{});
  warps.resize((block.x + 31) / 32);
  for (size_t k = 0; k < fibers.size(); ++k) {
    getcontext(&fibers[k].start);
    fibers[k].start.uc_stack = {stacks.data + k * stack_bytes, 0, stack_bytes};
    fibers[k].start.uc_link = nullptr;
    makecontext(&fibers[k].start, fiber_main, 0);
  }
  const Signals signals;
  for (unsigned k = 0; k < grid.x; ++k) run_block(k);
}

}  // namespace emulator
