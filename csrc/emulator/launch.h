// Launches kernels in the emulator, and lists the global memory that the kernels may access. The file does not depend
// on torch.
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
  kFresh,  // as kWrite, but a read of an element that no kernel has written yet is a fault
};

// The global memory that the kernels of one Launcher may access. An access to other global memory is a fault, except
// for a read of the library's read-only data.
class Memory {
 public:
  Memory() = default;
  ~Memory();
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;

  // Adds a range of memory that kernels may access. `element` is the size of an element in bytes. It is a fault if a
  // block of the launch accesses an element that another block wrote, or writes an element that another block read,
  // unless both accesses are atomics, or the earlier block has published its accesses (Machine::published) and the
  // later block has done an atomic.
  void add(const void* data, size_t bytes, size_t element, Use use);

  struct Range {
    uintptr_t begin;
    size_t bytes;
    Use use;
    int log2_element;
    // Stamps for each element of a writable range: which block of the launch last wrote the element, and which block
    // read the element (see machine.h).
    uint32_t* writers;
    uint32_t* readers;
  };

  std::vector<Range> ranges;
  uint32_t base = 0;  // the stamps of the current launch are greater than `base`, those of earlier launches are not
};

// Runs the kernel's blocks one after another. At the first fault, ends the launch and throws std::runtime_error.
void run(Memory& memory, const void* kernel, void (*invoke)(const void* call), const void* call, const int64_t grid[3],
         int threads, int64_t dynamic_shared);

template <typename... Parameters>
struct Call {
  void (*kernel)(Parameters...);
  void* const* parameters;  // addresses of the kernel's arguments, as for cuLaunchKernel

  // Calls the kernel with copies of its arguments. `invoke` is compiled without hooks, because it reads the arguments
  // from the host's memory.
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

// Returns whether a test has marked the data at the address as data of another device, by peft_ext_emulated_elsewhere.
// The emulator has one device, so that the operators' checks of devices could not be tested otherwise.
bool is_elsewhere(const void* data);

// Returns whether a test has marked the data at the address as memory of the host that a kernel cannot read, by
// peft_ext_emulated_on_host.
bool is_on_host(const void* data);

}  // namespace emulator
}  // namespace peft_ext
