// A launch of the emulator, and the memory that its kernels may touch. Torch-free.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include <tuple>
#include <utility>
#include <vector>

namespace peft_ext {
namespace emulator {

enum class Use {
  kRead,   // a kernel may not write it
  kWrite,  // it may do both
  kFresh,  // the same, but a byte is read only after a kernel wrote it
};

// Global memory of some launches, one after another: those of one Launcher. What is not added is out of bounds.
class Memory {
 public:
  Memory() = default;
  ~Memory();
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;

  // `element` is the size that conflicts between blocks are found at: two that share an element conflict.
  void add(const void* data, size_t bytes, size_t element, Use use);

  struct Range {
    uintptr_t begin;
    size_t bytes;
    Use use;
    int log2_element;
    // Of each element, if it may be written: which block wrote it last, and which read it (machine.h says how coded).
    uint32_t* writers;
    uint32_t* readers;
  };

  std::vector<Range> ranges;
  uint32_t base = 0;  // stamps of the current launch are above it
};

// Runs the kernel, block after block. Throws std::runtime_error at the first fault; nothing runs on after it.
void run(Memory& memory, const void* kernel, void (*invoke)(const void* call), const void* call, const int64_t grid[3],
         int threads, int64_t dynamic_shared);

template <typename... Parameters>
struct Call {
  void (*kernel)(Parameters...);
  std::tuple<Parameters...> parameters;

  // Not instrumented: the parameters are the host's memory here; the kernel gets its own copy.
  __attribute__((no_sanitize("thread", "undefined"))) static void invoke(const void* call) {
    invoke(*static_cast<const Call*>(call), std::index_sequence_for<Parameters...>());
  }
  template <size_t... kIndex>
  __attribute__((no_sanitize("thread", "undefined"))) static void invoke(const Call& call,
                                                                         std::index_sequence<kIndex...>) {
    call.kernel(std::get<kIndex>(call.parameters)...);
  }
};

template <typename... Parameters, typename... Arguments>
void launch(Memory& memory, void (*kernel)(Parameters...), const int64_t (&grid)[3], int threads,
            int64_t dynamic_shared, const Arguments&... arguments) {
  const Call<Parameters...> call{kernel, {arguments...}};
  run(memory, reinterpret_cast<const void*>(kernel), Call<Parameters...>::invoke, &call, grid, threads, dynamic_shared);
}

}  // namespace emulator
}  // namespace peft_ext
