// Fibers: stacks that one OS thread switches between. The scheduler resumes a fiber until that suspends itself.
#pragma once
#include <sys/mman.h>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <new>
#include <vector>

#include "sanitizers.h"

#if defined(__x86_64__) && !defined(CUDA_HOST_UCONTEXT)
#define CUDA_HOST_FAST_SWITCH 1
#else
#include <ucontext.h>
#endif

namespace cuda_host {

#if CUDA_HOST_FAST_SWITCH
// Pushes the registers that a call preserves, changes the stack, and pops them from there. Unlike swapcontext, it
// leaves the signal mask alone, which would cost two system calls.
#if defined(__clang__)
__attribute__((naked, noinline))
#else
__attribute__((naked, noinline, noipa))
#endif
inline void switch_stacks(void** /*save, in rdi*/, void* /*load, in rsi*/) {
  asm volatile(
      "pushq %rbp; pushq %rbx; pushq %r12; pushq %r13; pushq %r14; pushq %r15\n"
      "movq %rsp, (%rdi); movq %rsi, %rsp\n"
      "popq %r15; popq %r14; popq %r13; popq %r12; popq %rbx; popq %rbp; ret");
}
#endif

// What is needed to continue where something stopped.
struct Context {
#if CUDA_HOST_FAST_SWITCH
  void* stack_pointer = nullptr;
#else
  ucontext_t registers;
#endif
  const void* stack = nullptr;
  size_t stack_size = 0;
  void* race_detector = nullptr;
};

class Fiber {
 public:
  static constexpr size_t kGuard = 4096, kStack = (CUDA_HOST_ASAN || CUDA_HOST_TSAN ? 256 : 64) << 10;

  Fiber() {
    memory_ = mmap(nullptr, kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory_ == MAP_FAILED) throw std::bad_alloc();
    mprotect(memory_, kGuard, PROT_NONE);  // an overflow faults
    self_.stack = bottom();
    self_.stack_size = kStack - kGuard;
#if CUDA_HOST_TSAN
    self_.race_detector = __tsan_create_fiber(0);
#endif
  }
  CUDA_HOST_UNSEEN ~Fiber() {
#if CUDA_HOST_TSAN
    // All that it did happens before what follows here, even if it never came to its end.
    void* here = __tsan_get_current_fiber();
    __tsan_switch_to_fiber(self_.race_detector, kUnordered);
    __tsan_switch_to_fiber(here, 0);
    __tsan_destroy_fiber(self_.race_detector);
#endif
#if CUDA_HOST_ASAN
    __asan_unpoison_memory_region(bottom(), kStack - kGuard);
#endif
    munmap(memory_, kStack);
  }
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;

  // The next resume() begins with `entry`, which calls entered() first, and ends with suspend(true).
  CUDA_HOST_UNSEEN void start(void (*entry)()) {
#if CUDA_HOST_FAST_SWITCH
    void** top = reinterpret_cast<void**>(static_cast<char*>(memory_) + kStack);
    *--top = nullptr;  // the return address of `entry`, which it never needs
    *--top = reinterpret_cast<void*>(entry);
    for (int preserved = 0; preserved < 6; preserved++) *--top = nullptr;
    self_.stack_pointer = top;
#else
    getcontext(&self_.registers);
    self_.registers.uc_stack.ss_sp = bottom();
    self_.registers.uc_stack.ss_size = kStack - kGuard;
    self_.registers.uc_link = nullptr;
    makecontext(&self_.registers, entry, 0);
#endif
  }

  CUDA_HOST_UNSEEN void resume() {
#if CUDA_HOST_TSAN
    scheduler_.race_detector = __tsan_get_current_fiber();
#endif
    change(scheduler_, self_, false);
  }
  CUDA_HOST_UNSEEN void suspend(bool forever = false) { change(self_, scheduler_, forever); }
  CUDA_HOST_UNSEEN CUDA_HOST_FIRST_FRAME void entered() {
#if CUDA_HOST_ASAN
    __sanitizer_finish_switch_fiber(nullptr, &scheduler_.stack, &scheduler_.stack_size);
#endif
  }

 private:
  char* bottom() const { return static_cast<char*>(memory_) + kGuard; }

  CUDA_HOST_UNSEEN static void change(Context& from, Context& to, bool forever) {
#if CUDA_HOST_ASAN
    void* locals = nullptr;
    __sanitizer_start_switch_fiber(forever ? nullptr : &locals, to.stack, to.stack_size);
#endif
#if CUDA_HOST_TSAN
    __tsan_switch_to_fiber(to.race_detector, kUnordered);
#endif
    (void)forever;
#if CUDA_HOST_FAST_SWITCH
    switch_stacks(&from.stack_pointer, to.stack_pointer);
#else
    swapcontext(&from.registers, &to.registers);
#endif
#if CUDA_HOST_ASAN
    __sanitizer_finish_switch_fiber(locals, nullptr, nullptr);
#endif
  }

#if CUDA_HOST_TSAN
  static constexpr unsigned kUnordered = __tsan_switch_to_fiber_no_sync;  // a switch does not order what the two do
#endif
  void* memory_;
  Context self_, scheduler_;
};

// Fibers for reuse. A fiber that is given back at once serves the next thread with a stack that is in the cache.
class FiberPool {
 public:
  Fiber* take() {
    if (free_.empty()) {
      all_.push_back(std::make_unique<Fiber>());
      return all_.back().get();
    }
    Fiber* fiber = free_.back();
    free_.pop_back();
    return fiber;
  }
  void give_back(Fiber* fiber) { free_.push_back(fiber); }
  void give_all_back() {
    free_.clear();
    for (const auto& fiber : all_) free_.push_back(fiber.get());
  }
  void discard_all() {  // also those that are in the middle of a kernel
    free_.clear();
    all_.clear();
  }

 private:
  std::vector<std::unique_ptr<Fiber>> all_;
  std::vector<Fiber*> free_;
};

}  // namespace cuda_host
