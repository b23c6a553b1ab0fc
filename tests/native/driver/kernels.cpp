// Kernels without code, in each form that csrc has, and functions that launch them by cuda/driver.h.
#include <string.h>

#include <exception>
#include <string>

#include "cuda/driver.h"
#include "cuda/ptx.cuh"

namespace peft_ext {

enum class Kind : int { kOne, kTwo };

struct Work {
  int64_t first;
  void (*unused)(int);
  char rest[40];
};

template <typename T, bool kFlag, int kNumber, Kind kKind>
__global__ void full_kernel(Work work, int last) {
  PEFT_EXT_KERNEL;
  work.rest[0] = static_cast<char>(last);
}

template <int kNumber>
__global__ void __launch_bounds__(128) numbered_kernel(Work work, int last) {
  PEFT_EXT_KERNEL;
  work.rest[0] = static_cast<char>(last);
}

static __global__ void plain_kernel(Work work, int last) {
  PEFT_EXT_KERNEL;
  work.rest[0] = static_cast<char>(last);
}

using Function = void (*)(Work, int);
constexpr Function kFunctions[] = {full_kernel<bf16, true, 3, Kind::kTwo>, numbered_kernel<-1>, plain_kernel};

}  // namespace peft_ext

#define EXPORTED extern "C" __attribute__((visibility("default")))

// Returns null, or the error of the launch.
EXPORTED const char* test_launch(int which, int device, long long first, int last, int shared) {
  using namespace peft_ext;
  static thread_local std::string error;
  Work work{first, nullptr, {}};
  void* parameters[] = {&work, &last};
  try {
    kFunctions[which](work, last);
    launch_kernel(*called_kernel, device, Grid(2, 3, 4), Block(64, shared), reinterpret_cast<void*>(0x77), parameters);
    return nullptr;
  } catch (const std::exception& caught) {
    error = caught.what();
    return error.c_str();
  }
}

EXPORTED const char* test_fault() { return peft_ext::device_fault(); }
EXPORTED int test_capability(int device) { return peft_ext::compute_capability(device); }
