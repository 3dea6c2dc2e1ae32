// Stacks to switch between: a few ns a switch on x86-64; ucontext, which makes two system calls, elsewhere.
#pragma once

#include <sys/mman.h>

#include <cstddef>
#include <cstdint>
#include <stdexcept>

#ifndef __x86_64__
#include <ucontext.h>
#endif

namespace fastdiff::emulation {

inline constexpr size_t kStack = 128 << 10;

class Fibre {
 public:
  Fibre() {
    // A page that nobody may touch below each stack.
    memory_ = mmap(nullptr, kStack + 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory_ == MAP_FAILED) throw std::bad_alloc();
    mprotect(memory_, 4096, PROT_NONE);
  }
  Fibre(const Fibre&) = delete;
  ~Fibre() { munmap(memory_, kStack + 4096); }

  // Makes the next resume() call entry(), which must never return.
  void start(void (*entry)()) {
#ifdef __x86_64__
    void** top = reinterpret_cast<void**>(static_cast<char*>(memory_) + 4096 + kStack);
    *--top = nullptr;  // entry's return address, which also aligns the stack as after a call
    *--top = reinterpret_cast<void*>(entry);
    at_ = top - 6;
#else
    getcontext(&context_);
    context_.uc_stack.ss_sp = static_cast<char*>(memory_) + 4096;
    context_.uc_stack.ss_size = kStack;
    makecontext(&context_, entry, 0);
#endif
  }

  // From the main stack into the fibre, until it calls suspend().
  void resume() {
#ifdef __x86_64__
    exchange(&main_, at_);
#else
    swapcontext(&main_, &context_);
#endif
  }

  void suspend() {
#ifdef __x86_64__
    exchange(&at_, main_);
#else
    swapcontext(&context_, &main_);
#endif
  }

 private:
  void* memory_;
#ifdef __x86_64__
  void* at_ = nullptr;
  static inline void* main_ = nullptr;

  __attribute__((naked, noinline)) static void exchange(void**, void*) {
    asm("push %rbp\n push %rbx\n push %r12\n push %r13\n push %r14\n push %r15\n"
        "mov %rsp, (%rdi)\n mov %rsi, %rsp\n"
        "pop %r15\n pop %r14\n pop %r13\n pop %r12\n pop %rbx\n pop %rbp\n ret");
  }
#else
  ucontext_t context_;
  static inline ucontext_t main_;
#endif
};

}  // namespace fastdiff::emulation
