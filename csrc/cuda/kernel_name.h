// Defines how a host function refers to a kernel. g++ compiles the host functions, but not the kernels: PEFT_EXT_KERNEL
// turns each kernel into a host function that only sets called_kernel to the kernel's Kernel object. Launcher calls
// this host function, and then launches the machine code that NVRTC made of the kernel (see driver.h). The file does
// not depend on torch.
#pragma once

#include <atomic>
#include <typeinfo>

namespace peft_ext {

// Largest number of GPUs of a machine that the library supports. A Kernel object has one handle for each GPU.
constexpr int kMaxDevices = 64;

// An instance of a kernel template, or a kernel that is no template. Each instance that a host function launches has a
// Kernel object, which is made when the library is loaded; an instance with internal linkage has one object for each
// source file that launches the instance.
struct Kernel {
  // `local_class` is the mangled name of a class inside of the kernel, and so contains the kernel's own name and
  // template arguments. `file` is the header of the kernel.
  Kernel(const char* local_class, const char* file);

  const char* local_class;
  const char* file;
  Kernel* next;                                          // next object in the list of all Kernel objects
  mutable std::atomic<void*> handles[kMaxDevices] = {};  // CUfunction handle for each GPU; null: not loaded
  mutable std::atomic<int> allowed[kMaxDevices] = {};    // bytes of dynamic shared memory that each handle allows
};

template <class Here>
inline Kernel kKernel{typeid(Here).name(), Here::file()};

// The kernel whose host function this thread called last.
inline thread_local const Kernel* called_kernel = nullptr;

}  // namespace peft_ext
