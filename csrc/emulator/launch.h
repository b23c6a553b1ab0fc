// A launch in the emulator, and the memory that the launched kernels may access. The file does not depend on torch.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include <utility>
#include <vector>

namespace peft_ext {
namespace emulator {

enum class Use {
  kRead,   // kernels may read this memory, and not write to it
  kWrite,  // kernels may read this memory and write to it
  kFresh,  // as kWrite, but a read of a byte that no kernel has written yet is a fault
};

// The global memory of the launches of one Launcher, which run one after another. An access to global memory that was
// not added to the Memory object is a fault, except for a read of read-only data.
class Memory {
 public:
  Memory() = default;
  ~Memory();
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;

  // `element` is the size of an element in bytes. Two blocks that write one element conflict, and so do a block that
  // writes and a block that reads one element. There is no conflict if both accesses are atomics, or if the first block
  // has published its accesses (see machine.h) and the second block has done an atomic.
  void add(const void* data, size_t bytes, size_t element, Use use);

  struct Range {
    uintptr_t begin;
    size_t bytes;
    Use use;
    int log2_element;
    // Stamps for each element of a writable range: of the block that last wrote the element, and of the block that read
    // the element (see machine.h).
    uint32_t* writers;
    uint32_t* readers;
  };

  std::vector<Range> ranges;
  uint32_t base = 0;  // all stamps of the current launch are greater than base
};

// Runs the kernel, one block after another. Throws std::runtime_error at the first fault, after which no thread runs.
void run(Memory& memory, const void* kernel, void (*invoke)(const void* call), const void* call, const int64_t grid[3],
         int threads, int64_t dynamic_shared);

template <typename... Parameters>
struct Call {
  void (*kernel)(Parameters...);
  void* const* parameters;  // the addresses of the parameters, as CUDA's driver takes them

  // `invoke` is not instrumented, because the function reads the parameters from the host's memory. The kernel gets
  // copies of the parameters.
  __attribute__((no_sanitize("thread", "undefined"))) static void invoke(const void* call) {
    invoke(*static_cast<const Call*>(call), std::index_sequence_for<Parameters...>());
  }
  template <size_t... kIndex>
  __attribute__((no_sanitize("thread", "undefined"))) static void invoke(const Call& call,
                                                                         std::index_sequence<kIndex...>) {
    call.kernel(*static_cast<const Parameters*>(call.parameters[kIndex])...);
  }
};

template <typename... Parameters>
void launch(Memory& memory, void (*kernel)(Parameters...), const int64_t (&grid)[3], int threads,
            int64_t dynamic_shared, void* const* parameters) {
  const Call<Parameters...> call{kernel, parameters};
  run(memory, reinterpret_cast<const void*>(kernel), Call<Parameters...>::invoke, &call, grid, threads, dynamic_shared);
}

// Returns whether a test has declared that the data at the address is on another device than all other data. The
// emulator has one device, so that checks of devices could not be tested otherwise.
bool is_elsewhere(const void* data);

}  // namespace emulator
}  // namespace peft_ext
