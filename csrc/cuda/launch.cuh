// Launches kernels from host functions. A Launcher runs kernels on a tensor's device, on PyTorch's current stream of
// this device, and returns the data pointers of tensors that are passed to kernels. Under the emulator
// (PEFT_EXT_EMULATE_CUDA) the same host functions take CPU tensors: the emulator then lets a kernel read the tensors
// given to in(), read and write the tensors given to out() and scratch(), read constants, and access no other memory of
// the host.
#pragma once

#ifdef PEFT_EXT_EMULATE_CUDA
#include "emulator/launch.h"

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>
#else
#include <torch/csrc/stable/accelerator.h>

#include "cuda/driver.h"
#include "cuda/kernel_name.h"
#endif

#include <stdint.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/shim_utils.h>

#include <exception>
#include <optional>
#include <string>
#include <tuple>
#include <type_traits>

#include "common/dtype.h"
#include "common/registration.h"
#include "cuda/grid.h"

// PEFT_EXT_CUDA_LIBRARY(m) { m.impl("name", PEFT_EXT_CUDA_BOX(&function)); } registers the CUDA functions of an
// operator.
#ifdef PEFT_EXT_EMULATE_CUDA
#define PEFT_EXT_CUDA_LIBRARY(m) STABLE_TORCH_LIBRARY_IMPL(peft_ext_emulated, CPU, m)
#else
#define PEFT_EXT_CUDA_LIBRARY(m) PEFT_EXT_OPERATORS(CUDA, m)
#endif
#define PEFT_EXT_CUDA_BOX(function) peft_ext::boxed_device_call<TORCH_BOX(function)>

namespace peft_ext {

// Raises an error with the reason of a failed call of PyTorch. `text` is the text of a caught error. raise_reason
// returns without an error if the caught error is not from PyTorch's stable ABI, or if the reason is not known.
void raise_reason(const std::string& text);

// Calls a boxed function of a CUDA operator. An error of PyTorch's stable ABI names only the call that failed.
// boxed_device_call raises an error with the reason instead, by which trainers recognize a lack of memory.
template <void (*Boxed)(StableIValue*, uint64_t, uint64_t)>
void boxed_device_call(StableIValue* stack, uint64_t arguments, uint64_t outputs) {
  try {
    Boxed(stack, arguments, outputs);
  } catch (const std::exception& error) {
    raise_reason(error.what());
    throw;
  }
}

// Returns whether kernels can use the tensor, which must be on a CUDA device, or on the CPU under the emulator.
inline bool on_device(const torch::stable::Tensor& tensor) {
#ifdef PEFT_EXT_EMULATE_CUDA
  return tensor.is_cpu();
#else
  return tensor.is_cuda();
#endif
}

// Returns whether the tensor is on the CPU, where a kernel cannot read the tensor. Under the emulator, whose kernels
// read CPU tensors, a test marks a tensor that only the host may read (is_on_host).
inline bool on_host(const torch::stable::Tensor& tensor) {
#ifdef PEFT_EXT_EMULATE_CUDA
  return emulator::is_on_host(tensor.const_data_ptr());
#else
  return tensor.is_cpu();
#endif
}

// Returns whether both tensors are on the same CUDA device. Under the emulator, both must be on the CPU, and a test can
// mark a tensor as a tensor of another device (is_elsewhere).
inline bool same_device(const torch::stable::Tensor& tensor, const torch::stable::Tensor& like) {
#ifdef PEFT_EXT_EMULATE_CUDA
  return on_device(tensor) &&
         emulator::is_elsewhere(tensor.const_data_ptr()) == emulator::is_elsewhere(like.const_data_ptr());
#else
  return on_device(tensor) && tensor.get_device_index() == like.get_device_index();
#endif
}

// Computes out [T, N] = a [T, K] b [K, N] by PyTorch's matrix product.
inline void mm_out(const torch::stable::Tensor& out, const torch::stable::Tensor& a, const torch::stable::Tensor& b) {
#ifdef PEFT_EXT_EMULATE_CUDA
  TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_mm_out(out.get(), a.get(), b.get()));
#else
  TORCH_ERROR_CODE_CHECK(torch_cuda().mm_out(out.get(), a.get(), b.get()));
#endif
}

// Computes out [T, N] = beta · out + a [T, K] b [K, N] by PyTorch's matrix product, in place.
inline void addmm_(const torch::stable::Tensor& out, const torch::stable::Tensor& a, const torch::stable::Tensor& b,
                   double beta) {
#ifdef PEFT_EXT_EMULATE_CUDA
  TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_addmm_out(out.get(), out.get(), a.get(), b.get(), beta, 1.0));
#else
  TORCH_ERROR_CODE_CHECK(torch_cuda().addmm_out(out.get(), out.get(), a.get(), b.get(), beta, 1.0));
#endif
}

// A Launcher makes the tensor's device the current device for the lifetime of the Launcher. A Launcher never waits for
// the device, so that CUDA graphs can capture its launches.
class Launcher {
 public:
  explicit Launcher(const torch::stable::Tensor& tensor);

