// Divides a block of scratch memory.
#pragma once

#include <stdint.h>

#include "common/dtype.h"

namespace peft_ext {
namespace {

// Divides a thread's scratch memory, from address `at` on, into parts of whole cache lines. If `at` starts at 0, its
// final value is the number of bytes that all parts need.
struct Parts {
  uintptr_t at;
  template <typename T>
  T* take(int64_t count) {
    T* found = reinterpret_cast<T*>(at);
    at += static_cast<uintptr_t>(ceil_div(count * static_cast<int64_t>(sizeof(T)), 64) * 64);
    return found;
  }
};

}  // namespace
}  // namespace peft_ext
