// Switches between fibers, each of which has its own stack and runs one emulated CUDA thread: by a few instructions on
// x86-64, and by ucontext elsewhere.
#pragma once

#include <stddef.h>
#include <stdint.h>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace peft_ext {
namespace emulator {

#if defined(__x86_64__)

// The state of a fiber that is not running. The registers that a function call must preserve are on the fiber's stack.
struct Execution {
  void* stack_pointer;
};

extern "C" void peft_ext_emulator_switch(Execution* from, const Execution* to);

inline void switch_execution(Execution& from, const Execution& to) { peft_ext_emulator_switch(&from, &to); }

// Prepares `execution` so that the first switch to `execution` starts `entry`, which must never return.
inline void prepare(Execution& execution, char* stack, size_t bytes, void (*entry)()) {
  void** top = reinterpret_cast<void**>(reinterpret_cast<uintptr_t>(stack + bytes) & ~uintptr_t{15});
  *--top = nullptr;  // null return address of `entry`; aligns the stack as after a call
  *--top = reinterpret_cast<void*>(entry);
  for (int kept = 0; kept < 6; ++kept) *--top = nullptr;
  execution.stack_pointer = top;
}

#else

struct Execution {
  ucontext_t context;
};

inline void switch_execution(Execution& from, const Execution& to) { swapcontext(&from.context, &to.context); }

inline void prepare(Execution& execution, char* stack, size_t bytes, void (*entry)()) {
  getcontext(&execution.context);
  execution.context.uc_stack.ss_sp = stack;
  execution.context.uc_stack.ss_size = bytes;
  execution.context.uc_link = nullptr;
  makecontext(&execution.context, entry, 0);
}

#endif

}  // namespace emulator
}  // namespace peft_ext