  // Launches kernel<<<grid, block>>>(arguments...). Call launcher(kernel, blocks, threads, arguments...), or
  // launcher(kernel, {x, y, z}, {threads, dynamic_shared}, arguments...). If the grid has no block, nothing is
  // launched.
  template <typename... Parameters, typename... Arguments>
  void operator()(void (*kernel)(Parameters...), const Grid& grid, const Block& block,
                  const Arguments&... arguments) const {
    static_assert(sizeof(std::tuple<Parameters...>) <= 4096, "the arguments of a kernel take at most 4 KiB");
    if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
    check_shape(grid, block);
    std::tuple<Parameters...> parameters{arguments...};
    std::apply(
        [&](Parameters&... parameter) {
          void* addresses[] = {&parameter...};
#ifdef PEFT_EXT_EMULATE_CUDA
          emulator::launch(memory_, kernel, {grid.x, grid.y, grid.z}, block.threads, block.dynamic_shared, addresses);
#else
          kernel(parameter...);  // sets called_kernel
          launch_kernel(*called_kernel, device_, grid, block, stream_, addresses);
#endif
        },
        parameters);
  }

  // Returns the tensor's data for a kernel that reads the tensor. T is the element type of the tensor; void allows any
  // type.
  template <typename T>
  const T* in(const torch::stable::Tensor& tensor) const {
    check_type<T>(tensor);
#ifdef PEFT_EXT_EMULATE_CUDA
    STD_TORCH_CHECK(!on_host(tensor), "peft_ext: a kernel was given a tensor that only the host may read");
    memory_.add(tensor.const_data_ptr(), extent(tensor), tensor.element_size(), emulator::Use::kRead);
#endif
    return static_cast<const T*>(tensor.const_data_ptr());
  }

  // Returns the tensor's data for a kernel that writes, and may read, the tensor.
  template <typename T>
  T* out(const torch::stable::Tensor& tensor) const {
    check_type<T>(tensor);
#ifdef PEFT_EXT_EMULATE_CUDA
    memory_.add(tensor.mutable_data_ptr(), extent(tensor), tensor.element_size(), emulator::Use::kWrite);
#endif
    return static_cast<T*>(tensor.mutable_data_ptr());
  }

  // Returns the data of a scratch tensor. A kernel may read only those bytes of the tensor that an earlier kernel of
  // the same Launcher has written.
  template <typename T>
  T* scratch(const torch::stable::Tensor& tensor) const {
    check_type<T>(tensor);
#ifdef PEFT_EXT_EMULATE_CUDA
    memory_.add(tensor.mutable_data_ptr(), extent(tensor), tensor.element_size(), emulator::Use::kFresh);
#endif
    return static_cast<T*>(tensor.mutable_data_ptr());
  }

  // Returns the data of an optional tensor, or a null pointer if there is no tensor.
  template <typename T>
  const T* in(const std::optional<torch::stable::Tensor>& tensor) const {
    return tensor.has_value() ? in<T>(*tensor) : nullptr;
  }
  template <typename T>
  T* out(const std::optional<torch::stable::Tensor>& tensor) const {
    return tensor.has_value() ? out<T>(*tensor) : nullptr;
  }

 private:
  template <typename T>
  static void check_type(const torch::stable::Tensor& tensor) {
    using torch::headeronly::ScalarType;
    const ScalarType type = tensor.scalar_type();
    bool same = true;
    if constexpr (std::is_same_v<T, float>) same = type == ScalarType::Float;
    if constexpr (std::is_same_v<T, bf16>) same = type == ScalarType::BFloat16;
    if constexpr (std::is_same_v<T, f16>) same = type == ScalarType::Half;
    if constexpr (std::is_same_v<T, uint8_t>) same = type == ScalarType::Byte;
    if constexpr (std::is_same_v<T, int32_t>) same = type == ScalarType::Int;
    if constexpr (std::is_same_v<T, int64_t>) same = type == ScalarType::Long;
    STD_TORCH_CHECK(same, "peft_ext: a kernel was given a tensor of ", torch::headeronly::toString(type),
                    ", wanted its own element type");
  }

  static void check_shape(const Grid& grid, const Block& block) {
    STD_TORCH_CHECK(grid.x > 0 && grid.y > 0 && grid.z > 0 && grid.x <= INT32_MAX && grid.y <= 65535 && grid.z <= 65535,
                    "peft_ext: a launch of ", grid.x, " x ", grid.y, " x ", grid.z, " blocks, wanted at most ",
                    INT32_MAX, " x 65535 x 65535");
    STD_TORCH_CHECK(block.threads > 0 && block.threads <= 1024 && block.dynamic_shared >= 0,
                    "peft_ext: a launch of blocks of ", block.threads, " threads and ", block.dynamic_shared,
                    " bytes of shared memory, wanted 1 to 1024 threads");
  }

#ifdef PEFT_EXT_EMULATE_CUDA
  // Returns the number of bytes from the tensor's first element to the end of its last element.
  static size_t extent(const torch::stable::Tensor& tensor) {
    if (tensor.numel() == 0) return 0;
    int64_t last = 0;
    for (int64_t d = 0; d < tensor.dim(); ++d) last += (tensor.size(d) - 1) * tensor.stride(d);
    return static_cast<size_t>(last + 1) * tensor.element_size();
  }

  mutable emulator::Memory memory_;
#else
  int device_;
  torch::stable::accelerator::DeviceGuard guard_;
  void* stream_ = nullptr;
#endif
};

#ifdef PEFT_EXT_EMULATE_CUDA
inline Launcher::Launcher(const torch::stable::Tensor&) {}
#else
inline Launcher::Launcher(const torch::stable::Tensor& tensor) : device_(tensor.get_device_index()), guard_(device_) {
  TORCH_ERROR_CODE_CHECK(torch_cuda().get_current_cuda_stream(device_, &stream_));
}
#endif

}  // namespace peft_ext
