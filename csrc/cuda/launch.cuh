// How the glue meets a device: a Launcher runs kernels on a tensor's device, on PyTorch's current stream there, with
// errors checked, and hands out the pointers that kernels may touch. Under the emulator (PEFT_EXT_EMULATE_CUDA) the
// same glue takes CPU tensors: a kernel may then read what in() gave it and write what out() did, and nothing else.
#pragma once

#ifdef PEFT_EXT_EMULATE_CUDA
#include "emulator/launch.h"

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>
#else
#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cuda.h>
#include <torch/csrc/stable/accelerator.h>
#endif

#include <stdint.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/shim_utils.h>

#include <atomic>
#include <optional>
#include <type_traits>

#include "common/dtype.h"

// PEFT_EXT_CUDA_LIBRARY(m) { m.impl("name", TORCH_BOX(&function)); } registers the CUDA kernels of an op.
#ifdef PEFT_EXT_EMULATE_CUDA
#define PEFT_EXT_CUDA_LIBRARY(m) STABLE_TORCH_LIBRARY_IMPL(peft_ext_emulated, CPU, m)
#else
#define PEFT_EXT_CUDA_LIBRARY(m) STABLE_TORCH_LIBRARY_IMPL(peft_ext, CUDA, m)
#endif

namespace peft_ext {

// Whether kernels can take the tensor.
inline bool on_device(const torch::stable::Tensor& tensor) {
#ifdef PEFT_EXT_EMULATE_CUDA
  return tensor.is_cpu();
#else
  return tensor.is_cuda();
#endif
}

// out [T, N] = a [T, K] b [K, N], by PyTorch's own kernel.
inline void mm_out(const torch::stable::Tensor& out, const torch::stable::Tensor& a, const torch::stable::Tensor& b) {
#ifdef PEFT_EXT_EMULATE_CUDA
  TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_mm_out(out.get(), a.get(), b.get()));
#else
  TORCH_ERROR_CODE_CHECK(aoti_torch_cuda_mm_out(out.get(), a.get(), b.get()));
#endif
}

// out [T, N] = beta · out + a [T, K] b [K, N], by PyTorch's own kernel, in place.
inline void addmm_(const torch::stable::Tensor& out, const torch::stable::Tensor& a, const torch::stable::Tensor& b,
                   double beta) {
#ifdef PEFT_EXT_EMULATE_CUDA
  TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_addmm_out(out.get(), out.get(), a.get(), b.get(), beta, 1.0));
#else
  TORCH_ERROR_CODE_CHECK(aoti_torch_cuda_addmm_out(out.get(), out.get(), a.get(), b.get(), beta, 1.0));
#endif
}

// A launch's grid; a number alone is x.
struct Grid {
  Grid(int64_t x, int64_t y = 1, int64_t z = 1) : x(x), y(y), z(z) {}
  int64_t x, y, z;
};

// A launch's block: threads, and bytes of dynamic_shared(); a number alone is threads.
struct Block {
  Block(int threads, int64_t dynamic_shared = 0) : threads(threads), dynamic_shared(dynamic_shared) {}
  int threads;
  int64_t dynamic_shared;
};

// Holds the tensor's device current for its own life. Nothing here waits for the device, so CUDA graphs can capture it.
class Launcher {
 public:
  explicit Launcher(const torch::stable::Tensor& tensor);

  // kernel<<<grid, block>>>(arguments...): launcher(kernel, blocks, threads, arguments...), or with braces for the
  // rest: launcher(kernel, {x, y, z}, {threads, dynamic_shared}, arguments...). No blocks, no launch.
  template <typename... Parameters, typename... Arguments>
  void operator()(void (*kernel)(Parameters...), const Grid& grid, const Block& block,
                  const Arguments&... arguments) const;

  // The tensor's data for a kernel that reads it. T is its element type, void for any.
  template <typename T>
  const T* in(const torch::stable::Tensor& tensor) const {
    check_type<T>(tensor);
#ifdef PEFT_EXT_EMULATE_CUDA
    memory_.add(tensor.const_data_ptr(), extent(tensor), tensor.element_size(), emulator::Use::kRead);
#endif
    return static_cast<const T*>(tensor.const_data_ptr());
  }

  // The tensor's data for a kernel that writes it, and may read it.
  template <typename T>
  T* out(const torch::stable::Tensor& tensor) const {
    check_type<T>(tensor);
#ifdef PEFT_EXT_EMULATE_CUDA
    memory_.add(tensor.mutable_data_ptr(), extent(tensor), tensor.element_size(), emulator::Use::kWrite);
#endif
    return static_cast<T*>(tensor.mutable_data_ptr());
  }

  // The same of a tensor that only this launcher's kernels fill: what they read of it they must have written.
  template <typename T>
  T* scratch(const torch::stable::Tensor& tensor) const {
    check_type<T>(tensor);
#ifdef PEFT_EXT_EMULATE_CUDA
    memory_.add(tensor.mutable_data_ptr(), extent(tensor), tensor.element_size(), emulator::Use::kFresh);
#endif
    return static_cast<T*>(tensor.mutable_data_ptr());
  }

  // The same of a tensor that may be none, as a null pointer.
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
  // From the tensor's first element to behind its last.
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
  cudaStream_t stream_ = nullptr;
#endif
};

#ifdef PEFT_EXT_EMULATE_CUDA

inline Launcher::Launcher(const torch::stable::Tensor&) {}

template <typename... Parameters, typename... Arguments>
void Launcher::operator()(void (*kernel)(Parameters...), const Grid& grid, const Block& block,
                          const Arguments&... arguments) const {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
  check_shape(grid, block);
  emulator::launch(memory_, kernel, {grid.x, grid.y, grid.z}, block.threads, block.dynamic_shared, arguments...);
}

#else

inline Launcher::Launcher(const torch::stable::Tensor& tensor) : device_(tensor.get_device_index()), guard_(device_) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device_, &stream));
  stream_ = static_cast<cudaStream_t>(stream);
}

template <typename... Parameters, typename... Arguments>
void Launcher::operator()(void (*kernel)(Parameters...), const Grid& grid, const Block& block,
                          const Arguments&... arguments) const {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
  check_shape(grid, block);
  if (block.dynamic_shared > 0) {  // with the static, it may be more than the 48 KiB that a kernel has unasked
    STD_CUDA_CHECK(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                        cudaFuncAttributeMaxDynamicSharedMemorySize,
                                        static_cast<int>(block.dynamic_shared)));
  }
  const dim3 blocks(static_cast<unsigned>(grid.x), static_cast<unsigned>(grid.y), static_cast<unsigned>(grid.z));
  kernel<<<blocks, block.threads, static_cast<size_t>(block.dynamic_shared), stream_>>>(arguments...);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

#endif

}  // namespace peft_ext
