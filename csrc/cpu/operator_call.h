// The state that a thread holds while the thread runs a call of a CPU operator or a part of the call: the CPU path and
// the scratch memory.
#pragma once

#include <torch/csrc/stable/library.h>

#include "cpu/isa.h"
#include "cpu/scratch.h"

namespace peft_ext {

// A ThreadInCall object exists on the calling thread for the whole call of an operator, and on another thread while
// that thread runs a part of a parallel loop.
struct ThreadInCall {
  explicit ThreadInCall(Isa path = current_isa()) : isa(path) {}

  const IsaOfCall isa;
  const ScratchInUse scratch;
};

// Calls a boxed function of an operator, with one CPU path for the whole call.
template <void (*Boxed)(StableIValue*, uint64_t, uint64_t)>
void boxed_call(StableIValue* stack, uint64_t arguments, uint64_t outputs) {
  const ThreadInCall call;
  Boxed(stack, arguments, outputs);
}

}  // namespace peft_ext

// m.impl("name", PEFT_EXT_CPU_BOX(&function)) registers the CPU function of an operator.
#define PEFT_EXT_CPU_BOX(function) peft_ext::boxed_call<TORCH_BOX(function)>
